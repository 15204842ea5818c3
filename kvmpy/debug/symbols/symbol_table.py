"""The symbols of a guest: by name, and by the addresses that they cover."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from operator import add
from typing import TYPE_CHECKING

from kvmpy.debug.symbols.symbol import Symbol, SymbolAddress, UnknownSymbolError, similar_names
from kvmpy.debug.symbols.symbol_columns import SymbolColumns

if TYPE_CHECKING:
    from kvmpy.boot.elf.image import ElfImage
    from kvmpy.boot.image import Image

__all__ = ["SymbolTable"]

_KIND_ORDER = {"function": 0, "object": 1, "label": 2, "absolute": 3}


class SymbolTable:
    """The symbols of a guest. Made from symbols, or `from_elf`, `from_system_map`, `from_dict`, or by `merge`.

    Symbols without a size, as labels of assembly are, end where the next symbol begins, at the latest at `end` or 64
    KiB on. (Those of an ELF file end with their section.)

    Looking up takes microseconds; the first look-up sorts the table.
    """

    def __init__(self, symbols: Iterable[Symbol] = (), *, end: int | None = None) -> None:
        self._fill(SymbolColumns.of(symbols, end))

    def _fill(self, columns: SymbolColumns) -> None:
        self._columns = columns
        self._address_index: tuple[list[int], list[int], list[int]] | None = None
        self._name_index: tuple[dict[str, int], dict[str, list[int]]] | None = None

    @classmethod
    def _of(cls, columns: SymbolColumns) -> SymbolTable:
        table = cls.__new__(cls)
        table._fill(columns)
        return table

    # Where symbols come from

    @classmethod
    def from_elf(
        cls, source: bytes | bytearray | memoryview | str | os.PathLike[str] | ElfImage, *, bias: int | None = None
    ) -> SymbolTable:
        """The symbols that an ELF file defines, from its path or bytes, or an image of it.

        `bias` is what is added to all addresses but absolute ones, for a file that is loaded elsewhere than where it
        was linked; by default that of the image, or 0. A stripped file has no symbols. Raises ImageError for a file
        that is not sound, OSError as `open` does.
        """
        from kvmpy.debug.symbols.elf_file import OpenedElf, symbol_columns

        return cls._of(symbol_columns(OpenedElf.open(source, bias)))

    @classmethod
    def of_image(cls, image: Image) -> SymbolTable:
        """The symbols of an image where it is loaded: those of the ELF file that it is or holds, else none.

        Raises ImageError as `from_elf` does.
        """
        from kvmpy.boot.elf.image import elf_of

        elf = elf_of(image)
        return cls.from_elf(elf) if elf is not None else cls()

    @classmethod
    def from_system_map(cls, source: bytes | str | os.PathLike[str], *, bias: int = 0) -> SymbolTable:
        """The symbols of a System.map, of a copy of /proc/kallsyms, or of what `nm` prints.

        `source` is a path, or the text itself: bytes, or a str with a line feed in it. `bias` is added to all addresses
        but absolute ones: the kernel's random offset (KASLR). Raises ImageError for a line of another form, and for a
        kallsyms that a user without rights has read, in which all addresses are 0.
        """
        from kvmpy.debug.symbols.system_map import read_system_map

        return cls._of(read_system_map(source, bias))

    @classmethod
    def from_dict(cls, addresses: Mapping[str, int], *, end: int | None = None) -> SymbolTable:
        """Labels from name -> address; the last one ends at `end`, or after 64 KiB."""
        return cls((Symbol(name, address) for name, address in addresses.items()), end=end)

    @classmethod
    def merge(cls, *tables: SymbolTable) -> SymbolTable:
        """The symbols of all `tables`. Where two of them answer, the earlier table does."""
        columns = SymbolColumns()
        for table in tables:
            columns.append(table._columns)
        return cls._of(columns)

    # By address

    def at(self, address: int) -> SymbolAddress | None:
        """The symbol that covers `address`, and how far from its start that is.

        Of several the innermost one with a size; else the nearest label before it, unless its section, or a symbol
        around or behind it, has ended since. Functions come before objects and labels, global symbols before weak and
        local ones, names with fewer leading underscores before others. Absolute symbols cover nothing.
        """
        if self._address_index is None:
            self._address_index = self._sort()
        starts = self._address_index[1]
        place = bisect_right(starts, address) - 1
        if place < 0:
            return None
        sized = self._covering(place, address)
        columns = self._columns
        if sized is not None:
            found = [
                index
                for index in self._starting_with(sized)
                if columns.sizes[index] and columns.addresses[index] + columns.sizes[index] > address
            ]
        elif self._covering(place, starts[place]) is None:
            found = [index for index in self._starting_with(place) if columns.reach(index) > address]
        else:
            found = []  # what covers the label before it has ended
        if not found:
            return None
        best = min(found, key=self._preference)
        return SymbolAddress(columns.symbol(best), address - columns.addresses[best])

    def describe(self, address: int) -> str:
        """The address in hex, with its symbol if it has one: "0x101012 <main+0x12>"."""
        found = self.at(address)
        return f"{address:#x} <{found}>" if found else f"{address:#x}"

    def _sort(self) -> tuple[list[int], list[int], list[int]]:
        """Indices by address, the addresses, and for each place the highest end of the symbols up to there."""
        addresses, sizes, kinds = self._columns.addresses, self._columns.sizes, self._columns.kinds
        order = sorted(range(len(addresses)), key=addresses.__getitem__)
        if "absolute" in kinds:
            order = [index for index in order if kinds[index] != "absolute"]
        starts = list(map(addresses.__getitem__, order))
        ends = map(add, starts, map(sizes.__getitem__, order))  # of one without a size: its start
        return order, starts, list(accumulate(ends, max))

    def _covering(self, place: int, address: int) -> int | None:
        """The last place up to `place` whose symbol has a size and covers `address`."""
        assert self._address_index is not None
        order, starts, ends = self._address_index
        sizes = self._columns.sizes
        while place >= 0 and ends[place] > address:
            if starts[place] + sizes[order[place]] > address and sizes[order[place]]:
                return place
            place -= 1
        return None

    def _starting_with(self, place: int) -> list[int]:
        """The indices of all symbols that start where the one at `place` does, which is the last of them."""
        assert self._address_index is not None
        order, starts, _ = self._address_index
        first = place
        while first and starts[first - 1] == starts[place]:
            first -= 1
        return order[first : place + 1]

    def _preference(self, index: int) -> tuple[int, int, int, int]:
        name = self._columns.names[index]
        underscores = len(name) - len(name.lstrip("_"))
        return _KIND_ORDER[self._columns.kinds[index]], self._columns.bindings[index], underscores, index

    # By name

    def address_of(self, name: str) -> int:
        """The address of the symbol `name`. Of several the first global one, else the first.

        Raises UnknownSymbolError, which lists names that are similar.
        """
        return self.symbol(name).address

    def symbol(self, name: str) -> Symbol:
        """The symbol `name`, chosen as by `address_of`. Raises UnknownSymbolError."""
        found = self._indices(name)
        if not found:
            raise UnknownSymbolError(name, similar_names(name, self._names()))
        return self._columns.symbol(found[0])

    def named(self, name: str) -> tuple[Symbol, ...]:
        """All symbols called `name`, such as static functions of several files; global ones first."""
        return tuple(self._columns.symbol(index) for index in self._indices(name))

    def _indices(self, name: str) -> list[int]:
        first = self._names().get(name)
        if first is None or self._name_index is None:
            return []
        found = self._name_index[1].get(name, [first])
        return sorted(found, key=self._columns.bindings.__getitem__)

    def _names(self) -> dict[str, int]:
        """Name -> the first index that has it."""
        if self._name_index is None:
            names = self._columns.names
            first = dict(zip(reversed(names), range(len(names) - 1, -1, -1), strict=True))
            repeated: dict[str, list[int]] = {}
            if len(first) < len(names):
                for index, name in enumerate(names):
                    if first[name] != index:
                        repeated.setdefault(name, [first[name]]).append(index)
            self._name_index = first, repeated
        return self._name_index[0]

    # As a collection

    def __len__(self) -> int:
        return len(self._columns.names)

    def __iter__(self) -> Iterator[Symbol]:
        """All symbols by address, absolute ones too."""
        order = sorted(range(len(self)), key=self._columns.addresses.__getitem__)
        return map(self._columns.symbol, order)

    def __contains__(self, name: object) -> bool:
        return name in self._names()

    def __repr__(self) -> str:
        return f"<SymbolTable of {len(self)} symbols>"
