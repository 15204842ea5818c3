"""ELF images: kernels and bare programs, 32-bit i386 and 64-bit x86-64, at fixed addresses or position independent."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from kvmpy.boot.elf.format import EM_386, ET_DYN, PT_LOAD, ElfHeader, ProgramHeader
from kvmpy.boot.elf.relocation import PlacedSegment, find_relocations, relocate
from kvmpy.boot.image import Entry, LoadedRange, RomMapping
from kvmpy.boot.image_source import ImageSource
from kvmpy.boot.placement import ram_views
from kvmpy.boot.start import Mapping, Start, page_mappings
from kvmpy.errors import ImageError

if TYPE_CHECKING:
    from kvmpy.memory import GuestMemory

__all__ = ["ElfImage", "elf_of"]

DEFAULT_BASE = 0x10_0000
"""Where a position-independent image goes that was linked for address 0: 1 MiB, above the BIOS area."""


class ElfImage:
    """An ELF file: ELF32 for i386, which starts in protected mode, or ELF64 for x86-64, which starts in long mode.

    `source` is a path or the file's bytes. Segments go to their p_paddr, or with `physical=False` to their p_vaddr;
    what a segment has in memory but not in the file (.bss) is zeroed. A position-independent image (ET_DYN) is moved
    so that its lowest segment starts at `base`, in p_paddr, p_vaddr and all addresses alike, and its RELATIVE
    relocations are done; by default it stays where it was linked, or goes to 1 MiB (rounded up to its alignment) when
    that is in the first page.

    The processor starts at `entry`, by default e_entry. Both are addresses as the linker saw them (before an image is
    moved by `base`). When that address is in a segment linked for another virtual address than its physical one:

    * in long mode all segments are mapped at their virtual addresses too, and the processor starts at the virtual one
      (a kernel linked for 0xffffffff80000000 just starts). Where such a mapping collides with the identity mapping of
      RAM, the segment wins;
    * in the other modes, which have no paging, it starts at the physical address instead.

    An address outside of the virtual ranges of all segments is taken as a physical one (Linux's vmlinux has that).

    `mode` is "real", "protected16", "protected" or "long" when the class of the file does not say what its code
    expects; `stack`, `ring` and `tables` are those of `kvmpy.boot.start.Start`.

    Raises ImageError, a ValueError that names file, field and offset, for a file that is not sound; `load` does so for
    one that does not fit into the guest's RAM.
    """

    def __init__(
        self,
        source: bytes | bytearray | memoryview | str | os.PathLike[str] | ImageSource,
        *,
        physical: bool = True,
        base: int | None = None,
        entry: int | None = None,
        mode: str | None = None,
        stack: int | None = None,
        ring: int = 0,
        tables: int | None = None,
    ) -> None:
        self._source = source if isinstance(source, ImageSource) else ImageSource(source)
        self._header = ElfHeader.read(self._source)
        self._program_headers = self._header.read_program_headers(self._source)
        self._physical = physical
        loadable = [header for header in self._program_headers if header.type == PT_LOAD and header.memsz]
        if not loadable:
            raise ImageError("has no PT_LOAD segment with bytes in it: nothing to load", self._source.name)
        self.bits = self._header.bits
        """32 or 64: the class of the file."""
        self.position_independent = self._header.type == ET_DYN
        """Whether the file can be moved (ET_DYN)."""
        self.bias = self._bias(loadable, base)
        """What is added to the addresses in the file: 0 unless a position-independent image is moved."""
        self.segments = self._place(loadable)
        """The PT_LOAD segments that take memory, by guest-physical address."""
        # Of a file at fixed addresses too, for it may need shared libraries; but there is nothing to relocate in it.
        tables_found = find_relocations(self._source, self._program_headers)
        self._relocations = tables_found if self.position_independent else []
        default_mode = "long" if self.bits == 64 else "protected"
        self._start = Start(mode or default_mode, stack=stack, ring=ring, tables=tables)
        self._entry_override = entry
        self.entry, self._entry_segment = self._locate_entry(entry)
        """The address of the first instruction as the guest sees it, when it runs with paging."""

    @property
    def machine(self) -> str:
        """ "i386" or "x86-64"."""
        return "i386" if self._header.machine == EM_386 else "x86-64"

    @property
    def source(self) -> ImageSource:
        """The file that it is, for who reads more in it: `kvmpy.debug.symbols` does."""
        return self._source

    @property
    def header(self) -> ElfHeader:
        """The ELF header."""
        return self._header

    @property
    def program_headers(self) -> Sequence[ProgramHeader]:
        """All program headers, in the order of the file."""
        return self._program_headers

    @property
    def physical_entry(self) -> int:
        """The guest-physical address of the first instruction: where it starts without paging."""
        inside = self._entry_segment
        return self.entry if inside is None else self.entry - inside.virtual + inside.address

    def memory_needs(self) -> tuple[RomMapping, ...]:
        """Nothing: an ELF image lives in RAM."""
        return ()

    def load(self, memory: GuestMemory) -> Entry:
        """Write the segments into RAM, relocate them, and build the tables of the mode. Raises ImageError."""
        used = self.load_segments(memory)
        inside = self._entry_segment
        if self._start.mode == "long" and inside is not None and inside.virtual != inside.address:
            return self._start.enter(memory, self.entry, used, self._source.name, self._mappings())
        return self._start.enter(memory, self.physical_entry, used, self._source.name)

    def load_segments(self, memory: GuestMemory) -> list[LoadedRange]:
        """Write the segments into RAM and relocate them, without tables and without an entry state.

        For boot protocols that start an ELF image in a way of their own. Raises ImageError, as `load` does.
        """
        # All before any: an image that does not fit leaves the guest's memory as it was.
        for segment in self.segments:
            header = segment.header
            ram_views(memory, segment.address, segment.size, self._source.name, header.name, header.file_offset)
        for segment in self.segments:
            header = segment.header
            self._source.copy_to(memory, segment.address, header.offset, header.filesz, header.name)
            memory.fill(segment.address + header.filesz, header.memsz - header.filesz, 0)
        relocate(self._source, self._relocations, self.segments, memory, self.bias)
        return [LoadedRange(segment.address, segment.size, segment.header.name) for segment in self.segments]

    def symbols(self) -> dict[str, int]:
        """Name -> address of the symbols that the file defines, moved with the image. Empty for a stripped file.

        Addresses are virtual. Of several symbols of one name a global one counts, else the first.
        """
        from kvmpy.boot.elf.symbols import read_symbols

        mask = (1 << self.bits) - 1
        return {
            name: value if absolute else value + self.bias & mask
            for name, (value, absolute) in read_symbols(self._header, self._source).items()
        }

    # Where things go

    def _bias(self, loadable: Sequence[ProgramHeader], base: int | None) -> int:
        if not self.position_independent:
            if base is not None:
                raise ImageError("is linked for fixed addresses (ET_EXEC), so base= cannot move it", self._source.name)
            return 0
        lowest = min(loadable, key=self._linked_address)
        linked = self._linked_address(lowest)
        alignment = max(header.align for header in loadable) or 1
        if base is None:
            if linked >= alignment or linked >= DEFAULT_BASE:
                return 0
            base = linked + (max(DEFAULT_BASE, alignment) + alignment - 1 & -alignment)
        if (base - linked) % alignment:
            raise ImageError(
                f"base {base:#x} does not keep the alignment: it must be {linked:#x} modulo {alignment:#x} (p_align)",
                self._source.name,
            )
        return base - linked

    def _linked_address(self, header: ProgramHeader) -> int:
        return header.paddr if self._physical else header.vaddr

    def _place(self, loadable: Sequence[ProgramHeader]) -> tuple[PlacedSegment, ...]:
        field = "p_paddr" if self._physical else "p_vaddr"
        limit = 1 << self.bits
        segments = []
        for header in loadable:
            header.check_address(self._source, field)
            address = self._linked_address(header) + self.bias
            virtual = header.vaddr + self.bias
            for moved in (address, virtual):
                if moved < 0 or moved + header.memsz > limit:
                    raise header.refusal(
                        self._source,
                        field,
                        f"{self._linked_address(header):#x}; moved by {self.bias:#x} it wraps around",
                    )
            segments.append(PlacedSegment(header, address, virtual))
        segments.sort(key=lambda segment: segment.address)
        for below, above in pairwise(segments):
            if below.address + below.size > above.address:
                hint = "; physical=False loads by p_vaddr" if self._physical else ""
                raise above.header.refusal(
                    self._source, field,
                    f"{self._linked_address(above.header):#x}, but {below.header.name} already takes "
                    f"{below.address:#x}..{below.address + below.size - 1:#x}{hint}",
                )  # fmt: skip
        return tuple(segments)

    def _locate_entry(self, override: int | None) -> tuple[int, PlacedSegment | None]:
        """The start address as the guest sees it, and the segment whose virtual range it is in."""
        given = self._header.entry if override is None else override
        if override is None and given == 0:
            raise ImageError(
                "e_entry is 0: the file has no entry point; give entry=", self._source.name, self._header.entry_offset
            )
        address = given + self.bias
        for segment in self.segments:
            if segment.virtual <= address < segment.virtual + segment.size:
                return address, segment
        for segment in self.segments:
            if segment.address <= address < segment.address + segment.size:
                return address, None
        if override is not None:
            raise ImageError(f"entry {override:#x} is in no segment", self._source.name)
        raise ImageError(f"e_entry is {given:#x}, in no segment", self._source.name, self._header.entry_offset)

    def _mappings(self) -> list[Mapping]:
        """The segments at their virtual addresses, in whole pages."""
        by_virtual = {segment.virtual: segment for segment in self.segments}
        for segment in self.segments:
            last = segment.virtual + segment.size - 1
            if segment.virtual >> 47 not in (0, 0x1_FFFF) or segment.virtual >> 47 != last >> 47:
                raise segment.header.refusal(
                    self._source, "p_vaddr", f"{segment.header.vaddr:#x}, not a canonical 48-bit address (to its end)"
                )
        try:
            return page_mappings((segment.virtual, segment.address, segment.size) for segment in self.segments)
        except ValueError as error:
            virtual, why = error.args
            raise by_virtual[virtual].header.refusal(self._source, "p_vaddr", f"{virtual:#x}, which {why}") from None

    def __repr__(self) -> str:
        return f"<ElfImage {self._source.name} {self.machine} entry={self.entry:#x}>"


def elf_of(image: object) -> ElfImage | None:
    """The ELF file that an image is, or that is in it as in a kernel's (`image.elf`); None where there is none."""
    elf = image if isinstance(image, ElfImage) else getattr(image, "elf", None)
    return elf if isinstance(elf, ElfImage) else None
