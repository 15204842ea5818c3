"""A linked guest program: an ELF file, its flat image and its symbols."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from kvmpy.errors import UsageError

__all__ = ["GuestProgram"]

_LARGEST_IMAGE = 256 << 20
"""Bytes. Sections further apart (a kernel with a part at the top of the address space) make no flat image."""


class GuestProgram:
    """A program linked for fixed addresses, for a processor in `bits`-bit mode (16, 32 or 64).

    `elf` is the path of the ELF file, with symbols and, from C, line numbers. `warnings` is what the tools said.
    """

    def __init__(self, elf: Path, *, bits: int, base: int | None = None, warnings: str = "") -> None:
        self.elf = elf
        self.bits = bits
        self.warnings = warnings
        self._base = base

    @property
    def image(self) -> bytes:
        """The flat binary, to be placed at `address`; what .bss wants after its end is not in it.

        Raises UsageError when the sections are too far apart for one.
        """
        return self._flat.image

    @property
    def address(self) -> int:
        """Where the first byte of `image` belongs."""
        return self._flat.address

    @property
    def entry(self) -> int:
        """The address of `_start`, or of the first byte of code."""
        return self._contents.entry

    @property
    def symbols(self) -> dict[str, int]:
        """The address of every name that the program defines."""
        return self._contents.symbols

    @cached_property
    def _contents(self) -> _Contents:
        from elftools.elf.constants import SH_FLAGS
        from elftools.elf.elffile import ELFFile
        from elftools.elf.sections import SymbolTableSection

        with self.elf.open("rb") as stream:
            elf = ELFFile(stream)
            sections = tuple(
                (section["sh_addr"], section.data())
                for section in elf.iter_sections()
                if section["sh_flags"] & SH_FLAGS.SHF_ALLOC and section["sh_type"] != "SHT_NOBITS"
            )
            table = elf.get_section_by_name(".symtab")
            symbols = {
                symbol.name: symbol["st_value"]
                for symbol in (table.iter_symbols() if isinstance(table, SymbolTableSection) else ())
                if symbol.name and symbol["st_shndx"] != "SHN_UNDEF" and symbol["st_info"]["type"] != "STT_FILE"
            }
            return _Contents(elf["e_entry"], symbols, sections)

    @cached_property
    def _flat(self) -> _Flat:
        sections = self._contents.sections
        base = min((start for start, _ in sections), default=0) if self._base is None else self._base
        length = max((start + len(content) - base for start, content in sections), default=0)
        if length > _LARGEST_IMAGE:
            raise UsageError(
                f"{self.elf.name} reaches from {base:#x} to {base + length:#x}: no flat image; load the ELF file"
            )
        image = bytearray(length)
        for start, content in sections:
            image[start - base : start - base + len(content)] = content
        return _Flat(base, bytes(image))

    def __repr__(self) -> str:
        return f"<GuestProgram {self.elf} {self.bits} bits, entry {self.entry:#x}>"


class _Contents(NamedTuple):
    entry: int
    symbols: dict[str, int]
    sections: tuple[tuple[int, bytes], ...]


class _Flat(NamedTuple):
    address: int
    image: bytes
