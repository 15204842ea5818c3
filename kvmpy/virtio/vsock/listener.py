"""A port of the host at which a program in Python waits for connections of the guest."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque
from typing import TYPE_CHECKING

from kvmpy.errors import ClosedError

if TYPE_CHECKING:
    from kvmpy.virtio.vsock.device import Vsock

__all__ = ["VsockListener"]


class VsockListener:
    """What `Vsock.listen(port)` answers; also a context manager, which closes it.

    Connections are established before they are accepted, at most `backlog` of them; the guest is refused others.
    """

    def __init__(self, device: Vsock, port: int, backlog: int) -> None:
        self.port = port
        self._device = device
        self._backlog = backlog
        self._waiting: deque[tuple[socket.socket, tuple[int, int]]] = deque()
        self._change = threading.Condition()
        self._closed = False

    def accept(self, timeout: float | None = None) -> tuple[socket.socket, tuple[int, int]]:
        """A connected socket, and the guest's CID and port. Raises TimeoutError after `timeout` seconds, ClosedError
        when the listener or the device is closed."""
        with self._change:
            self._change.wait_for(lambda: self._waiting or self._closed, timeout)
            if self._waiting:
                return self._waiting.popleft()
            if self._closed:
                raise ClosedError(f"nothing listens at vsock port {self.port} any more")
        raise TimeoutError(f"no connection to vsock port {self.port} within {timeout} s")

    def offer(self, address: tuple[int, int]) -> socket.socket | None:
        """The guest connects: the device's end, or None if nobody can take it."""
        with self._change:
            if self._closed or len(self._waiting) >= self._backlog:
                return None
            try:
                ours, theirs = socket.socketpair()
            except OSError:  # too many open files
                return None
            self._waiting.append((theirs, address))
            self._change.notify()
        return ours

    def close(self) -> None:
        """Listen no more. Connections that were not accepted are closed; others stay."""
        with self._change:
            self._closed = True
            waiting, self._waiting = self._waiting, deque()
            self._change.notify_all()
        for sock, _ in waiting:
            with contextlib.suppress(OSError):
                sock.close()
        self._device.forget_listener(self)

    def __enter__(self) -> VsockListener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
