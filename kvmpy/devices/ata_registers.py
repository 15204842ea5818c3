"""What the registers and commands of an ATA disk are called, and the data by which it introduces itself.

Source: ATA/ATAPI-6 (T13 1410D), clauses 7 (registers), 8 (commands) and 8.15 (IDENTIFY DEVICE).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum, IntFlag

__all__ = [
    "CONTROL", "COUNT", "DATA", "DEVICE", "ERROR", "EXTENDED", "FLUSHES", "IN_BLOCKS", "LBA_HIGH", "LBA_LOW", "LBA_MID",
    "MULTIPLE_LIMIT", "READS", "SECTOR", "STATUS", "VERIFIES", "WITHOUT_EFFECT", "WRITES", "Command", "Control",
    "DeviceBits", "Error", "Status", "address_28", "address_48", "identify_data",
]  # fmt: skip

DATA, ERROR, COUNT, LBA_LOW, LBA_MID, LBA_HIGH, DEVICE, STATUS = range(8)  # from port 0x1F0 on
CONTROL = 8  # port 0x3F6

SECTOR = 512
HEADS, TRACK = 16, 63
"""The translation of cylinder, head and sector that old drivers use."""
MULTIPLE_LIMIT = 16
"""The most sectors of a block of READ MULTIPLE and WRITE MULTIPLE."""
MOST_SECTORS_28 = (1 << 28) - 1


class Status(IntFlag):
    """Port 0x1F7, read, and 0x3F6, read (7.15)."""

    ERR = 1 << 0  # the Error register says what
    DRQ = 1 << 3  # data waits to be read, or to be written
    DSC = 1 << 4  # obsolete, and still looked for: the heads are where they should be
    DF = 1 << 5
    DRDY = 1 << 6
    BSY = 1 << 7


class Error(IntFlag):
    """Port 0x1F1, read (7.9), when ERR is set."""

    ABRT = 1 << 2  # the command is not known, or cannot be done
    IDNF = 1 << 4  # no such sector
    UNC = 1 << 6  # the data could not be read


class Control(IntFlag):
    """Port 0x3F6, written (7.8)."""

    NIEN = 1 << 1  # no interrupts
    SRST = 1 << 2  # resets while it is set
    HOB = 1 << 7  # shows the values written to the registers before the last ones


class DeviceBits(IntFlag):
    """Port 0x1F6 (7.7)."""

    DEV = 1 << 4  # device 1, which is not there
    LBA = 1 << 6


class Command(IntEnum):
    """Port 0x1F7, written (clause 8)."""

    RECALIBRATE = 0x10
    READ_SECTORS = 0x20
    READ_SECTORS_NO_RETRY = 0x21
    READ_SECTORS_EXT = 0x24
    READ_MULTIPLE_EXT = 0x29
    WRITE_SECTORS = 0x30
    WRITE_SECTORS_NO_RETRY = 0x31
    WRITE_SECTORS_EXT = 0x34
    WRITE_MULTIPLE_EXT = 0x39
    READ_VERIFY = 0x40
    READ_VERIFY_NO_RETRY = 0x41
    READ_VERIFY_EXT = 0x42
    SEEK = 0x70
    EXECUTE_DEVICE_DIAGNOSTIC = 0x90
    INITIALIZE_DEVICE_PARAMETERS = 0x91
    READ_MULTIPLE = 0xC4
    WRITE_MULTIPLE = 0xC5
    SET_MULTIPLE_MODE = 0xC6
    STANDBY_IMMEDIATE = 0xE0
    IDLE_IMMEDIATE = 0xE1
    STANDBY = 0xE2
    IDLE = 0xE3
    CHECK_POWER_MODE = 0xE5
    FLUSH_CACHE = 0xE7
    FLUSH_CACHE_EXT = 0xEA
    IDENTIFY_DEVICE = 0xEC
    SET_FEATURES = 0xEF


READS = frozenset({
    Command.READ_SECTORS, Command.READ_SECTORS_NO_RETRY, Command.READ_SECTORS_EXT, Command.READ_MULTIPLE,
    Command.READ_MULTIPLE_EXT,
})  # fmt: skip
WRITES = frozenset({
    Command.WRITE_SECTORS, Command.WRITE_SECTORS_NO_RETRY, Command.WRITE_SECTORS_EXT, Command.WRITE_MULTIPLE,
    Command.WRITE_MULTIPLE_EXT,
})  # fmt: skip
VERIFIES = frozenset({Command.READ_VERIFY, Command.READ_VERIFY_NO_RETRY, Command.READ_VERIFY_EXT})
FLUSHES = frozenset({Command.FLUSH_CACHE, Command.FLUSH_CACHE_EXT})
WITHOUT_EFFECT = frozenset({
    Command.RECALIBRATE, Command.SEEK, Command.INITIALIZE_DEVICE_PARAMETERS, Command.STANDBY_IMMEDIATE,
    Command.IDLE_IMMEDIATE, Command.STANDBY, Command.IDLE,
})  # fmt: skip
IN_BLOCKS = frozenset({
    Command.READ_MULTIPLE, Command.READ_MULTIPLE_EXT, Command.WRITE_MULTIPLE, Command.WRITE_MULTIPLE_EXT,
})  # fmt: skip
"""Those that move as many sectors at once as SET MULTIPLE MODE has said."""
EXTENDED = frozenset({
    Command.READ_SECTORS_EXT, Command.READ_MULTIPLE_EXT, Command.WRITE_SECTORS_EXT, Command.WRITE_MULTIPLE_EXT,
    Command.READ_VERIFY_EXT,
})  # fmt: skip
"""Those whose address has 48 bits."""


def identify_data(sectors: int, model: str, serial: str, firmware: str, multiple: int, write_cache: bool) -> bytes:
    """The 512 bytes of IDENTIFY DEVICE for a disk of so many sectors; `multiple` is the present block size, or 0."""
    words = [0] * 256
    cylinders = min(max(sectors // (HEADS * TRACK), 1), 16383)
    words[0] = 1 << 6  # a fixed disk
    words[1] = words[54] = cylinders
    words[3] = words[55] = HEADS
    words[6] = words[56] = TRACK
    words[10:20] = _text(serial, 20)
    words[23:27] = _text(firmware, 8)
    words[27:47] = _text(model, 40)
    words[47] = 0x8000 | MULTIPLE_LIMIT
    words[49] = 1 << 9 | 1 << 11  # LBA; IORDY. No DMA.
    words[50] = 1 << 14
    words[51] = 2 << 8
    words[53] = 1 << 0 | 1 << 1  # words 54 to 58 and 64 to 70 are valid
    words[57:59] = _two_words(cylinders * HEADS * TRACK)
    words[59] = 0x100 | multiple if multiple else 0
    words[60:62] = _two_words(min(sectors, MOST_SECTORS_28))
    words[64] = 0b11  # PIO modes 3 and 4
    words[65:69] = [120] * 4  # cycle times, in nanoseconds
    words[80] = 1 << 4 | 1 << 5 | 1 << 6  # ATA/ATAPI-4, -5 and -6
    words[82] = 1 << 5 | 1 << 14  # write cache, NOP
    words[83] = 1 << 10 | 1 << 12 | 1 << 13 | 1 << 14  # 48-bit addresses, FLUSH CACHE, FLUSH CACHE EXT
    words[84] = 1 << 14
    words[85] = write_cache << 5 | 1 << 14
    words[86] = 1 << 10 | 1 << 12 | 1 << 13
    words[87] = 1 << 14
    words[93] = 1 << 14 | 1 << 0 | 1 << 1 | 1 << 3  # the result of the reset: device 0, passed
    words[100:104] = [sectors >> 16 * place & 0xFFFF for place in range(4)]
    data = struct.pack("<255H", *words[:255]) + b"\xa5"  # the signature of the checksum
    return data + bytes([-sum(data) & 0xFF])


def address_28(registers: Sequence[int], device: int) -> tuple[int, int]:
    """The first sector, and how many, of a command with 28 bits of address; -1 for a sector 0 of a track."""
    count, low, mid, high = registers[COUNT:DEVICE]
    if device & DeviceBits.LBA:
        sector = (device & 0xF) << 24 | high << 16 | mid << 8 | low
    else:
        sector = ((high << 8 | mid) * HEADS + (device & 0xF)) * TRACK + low - 1 if 1 <= low <= TRACK else -1
    return sector, count or 0x100


def address_48(registers: Sequence[int], before: Sequence[int]) -> tuple[int, int]:
    """The same for one with 48 bits, whose upper halves were written `before`."""
    halves = (before[LBA_HIGH], before[LBA_MID], before[LBA_LOW], *reversed(registers[LBA_LOW:DEVICE]))
    return int.from_bytes(bytes(halves), "big"), (before[COUNT] << 8 | registers[COUNT]) or 0x10000


def _text(text: str, length: int) -> list[int]:
    """ATA strings have their first character in the upper half of the word."""
    return list(struct.unpack(f">{length // 2}H", text.encode("ascii", "replace")[:length].ljust(length)))


def _two_words(value: int) -> list[int]:
    return [value & 0xFFFF, value >> 16]
