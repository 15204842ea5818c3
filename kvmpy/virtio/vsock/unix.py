"""The UNIX sockets by which programs of the host reach the guest, and it them, as users of Firecracker know them."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
from collections.abc import Callable
from functools import partial

from kvmpy.errors import UsageError
from kvmpy.virtio.vsock.watched_sockets import WatchedSockets

__all__ = ["UnixDoor"]

_LONGEST_GREETING = 32
_BACKLOG = 64
_MOST_GUESTS = 64
"""Programs that have connected, and not said yet what they want."""


class UnixDoor:
    """Listens at `path`. Who connects says "CONNECT 1234\\n", and `connect(socket, port)` is called.

    `dial(port)` is the way out: to whoever listens at `path` followed by "_" and the port.
    """

    def __init__(self, path: str, sockets: WatchedSockets, connect: Callable[[socket.socket, int], object]) -> None:
        self.path = path
        self._sockets = sockets
        self._connect = connect
        self._lines: dict[socket.socket, bytes] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._listener.bind(path)
            there = os.stat(path)
            self._identity = there.st_dev, there.st_ino
            self._listener.listen(_BACKLOG)
        except OSError as error:
            self._listener.close()
            if error.errno == errno.EADDRINUSE:
                raise UsageError(f"{path} is there already: remove it, unless another machine uses it") from None
            raise OSError(error.errno, error.strerror or str(error), path) from None
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        sockets.watch(self._listener.fileno(), select.EPOLLIN, self._accept)

    def _accept(self, events: int) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._turn_away()
            return  # else it has gone again
        sock.setblocking(False)
        if len(self._lines) >= _MOST_GUESTS:
            sock.close()
            return
        self._lines[sock] = b""
        self._sockets.watch(sock.fileno(), select.EPOLLIN, partial(self._read, sock))

    def _turn_away(self) -> None:
        """Too many files are open, and who waits would wake the thread again and again: one more for a moment."""
        spare, self._spare = self._spare, -1
        if spare >= 0:
            os.close(spare)
        with contextlib.suppress(OSError):
            self._listener.accept()[0].close()
        with contextlib.suppress(OSError):  # another thread was quicker: there may be one the next time
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _read(self, sock: socket.socket, events: int) -> None:
        line = self._lines[sock]
        try:
            # What comes behind the line is for the guest, and stays where it is.
            seen = sock.recv(_LONGEST_GREETING - len(line), socket.MSG_PEEK)
            seen = sock.recv(seen.find(b"\n") + 1 or len(seen)) if seen else b""
        except BlockingIOError:
            return
        except OSError:
            seen = b""
        line += seen
        if seen and not line.endswith(b"\n") and len(line) < _LONGEST_GREETING:
            self._lines[sock] = line
            return
        del self._lines[sock]
        self._sockets.forget(sock.fileno())
        port = _port(line)
        if port is None:
            sock.close()
        else:
            self._connect(sock, port)

    def dial(self, port: int) -> socket.socket | None:
        """A socket that is connected to who listens for this port. None: nobody does."""
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError:  # too many open files
            return None
        try:
            sock.connect(f"{self.path}_{port}")
        except OSError:  # nobody, or more than it can take now (EAGAIN)
            sock.close()
            return None
        return sock

    def close(self) -> None:
        """Listen no more, and remove the socket from the file system."""
        for sock in (self._listener, *self._lines):
            self._sockets.forget(sock.fileno())
            sock.close()
        self._lines.clear()
        if self._spare >= 0:
            os.close(self._spare)
        with contextlib.suppress(OSError):
            there = os.stat(self.path)
            if (there.st_dev, there.st_ino) == self._identity:
                os.unlink(self.path)


def _port(line: bytes) -> int | None:
    command, _, number = line.rstrip(b"\r\n").partition(b" ")
    if command != b"CONNECT" or not line.endswith(b"\n") or not number.isdigit() or int(number) > 0xFFFF_FFFF:
        return None
    return int(number)
