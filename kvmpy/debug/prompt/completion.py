"""What Tab completes at the prompt: names and attributes as in Python, symbols and registers within strings."""

from __future__ import annotations

import rlcompleter
from bisect import bisect_left
from typing import TYPE_CHECKING, Any

from kvmpy.debug.prompt.addresses import ADDRESS_REGISTERS

if TYPE_CHECKING:
    from kvmpy.debug.prompt.guest_prompt import GuestPrompt

__all__ = ["Completer", "within_string"]

_MOST = 500
"""How many names are offered; the start of more than that says too little."""


class Completer:
    """Completes words of a line. `namespace` is what the prompt's statements see."""

    def __init__(self, prompt: GuestPrompt, namespace: dict[str, Any]) -> None:
        self._prompt = prompt
        self._python = rlcompleter.Completer(namespace)
        self._sorted: tuple[object, list[str]] = (None, [])

    def complete(self, line: str, begin: int, text: str) -> list[str]:
        """The words that `text`, which starts at `begin` in `line`, may be meant to become."""
        if within_string(line[:begin]):
            return self._addresses(text)
        found = []
        for number in range(_MOST):
            word = self._python.complete(text, number)
            if word is None:
                break
            found.append(word)
        return found

    def _addresses(self, text: str) -> list[str]:
        """Symbols and registers that begin with `text`."""
        names = self._symbol_names()
        first = bisect_left(names, text)
        found = []
        for name in names[first : first + _MOST]:
            if not name.startswith(text):
                break
            found.append(name)
        return found + [name for name in ADDRESS_REGISTERS if name.startswith(text) and name not in found]

    def _symbol_names(self) -> list[str]:
        table = self._prompt.machine.symbols
        if self._sorted[0] is not table:
            self._sorted = (table, sorted({symbol.name for symbol in table}))
        return self._sorted[1]


def within_string(text: str) -> bool:
    """Whether `text`, the beginning of a line of Python, ends inside of a string."""
    quote, at = "", 0
    while at < len(text):
        character = text[at]
        if quote and character == "\\":
            at += 2
            continue
        if quote:
            if text.startswith(quote, at):
                at += len(quote)
                quote = ""
                continue
        elif character == "#":
            return False
        elif character in "\"'":
            quote = character * 3 if text.startswith(character * 3, at) else character
            at += len(quote)
            continue
        at += 1
    return bool(quote)
