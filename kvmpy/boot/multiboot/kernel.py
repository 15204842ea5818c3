"""Multiboot kernels: ELF files, or files with address fields, that start in protected mode.

The Multiboot Specification 0.6.96 and the Multiboot2 Specification 2.0, of the GNU project.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from kvmpy._value import frozen
from kvmpy.boot.boot_memory import BootMemory
from kvmpy.boot.e820 import ONE_MIB, e820_map
from kvmpy.boot.elf.image import ElfImage
from kvmpy.boot.firmware_tables import place_tables
from kvmpy.boot.image import Entry, LoadedRange, RomMapping
from kvmpy.boot.image_source import ImageSource
from kvmpy.boot.multiboot.header import AddressFields, Multiboot1Header
from kvmpy.boot.multiboot.header2 import Multiboot2Header
from kvmpy.boot.multiboot.information import (
    CELL,
    COLUMNS,
    LINES,
    TEXT_MEMORY,
    BootInformation,
    LoadedModule,
    place_information,
    place_information2,
    read_rsdp,
)  # fmt: skip
from kvmpy.boot.multiboot.sections import load_sections
from kvmpy.boot.placement import FOUR_GIB, lowest_free, ram_spans, ram_text, ram_views
from kvmpy.boot.start import Start
from kvmpy.errors import ImageError, UsageError

if TYPE_CHECKING:
    from kvmpy.boot.firmware_tables import FirmwareTables
    from kvmpy.boot.multiboot.information import SectionHeaders
    from kvmpy.memory import GuestMemory

__all__ = ["MultibootKernel", "MultibootModule"]

_IN_EAX = {1: 0x2BAD_B002, 2: 0x36D7_6289}
_PAGE = 0x1000


@frozen
class MultibootModule:
    """A file that comes along with a multiboot kernel (a path or the bytes), and the string that goes with it."""

    source: bytes | bytearray | memoryview | str | os.PathLike[str]
    string: str = ""


class MultibootKernel:
    """A kernel with a Multiboot or Multiboot2 header. `source` is a path or the bytes.

    `version` is 1 or 2; by default that of the header that the file has, 2 when it has both. The file is an ELF file,
    of 32 or 64 bits, whose segments go to their p_paddr, or its header has address fields (the a.out kludge), which
    then count. The processor starts at its physical entry point, in 32-bit protected mode without paging, with
    interrupts off; EAX holds the magic number of the version, EBX the address of the boot information.

    That has: `cmdline`, the name of the boot loader, memory sizes and memory map, `modules` (`MultibootModule`s, or
    paths, whose string is then the path), the section headers of an ELF file with its symbols in memory, EGA text mode
    at 0xb8000 when the header asks for a screen, and the RSDP of `tables` (Multiboot2 only). `tables` are objects like
    `kvmpy.boot.firmware_tables.FirmwareTables`; None, the default, are those by which the machine that loads the kernel
    describes itself, and `()` are none at all. Modules follow the kernel, on page boundaries.

    Raises ImageError that names field and offset: for a file without header, one whose header contradicts the file,
    and one that requires what kvmpy cannot give. `load` raises it when something does not fit into RAM.
    """

    def __init__(
        self,
        source: bytes | bytearray | memoryview | str | os.PathLike[str],
        *,
        cmdline: str = "",
        modules: Iterable[MultibootModule | str | os.PathLike[str]] = (),
        version: Literal[1, 2] | None = None,
        tables: Iterable[FirmwareTables] | None = None,
    ) -> None:
        self._source = ImageSource(source)
        self.header = self._find_header(version)
        """The header that counts."""
        self.version: Literal[1, 2] = 2 if isinstance(self.header, Multiboot2Header) else 1
        """Of the specification: 1 or 2."""
        self.elf: ElfImage | None = None
        """The file as an ELF image, unless it is loaded by address fields."""
        if self.header.addresses is None:
            self.elf = self._open_elf(self.header)
        self._command_line = _encode(cmdline, "the command line")
        self._modules = [_open_module(module) for module in modules]
        self._tables = None if tables is None else tuple(tables)

    @property
    def source(self) -> ImageSource:
        """The file."""
        return self._source

    def memory_needs(self) -> tuple[RomMapping, ...]:
        """Nothing: a kernel lives in RAM."""
        return ()

    @property
    def takes_tables(self) -> bool:
        """Whether `load` wants the tables of the machine: nobody gave others."""
        return self._tables is None

    def load(self, memory: GuestMemory, tables: Iterable[FirmwareTables] = ()) -> Entry:
        """Write kernel, modules and boot information into RAM, and the tables of the mode. Raises ImageError.

        `tables` are those of the machine, for a kernel that `takes_tables`.
        """
        if self._tables is not None:
            tables = self._tables
        area = BootMemory(memory, (), self._source.name)
        entry, ranges = self._load_kernel(memory)
        area.ranges += ranges
        placed = place_tables(tables, memory, area.used)
        area.ranges += placed.ranges
        above = max(ONE_MIB, *(loaded.end for loaded in ranges))
        modules = [self._load_module(source, string, area, above) for source, string in self._modules]
        sections: SectionHeaders | None = None
        if self.elf is not None:
            sections = load_sections(self.elf, area, above)
        header = self.header
        relocatable = isinstance(header, Multiboot2Header) and header.relocatable is not None
        information = BootInformation(
            command_line=self._command_line,
            boot_loader_name=b"kvmpy",
            modules=modules,
            memory_map=e820_map(memory, placed.memory_map),
            sections=sections,
            screen=header.wants_screen and _has_text_memory(memory),
            rsdp=read_rsdp(memory, placed.rsdp),
            load_base=min(loaded.address for loaded in ranges) if relocatable else None,
        )
        place = place_information2 if self.version == 2 else place_information
        address = place(information, area)
        started = Start("protected").enter(memory, entry, area.ranges, self._source.name)
        started.state.regs.rax = _IN_EAX[self.version]
        started.state.regs.rbx = address
        return started

    # What is loaded

    def _find_header(self, version: int | None) -> Multiboot1Header | Multiboot2Header:
        if version not in (None, 1, 2):
            raise UsageError(f"there is no version {version!r} of the Multiboot specification; there are 1 and 2")
        header: Multiboot1Header | Multiboot2Header | None = None
        if version != 1:
            header = Multiboot2Header.find(self._source)
        if header is None and version != 2:
            header = Multiboot1Header.find(self._source)
        if header is None:
            wanted = {1: "Multiboot header (0x1badb002) in its first 8192 bytes",
                      2: "Multiboot2 header (0xe85250d6) in its first 32768 bytes"}  # fmt: skip
            text = wanted[version] if version else f"{wanted[1]}, and no {wanted[2]}"
            raise ImageError(f"has no {text}, at least none whose checksum is right", self._source.name)
        return header

    def _open_elf(self, header: Multiboot1Header | Multiboot2Header) -> ElfImage:
        magic = self._source.read(0, min(4, self._source.size), "the image")
        if magic != b"\x7fELF":
            raise ImageError(
                "is no ELF file, and its Multiboot header has no address fields that say where it goes",
                self._source.name, header.offset,
            )  # fmt: skip
        entry = header.entry
        elf = ElfImage(self._source, mode="protected", entry=entry)
        if isinstance(header, Multiboot2Header) and header.relocatable is not None:
            elf = self._inside(elf, header)
        for segment in elf.segments:
            if segment.address + segment.size > FOUR_GIB:
                raise segment.header.refusal(
                    self._source, "p_paddr", f"{segment.address:#x}; a multiboot kernel is loaded below 4 GiB"
                )
        return elf

    def _inside(self, elf: ElfImage, header: Multiboot2Header) -> ElfImage:
        """The image where its relocatable tag allows it to be: moved, when it can be moved."""
        wanted = header.relocatable
        assert wanted is not None

        def fits(image: ElfImage) -> bool:
            end = max(segment.address + segment.size for segment in image.segments)
            return wanted.min_addr <= image.segments[0].address and end - 1 <= wanted.max_addr

        if not fits(elf) and elf.position_independent:
            alignment = max(1, wanted.align, *(segment.header.align for segment in elf.segments))
            if wanted.align & (wanted.align - 1):
                raise ImageError(f"align is {wanted.align:#x}, not a power of two", self._source.name, wanted.offset)
            linked = elf.segments[0].address - elf.bias
            base = (wanted.min_addr + alignment - 1 & -alignment) + linked % alignment
            elf = ElfImage(self._source, mode="protected", entry=header.entry, base=base)
        if not fits(elf):
            raise ImageError(
                f"the image is at {elf.segments[0].address:#x}, but its header wants it between "
                f"{wanted.min_addr:#x} and {wanted.max_addr:#x}", self._source.name, wanted.offset,
            )  # fmt: skip
        return elf

    # Loading

    def _load_kernel(self, memory: GuestMemory) -> tuple[int, list[LoadedRange]]:
        if self.elf is not None:
            return self.elf.physical_entry, self.elf.load_segments(memory)
        addresses, entry = self.header.addresses, self.header.entry
        assert addresses is not None
        assert entry is not None
        return entry, [self._load_flat(memory, addresses)]

    def _load_flat(self, memory: GuestMemory, addresses: AddressFields) -> LoadedRange:
        size = addresses.end - addresses.load_addr
        ram_views(memory, addresses.load_addr, size, self._source.name, "the image", self.header.offset)
        self._source.copy_to(memory, addresses.load_addr, addresses.offset, addresses.size, "the image")
        memory.fill(addresses.load_addr + addresses.size, size - addresses.size, 0)
        return LoadedRange(addresses.load_addr, size, "image")

    @staticmethod
    def _load_module(source: ImageSource, string: bytes, area: BootMemory, above: int) -> LoadedModule:
        address = lowest_free(area.memory, max(source.size, 1), area.taken, alignment=_PAGE, above=above)
        if address is None:
            raise ImageError(
                f"no {source.size:#x} bytes are free for this module below 4 GiB "
                f"(the guest has {ram_text(area.memory)})", source.name,
            )  # fmt: skip
        source.copy_to(area.memory, address, 0, source.size, "the module")
        area.ranges.append(LoadedRange(address, source.size, "module"))
        return LoadedModule(address, address + source.size, string)

    def __repr__(self) -> str:
        return f"<MultibootKernel {self._source.name} version={self.version}>"


def _open_module(module: MultibootModule | str | os.PathLike[str]) -> tuple[ImageSource, bytes]:
    if isinstance(module, MultibootModule):
        return ImageSource(module.source), _encode(module.string, "the string of a module")
    if not isinstance(module, (str, os.PathLike)):
        raise UsageError(f"a module is a MultibootModule or a path, not {module!r:.60}")
    return ImageSource(module), _encode(os.fspath(module), "the string of a module")


def _encode(text: str, what: str) -> bytes:
    if "\0" in text:
        raise UsageError(f"{what} ends with its first zero byte, so it must not have one")
    return text.encode("utf-8", "surrogateescape")


def _has_text_memory(memory: GuestMemory) -> bool:
    end = TEXT_MEMORY + COLUMNS * LINES * CELL
    return any(start <= TEXT_MEMORY and end <= stop for start, stop in ram_spans(memory))
