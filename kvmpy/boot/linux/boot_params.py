"""struct boot_params, the "zero page": what a boot loader tells a Linux kernel by the 32- and 64-bit protocols.

Names and offsets are those of Documentation/arch/x86/zero-page.rst and of the boot protocol document.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from kvmpy._value import frozen
from kvmpy.boot.field_table import Fields
from kvmpy.boot.linux.setup_header import SETUP_HEADER, START

if TYPE_CHECKING:
    from kvmpy.boot.boot_memory import BootMemory
    from kvmpy.boot.e820 import E820Entry
    from kvmpy.boot.linux.setup_header import SetupHeader

__all__ = ["BOOT_PARAMS", "BootParams", "SetupData", "place_setup_data"]

SIZE = 0x1000

BOOT_PARAMS = {
    # screen_info, at 0x000, stays zero: there is no screen that a BIOS has set up.
    "acpi_rsdp_addr": (0x070, 8),
    "ext_ramdisk_image": (0x0C0, 4),
    "ext_ramdisk_size": (0x0C4, 4),
    "ext_cmd_line_ptr": (0x0C8, 4),
    "e820_entries": (0x1E8, 1),
    "sentinel": (0x1EF, 1),
    **SETUP_HEADER,
}

E820_TABLE = 0x2D0
E820_LIMIT = 128  # E820_MAX_ENTRIES_ZEROPAGE
SETUP_E820_EXT = 1


@frozen
class SetupData:
    """A node of the list setup_data: `type` is a SETUP_... number of the kernel's asm/setup_data.h.

    SETUP_RNG_SEED (9) gives the kernel entropy, SETUP_DTB (2) a device tree.
    """

    type: int
    data: bytes


class BootParams(Fields):
    """boot_params under construction: zero, up to what is filled in."""

    def __init__(self) -> None:
        super().__init__(BOOT_PARAMS, bytearray(SIZE))

    def set_header(self, header: SetupHeader) -> None:
        """Put the setup header in its place, and nothing of the setup code around it (which would set `sentinel`)."""
        self.data[START : START + len(header.data)] = header.data

    def set_e820(self, entries: Sequence[E820Entry]) -> list[SetupData]:
        """Fill the memory map in. Entries beyond the 128 for which there is room are answered as setup_data."""
        for index, entry in enumerate(entries[:E820_LIMIT]):
            E820_ENTRY.pack_into(self.data, E820_TABLE + E820_ENTRY.size * index, entry.address, entry.size, entry.type)
        self["e820_entries"] = min(len(entries), E820_LIMIT)
        more = [E820_ENTRY.pack(entry.address, entry.size, entry.type) for entry in entries[E820_LIMIT:]]
        return [SetupData(SETUP_E820_EXT, b"".join(more))] if more else []


E820_ENTRY = struct.Struct("<QQI")
_NODE = struct.Struct("<QII")


def place_setup_data(nodes: Iterable[SetupData], following: int, area: BootMemory) -> int:
    """Write a list of struct setup_data into guest memory; `following` is a list that is there already, or 0.

    Answers the address of the first node: what the header's field setup_data must hold.
    """
    first = following
    for node in reversed(list(nodes)):
        first = area.put(_NODE.pack(first, node.type, len(node.data)) + node.data, "setup_data")
    return first
