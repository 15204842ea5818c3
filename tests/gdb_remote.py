"""Two ways to talk to a gdb server: a real gdb with a script, and bare packets."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from kvmpy.debug.gdb.listening import Address
from kvmpy.debug.gdb.packet import Mark, PacketReader, encode
from kvmpy.pytest_plugin.requirement import skip_or_fail

__all__ = ["PATIENCE", "RemoteClient", "gdb_command", "remote_name", "run_gdb"]

PATIENCE = 20.0


def remote_name(address: Address) -> str:
    """The address as gdb's `target remote` takes it."""
    return address if isinstance(address, str) else f"{address[0]}:{address[1]}"


def gdb_command(address: Address, *commands: str, program: Path | None = None) -> list[str]:
    """The command line of a real gdb that connects to `address` and then does `commands`."""
    path = shutil.which("gdb")
    if path is None:
        skip_or_fail("needs `gdb` (Debian package gdb)")
    script = ["set confirm off", "set pagination off", "set width 0", "set style enabled off", "set remotetimeout 10"]
    script.append(f"target remote {remote_name(address)}")
    arguments = [argument for command in (*script, *commands) for argument in ("-ex", command)]
    return [path, "-nx", "-batch", *arguments, *([str(program)] if program is not None else [])]


def run_gdb(address: Address, *commands: str, program: Path | None = None) -> str:
    """What a real gdb prints for some commands."""
    done = subprocess.run(
        gdb_command(address, *commands, program=program),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=2 * PATIENCE,
        check=False,
    )  # fmt: skip
    return done.stdout


class RemoteClient:
    """Sends packets as gdb does, and acknowledges. A context manager."""

    def __init__(self, address: Address) -> None:
        if isinstance(address, str):
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(PATIENCE)
            self.socket.connect(address)
        else:
            self.socket = socket.create_connection(address, PATIENCE)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = PacketReader()
        self.acknowledges = True

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> RemoteClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, payload: bytes) -> bytes:
        """The answer to a packet; console output before it is dropped."""
        self.send(payload)
        return self.answer()

    def send(self, payload: bytes) -> None:
        self.socket.sendall(encode(payload))

    def interrupt(self) -> None:
        self.socket.sendall(b"\x03")

    def answer(self) -> bytes:
        """The next packet that is no console output."""
        while True:
            packet = self.packet()
            if not re.match(rb"O[0-9a-f]", packet):
                return packet

    def packet(self) -> bytes:
        """The next packet. Raises ConnectionError when the server has closed."""
        while True:
            item = self.item()
            if isinstance(item, bytes):
                return item

    def item(self) -> bytes | Mark:
        """The next packet or acknowledgement."""
        while (item := self._reader.next()) is None:
            data = self._receive()
            if not data:
                raise ConnectionError("the server closed the connection")
            self._reader.feed(data)
        if isinstance(item, bytes) and self.acknowledges:
            with suppress(ConnectionError):  # closed after what it sent last
                self.socket.sendall(b"+")
        return item

    def _receive(self) -> bytes:
        try:
            return self.socket.recv(0x10000)
        except ConnectionError:
            return b""

    def is_closed(self) -> bool:
        """Whether the server closes the connection; waits for it, dropping what comes before."""
        try:
            while True:
                self.item()
        except ConnectionError:
            return True

    def stop_acknowledging(self) -> None:
        assert self.ask(b"QStartNoAckMode") == b"OK"
        self.acknowledges = False


def answers(address: Address, packets: Iterable[bytes]) -> list[bytes]:
    """The answers of one session to some packets."""
    with RemoteClient(address) as client:
        return [client.ask(packet) for packet in packets]
