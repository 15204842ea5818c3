"""All tables of a platform together, put into memory: RSDP, RSDT and XSDT, and what these point to."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvmpy.boot.acpi.dsdt import dsdt
from kvmpy.boot.acpi.fadt import facs, fadt
from kvmpy.boot.acpi.madt import madt
from kvmpy.boot.acpi.mcfg import mcfg
from kvmpy.boot.acpi.system_table import OEM_ID, system_table
from kvmpy.boot.bios_area import place_in_bios_area, place_in_reserved_memory
from kvmpy.boot.checksum import with_checksum
from kvmpy.boot.firmware_tables import PlacedTables
from kvmpy.boot.platform import FixedHardware

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmpy.boot.image import LoadedRange
    from kvmpy.boot.platform import Platform
    from kvmpy.memory import GuestMemory

__all__ = ["AcpiTables"]

ALIGNMENT = 64  # of the FACS; others have none
_RSDP = struct.Struct("<8sB6sBIIQBxxx")
_FIRST_VERSION = 20  # bytes that ACPI 1.0 had, with a checksum of their own


class AcpiTables:
    """The ACPI tables of `platform`: `FirmwareTables` for the `tables` of a kernel."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform

    def place(self, memory: GuestMemory, taken: Sequence[LoadedRange]) -> PlacedTables:
        """Write all tables into RAM; the RSDP to where operating systems look for it. Raises ImageError."""
        size = len(self._tables_at(0)[1])
        tables = place_in_reserved_memory(
            memory, taken, size, "ACPI tables", lambda address: self._tables_at(address)[1], alignment=ALIGNMENT
        )
        roots, _ = self._tables_at(tables.ranges[0].address)
        pointer = place_in_bios_area(
            memory, (*taken, *tables.ranges), _RSDP.size, "ACPI RSDP", lambda _: _root_pointer(*roots)
        )
        return PlacedTables(
            tables.ranges + pointer.ranges, tables.memory_map + pointer.memory_map, pointer.ranges[0].address
        )  # fmt: skip

    def _tables_at(self, address: int) -> tuple[tuple[int, int], bytes]:
        """The addresses of RSDT and XSDT, and the bytes of all tables but the RSDP, when they lie at `address`."""
        platform, made = self.platform, bytearray()

        def put(table: bytes) -> int:
            made.extend(bytes(-len(made) % 16))
            made.extend(table)
            return address + len(made) - len(table)

        at_facs = put(facs()) if isinstance(platform.power, FixedHardware) else 0
        at_dsdt = put(dsdt(platform))
        listed = [put(fadt(platform, dsdt=at_dsdt, facs=at_facs)), put(madt(platform))]
        if platform.pci_config is not None:
            listed.append(put(mcfg(platform.pci_config)))
        xsdt = put(system_table(b"XSDT", 1, struct.pack(f"<{len(listed)}Q", *listed)))
        rsdt = put(system_table(b"RSDT", 1, struct.pack(f"<{len(listed)}I", *listed)))
        return (rsdt, xsdt), bytes(made)

    def __repr__(self) -> str:
        return f"<AcpiTables of {len(self.platform.apic_ids)} processors>"


def _root_pointer(rsdt: int, xsdt: int) -> bytes:
    """The RSDP (5.2.5.3), revision 2."""
    pointer = _RSDP.pack(b"RSD PTR ", 0, OEM_ID, 2, rsdt, _RSDP.size, xsdt, 0)
    return with_checksum(with_checksum(pointer, 8, _FIRST_VERSION), 32)
