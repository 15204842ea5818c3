"""The entropy device: random numbers for the guest (virtio 1.2, section 5.4)."""

from __future__ import annotations

import os
from collections.abc import Callable

from kvmpy.virtio.chain import Chain
from kvmpy.virtio.device import VirtioDevice
from kvmpy.virtio.features import Feature
from kvmpy.virtio.virtqueue import Virtqueue

__all__ = ["Entropy"]

MOST_BYTES = 0x1_0000
"""Of one request. A guest may ask for gigabytes; section 5.4.6.2 lets the device write less."""


class Entropy(VirtioDevice):
    """Fills the guest's buffers from `source(length) -> bytes`, by default with the host's own random numbers.

    Linux feeds its pool from it, and offers it as /dev/hwrng.
    """

    name = "virtio-entropy"
    device_id = 4
    queue_sizes = (64,)
    features = frozenset({Feature.IN_ORDER})

    def __init__(self, source: Callable[[int], bytes] = os.urandom) -> None:
        super().__init__()
        self.source = source

    def handle(self, queue: Virtqueue, chain: Chain) -> None:
        if chain.readable_left:  # 5.4.6.1: the driver must not place device-readable buffers into the queue
            self.counters["readable_buffer"] += 1
        chain.write(self.source(min(chain.writable_left, MOST_BYTES)))
        chain.complete()
