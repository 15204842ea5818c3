"""PVH, the direct boot of Xen, which Linux takes on other hypervisors too: its ELF note, and start_info.

Xen, docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h; the note's number is in public/elfnote.h.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvmpy.boot.field_table import Fields
from kvmpy.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvmpy.boot.boot_memory import BootMemory
    from kvmpy.boot.e820 import E820Entry
    from kvmpy.boot.elf.image import ElfImage

__all__ = ["START_INFO", "Module", "find_entry", "place_start_info"]

PT_NOTE = 4
XEN_ELFNOTE_PHYS32_ENTRY = 18
_NOTE = struct.Struct("<III")
_NOTES_LIMIT = 1 << 20
"""Bytes of notes that are looked through; a kernel has less than 1 KiB."""

MAGIC = 0x336E_C578  # "xEn3" with the 0x80 bit of the "E" set
START_INFO = {
    "magic": (0, 4),
    "version": (4, 4),
    "flags": (8, 4),
    "nr_modules": (12, 4),
    "modlist_paddr": (16, 8),
    "cmdline_paddr": (24, 8),
    "rsdp_paddr": (32, 8),
    "memmap_paddr": (40, 8),
    "memmap_entries": (48, 4),
    "reserved": (52, 4),
}
SIZE = 56
_MODULE = struct.Struct("<QQQQ")  # paddr, size, cmdline_paddr, reserved
_MEMORY_MAP_ENTRY = struct.Struct("<QQII")  # addr, size, type, reserved

Module = tuple[int, int]
"""Address and size."""


def find_entry(image: ElfImage) -> int:
    """The 32-bit entry point that the note XEN_ELFNOTE_PHYS32_ENTRY names. Raises ImageError without one."""
    for name, kind, description, offset in _notes(image):
        if name == b"Xen\0" and kind == XEN_ELFNOTE_PHYS32_ENTRY:
            if len(description) not in (4, 8):
                raise ImageError(
                    f"the note XEN_ELFNOTE_PHYS32_ENTRY has {len(description)} bytes, not 4 or 8",
                    image.source.name, offset,
                )  # fmt: skip
            entry = int.from_bytes(description, "little")
            if entry >> 32 or not any(
                segment.address <= entry < segment.address + segment.size for segment in image.segments
            ):
                raise ImageError(
                    f"XEN_ELFNOTE_PHYS32_ENTRY is {entry:#x}, in no segment below 4 GiB", image.source.name, offset
                )
            return entry
    raise ImageError(
        f"has no ELF note XEN_ELFNOTE_PHYS32_ENTRY ({XEN_ELFNOTE_PHYS32_ENTRY}), so no PVH entry; Linux has one when "
        "it is configured with CONFIG_PVH", image.source.name,
    )  # fmt: skip


def _notes(image: ElfImage) -> Iterator[tuple[bytes, int, bytes, int]]:
    """(name, type, description, offset in the file) of all notes (System V gABI, chapter 5, "Note Section")."""
    left = _NOTES_LIMIT
    for header in image.program_headers:
        if header.type != PT_NOTE:
            continue
        header.check(image.source)
        left -= header.filesz
        if left < 0:
            raise header.refusal(image.source, "p_filesz", f"{header.filesz:#x}: more notes than a kernel has")
        data = image.source.read(header.offset, header.filesz, "the notes")
        alignment = 8 if header.align == 8 else 4
        position = 0
        while position + _NOTE.size <= len(data):
            name_size, description_size, kind = _NOTE.unpack_from(data, position)
            start = position + _NOTE.size
            description = position + (_NOTE.size + name_size + alignment - 1 & -alignment)
            end = description + description_size
            if end > len(data):
                raise ImageError("a note ends behind its segment", image.source.name, header.offset + position)
            yield data[start : start + name_size], kind, data[description:end], header.offset + position
            position = end + alignment - 1 & -alignment


def place_start_info(
    area: BootMemory, cmdline: int, modules: Sequence[Module], memory_map: Sequence[E820Entry], rsdp: int
) -> int:
    """Write hvm_start_info, version 1, into guest memory and answer its address, for EBX.

    `cmdline` is the address of the command line, `rsdp` that of the RSDP or 0.
    """
    info = Fields(START_INFO, bytearray(SIZE))
    info["magic"] = MAGIC
    info["version"] = 1
    info["cmdline_paddr"] = cmdline
    info["rsdp_paddr"] = rsdp
    if modules:
        info["nr_modules"] = len(modules)
        entries = b"".join(_MODULE.pack(address, size, 0, 0) for address, size in modules)
        info["modlist_paddr"] = area.put(entries, "module list")
    entries = b"".join(_MEMORY_MAP_ENTRY.pack(entry.address, entry.size, entry.type, 0) for entry in memory_map)
    info["memmap_paddr"] = area.put(entries, "memory map")
    info["memmap_entries"] = len(memory_map)
    return area.put(info.data, "start_info")
