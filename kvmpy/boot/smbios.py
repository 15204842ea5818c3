"""SMBIOS (DMTF DSP0134, version 3.0): who made the machine, and what memory and processors it has.

Operating systems and tools (`dmidecode`) show it, and tell virtual machines by it. Only what a virtual machine knows of
itself is here; fields of a mainboard's say "unknown" as the specification has it for each.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING

from kvmpy.boot.bios_area import place_in_bios_area, place_in_reserved_memory
from kvmpy.boot.checksum import with_checksum
from kvmpy.boot.firmware_tables import PlacedTables
from kvmpy.boot.placement import ram_spans

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from uuid import UUID

    from kvmpy.boot.image import LoadedRange
    from kvmpy.boot.platform import Platform
    from kvmpy.memory import GuestMemory

__all__ = ["SmbiosTables", "StructureType"]

MAJOR, MINOR = 3, 0
MANUFACTURER, PRODUCT = "kvmpy", "virtual machine"
BIOS_DATE = "01/01/2026"  # some systems distrust what is older than the tables that they know
KIB, MIB = 1 << 10, 1 << 20
NO_CACHE, NO_ERROR_INFORMATION = 0xFFFF, 0xFFFE
UNKNOWN_WIDTH = 0xFFFF

# Section 5.2.1: anchor, checksum, length, version, largest structure, revision, formatted area; second anchor with
# checksum, length, address and count of the structures, version in BCD.
_ENTRY_2_1 = struct.Struct("<4sBBBBHB5s5sBHIHB")
_INTERMEDIATE_ANCHOR = 16
# Section 5.2.2: anchor, checksum, length, version, docrev, revision, largest size and address of the structures.
_ENTRY_3_0 = struct.Struct("<5sBBBBBBxIQ")
_SECOND_ENTRY = 32  # both begin on 16 bytes


class StructureType(IntEnum):
    """Section 7."""

    BIOS = 0
    SYSTEM = 1
    CHASSIS = 3
    PROCESSOR = 4
    MEMORY_ARRAY = 16
    MEMORY_DEVICE = 17
    MEMORY_ARRAY_ADDRESS = 19
    BOOT = 32
    END = 127


class _BiosCharacteristics(IntFlag):
    NOT_SUPPORTED = 1 << 3
    # the extension bytes
    ACPI = 1 << 0
    VIRTUAL_MACHINE = 1 << 12


class SmbiosTables:
    """The SMBIOS structures of `platform`: `FirmwareTables` for the `tables` of a kernel.

    Memory is the RAM of the guest that they are put into. `uuid` is the machine's; without one it has none.
    """

    def __init__(self, platform: Platform, *, uuid: UUID | None = None) -> None:
        self.platform = platform
        self.uuid = uuid

    def place(self, memory: GuestMemory, taken: Sequence[LoadedRange]) -> PlacedTables:
        """Write the structures into RAM, and both entry points to where they are searched for. Raises ImageError."""
        made = list(self.structures(ram_spans(memory)))
        data = b"".join(made)
        structures = place_in_reserved_memory(
            memory, taken, len(data), "SMBIOS structures", lambda _: data, alignment=16
        )  # fmt: skip
        address = structures.ranges[0].address
        entries = _entry_2_1(made, address).ljust(_SECOND_ENTRY, b"\0") + _entry_3_0(len(data), address)
        entry = place_in_bios_area(
            memory, (*taken, *structures.ranges), len(entries), "SMBIOS entry points", lambda _: entries
        )
        return PlacedTables(structures.ranges + entry.ranges, structures.memory_map + entry.memory_map)

    def for_firmware(self, memory: GuestMemory) -> tuple[bytes, bytes]:
        """An entry point without address, and the structures: for a firmware that puts them where it likes."""
        made = list(self.structures(ram_spans(memory)))
        return _entry_2_1(made, 0), b"".join(made)

    def structures(self, ram: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """All structures of a guest with this RAM, (start, end) each, numbered from 0 on: that is their handle."""
        parts = [self._bios(), self._system(), self._chassis(), self._processor()]
        array = len(parts)  # its handle: they are numbered
        parts.append(self._memory_array(ram))
        parts += [self._memory_device(number, end - start, array) for number, (start, end) in enumerate(ram)]
        parts += [self._memory_array_address(start, end, array) for start, end in ram]
        parts += [(StructureType.BOOT, bytes(7), ()), (StructureType.END, b"", ())]
        for handle, (kind, body, strings) in enumerate(parts):
            yield _structure(kind, handle, body, strings)

    def _bios(self) -> _Part:
        body = struct.pack(
            "<BBHBBQHBBBBH", 1, 0, 0, 2, 0, _BiosCharacteristics.NOT_SUPPORTED,
            _BiosCharacteristics.ACPI | _BiosCharacteristics.VIRTUAL_MACHINE, 0xFF, 0xFF, 0xFF, 0xFF, 0,
        )  # fmt: skip
        return StructureType.BIOS, body, (MANUFACTURER, BIOS_DATE)

    def _system(self) -> _Part:
        power_switch = 6
        identity = bytes(16) if self.uuid is None else self.uuid.bytes_le
        body = struct.pack("<BBBB16sBBB", 1, 2, 0, 0, identity, power_switch, 0, 0)
        return StructureType.SYSTEM, body, (MANUFACTURER, PRODUCT)

    def _chassis(self) -> _Part:
        other, safe, no_security = 1, 3, 3
        body = struct.pack("<BBBBBBBBBIBBBBB", 1, other, 0, 0, 0, safe, safe, safe, no_security, 0, 0, 0, 0, 0, 0)
        return StructureType.CHASSIS, body, (MANUFACTURER,)

    def _processor(self) -> _Part:
        """One socket with all processors, each a core."""
        central, other, populated_and_enabled, capable_of_64_bits, several_cores = 3, 1, 0x41, 1 << 2, 1 << 3
        cores = len(self.platform.apic_ids)
        short = min(cores, 0xFF)
        body = struct.pack(
            "<BBBBIIBBHHHBBHHHBBBBBBHHHHH", 1, central, other, 2, self.platform.signature, self.platform.features,
            0, 0, 0, 0, 0, populated_and_enabled, other, NO_CACHE, NO_CACHE, NO_CACHE, 0, 0, 0,
            short, short, short, capable_of_64_bits | (several_cores if cores > 1 else 0), other, cores, cores, cores,
        )  # fmt: skip
        return StructureType.PROCESSOR, body, ("CPU 0", MANUFACTURER)

    def _memory_array(self, ram: Sequence[tuple[int, int]]) -> _Part:
        system_board, system_memory, no_correction, too_large = 3, 3, 3, 0x8000_0000
        size = sum(end - start for start, end in ram)
        kib = size // KIB
        body = struct.pack(
            "<BBBIHHQ", system_board, system_memory, no_correction, min(kib, too_large), NO_ERROR_INFORMATION,
            len(ram), size if kib >= too_large else 0,
        )  # fmt: skip
        return StructureType.MEMORY_ARRAY, body, ()

    def _memory_device(self, number: int, size: int, array: int) -> _Part:
        """The size is in MiB, or below 32 MiB in KiB."""
        dimm, ram, other = 9, 7, 1 << 1
        mib, kilobytes, too_large = size // MIB, 1 << 15, 0x7FFF
        length = kilobytes | size // KIB if size < 32 * MIB else min(mib, too_large)
        body = struct.pack(
            "<HHHHHBBBBBHHBBBBBIHHHH", array, NO_ERROR_INFORMATION, UNKNOWN_WIDTH, UNKNOWN_WIDTH, length, dimm, 0, 1,
            0, ram, other, 0, 0, 0, 0, 0, 0, mib if length == too_large else 0, 0, 0, 0, 0,
        )  # fmt: skip
        return StructureType.MEMORY_DEVICE, body, (f"RAM {number}",)

    def _memory_array_address(self, start: int, end: int, array: int) -> _Part:
        first, last, beyond = start // KIB, (end - 1) // KIB, 0xFFFF_FFFF
        if last >= beyond:
            body = struct.pack("<IIHBQQ", beyond, beyond, array, 1, start, end - 1)
        else:
            body = struct.pack("<IIHBQQ", first, last, array, 1, 0, 0)
        return StructureType.MEMORY_ARRAY_ADDRESS, body, ()

    def __repr__(self) -> str:
        return f"<SmbiosTables of {len(self.platform.apic_ids)} processors>"


_Part = tuple[StructureType, bytes, tuple[str, ...]]
"""A structure: its type, its fields behind the header, and its strings, which fields name by their number from 1."""


def _structure(kind: StructureType, handle: int, body: bytes, strings: tuple[str, ...]) -> bytes:
    """Section 6.1: the header, the formatted fields, and the strings with a zero byte after each and after all."""
    texts = b"".join(text.encode() + b"\0" for text in strings) or b"\0"
    return struct.pack("<BBH", kind, 4 + len(body), handle) + body + texts + b"\0"


def _entry_2_1(structures: Sequence[bytes], address: int) -> bytes:
    largest, size = max(map(len, structures)), sum(map(len, structures))
    entry = _ENTRY_2_1.pack(
        b"_SM_", 0, _ENTRY_2_1.size, MAJOR, MINOR, largest, 0, bytes(5), b"_DMI_", 0, size, address, len(structures),
        MAJOR << 4 | MINOR,
    )  # fmt: skip
    inner = with_checksum(entry[_INTERMEDIATE_ANCHOR:], 5)
    return with_checksum(entry[:_INTERMEDIATE_ANCHOR] + inner, 4)


def _entry_3_0(size: int, address: int) -> bytes:
    return with_checksum(_ENTRY_3_0.pack(b"_SM3_", 0, _ENTRY_3_0.size, MAJOR, MINOR, 0, 1, size, address), 5)
