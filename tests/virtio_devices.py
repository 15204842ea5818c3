"""Small virtio devices for tests of the core."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from kvmpy.virtio import Chain, VirtioDevice, Virtqueue

__all__ = ["Echo", "Keeper"]


class EchoConfig(ctypes.LittleEndianStructure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [("capacity", ctypes.c_uint64), ("limit", ctypes.c_uint32), ("mode", ctypes.c_uint8)]


class Echo(VirtioDevice):
    """Answers what it reads. Two queues; the features 0 and 3; 3 only together with 0."""

    name = "virtio-echo"
    device_id = 42
    queue_sizes = (256, 16)
    features = frozenset({0, 3})

    def __init__(self) -> None:
        super().__init__()
        self.config: EchoConfig = EchoConfig(0x1122334455667788, 0x99AABBCC, 0xDD)
        self.handled: list[bytes] = []
        self.count = 0
        self.written: list[tuple[int, bytes]] = []
        self.calls: list[str] = []
        self.on_chain: Callable[[Virtqueue, Chain], None] = self.echo
        """What is done with a chain; a test may want something else."""

    def accepts(self, features: frozenset[int]) -> bool:
        return 3 not in features or 0 in features

    def handle(self, queue: Virtqueue, chain: Chain) -> None:
        self.on_chain(queue, chain)

    def echo(self, queue: Virtqueue, chain: Chain) -> None:
        data = chain.read(0x1_0000)
        self.handled.append(data)
        self.count += 1
        chain.write(data)
        chain.complete()

    def config_written(self, offset: int, data: bytes) -> None:
        self.written.append((offset, data))

    def started(self) -> None:
        self.calls.append("started")

    def stopped(self) -> None:
        self.calls.append("stopped")

    def device_state(self) -> dict[str, Any]:
        return {"count": self.count}

    def restore_device_state(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Keeper(Echo):
    """Keeps what it gets in `kept`, until somebody completes it."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Chain] = []
        self.on_chain = lambda queue, chain: self.kept.append(chain)

    def answer(self, number: int = 0) -> None:
        """Answer one of those that are kept, as Echo does."""
        self.echo(self.queues[0], self.kept.pop(number))
