"""Several sockets that a device waits for, as one input of the machine's host input thread."""

from __future__ import annotations

import contextlib
import select
from collections.abc import Callable
from threading import RLock

__all__ = ["WatchedSockets"]

_AT_ONCE = 64


class WatchedSockets:
    """An epoll instance: readable itself when one of its sockets is ready for what is waited for, be it room to write.

    `calls` get what happened (EPOLLIN ...), with `lock` held. A socket is taken out before it is closed.
    """

    def __init__(self, lock: RLock) -> None:
        self._lock = lock
        self._epoll = select.epoll()
        self._calls: dict[int, Callable[[int], object]] = {}
        self._masks: dict[int, int] = {}

    def fileno(self) -> int:
        return self._epoll.fileno()

    def watch(self, descriptor: int, mask: int, call: Callable[[int], object]) -> None:
        """Wait for `mask` from now on. The end of a connection (EPOLLHUP) is told in any case, 0 is for that alone."""
        before = self._masks.get(descriptor)
        if before is None:
            self._epoll.register(descriptor, mask)
        elif before != mask:
            self._epoll.modify(descriptor, mask)
        self._masks[descriptor], self._calls[descriptor] = mask, call

    def forget(self, descriptor: int) -> None:
        """Wait for it no more."""
        if self._masks.pop(descriptor, None) is not None:
            del self._calls[descriptor]
            with contextlib.suppress(OSError):
                self._epoll.unregister(descriptor)

    def ready(self) -> bool:
        """Do what is to be done. False: it was closed."""
        with self._lock:
            if self._epoll.closed:
                return False
            for descriptor, events in self._epoll.poll(0, _AT_ONCE):
                call = self._calls.get(descriptor)
                if call is not None:  # a call before may have taken it out
                    call(events)
            return True

    def close(self) -> None:
        """Stop."""
        with self._lock:
            self._calls.clear()
            self._masks.clear()
            self._epoll.close()
