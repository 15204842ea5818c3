"""What vsock packets and the configuration space look like (virtio 1.2, section 5.10)."""

from __future__ import annotations

import ctypes
from enum import IntEnum, IntFlag
from struct import Struct

__all__ = [
    "EVENT", "HEADER", "HOST_CID", "SHUT_BOTH", "TRANSPORT_RESET", "VsockConfig", "VsockFeature", "VsockOperation",
    "VsockShutdown", "VsockType",
]  # fmt: skip

HOST_CID = 2
"""Section 5.10.4: the well-known context ID of the host."""
HEADER = Struct("<QQIIIHHIII")
"""struct virtio_vsock_hdr (5.10.6): src_cid, dst_cid, src_port, dst_port, len, type, op, flags, buf_alloc, fwd_cnt."""
EVENT = Struct("<I")
"""struct virtio_vsock_event (5.10.6.7): id."""
TRANSPORT_RESET = 0
"""The only event: communication was interrupted, as by a restore; all connections are gone."""


class VsockFeature(IntEnum):
    """Section 5.10.3."""

    STREAM = 0
    SEQPACKET = 1


class VsockType(IntEnum):
    """Section 5.10.6."""

    STREAM = 1
    SEQPACKET = 2


class VsockOperation(IntEnum):
    """What a packet is for (section 5.10.6)."""

    INVALID = 0
    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


class VsockShutdown(IntFlag):
    """Flags of a SHUTDOWN packet (section 5.10.6.5): its sender will do this no more."""

    RECEIVE = 1
    SEND = 2


SHUT_BOTH = int(VsockShutdown.RECEIVE | VsockShutdown.SEND)


class VsockConfig(ctypes.LittleEndianStructure):
    """struct virtio_vsock_config (section 5.10.4)."""

    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("guest_cid", ctypes.c_uint64),)
