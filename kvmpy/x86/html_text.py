"""Texts as HTML, for what notebooks ask of objects: `_repr_html_`.

What is laid out for a terminal stays so, in a fixed-width block; values that deserve a look are marked.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["escaped", "preformatted"]

_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#x27;"})
_STYLE = "line-height:1.3;margin:0;padding:0.2em 0;background:none"
_MARK = "background:#fff0a0;color:#000"


def escaped(text: str) -> str:
    """`text` such that HTML shows it as it is. What HTML has no character for, such as NUL, is shown as U+FFFD."""
    return "".join("\ufffd" if _is_control(character) else character for character in text).translate(_ENTITIES)


def _is_control(character: str) -> bool:
    """Control characters but tab and line feed, and halves of surrogate pairs."""
    if character in "\n\t":
        return False
    return character < " " or "\x7f" <= character <= "\x9f" or "\ud800" <= character <= "\udfff"


def preformatted(text: str, marked: Iterable[str] = ()) -> str:
    """`text` in fixed width, the first place of each of the words `marked` highlighted. Those must not overlap."""
    places = sorted((text.find(word), word) for word in marked if word and word in text)
    pieces, at = [], 0
    for place, word in places:
        pieces.append(f'{escaped(text[at:place])}<mark style="{_MARK}">{escaped(word)}</mark>')
        at = place + len(word)
    return f'<pre style="{_STYLE}">{"".join(pieces)}{escaped(text[at:])}</pre>'
