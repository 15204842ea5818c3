"""The MADT (ACPI 6.5, section 5.2.12): processors and interrupt controllers."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import TYPE_CHECKING

from kvmpy.boot.acpi.system_table import system_table
from kvmpy.boot.platform import IOAPIC_ADDRESS, IOAPIC_ID, LOCAL_APIC_ADDRESS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmpy.boot.platform import Platform

__all__ = ["ControllerType", "madt"]

REVISION = 5
PCAT_COMPAT = 1  # there are two 8259 PICs too
ENABLED = 1
EVERY_PROCESSOR, EVERY_PROCESSOR_X2 = 0xFF, 0xFFFF_FFFF
LINT1 = 1
FIRST_X2APIC_ID = 0xFF
ISA = 0
LEVEL_ACTIVE_HIGH = 0b1101


class ControllerType(IntEnum):
    """Type of an interrupt controller structure (table 5.21)."""

    LOCAL_APIC = 0
    IOAPIC = 1
    INTERRUPT_SOURCE_OVERRIDE = 2
    LOCAL_APIC_NMI = 4
    LOCAL_X2APIC = 9
    LOCAL_X2APIC_NMI = 10


def madt(platform: Platform) -> bytes:
    """The MADT of `platform`. The ACPI processor UID is the place in `apic_ids`."""
    entries = b"".join(bytes([kind, 2 + len(body)]) + body for kind, body in _controllers(platform))
    return system_table(b"APIC", REVISION, struct.pack("<II", LOCAL_APIC_ADDRESS, PCAT_COMPAT) + entries)


def _controllers(platform: Platform) -> Iterator[tuple[ControllerType, bytes]]:
    for uid, apic_id in enumerate(platform.apic_ids):
        if apic_id < FIRST_X2APIC_ID:
            yield ControllerType.LOCAL_APIC, struct.pack("<BBI", uid, apic_id, ENABLED)
        else:
            yield ControllerType.LOCAL_X2APIC, struct.pack("<2xIII", apic_id, ENABLED, uid)
    yield ControllerType.IOAPIC, struct.pack("<BxII", IOAPIC_ID, IOAPIC_ADDRESS, 0)
    # An ISA interrupt goes to the input of its number, on an edge, unless said otherwise.
    if platform.sci is not None:
        sci = platform.sci
        yield ControllerType.INTERRUPT_SOURCE_OVERRIDE, struct.pack("<BBIH", ISA, sci, sci, LEVEL_ACTIVE_HIGH)
    yield ControllerType.LOCAL_APIC_NMI, struct.pack("<BHB", EVERY_PROCESSOR, 0, LINT1)
    if max(platform.apic_ids) >= FIRST_X2APIC_ID:
        yield ControllerType.LOCAL_X2APIC_NMI, struct.pack("<HIB3x", 0, EVERY_PROCESSOR_X2, LINT1)
