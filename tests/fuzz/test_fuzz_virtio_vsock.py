"""Whatever a guest does to the vsock device, it works again after a reset; streams give what was sent, or end."""

from __future__ import annotations

import os
import random
import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.virtio import Vsock
from kvmpy.virtio.vsock.connection import BUFFER
from kvmpy.virtio.vsock.format import HEADER, VsockOperation
from virtio_driver import FakeDriver
from virtio_hostile import EXAMPLES, PROGRAMS, HostileTarget
from vsock_guest import CID, ROOM, VsockGuest

PLACE = tempfile.TemporaryDirectory(prefix="kvmpy vsock ")
PATH = str(Path(PLACE.name) / "v.sock")
SERVICE = socket.socket(socket.AF_UNIX)
"""At port 5 of the host a program listens, for all examples."""
SERVICE.bind(f"{PATH}_5")
SERVICE.listen(64)
SERVICE.setblocking(False)
PORTS = (5, 6, 1 << 30, (1 << 30) + 1)


class Hosts:
    """What programs of the host do meanwhile."""

    def __init__(self) -> None:
        self.socks: list[socket.socket] = []

    def act(self, device: Vsock, number: int) -> None:
        with suppress(OSError):
            match number % 8:
                case 0 if len(self.socks) < 8:
                    self._keep(socket.socket(socket.AF_UNIX)).connect(PATH)
                case 1 if self.socks:
                    self.socks[-1].send(b"CONNECT 9\n")
                case 2 if len(self.socks) < 8:
                    self._keep(SERVICE.accept()[0])
                case 3 | 4 if self.socks:
                    self.socks[number // 8 % len(self.socks)].send(bytes(1 + 0x900 * (number // 8)))
                case 5 if self.socks:
                    self.socks[number // 8 % len(self.socks)].recv(0x1_0000)
                case 6 if self.socks:
                    self.socks.pop(number // 8 % len(self.socks)).close()
                case 7 if self.socks:
                    self.socks[number // 8 % len(self.socks)].shutdown(socket.SHUT_WR)
        device._sockets.ready()

    def _keep(self, sock: socket.socket) -> socket.socket:
        sock.setblocking(False)
        self.socks.append(sock)
        return sock

    def forget(self) -> None:
        """Close all, and those who wait."""
        with suppress(OSError):
            while True:
                self.socks.append(SERVICE.accept()[0])
        for sock in self.socks:
            sock.close()
        self.socks.clear()


HOSTS = Hosts()
LIVE: list[Vsock] = []


def make() -> Vsock:
    while LIVE:  # what a restore replaces: both would have the same path
        LIVE.pop().close()
    LIVE.append(Vsock(CID, PATH))
    return LIVE[-1]


def works(driver: FakeDriver) -> None:
    HOSTS.forget()
    device = driver.device
    assert isinstance(device, Vsock)
    guest = VsockGuest(device, buffers=4, driver=driver)
    guest.packets()
    with device.listen(77) as listener:
        assert guest.connect(77, 1234) == "RESPONSE"
        sock, _ = listener.accept(5)
    with sock:
        guest.send(VsockOperation.RW, 1234, 77, b"question")
        assert sock.recv(100) == b"question"
        sock.sendall(b"answer")
        assert [packet.data for packet in guest.packets()] == [b"answer"]
    guest.packets()
    limits(device)


def limits(device: Vsock) -> None:
    """What a guest may make the device keep."""
    assert device.connections <= 512
    assert len(device._replies) < 256 + 20
    for connection in device._streams._connections.values():
        assert connection.unsent <= BUFFER
        assert connection.credit <= 0xFFFF_FFFF


def header(
    operation: int, host_port: int, guest_port: int, length: int = 0, flags: int = 0, buffer: int = ROOM
) -> bytes:
    return HEADER.pack(CID, 2, guest_port, host_port, length, 1, operation, flags, buffer, 0) + bytes(length)


REQUESTS = tuple(
    header(operation, port, 9, length, flags)
    for operation, length, flags in (
        (VsockOperation.REQUEST, 0, 0), (VsockOperation.RESPONSE, 0, 0), (VsockOperation.RW, 5, 0),
        (VsockOperation.RW, 3000, 0), (VsockOperation.SHUTDOWN, 0, 1), (VsockOperation.SHUTDOWN, 0, 2),
        (VsockOperation.SHUTDOWN, 0, 3), (VsockOperation.RST, 0, 0), (VsockOperation.CREDIT_UPDATE, 0, 0),
        (VsockOperation.CREDIT_REQUEST, 0, 0),
    )
    for port in PORTS
)  # fmt: skip


def host(device: object, number: int) -> None:
    assert isinstance(device, Vsock)
    HOSTS.act(device, number)


RIGHT = (
    (0, (), (0x1000,)), (0, (), (44, 100)), (2, (), (4,)),
    *((1, (header(operation, 5, 9, length),), ()) for operation, length in (
        (VsockOperation.REQUEST, 0), (VsockOperation.RW, 100), (VsockOperation.RW, 0xC000), (VsockOperation.RST, 0),
    )),
)  # fmt: skip
TARGET = HostileTarget(make, works=works, requests=REQUESTS, right=RIGHT, config_size=8, host=host)


@settings(max_examples=EXAMPLES)
@given(PROGRAMS)
def test_vsock(program: bytes) -> None:
    TARGET.play(program)


# --- a driver that keeps the rules of rings, and breaks those of streams ----------------------------------------------


@given(st.integers(0, (1 << 64) - 1))
def test_packets(seed: int) -> None:
    chance = random.Random(seed)
    device = make()
    guest = VsockGuest(device, buffers=4)
    for _ in range(60):
        if chance.random() < 0.35:
            HOSTS.act(device, chance.randrange(256))
        else:
            send_by_chance(chance, guest)
        for packet in guest.packets():
            assert (packet.source, packet.target) == (2, CID)
            assert packet.operation in range(1, 8)
            assert packet.buffer in (0, BUFFER)
        limits(device)
    works(guest.driver)
    guest.driver.mmio.close()


def send_by_chance(chance: random.Random, guest: VsockGuest) -> None:
    operation = chance.choice((1, 1, 2, 2, 3, 4, 5, 5, 5, 5, 5, 6, 6, 7, 0, 8))
    known = [*guest.device._streams._connections]
    host_port, guest_port = chance.choice(known) if known and chance.random() < 0.8 else (chance.choice(PORTS), 9)
    guest.send(
        operation, guest_port, host_port, bytes(chance.choice((0, 1, 100, 0x3000))) if operation == 5 else b"",
        flags=chance.choice((0, 1, 2, 3, 3, 0xFFFF_FFFF)), buffer=chance.choice((ROOM, ROOM, 0, 10, 0xFFFF_FFFF)),
        forwarded=chance.choice((0, 0, 100, 0xFFFF_FFFF)), length=chance.choice((None,) * 20 + (7, 0xFFFF_FFFF)),
        kind=chance.choice((1,) * 20 + (0, 2)), source=chance.choice((CID,) * 20 + (2,)),
    )  # fmt: skip


# --- streams give what was sent, in order, however it is cut ----------------------------------------------------------


@given(st.integers(0, (1 << 64) - 1))
def test_streams(seed: int) -> None:
    chance = random.Random(seed)
    device = make()
    guest = VsockGuest(device, buffers=2)
    with device.listen(77) as listener:
        guest.connect(77, 1, buffer=chance.choice((1, 100, 0x4000)))
        sock, _ = listener.accept(5)
    sock.setblocking(False)
    connection = device._streams.get((77, 1))
    assert connection is not None
    assert connection.socket is not None
    connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # soon full
    there, back = chance.randbytes(chance.randrange(0x2_0000)), chance.randbytes(chance.randrange(0x8000))
    to_host = to_guest = said = 0
    got_there, got_back, forwarded, room = bytearray(), bytearray(), 0, BUFFER
    buffer = 0x4000
    acts: list[Callable[[], object]] = []

    def guest_sends() -> None:
        nonlocal to_host, said
        said = len(got_back)
        piece = there[to_host : to_host + min(chance.randrange(0x3000), room - to_host)]
        to_host += len(piece)
        guest.send(VsockOperation.RW, 1, 77, piece, buffer=buffer, forwarded=len(got_back))

    def host_reads() -> None:
        with suppress(BlockingIOError):
            got_there.extend(sock.recv(chance.randrange(1, 0x1_0000)))

    def host_sends() -> None:
        nonlocal to_guest
        if piece := back[to_guest : to_guest + chance.randrange(0x3000)]:
            with suppress(BlockingIOError):
                to_guest += sock.send(piece)

    def guest_says_credit() -> None:
        nonlocal said
        said = len(got_back)
        guest.send(VsockOperation.CREDIT_UPDATE, 1, 77, buffer=buffer, forwarded=len(got_back))

    acts += [guest_sends, host_reads, host_sends, guest_says_credit]
    for _ in range(2000):
        chance.choice(acts)()
        for packet in guest.packets():
            assert packet.name in ("RW", "CREDIT_UPDATE", "CREDIT_REQUEST")
            got_back += packet.data
            assert len(got_back) - said <= buffer
            room = packet.forwarded + packet.buffer
            forwarded = packet.forwarded
        if len(got_there) == len(there) and len(got_back) == len(back):
            break
    assert bytes(got_there) == there
    assert bytes(got_back) == back
    assert forwarded <= len(there)
    sock.close()
    guest.driver.mmio.close()
    assert os.listdir(PLACE.name) == ["v.sock_5"]
