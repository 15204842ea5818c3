"""The MCFG (PCI Firmware Specification 3.2, 4.1.2): where PCI configuration space is in memory."""

from __future__ import annotations

import struct

from kvmpy.boot.acpi.system_table import system_table

__all__ = ["mcfg"]

REVISION = 1
BUS_SIZE = 1 << 20


def mcfg(address: int, last_bus: int = 0xFF) -> bytes:
    """One allocation: buses 0 to `last_bus` of segment 0, 1 MiB each from `address` on."""
    return system_table(b"MCFG", REVISION, bytes(8) + struct.pack("<QHBB4x", address, 0, 0, last_bus))
