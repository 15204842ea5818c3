"""What all ACPI tables have in common: the header with its checksum, and the address of a register."""

from __future__ import annotations

import struct
from enum import IntEnum

from kvmpy.boot.checksum import with_checksum

__all__ = ["HEADER_SIZE", "OEM_ID", "AddressSpace", "port_register", "system_table"]

OEM_ID = b"KVMPY "
OEM_TABLE_ID = b"MACHINE "
OEM_REVISION = 1
CREATOR_ID = b"KVPY"
CREATOR_REVISION = 1

_HEADER = struct.Struct("<4sIBB6s8sI4sI")
HEADER_SIZE = _HEADER.size
_CHECKSUM = 9
_ADDRESS = struct.Struct("<BBBBQ")


def system_table(signature: bytes, revision: int, body: bytes | bytearray) -> bytes:
    """A table (5.2.6): the header, with the length and a checksum over everything, and `body`."""
    header = _HEADER.pack(
        signature,
        HEADER_SIZE + len(body),
        revision,
        0,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        CREATOR_ID,
        CREATOR_REVISION,
    )
    return with_checksum(header + body, _CHECKSUM)


class AddressSpace(IntEnum):
    """Where a register is (table 5.1)."""

    MEMORY = 0
    IO = 1


def port_register(port: int, size: int, access: int | None = None) -> bytes:
    """The Generic Address Structure (5.2.3.2) of `size` bytes at `port`, accessed `access` bytes at a time."""
    access_size = {1: 1, 2: 2, 4: 3}[size if access is None else access]
    return _ADDRESS.pack(AddressSpace.IO, 8 * size, 0, access_size, port)
