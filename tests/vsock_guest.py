"""The guest's side of a vsock device, in Python: what tests need of a driver and of the sockets behind it."""

from __future__ import annotations

import select
from typing import NamedTuple

from kvmpy.virtio import Feature
from kvmpy.virtio.vsock.device import Vsock
from kvmpy.virtio.vsock.format import HEADER, VsockOperation
from virtio_driver import FakeDriver

__all__ = ["CID", "Packet", "VsockGuest"]

CID = 7
ROOM = 0x1_0000
"""buf_alloc of the guest."""
_BUFFER = 0x2000


class Packet(NamedTuple):
    """A packet from the device."""

    source: int
    target: int
    source_port: int
    target_port: int
    length: int
    kind: int
    operation: int
    flags: int
    buffer: int
    forwarded: int
    data: bytes

    @property
    def name(self) -> str:
        return VsockOperation(self.operation).name


class VsockGuest:
    """Sends packets, and takes those of the device; `buffers` of 8 KiB are in the receive queue all the time."""

    def __init__(self, device: Vsock, *, buffers: int = 8, driver: FakeDriver | None = None) -> None:
        self.device = device
        self.driver = driver or FakeDriver(device).start(size=16, without=[Feature.INDIRECT_DESC])
        self.receive, self.transmit, self.events = self.driver.queues[:3]
        self.offer(buffers)

    def offer(self, count: int, size: int = _BUFFER) -> None:
        """Make buffers available."""
        for _ in range(count):
            self.receive.add((), [size])
        self.receive.kick()

    def poll(self) -> None:
        """Let the host's thread run until there is nothing to do."""
        for source in self.driver.board.inputs:
            for _ in range(200):
                if not select.select([source], [], [], 0)[0]:
                    break
                assert source.ready()
            else:
                raise AssertionError("the host's thread would never sleep")
        for timer in self.driver.board.timers:
            if timer.deadline is not None:
                timer.deadline = None
                timer.call()

    def packets(self, *, again: bool = True) -> list[Packet]:
        """What has come since the last time; the buffers are made available again."""
        self.poll()
        found = []
        while done := self.receive.used():
            for _, _, content in done:
                found.append(Packet._make((*HEADER.unpack_from(content), content[HEADER.size :])))
                assert found[-1].length == len(found[-1].data)
            if again:
                self.offer(len(done))
                self.poll()
        return found

    def names(self) -> list[str]:
        """The operations of what has come."""
        return [packet.name for packet in self.packets()]

    def send(
        self, operation: int, guest_port: int, host_port: int, data: bytes = b"", *, flags: int = 0, buffer: int = ROOM,
        forwarded: int = 0, source: int = CID, target: int = 2, kind: int = 1, length: int | None = None,
    ) -> None:  # fmt: skip
        length = len(data) if length is None else length
        header = HEADER.pack(
            source, target, guest_port, host_port, length, kind, operation, flags, buffer, forwarded
        )  # fmt: skip
        self.raw(header, data)

    def raw(self, *parts: bytes) -> None:
        self.transmit.add([part for part in parts if part])
        self.transmit.kick()
        self.transmit.used()

    def connect(self, host_port: int, guest_port: int = 1000, *, buffer: int = ROOM, again: bool = True) -> str:
        """Connect to the host; answers what it says."""
        self.packets()
        self.send(VsockOperation.REQUEST, guest_port, host_port, buffer=buffer)
        (answer,) = self.packets(again=again)
        return answer.name
