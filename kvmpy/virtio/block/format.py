"""What a block device and its driver say to each other (virtio 1.2, section 5.2)."""

from __future__ import annotations

import ctypes
import struct
from enum import IntEnum

__all__ = ["HEADER", "RANGE", "SECTOR", "BlockConfig", "BlockFeature", "BlockStatus", "BlockType"]

SECTOR = 512
"""Bytes. Section 5.2.5: the unit of the protocol, whatever `blk_size` says."""

HEADER = struct.Struct("<IIQ")
"""struct virtio_blk_req up to its data (section 5.2.6): type, reserved, sector."""

RANGE = struct.Struct("<QII")
"""struct virtio_blk_discard_write_zeroes (section 5.2.6): sector, number of sectors, flags."""


class BlockFeature(IntEnum):
    """Numbers of the feature bits (section 5.2.3)."""

    SIZE_MAX = 1
    SEG_MAX = 2
    GEOMETRY = 4
    RO = 5
    BLK_SIZE = 6
    FLUSH = 9
    TOPOLOGY = 10
    CONFIG_WCE = 11
    MQ = 12
    DISCARD = 13
    WRITE_ZEROES = 14
    LIFETIME = 15
    SECURE_ERASE = 16


class BlockType(IntEnum):
    """What a request asks for (section 5.2.6)."""

    IN = 0
    OUT = 1
    FLUSH = 4
    FLUSH_OUT = 5  # section 5.2.6.3: legacy, the same
    GET_ID = 8
    GET_LIFETIME = 10
    DISCARD = 11
    WRITE_ZEROES = 13
    SECURE_ERASE = 14


class BlockStatus(IntEnum):
    """How it ended (section 5.2.6)."""

    OK = 0
    IOERR = 1
    UNSUPP = 2


class BlockConfig(ctypes.LittleEndianStructure):
    """struct virtio_blk_config (section 5.2.4)."""

    _pack_ = 1
    _fields_ = (
        ("capacity", ctypes.c_uint64),  # in sectors
        ("size_max", ctypes.c_uint32),
        ("seg_max", ctypes.c_uint32),
        ("cylinders", ctypes.c_uint16),
        ("heads", ctypes.c_uint8),
        ("sectors", ctypes.c_uint8),
        ("blk_size", ctypes.c_uint32),
        ("physical_block_exp", ctypes.c_uint8),  # from here on four fields of `topology`
        ("alignment_offset", ctypes.c_uint8),
        ("min_io_size", ctypes.c_uint16),
        ("opt_io_size", ctypes.c_uint32),
        ("writeback", ctypes.c_uint8),
        ("unused0", ctypes.c_uint8),
        ("num_queues", ctypes.c_uint16),
        ("max_discard_sectors", ctypes.c_uint32),
        ("max_discard_seg", ctypes.c_uint32),
        ("discard_sector_alignment", ctypes.c_uint32),
        ("max_write_zeroes_sectors", ctypes.c_uint32),
        ("max_write_zeroes_seg", ctypes.c_uint32),
        ("write_zeroes_may_unmap", ctypes.c_uint8),
        ("unused1", ctypes.c_uint8 * 3),
        ("max_secure_erase_sectors", ctypes.c_uint32),
        ("max_secure_erase_seg", ctypes.c_uint32),
        ("secure_erase_sector_alignment", ctypes.c_uint32),
    )
