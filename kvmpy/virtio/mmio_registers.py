"""The registers of virtio-mmio by their names and offsets (virtio 1.2, section 4.2.2; legacy: 4.2.4)."""

from __future__ import annotations

__all__ = [
    "CONFIG", "CONFIG_GENERATION", "DEVICE_FEATURES", "DEVICE_FEATURES_SEL", "DEVICE_ID", "DRIVER_FEATURES",
    "DRIVER_FEATURES_SEL", "GUEST_PAGE_SIZE", "INTERRUPT_ACK", "INTERRUPT_STATUS", "MAGIC", "MAGIC_VALUE",
    "QUEUE_ALIGN", "QUEUE_DESC_HIGH", "QUEUE_DESC_LOW", "QUEUE_DEVICE_HIGH", "QUEUE_DEVICE_LOW",
    "QUEUE_DRIVER_HIGH", "QUEUE_DRIVER_LOW", "QUEUE_NOTIFY", "QUEUE_NUM", "QUEUE_NUM_MAX", "QUEUE_PFN",
    "QUEUE_READY", "QUEUE_RESET", "QUEUE_SEL", "SHM_BASE_HIGH", "SHM_BASE_LOW", "SHM_LEN_HIGH", "SHM_LEN_LOW",
    "SHM_SEL", "STATUS", "VENDOR_ID", "VERSION",
]  # fmt: skip

MAGIC_VALUE = 0x000  # R, "virt"
VERSION = 0x004  # R, 2; legacy 1
DEVICE_ID = 0x008  # R
VENDOR_ID = 0x00C  # R
DEVICE_FEATURES = 0x010  # R, 32 bits of them
DEVICE_FEATURES_SEL = 0x014  # W, which 32
DRIVER_FEATURES = 0x020  # W
DRIVER_FEATURES_SEL = 0x024  # W
GUEST_PAGE_SIZE = 0x028  # W, legacy only
QUEUE_SEL = 0x030  # W, which queue the following are about
QUEUE_NUM_MAX = 0x034  # R, QueueSizeMax in later versions
QUEUE_NUM = 0x038  # W, QueueSize in later versions
QUEUE_ALIGN = 0x03C  # W, legacy only
QUEUE_PFN = 0x040  # RW, legacy only: the page of the queue; 0 takes it out of use
QUEUE_READY = 0x044  # RW
QUEUE_NOTIFY = 0x050  # W, the number of a queue
INTERRUPT_STATUS = 0x060  # R, bit 0 a buffer was used, bit 1 the configuration changed
INTERRUPT_ACK = 0x064  # W, clears these bits
STATUS = 0x070  # RW, 0 resets
QUEUE_DESC_LOW = 0x080  # W
QUEUE_DESC_HIGH = 0x084
QUEUE_DRIVER_LOW = 0x090  # W
QUEUE_DRIVER_HIGH = 0x094
QUEUE_DEVICE_LOW = 0x0A0  # W
QUEUE_DEVICE_HIGH = 0x0A4
SHM_SEL = 0x0AC  # W, shared memory regions: there are none
SHM_LEN_LOW = 0x0B0  # R
SHM_LEN_HIGH = 0x0B4
SHM_BASE_LOW = 0x0B8
SHM_BASE_HIGH = 0x0BC
QUEUE_RESET = 0x0C0  # RW, with VIRTIO_F_RING_RESET
CONFIG_GENERATION = 0x0FC  # R
CONFIG = 0x100  # the device's configuration space from here on

MAGIC = 0x7472_6976
