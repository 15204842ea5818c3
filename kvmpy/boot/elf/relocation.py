"""Relocation of a position-independent ELF image: the RELATIVE entries of a file linked as static PIE.

A RELATIVE relocation adds to an address the distance between where the file was linked and where it is (System V gABI,
chapter 5; x86-64 psABI 4.4.1; i386 psABI, "Relocation Types"). Every other type names a symbol, which a linker must
have resolved: such a file is refused. REL, RELA and the packed RELR tables are understood for both machines.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from kvmpy._value import frozen
from kvmpy.boot.elf.format import PT_DYNAMIC, PT_LOAD, ProgramHeader, read_dynamic_section
from kvmpy.errors import ImageError

if TYPE_CHECKING:
    from kvmpy.boot.image_source import ImageSource
    from kvmpy.memory import GuestMemory

__all__ = ["PlacedSegment", "RelocationTable", "find_relocations", "relocate"]

DT_NEEDED, DT_PLTRELSZ, DT_RELA, DT_RELASZ, DT_RELAENT = 1, 2, 7, 8, 9
DT_REL, DT_RELSZ, DT_RELENT, DT_PLTREL, DT_JMPREL = 17, 18, 19, 20, 23
DT_RELRSZ, DT_RELR, DT_RELRENT = 35, 36, 37

# R_386_NONE and R_X86_64_NONE are both 0, R_386_RELATIVE and R_X86_64_RELATIVE both 8.
_R_NONE, _R_RELATIVE = 0, 8

_ENTRY = {
    (32, "REL"): struct.Struct("<II"), (32, "RELA"): struct.Struct("<III"), (32, "RELR"): struct.Struct("<I"),
    (64, "REL"): struct.Struct("<QQ"), (64, "RELA"): struct.Struct("<QQQ"), (64, "RELR"): struct.Struct("<Q"),
}  # fmt: skip


@frozen
class PlacedSegment:
    """A PT_LOAD segment and where it goes: guest-physical `address`, and `virtual`, where its code expects to be."""

    header: ProgramHeader
    address: int
    virtual: int

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return self.header.memsz


@frozen
class RelocationTable:
    """A table of `kind` REL, RELA or RELR: `size` bytes at `offset` in the file."""

    kind: str
    offset: int
    size: int


def find_relocations(source: ImageSource, headers: Sequence[ProgramHeader]) -> list[RelocationTable]:
    """The relocation tables that the dynamic section names; none when there is no dynamic section.

    Raises ImageError for tables outside of the file's segments, with odd sizes, and for a file that needs shared
    libraries.
    """
    dynamic = next((header for header in headers if header.type == PT_DYNAMIC), None)
    if dynamic is None:
        return []
    entries = read_dynamic_section(source, dynamic)
    values = dict(reversed(entries))  # the first of two equal tags counts
    if DT_NEEDED in values:
        raise ImageError(
            "needs shared libraries (DT_NEEDED); link it statically (-static-pie)", source.name, dynamic.offset
        )
    plt_kind = "RELA" if values.get(DT_PLTREL) == DT_RELA else "REL"
    tables = []
    for kind, tag, size_tag, entry_tag in (
        ("RELR", DT_RELR, DT_RELRSZ, DT_RELRENT),
        ("RELA", DT_RELA, DT_RELASZ, DT_RELAENT),
        ("REL", DT_REL, DT_RELSZ, DT_RELENT),
        (plt_kind, DT_JMPREL, DT_PLTRELSZ, None),
    ):
        if tag not in values:
            continue
        name = f"the {kind} table" if entry_tag else "the DT_JMPREL table"
        layout = _ENTRY[dynamic.bits, kind]
        size = values.get(size_tag, 0)
        entry_size = values.get(entry_tag, layout.size) if entry_tag else layout.size
        if entry_size != layout.size or size % layout.size:
            raise ImageError(
                f"{name} has {size:#x} bytes in entries of {entry_size}; an entry of class ELF{dynamic.bits} "
                f"has {layout.size}", source.name, dynamic.offset,
            )  # fmt: skip
        if size:
            offset = _file_offset(source, headers, values[tag], size, name, dynamic)
            tables.append(RelocationTable(kind, offset, size))
    return tables


def relocate(
    source: ImageSource,
    tables: Sequence[RelocationTable],
    segments: Sequence[PlacedSegment],
    memory: GuestMemory,
    bias: int,
) -> None:
    """Apply all tables to the loaded segments. `bias` is what to add to an address of the file, modulo 2^32 or 2^64.

    Raises ImageError for a relocation that is not RELATIVE, or whose target is in no segment; the segments must be in
    RAM.
    """
    if not segments:
        return
    bits = segments[0].header.bits
    width = bits // 8
    mask = (1 << bits) - 1
    read, write = (memory.read_u64, memory.write_u64) if bits == 64 else (memory.read_u32, memory.write_u32)
    target_of = _target_finder(source, segments, width)
    for table in tables:
        layout = _ENTRY[bits, table.kind]
        raw = source.read(table.offset, table.size, f"the {table.kind} table")
        if table.kind == "RELR":
            words = (word for (word,) in layout.iter_unpack(raw))
            for position, vaddr in _relr_addresses(source, words, bits, table.offset):
                target = target_of(vaddr, position)
                write(target, read(target) + bias & mask)
            continue
        for index, entry in enumerate(layout.iter_unpack(raw)):
            position = table.offset + index * layout.size
            vaddr, info = entry[0], entry[1]
            kind = info & 0xFFFF_FFFF if bits == 64 else info & 0xFF
            if kind == _R_NONE:
                continue
            if kind != _R_RELATIVE:
                raise ImageError(
                    f"relocation {index} of the {table.kind} table is of type {kind}; only RELATIVE ({_R_RELATIVE}) "
                    "can be done without a dynamic linker (link with -static-pie, or -Bsymbolic)",
                    source.name,
                    position,
                )
            target = target_of(vaddr, position)
            addend = entry[2] if table.kind == "RELA" else read(target)
            write(target, addend + bias & mask)


def _relr_addresses(source: ImageSource, words: Iterator[int], bits: int, offset: int) -> Iterator[tuple[int, int]]:
    """(file offset of the entry, address to relocate). An even word is an address, an odd one a bitmap of the next.

    The addresses must rise, as linkers write them. The gABI does not say so, but else a small hostile file could have
    the same words relocated millions of times.
    """
    width = bits // 8
    following = 0  # the first address that the next bitmap speaks of
    started = False
    for index, word in enumerate(words):
        position = offset + index * width
        if not word & 1:
            if word < following:
                raise ImageError(f"RELR address {word:#x} comes after higher ones", source.name, position)
            yield position, word
            following = word + width
            started = True
            continue
        if not started:
            raise ImageError("the RELR table starts with a bitmap, not an address", source.name, position)
        bitmap = word >> 1
        while bitmap:
            lowest = bitmap & -bitmap
            yield position, following + (lowest.bit_length() - 1) * width
            bitmap ^= lowest
        following += (bits - 1) * width


def _target_finder(source: ImageSource, segments: Sequence[PlacedSegment], width: int) -> Callable[[int, int], int]:
    """A function from an address of the file, and the place of its relocation, to the guest-physical address."""
    ordered = sorted(segments, key=lambda segment: segment.header.vaddr)
    starts = [segment.header.vaddr for segment in ordered]

    def target_of(vaddr: int, position: int) -> int:
        index = bisect_right(starts, vaddr) - 1
        if index < 0 or vaddr + width > starts[index] + ordered[index].size:
            raise ImageError(f"relocates {vaddr:#x}; the {width} bytes there are in no segment", source.name, position)
        return ordered[index].address + vaddr - starts[index]

    return target_of


def _file_offset(
    source: ImageSource, headers: Sequence[ProgramHeader], vaddr: int, size: int, name: str, dynamic: ProgramHeader
) -> int:
    """Where in the file `size` bytes at an address of the file are."""
    for header in headers:
        if header.type == PT_LOAD and header.vaddr <= vaddr and vaddr + size <= header.vaddr + header.filesz:
            return header.offset + vaddr - header.vaddr
    raise ImageError(
        f"{name}, {size:#x} bytes at {vaddr:#x}, is in no segment of the file", source.name, dynamic.offset
    )
