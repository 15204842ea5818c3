"""The MP table: processors, buses and interrupt inputs as the Intel MultiProcessor Specification 1.4 has them.

Operating systems without ACPI, or that were told not to use it, find their processors by it.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING

from kvmpy.boot.bios_area import place_in_base_memory
from kvmpy.boot.checksum import with_checksum
from kvmpy.boot.platform import (
    CASCADE_IRQ,
    IOAPIC_ADDRESS,
    IOAPIC_ID,
    IOAPIC_VERSION,
    ISA_IRQS,
    LOCAL_APIC_ADDRESS,
    LOCAL_APIC_VERSION,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvmpy.boot.firmware_tables import PlacedTables
    from kvmpy.boot.image import LoadedRange
    from kvmpy.boot.platform import Platform
    from kvmpy.memory import GuestMemory

__all__ = ["EntryType", "InterruptType", "MpTable", "ProcessorFlags"]

REVISION = 4  # of specification 1.4
OEM_ID = b"KVMPY   "
PRODUCT_ID = b"MACHINE     "

# Section 4.1: signature, address of the configuration table, length in paragraphs, revision, checksum, five features.
# The second feature byte has the IMCR bit: zero, the PICs are wired to the first processor (virtual wire mode).
FLOATING_POINTER = struct.Struct("<4sIBBB5s")
# Section 4.2: signature, length, revision, checksum, OEM id, product id, OEM table and its size, entries, address of
# the local APICs, length and checksum of the extended table, reserved.
HEADER = struct.Struct("<4sHBB8s12sIHHIHBx")
PROCESSOR = struct.Struct("<BBBBII8x")
BUS = struct.Struct("<BB6s")
IOAPIC = struct.Struct("<BBBBI")
INTERRUPT = struct.Struct("<BBHBBBB")

EVERY_LOCAL_APIC = 0xFF
LARGEST_APIC_ID = 0xFE
USABLE = 1


class EntryType(IntEnum):
    """What an entry of the configuration table describes (section 4.3)."""

    PROCESSOR = 0
    BUS = 1
    IOAPIC = 2
    IO_INTERRUPT = 3
    LOCAL_INTERRUPT = 4


class ProcessorFlags(IntFlag):
    """CPU flags of a processor entry."""

    ENABLED = 1 << 0
    BOOT_PROCESSOR = 1 << 1


class InterruptType(IntEnum):
    """What comes in at an interrupt input (table 4-10)."""

    INT = 0
    NMI = 1
    SMI = 2
    EXT_INT = 3  # the vector comes from a PIC


class InterruptFlags(IntFlag):
    """Polarity and trigger mode; zero is as the bus has it: ISA active high, on an edge."""

    ACTIVE_HIGH = 1
    LEVEL = 3 << 2


class MpTable:
    """The MP table of `platform`: `FirmwareTables` for the `tables` of a kernel.

    Processors whose APIC id has more than eight bits, or is 255, are left out: the specification cannot say them.
    """

    def __init__(self, platform: Platform) -> None:
        self.platform = platform

    def place(self, memory: GuestMemory, taken: Sequence[LoadedRange]) -> PlacedTables:
        """Write floating pointer and configuration table to where operating systems look. Raises ImageError."""
        size = FLOATING_POINTER.size + len(self.configuration())
        return place_in_base_memory(memory, taken, size, "MP table", self._all_at)

    def _all_at(self, address: int) -> bytes:
        pointer = FLOATING_POINTER.pack(b"_MP_", address + FLOATING_POINTER.size, 1, REVISION, 0, bytes(5))
        return with_checksum(pointer, 10) + self.configuration()

    def configuration(self) -> bytes:
        """The MP configuration table."""
        entries = list(self._entries())
        body = b"".join(entries)
        header = HEADER.pack(
            b"PCMP", HEADER.size + len(body), REVISION, 0, OEM_ID, PRODUCT_ID, 0, 0, len(entries),
            LOCAL_APIC_ADDRESS, 0, 0,
        )  # fmt: skip
        return with_checksum(header + body, 7)

    def _entries(self) -> Iterator[bytes]:
        """In order of their types, as section 4.3 wants it."""
        platform = self.platform
        for place, apic_id in enumerate(platform.apic_ids):
            if apic_id <= LARGEST_APIC_ID:
                flags = ProcessorFlags.ENABLED | (0 if place else ProcessorFlags.BOOT_PROCESSOR)
                yield PROCESSOR.pack(
                    EntryType.PROCESSOR, apic_id, LOCAL_APIC_VERSION, flags, platform.signature, platform.features
                )
        buses = [b"PCI   ", b"ISA   "] if platform.pci else [b"ISA   "]  # PCI bus 0 is bus 0 here too
        for number, name in enumerate(buses):
            yield BUS.pack(EntryType.BUS, number, name)
        yield IOAPIC.pack(EntryType.IOAPIC, IOAPIC_ID, IOAPIC_VERSION, USABLE, IOAPIC_ADDRESS)
        isa = len(buses) - 1
        for irq in range(ISA_IRQS):
            if irq != CASCADE_IRQ:
                yield INTERRUPT.pack(
                    EntryType.IO_INTERRUPT, InterruptType.INT, self._flags(irq), isa, irq, IOAPIC_ID, irq
                )  # fmt: skip
        # Each processor's LINT0 is wired to the PICs, its LINT1 to NMI.
        for line, kind in enumerate((InterruptType.EXT_INT, InterruptType.NMI)):
            yield INTERRUPT.pack(EntryType.LOCAL_INTERRUPT, kind, 0, isa, 0, EVERY_LOCAL_APIC, line)

    def _flags(self, irq: int) -> int:
        return int(InterruptFlags.ACTIVE_HIGH | InterruptFlags.LEVEL) if irq == self.platform.sci else 0

    def __repr__(self) -> str:
        return f"<MpTable of {len(self.platform.apic_ids)} processors>"
