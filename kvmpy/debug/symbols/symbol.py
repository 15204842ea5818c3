"""Symbols as values, and the error for a name that no symbol has."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from kvmpy._value import frozen
from kvmpy.errors import UsageError

__all__ = ["Symbol", "SymbolAddress", "SymbolKind", "UnknownSymbolError", "similar_names"]

SymbolKind = Literal["function", "object", "label", "absolute"]
"""What a symbol stands for: code, data, an address whose nature nobody has declared (as labels of assembly are), or a
number that is no address."""

# What symbols of C, C++, Rust and assembly are made of.
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.$"
_LONGEST_MISSPELT = 64
_SUGGESTIONS = 3


@frozen
class Symbol:
    """A name for `size` bytes at `address`; size 0 when nobody has declared it.

    `module` is the kernel module that has it, in symbols of /proc/kallsyms.
    """

    name: str
    address: int
    size: int = 0
    kind: SymbolKind = "label"
    module: str = ""

    @property
    def end(self) -> int:
        """The address after its last byte."""
        return self.address + self.size


@frozen
class SymbolAddress:
    """An address as a symbol and the distance from its start. Prints as "main+0x12", or "main" at its start."""

    symbol: Symbol
    offset: int

    @property
    def address(self) -> int:
        """The address itself."""
        return self.symbol.address + self.offset

    def __str__(self) -> str:
        text = f"{self.symbol.name}+{self.offset:#x}" if self.offset else self.symbol.name
        return f"{text} [{self.symbol.module}]" if self.symbol.module else text


class UnknownSymbolError(UsageError):
    """No symbol is called `name`; `similar` are names that it may be meant to be."""

    def __init__(self, name: str, similar: Collection[str]) -> None:
        quoted = [repr(other) for other in similar]
        hint = f"; did you mean {' or '.join(quoted)}?" if quoted else ""
        super().__init__(f"no symbol {name!r}{hint}")
        self.name = name
        self.similar = tuple(similar)


def similar_names(name: str, names: Collection[str]) -> list[str]:
    """Up to three of `names` (a dict or a set) for which `name` may be a slip: one letter, case, or a part of it.

    Comparing it with each of them letter by letter would take minutes in a large kernel. What can be made of it by
    one slip are some thousand words, whatever the number of names; and whether one is a part of another is quick.
    """
    found = sorted(word for word in _one_slip_away(name) if word in names) if len(name) <= _LONGEST_MISSPELT else []
    if len(found) < _SUGGESTIONS and len(name) > 2:
        folded = name.casefold()
        parts = [other for other in names if folded in other.casefold() and other not in found]
        found += sorted(parts, key=lambda other: (len(other), other))
    return found[:_SUGGESTIONS]


def _one_slip_away(word: str) -> set[str]:
    """All words with one letter dropped, added, replaced, or swapped with its neighbour."""
    splits = [(word[:at], word[at:]) for at in range(len(word) + 1)]
    dropped = {left + right[1:] for left, right in splits if right}
    swapped = {left + right[1] + right[0] + right[2:] for left, right in splits if len(right) > 1}
    replaced = {left + letter + right[1:] for left, right in splits if right for letter in _LETTERS}
    added = {left + letter + right for left, right in splits for letter in _LETTERS}
    return (dropped | swapped | replaced | added) - {word}
