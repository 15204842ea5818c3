"""Features and device status: what driver and device agree on, and how far they are (virtio 1.2, sections 2.1, 2.2, 6).

"virtio 1.2" is the OASIS standard "Virtual I/O Device (VIRTIO) Version 1.2"; sections are cited by its numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum, IntFlag

__all__ = ["DeviceStatus", "Feature", "bits_of", "mask_of"]


class DeviceStatus(IntFlag):
    """The device status field (section 2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    DEVICE_NEEDS_RESET = 64
    FAILED = 128


class Feature(IntEnum):
    """Numbers of the feature bits that belong to the queues and to the protocol (section 6); 0 to 23 are the device's.

    None of them reaches beyond 63 (section 2.2: 50 to 127 are the device's again, or reserved).
    """

    NOTIFY_ON_EMPTY = 24  # legacy only
    ANY_LAYOUT = 27  # legacy only
    INDIRECT_DESC = 28
    EVENT_IDX = 29
    VERSION_1 = 32
    ACCESS_PLATFORM = 33
    RING_PACKED = 34
    IN_ORDER = 35
    ORDER_PLATFORM = 36
    SR_IOV = 37
    NOTIFICATION_DATA = 38
    NOTIF_CONFIG_DATA = 39
    RING_RESET = 40


def mask_of(bits: Iterable[int]) -> int:
    """The number that has these bits set."""
    mask = 0
    for bit in bits:
        mask |= 1 << bit
    return mask


def bits_of(mask: int) -> frozenset[int]:
    """The numbers of the bits that are set."""
    return frozenset(bit for bit in range(mask.bit_length()) if mask >> bit & 1)
