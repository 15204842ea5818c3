"""Network devices under test: what the machine's input thread does for them, and frames to send."""

from __future__ import annotations

import select
import socket
import threading
from struct import pack

from virtio_driver import FakeDriver

__all__ = ["HEADER", "MAC", "NO_OFFLOAD", "Inverter", "arp_request", "frame", "framed", "serve", "unframed"]

MAC = bytes.fromhex("525400123456")
HEADER = 12
NO_OFFLOAD = bytes(HEADER)


def frame(number: int = 0, length: int = 60) -> bytes:
    """An Ethernet frame with a content that is its own."""
    head = b"\xff" * 6 + MAC + b"\x88\xb5"  # for local experiments
    return (head + pack(">I", number) * (length // 4))[:length]


def framed(data: bytes) -> bytes:
    """As it goes over a stream socket."""
    return pack(">I", len(data)) + data


def unframed(stream: bytes) -> list[bytes]:
    """The frames in a stream, which ends with a whole one."""
    frames = []
    while stream:
        length = int.from_bytes(stream[:4], "big")
        assert len(stream) >= 4 + length
        frames.append(stream[4 : 4 + length])
        stream = stream[4 + length :]
    return frames


def arp_request(address: str, *, sender: str = "0.0.0.0", mac: bytes = MAC) -> bytes:
    """Who has `address`? (RFC 826)"""
    return (
        b"\xff" * 6 + mac + pack(">HHHBBH", 0x0806, 1, 0x0800, 6, 4, 1)
        + mac + socket.inet_aton(sender) + bytes(6) + socket.inet_aton(address)
    )  # fmt: skip


def serve(driver: FakeDriver, wait: float = 0) -> None:
    """Do what a machine's input thread would, until there is nothing to do; wait up to `wait` seconds for the first."""
    board = driver.board
    for turn in range(10_000):
        due = [timer for timer in board.timers if timer.deadline is not None]
        for timer in due:
            timer.deadline = None
            timer.call()
        readable, _, _ = select.select(board.inputs, [], [], 0 if turn or due else wait)
        for source in readable:
            if source in board.inputs and not source.ready():
                board.inputs.remove(source)
        if not due and not readable:
            return
    raise AssertionError("the device keeps the input thread busy")


class Inverter(threading.Thread):
    """A UDP server on the loopback interface that answers with all bits the other way round."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.lengths: list[int] = []

    def __enter__(self) -> Inverter:
        self.start()
        return self

    def run(self) -> None:
        while True:
            data, sender = self.socket.recvfrom(2000)
            if not data:
                return
            self.lengths.append(len(data))
            self.socket.sendto(bytes(byte ^ 0xFF for byte in data), sender)

    def __exit__(self, *_: object) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ender:
            ender.sendto(b"", ("127.0.0.1", self.port))
        self.join()
        self.socket.close()
