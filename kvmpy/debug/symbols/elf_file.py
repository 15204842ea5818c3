"""ELF files for who looks into them: opened and checked, and their symbols in columns."""

from __future__ import annotations

import os
from itertools import repeat
from typing import TYPE_CHECKING

from kvmpy._value import frozen
from kvmpy.boot.elf.format import ElfHeader
from kvmpy.boot.elf.sections import ElfSections
from kvmpy.boot.elf.symbols import (
    SHN_ABS,
    STB_LOCAL,
    STB_WEAK,
    STT_FUNC,
    STT_GNU_IFUNC,
    STT_NOTYPE,
    STT_OBJECT,
    read_symbol_table,
)
from kvmpy.boot.image_source import ImageSource
from kvmpy.debug.symbols.symbol import SymbolKind
from kvmpy.debug.symbols.symbol_columns import GLOBAL, LOCAL, WEAK, SymbolColumns

if TYPE_CHECKING:
    from kvmpy.boot.elf.image import ElfImage

__all__ = ["OpenedElf", "symbol_columns"]

_KINDS: dict[int, SymbolKind] = {
    STT_NOTYPE: "label", STT_OBJECT: "object", STT_FUNC: "function", STT_GNU_IFUNC: "function",
}  # fmt: skip
_BINDINGS = {STB_LOCAL: LOCAL, STB_WEAK: WEAK}


@frozen
class OpenedElf:
    """An ELF file whose header and section table have been checked. `bias` is added to the addresses in it."""

    source: ImageSource
    bits: int
    sections: ElfSections
    bias: int

    @classmethod
    def open(
        cls, source: bytes | bytearray | memoryview | str | os.PathLike[str] | ElfImage, bias: int | None = None
    ) -> OpenedElf:
        """From a path, the bytes of a file, or an ElfImage, whose bias is the default. Raises ImageError, OSError."""
        from kvmpy.boot.elf.image import ElfImage

        if isinstance(source, ElfImage):
            bias = source.bias if bias is None else bias
            source_ = source.source
        else:
            source_ = ImageSource(source)
        header = ElfHeader.read(source_)
        return cls(source_, header.bits, ElfSections(source_, header), bias or 0)

    @property
    def address_mask(self) -> int:
        """Addresses are modulo 2^32 or 2^64."""
        return (1 << self.bits) - 1


def symbol_columns(elf: OpenedElf) -> SymbolColumns:
    """The symbols of .symtab, or else of .dynsym, where the file is loaded. Raises ImageError."""
    table = read_symbol_table(elf.sections, elf.bits, elf.source)
    bias, mask = elf.bias, elf.address_mask
    addresses = table.values
    if bias:
        addresses = [
            value if place == SHN_ABS else value + bias & mask
            for value, place in zip(table.values, table.places, strict=True)
        ]
    # st_shndx may also be a reserved number, or a lie.
    ends = {index: end + bias & mask for index, end in enumerate(elf.sections.ends()) if end}
    reaches = list(map(ends.get, table.places, repeat(0)))
    kinds = list(map(_KINDS.__getitem__, table.types))
    if SHN_ABS in table.places:
        # A function or an object that is absolute is one at a fixed address: a routine in ROM, for example.
        for index, place in enumerate(table.places):
            if place == SHN_ABS and kinds[index] == "label":
                kinds[index] = "absolute"
    bindings = list(map(_BINDINGS.get, table.bindings, repeat(GLOBAL)))
    return SymbolColumns(table.names, addresses, table.sizes, kinds, bindings, reaches)
