"""What a multiboot kernel is told, in both formats: Multiboot Specification 0.6.96, chapter 3.3; Multiboot2, 3.6."""

from __future__ import annotations

import struct
from enum import IntFlag
from typing import TYPE_CHECKING

from kvmpy._value import frozen
from kvmpy.boot.e820 import E820Entry, E820Type
from kvmpy.boot.field_table import Fields
from kvmpy.boot.multiboot.header2 import InformationTag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmpy.boot.boot_memory import BootMemory
    from kvmpy.memory import GuestMemory

__all__ = [
    "INFORMATION",
    "BootInformation",
    "InformationFlags",
    "LoadedModule",
    "SectionHeaders",
    "place_information",
    "place_information2",
]

KIB = 0x400
ONE_MIB = 0x10_0000
LARGEST_LOWER_MEMORY = 640

EGA_TEXT = 2
TEXT_MEMORY = 0xB_8000
COLUMNS, LINES, CELL = 80, 25, 2

INFORMATION = {
    "flags": (0, 4),
    "mem_lower": (4, 4),
    "mem_upper": (8, 4),
    "boot_device": (12, 4),
    "cmdline": (16, 4),
    "mods_count": (20, 4),
    "mods_addr": (24, 4),
    "elf_num": (28, 4),
    "elf_size": (32, 4),
    "elf_addr": (36, 4),
    "elf_shndx": (40, 4),
    "mmap_length": (44, 4),
    "mmap_addr": (48, 4),
    "drives_length": (52, 4),
    "drives_addr": (56, 4),
    "config_table": (60, 4),
    "boot_loader_name": (64, 4),
    "apm_table": (68, 4),
    "vbe_control_info": (72, 4),
    "vbe_mode_info": (76, 4),
    "vbe_mode": (80, 2),
    "vbe_interface_seg": (82, 2),
    "vbe_interface_off": (84, 2),
    "vbe_interface_len": (86, 2),
    "framebuffer_addr": (88, 8),
    "framebuffer_pitch": (96, 4),
    "framebuffer_width": (100, 4),
    "framebuffer_height": (104, 4),
    "framebuffer_bpp": (108, 1),
    "framebuffer_type": (109, 1),
}
"""The information structure of Multiboot 1."""
SIZE = 116


class InformationFlags(IntFlag):
    """Which fields of the structure count."""

    MEMORY = 1 << 0
    COMMAND_LINE = 1 << 2
    MODULES = 1 << 3
    ELF_SECTIONS = 1 << 5
    MEMORY_MAP = 1 << 6
    BOOT_LOADER_NAME = 1 << 9
    FRAMEBUFFER = 1 << 12


@frozen
class LoadedModule:
    """A module in guest memory, and the string that goes with it."""

    start: int
    end: int
    string: bytes


@frozen
class SectionHeaders:
    """The section header table of an ELF kernel: each sh_addr says where the section is in memory."""

    table: bytes
    count: int
    entry_size: int
    names: int


