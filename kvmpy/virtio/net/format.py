"""What a network device and its driver say to each other (virtio 1.2, section 5.1), and what an Ethernet frame is."""

from __future__ import annotations

import ctypes
from enum import IntEnum

__all__ = [
    "HEADER_SIZE", "LEGACY_HEADER_SIZE", "LINK_UP", "LONGEST_FRAME", "LONGEST_MTU", "MAC_BYTES", "SHORTEST_FRAME",
    "SHORTEST_MTU", "NetConfig", "NetFeature", "received_header",
]  # fmt: skip

HEADER_SIZE = 12
"""struct virtio_net_hdr (section 5.1.6): le8 flags, gso_type; le16 hdr_len, gso_size, csum_start, csum_offset,
num_buffers. Without offloads all but the last are 0."""

LEGACY_HEADER_SIZE = 10
"""Section 5.1.6.1: without `num_buffers`, for legacy drivers that did not negotiate MRG_RXBUF."""

LINK_UP = 1
"""VIRTIO_NET_S_LINK_UP of `status` (section 5.1.4)."""

SHORTEST_MTU, LONGEST_MTU = 68, 65535
"""Section 5.1.4.1."""

MAC_BYTES = 6

SHORTEST_FRAME = 14
"""Bytes: two addresses and a type. Frames come without preamble, checksum and, mostly, padding."""

LONGEST_FRAME = 0x1_1000
"""Bytes. More than the longest MTU with all its headers; nobody sends more who means an Ethernet frame."""


class NetFeature(IntEnum):
    """Numbers of the feature bits (section 5.1.3)."""

    CSUM = 0
    GUEST_CSUM = 1
    CTRL_GUEST_OFFLOADS = 2
    MTU = 3
    MAC = 5
    GUEST_TSO4 = 7
    GUEST_TSO6 = 8
    GUEST_ECN = 9
    GUEST_UFO = 10
    HOST_TSO4 = 11
    HOST_TSO6 = 12
    HOST_ECN = 13
    HOST_UFO = 14
    MRG_RXBUF = 15
    STATUS = 16
    CTRL_VQ = 17
    CTRL_RX = 18
    CTRL_VLAN = 19
    GUEST_ANNOUNCE = 21
    MQ = 22
    CTRL_MAC_ADDR = 23


class NetConfig(ctypes.LittleEndianStructure):
    """struct virtio_net_config (section 5.1.4), as far as features that are offered reach."""

    _pack_ = 1
    _fields_ = (
        ("mac", ctypes.c_uint8 * MAC_BYTES),
        ("status", ctypes.c_uint16),
        ("max_virtqueue_pairs", ctypes.c_uint16),
        ("mtu", ctypes.c_uint16),
    )


def received_header(buffers: int) -> bytes:
    """The header of a frame that lies in so many buffers (section 5.1.6.4.1), with nothing offloaded."""
    return bytes(10) + buffers.to_bytes(2, "little")
