"""Whatever a guest, or the other end of its cable, does to a network device: it works again after a reset."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from struct import pack

import pytest
from hypothesis import given, settings

from device_board import RecordingBoard
from kvmpy.virtio import DatagramSocket, NetBackend, StreamSocket, VirtioDevice, VirtioNet
from network_cable import MAC, NO_OFFLOAD, frame, framed, serve
from virtio_driver import FakeDriver
from virtio_hostile import EXAMPLES, PROGRAMS, HostileTarget

KINDS = {"stream": socket.SOCK_STREAM, "datagrams": socket.SOCK_SEQPACKET}
ARRIVALS = (
    framed(frame(1)), framed(frame(2, 1514)), framed(frame(3, 9000)), framed(b""), framed(b"short"), b"\0", b"\0\0\x05",
    framed(frame(4)) * 70, pack(">I", 0xFFFF_FFFF), pack(">I", 1 << 20), os.urandom(100),
)  # fmt: skip


class Cables:
    """The device that is in use, and the other end of its cable."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.far: socket.socket | None = None
        self.net: VirtioNet | None = None

    def close(self) -> None:
        for one in (self.net, self.far):
            if one is not None:
                one.close()

    def backend(self) -> NetBackend:
        if self.far is not None:
            self.far.close()
        near, self.far = socket.socketpair(socket.AF_UNIX, KINDS[self.kind])
        self.far.setblocking(False)
        return StreamSocket(near) if self.kind == "stream" else DatagramSocket(near)

    def device(self) -> VirtioDevice:
        self.close()
        self.net = VirtioNet(self.backend(), mac=MAC, mtu=9000)
        return self.net

    def act(self, device: VirtioDevice, number: int) -> None:
        """The other end sends, reads, hangs up, or is plugged in anew."""
        assert isinstance(device, VirtioNet)
        assert self.far is not None
        with contextlib.suppress(OSError):
            if number < 0xA0:
                self.far.send(ARRIVALS[number % len(ARRIVALS)])
            elif number < 0xD0:
                self.far.recv(1 << 20)
            elif number < 0xE0:
                self.far.close()
            elif number < 0xF0:
                device.connect(None)
            else:
                device.connect(self.backend())
        board = device.board
        assert isinstance(board, RecordingBoard)
        board.inputs[:] = [source for source in board.inputs if source.ready()]

    def works(self, driver: FakeDriver) -> None:
        """Frames go both ways, with a cable that is in order."""
        device = driver.device
        assert isinstance(device, VirtioNet)
        device.connect(self.backend())  # a program may have left the beginning of a frame in the old one
        assert self.far is not None
        marker = frame(int.from_bytes(os.urandom(4), "big"))
        driver.request([NO_OFFLOAD, marker], queue=1)
        sent = framed(marker) if self.kind == "stream" else marker
        assert self.far.recv(100) == sent
        driver.queues[0].add(into=[12, 1514])
        driver.queues[0].kick()
        self.far.send(sent)
        serve(driver)
        assert [data for _, _, data in driver.queues[0].used()] == [bytes(10) + b"\1\0" + marker]


CABLES = {kind: Cables(kind) for kind in KINDS}
REQUESTS = (NO_OFFLOAD + frame(5), NO_OFFLOAD, b"\1\1", b"")
RIGHT = ((0, (), (1526,)), (0, (), (12, 600)), (1, (NO_OFFLOAD, frame(5)), ()), (1, (NO_OFFLOAD + frame(6, 1514),), ()))
TARGETS = {
    kind: HostileTarget(cables.device, works=cables.works, requests=REQUESTS, right=RIGHT, host=cables.act)
    for kind, cables in CABLES.items()
}
TARGET = TARGETS["stream"]  # for scripts/fuzz-virtio


@pytest.fixture(autouse=True, scope="module")
def _closed() -> Iterator[None]:
    yield
    for cables in CABLES.values():
        cables.close()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=EXAMPLES // 2)
@given(program=PROGRAMS)
def test_net(kind: str, program: bytes) -> None:
    TARGETS[kind].play(program)
