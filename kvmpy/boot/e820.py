"""The memory map of a PC, as INT 15h, AX=E820h reports it (ACPI specification, "System Address Map Interfaces").

Linux (boot_params), multiboot kernels and PVH all take it in this form, with the same types.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import TYPE_CHECKING

from kvmpy._value import frozen
from kvmpy.boot.image import LoadedRange
from kvmpy.boot.placement import ram_spans

if TYPE_CHECKING:
    from kvmpy.memory import GuestMemory

__all__ = ["BIOS_HOLE", "E820Entry", "E820Type", "e820_map"]

EXTENDED_BIOS_DATA = 0x9_FC00
"""The last KiB below 640 KiB: there operating systems look for an MP table and the RSDP, so it is not theirs."""
VIDEO_MEMORY = 0xA_0000
"""From here to `BIOS` are video memory and option ROMs: no part of the map, as on a PC."""
BIOS = 0xF_0000
ONE_MIB = 0x10_0000

BIOS_HOLE = LoadedRange(EXTENDED_BIOS_DATA, ONE_MIB - EXTENDED_BIOS_DATA, "BIOS")
"""What is not for a kernel below 1 MiB, and so nothing for a boot loader either."""


class E820Type(IntEnum):
    """What an address range is (ACPI specification, table "Address Range Types")."""

    RAM = 1
    RESERVED = 2
    ACPI = 3  # RAM that is free when the operating system has read the ACPI tables in it
    NVS = 4
    UNUSABLE = 5
    DISABLED = 6
    PERSISTENT = 7


@frozen
class E820Entry:
    """`size` bytes from guest-physical `address` on, of one type."""

    address: int
    size: int
    type: int = E820Type.RAM

    @property
    def end(self) -> int:
        """The first address behind the range."""
        return self.address + self.size


def e820_map(memory: GuestMemory, reserved: Iterable[E820Entry] = ()) -> list[E820Entry]:
    """The map of a guest: its RAM without what a PC has between 0x9fc00 and 1 MiB, its ROM, and `reserved`.

    The entries are in order of address, do not overlap, and adjacent ones of one type are one. An entry of `reserved`
    wins over what was at its place.
    """
    ranges: list[tuple[int, int, int | None]] = [(start, end, E820Type.RAM) for start, end in ram_spans(memory)]
    if any(start < ONE_MIB and end > EXTENDED_BIOS_DATA for start, end, _ in ranges):
        ranges = _put(ranges, EXTENDED_BIOS_DATA, VIDEO_MEMORY, E820Type.RESERVED)
        ranges = _put(ranges, VIDEO_MEMORY, BIOS, None)
        ranges = _put(ranges, BIOS, ONE_MIB, E820Type.RESERVED)
    for region in memory.regions:
        if region.read_only:
            ranges = _put(ranges, region.address, region.end, E820Type.RESERVED)
    for entry in reserved:
        ranges = _put(ranges, entry.address, entry.end, entry.type)
    found: list[E820Entry] = []
    for start, end, kind in ranges:
        if kind is None:
            continue
        if found and found[-1].end == start and found[-1].type == kind:
            start = found.pop().address
        found.append(E820Entry(start, end - start, kind))
    return found


def _put(
    ranges: list[tuple[int, int, int | None]], start: int, end: int, kind: int | None
) -> list[tuple[int, int, int | None]]:
    """`ranges` with start..end taken out of them, and put in as `kind`."""
    if start >= end:
        return ranges
    kept = [(start, end, kind)]
    for other_start, other_end, other in ranges:
        if other_start < min(other_end, start):
            kept.append((other_start, min(other_end, start), other))
        if max(other_start, end) < other_end:
            kept.append((max(other_start, end), other_end, other))
    return sorted(kept, key=lambda span: span[:2])
