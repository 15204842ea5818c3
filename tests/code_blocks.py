"""Programs inside texts: the blocks of a Markdown page, and the machine code in a Python program.

A block of Python in our pages is a whole program; a block of `text` right behind it is what it prints. Machine code in
a program is `bytes.fromhex(...)` or `bytes([...])` over several lines, each with its assembly as a comment::

    CODE = bytes.fromhex(
        # 32-bit code for 0x2000
        "b0 2a"  # mov al, 42    # what it is for
        "f4   "  # hlt
    )

Without the first comment it is 16-bit code for 0x1000.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

__all__ = ["Block", "Listing", "blocks", "listings"]

_FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_TARGET = re.compile(r"^(16|32|64)-bit code for (0x[0-9a-fA-F_]+)$")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block. `line` is that of its fence, `output` the text of a `text` block that follows at once."""

    page: Path
    line: int
    language: str
    text: str
    output: str | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


@dataclass(frozen=True, slots=True)
class Listing:
    """Machine code beside its assembly. `rows` are (bytes, assembly) of each line, `line` that of the first."""

    line: int
    bits: int
    address: int
    rows: tuple[tuple[bytes, str], ...]


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text("utf-8")
    matches = list(_FENCE.finditer(text))
    found = []
    for match, following in zip_longest(matches, matches[1:]):
        output = None
        if following is not None and following[1] == "text" and not text[match.end() : following.start()].strip():
            output = following[2]
        found.append(Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2], output))
    return found


def listings(program: str) -> list[Listing]:
    """All machine code with assembly in a Python program."""
    comments: dict[int, str] = {}
    data: dict[int, bytes] = {}
    for token in tokenize.generate_tokens(io.StringIO(program).readline):
        line = token.start[0]
        if token.type == tokenize.COMMENT:
            comments[line] = token.string.removeprefix("#").strip()
        elif token.type == tokenize.STRING and re.fullmatch(r'"[0-9a-fA-F ]+"', token.string):
            data[line] = data.get(line, b"") + bytes.fromhex(token.string.strip('"'))
        elif token.type == tokenize.NUMBER and re.fullmatch(r"0x[0-9a-fA-F]{1,2}", token.string):
            data[line] = data.get(line, b"") + bytes([int(token.string, 16)])
    return list(_listings(program, comments, data))


def _listings(program: str, comments: dict[int, str], data: dict[int, bytes]) -> Iterator[Listing]:
    for node in ast.walk(ast.parse(program)):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) not in ("bytes", "bytes.fromhex"):
            continue
        lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
        if len(lines) == 1:
            continue
        bits, address = 16, 0x1000
        rows = []
        for line in lines:
            comment = comments.get(line, "")
            if target := _TARGET.match(comment):
                bits, address = int(target[1]), int(target[2], 0)
            elif comment or line in data:
                rows.append((data.get(line, b""), comment))
        if any(assembly for _, assembly in rows):
            yield Listing(node.lineno, bits, address, tuple(rows))
