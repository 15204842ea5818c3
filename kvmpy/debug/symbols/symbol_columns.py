"""Symbols in columns: what the readers of files hand to a `SymbolTable`.

A large kernel has hundreds of thousands of symbols, and an object for each would take a second to make. Few of them
are ever asked for.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvmpy._value import field, mutable
from kvmpy.debug.symbols.symbol import Symbol, SymbolKind

__all__ = ["GLOBAL", "LOCAL", "WEAK", "SymbolColumns"]

GLOBAL, WEAK, LOCAL = 0, 1, 2
"""Bindings, in the order of preference."""

LABEL_REACH = 0x1_0000
"""How far a symbol reaches whose size and section nobody knows: 64 KiB, a segment of real mode."""


@mutable
class SymbolColumns:
    """One list per property, all equally long, in the order of the file.

    `reaches` are the addresses at which a symbol of size 0 ends at the latest, the end of its section; 0 when unknown.
    `modules` has the module of those that have one, by index.
    """

    names: list[str] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    kinds: list[SymbolKind] = field(default_factory=list)
    bindings: list[int] = field(default_factory=list)
    reaches: list[int] = field(default_factory=list)
    modules: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, symbols: Iterable[Symbol], end: int | None = None) -> SymbolColumns:
        """The columns of `symbols`; those without a size end at `end`."""
        columns = cls()
        for index, symbol in enumerate(symbols):
            columns.names.append(symbol.name)
            columns.addresses.append(symbol.address)
            columns.sizes.append(symbol.size)
            columns.kinds.append(symbol.kind)
            columns.bindings.append(GLOBAL)
            columns.reaches.append(0 if end is None else end)
            if symbol.module:
                columns.modules[index] = symbol.module
        return columns

    def append(self, other: SymbolColumns) -> None:
        """Add the symbols of `other` behind these."""
        first = len(self.names)
        self.names += other.names
        self.addresses += other.addresses
        self.sizes += other.sizes
        self.kinds += other.kinds
        self.bindings += other.bindings
        self.reaches += other.reaches
        self.modules.update((first + index, module) for index, module in other.modules.items())

    def reach(self, index: int) -> int:
        """The address up to which the symbol of one row reaches, when it has no size."""
        return self.reaches[index] or self.addresses[index] + LABEL_REACH

    def symbol(self, index: int) -> Symbol:
        """The symbol of one row."""
        return Symbol(
            self.names[index], self.addresses[index], self.sizes[index], self.kinds[index], self.modules.get(index, "")
        )
