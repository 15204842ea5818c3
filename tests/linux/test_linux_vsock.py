"""Programs in a Linux guest and on the host talk over vsock, with Linux's own driver."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from hashlib import md5
from pathlib import Path

import pytest

from kvmpy.boot.initramfs import File
from kvmpy.virtio import VirtioMmio, Vsock, linux_parameters
from linux_session import LinuxSession, small_kernel

pytestmark = [pytest.mark.kvm, pytest.mark.linux, pytest.mark.slow]

SOURCE = Path(__file__).with_name("vsock.c")
PATIENCE = 240.0
"""Seconds for a command: it takes one, but others may be at work on this computer."""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    if shutil.which("gcc") is None:
        pytest.skip("needs `gcc` (Debian package gcc)")
    program = tmp_path_factory.mktemp("vsock") / "vsock"
    subprocess.run(["gcc", "-O2", "-Wall", "-Werror", "-static", "-o", program, SOURCE], check=True)
    return program.read_bytes()


def read_all(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(0x1_0000), b""))


class Server:
    """Takes one connection, reads all, and answers."""

    def __init__(self, accept: Callable[[], socket.socket], answer: bytes) -> None:
        self._accept, self._answer = accept, answer
        self.got = b""
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with self._accept() as sock:
            sock.settimeout(PATIENCE)
            self.got = read_all(sock)
            sock.sendall(self._answer)

    def join(self) -> bytes:
        self._thread.join(PATIENCE)
        return self.got


def echo(sock: socket.socket, data: bytes) -> bytes:
    """Send, and read what comes back meanwhile."""

    def send() -> None:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    got = read_all(sock)
    sender.join(PATIENCE)
    return got


@pytest.mark.deadline(1200)
def test_linux_talks_to_the_host_both_ways(program: bytes, tmp_path: Path) -> None:
    path = str(tmp_path / "v.sock")
    device = Vsock(42, path)
    transport = VirtioMmio(device, 0xD000_0000, 5)
    cmdline = f"console=ttyS0 acpi=off {linux_parameters([transport])}"
    files = {"bin/vsock": File(program, 0o755)}
    with LinuxSession(small_kernel(), cmdline=cmdline, files=files) as session:
        session.machine.add(transport)
        session.boot()
        run = partial(session.run, timeout=PATIENCE)
        run("dd if=/dev/urandom of=/tmp/data bs=64k count=5")
        there = run("md5sum < /tmp/data").split()[0]

        # The guest connects: to a program in Python, and to one that listens at a UNIX socket.
        answer = os.urandom(500_000)
        with device.listen(52) as listener:
            server = Server(lambda: listener.accept(PATIENCE)[0], answer)
            back = run("vsock connect 52 < /tmp/data | md5sum").split()[0]
            assert md5(server.join()).hexdigest() == there
            assert back == md5(answer).hexdigest()
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(f"{path}_53")
            listening.listen()
            listening.settimeout(PATIENCE)
            server = Server(lambda: listening.accept()[0], b"hello, guest\n")
            assert run("echo hello, host | vsock connect 53") == "hello, guest\n"
            assert server.join() == b"hello, host\n"
        assert "reset by peer" in run("vsock connect 54 < /dev/null")

        # The host connects: from Python, and by the UNIX socket.
        data = os.urandom(400_000)
        for port in (60, 61):
            session.console.send(f"vsock echo {port}\n")
            with host_connects(device, path, port) as sock:
                sock.settimeout(PATIENCE)
                assert echo(sock, data) == data
            assert session.answer(PATIENCE).endswith("echoed\n")
        with pytest.raises(ConnectionRefusedError):
            device.connect(62, PATIENCE)

        assert session.machine.host_errors == []
        assert device.counters == {}
        assert device.connections == 0
    assert os.listdir(tmp_path) == ["v.sock_53"]


def host_connects(device: Vsock, path: str, port: int) -> socket.socket:
    """Port 60 from Python, others by the UNIX socket, as soon as the guest listens."""
    deadline = time.monotonic() + PATIENCE
    while True:
        if port == 60:
            try:
                return device.connect(port, PATIENCE)
            except ConnectionRefusedError:
                pass
        else:
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(PATIENCE)
            sock.connect(path)
            sock.sendall(b"CONNECT %d\n" % port)
            if sock.recv(3) == b"OK ":
                while sock.recv(1) != b"\n":
                    pass
                return sock
            sock.close()
        assert time.monotonic() < deadline, "no program of the guest listens"
        time.sleep(0.2)