@frozen
class BootInformation:
    """All that a kernel is told. Strings without their terminating zero; `rsdp` and `load_base` may be None."""

    command_line: bytes
    boot_loader_name: bytes
    modules: Sequence[LoadedModule]
    memory_map: Sequence[E820Entry]
    sections: SectionHeaders | None = None
    screen: bool = False
    rsdp: bytes | None = None
    load_base: int | None = None

    @property
    def lower_memory(self) -> int:
        """KiB from address 0 on."""
        return min(self._contiguous(0) // KIB, LARGEST_LOWER_MEMORY)

    @property
    def upper_memory(self) -> int:
        """KiB from 1 MiB on, up to the first hole."""
        return min(self._contiguous(ONE_MIB) // KIB, 0xFFFF_FFFF)

    def _contiguous(self, start: int) -> int:
        for entry in self.memory_map:
            if entry.type == E820Type.RAM and entry.address <= start < entry.end:
                return entry.end - start
        return 0


def read_rsdp(memory: GuestMemory, address: int) -> bytes | None:
    """A copy of the RSDP at `address`: 20 bytes by ACPI 1.0, as long as it says by later ones. None without one."""
    if not address:
        return None
    revision = memory.read_u8(address + 15)
    return memory.read(address, min(memory.read_u32(address + 20), 0x1000) if revision >= 2 else 20)


# Multiboot 1

_MODULE = struct.Struct("<4I")  # mod_start, mod_end, string, reserved
_MMAP_ENTRY = struct.Struct("<IQQI")  # size of what follows, base_addr, length, type


def place_information(information: BootInformation, area: BootMemory) -> int:
    """Write the structure of Multiboot 1, and what it points to, into guest memory; answer its address, for EBX."""
    info = Fields(INFORMATION, bytearray(SIZE))
    flags = InformationFlags.MEMORY | InformationFlags.COMMAND_LINE | InformationFlags.MODULES
    flags |= InformationFlags.MEMORY_MAP | InformationFlags.BOOT_LOADER_NAME
    info["mem_lower"] = information.lower_memory
    info["mem_upper"] = information.upper_memory
    info["cmdline"] = area.put(information.command_line + b"\0", "command line")
    info["boot_loader_name"] = area.put(information.boot_loader_name + b"\0", "boot loader name")
    info["mods_count"] = len(information.modules)
    if information.modules:
        entries = [
            _MODULE.pack(module.start, module.end, area.put(module.string + b"\0", "module string"), 0)
            for module in information.modules
        ]
        info["mods_addr"] = area.put(b"".join(entries), "module list")
    memory_map = b"".join(
        _MMAP_ENTRY.pack(_MMAP_ENTRY.size - 4, entry.address, entry.size, entry.type)
        for entry in information.memory_map
    )
    info["mmap_length"] = len(memory_map)
    info["mmap_addr"] = area.put(memory_map, "memory map")
    sections = information.sections
    if sections is not None:
        flags |= InformationFlags.ELF_SECTIONS
        info["elf_num"] = sections.count
        info["elf_size"] = sections.entry_size
        info["elf_addr"] = area.put(sections.table, "section headers")
        info["elf_shndx"] = sections.names
    if information.screen:
        flags |= InformationFlags.FRAMEBUFFER
        info["framebuffer_addr"] = TEXT_MEMORY
        info["framebuffer_pitch"] = COLUMNS * CELL
        info["framebuffer_width"] = COLUMNS
        info["framebuffer_height"] = LINES
        info["framebuffer_bpp"] = 8 * CELL
        info["framebuffer_type"] = EGA_TEXT
    info["flags"] = flags
    return area.put(info.data, "multiboot information")


# Multiboot 2

_TAG = struct.Struct("<II")
_MMAP2_ENTRY = struct.Struct("<QQII")


def place_information2(information: BootInformation, area: BootMemory) -> int:
    """Write the tags of Multiboot2 into guest memory, and answer their address, for EBX."""
    tags = [
        _tag(InformationTag.COMMAND_LINE, information.command_line + b"\0"),
        _tag(InformationTag.BOOT_LOADER_NAME, information.boot_loader_name + b"\0"),
    ]
    tags += [
        _tag(InformationTag.MODULE, struct.pack("<II", module.start, module.end) + module.string + b"\0")
        for module in information.modules
    ]
    tags.append(
        _tag(InformationTag.BASIC_MEMORY, struct.pack("<II", information.lower_memory, information.upper_memory))
    )
    memory_map = b"".join(
        _MMAP2_ENTRY.pack(entry.address, entry.size, entry.type, 0) for entry in information.memory_map
    )
    tags.append(_tag(InformationTag.MEMORY_MAP, struct.pack("<II", _MMAP2_ENTRY.size, 0) + memory_map))
    if information.screen:
        # framebuffer_addr, pitch, width, height, bpp, type, and reserved, which grub's header has as 16 bits.
        screen = struct.pack("<QIIIBBH", TEXT_MEMORY, COLUMNS * CELL, COLUMNS, LINES, 8 * CELL, EGA_TEXT, 0)
        tags.append(_tag(InformationTag.FRAMEBUFFER, screen))
    sections = information.sections
    if sections is not None:
        head = struct.pack("<III", sections.count, sections.entry_size, sections.names)
        tags.append(_tag(InformationTag.ELF_SECTIONS, head + sections.table))
    if information.rsdp is not None:
        old = len(information.rsdp) <= 20
        kind = InformationTag.ACPI_OLD_RSDP if old else InformationTag.ACPI_NEW_RSDP
        tags.append(_tag(kind, information.rsdp))
    if information.load_base is not None:
        tags.append(_tag(InformationTag.LOAD_BASE_ADDRESS, struct.pack("<I", information.load_base)))
    tags.append(_tag(InformationTag.END, b""))
    body = b"".join(tags)
    return area.put(_TAG.pack(8 + len(body), 0) + body, "multiboot information")


def _tag(kind: InformationTag, data: bytes) -> bytes:
    size = _TAG.size + len(data)
    return _TAG.pack(kind, size) + data + bytes(-size % 8)
