"""One thread that waits for host input of all devices: terminals, sockets, files (epoll(7))."""

import contextlib
import os
import select
import threading

from kvmpy.devices.host_input import HostInput

__all__ = ["HostEvents"]


class HostEvents:
    """Polls `fileno()` of each source and calls its `ready()`; takes it out when that answers False or raises.

    The thread starts with the first source and sleeps in epoll, where it does not hold the interpreter. An error of a
    source is kept in `errors`, with the source, and ends only that source.
    """

    def __init__(self) -> None:
        self._epoll: select.epoll | None = None
        self._wake = -1
        self._thread: threading.Thread | None = None
        self._sources: dict[int, HostInput] = {}
        self._closing = False
        self.errors: list[tuple[HostInput, Exception]] = []

    def add(self, source: HostInput) -> None:
        """Listen to a source from now on."""
        if self._epoll is None:
            self._epoll = select.epoll()
            self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._epoll.register(self._wake, select.EPOLLIN)
            self._thread = threading.Thread(target=self._run, name="kvmpy host input", daemon=True)
            self._thread.start()
        fd = source.fileno()
        self._sources[fd] = source
        try:
            self._epoll.register(fd, select.EPOLLIN)
        except PermissionError:  # a regular file is always ready, and epoll refuses it: read it to its end
            del self._sources[fd]
            while source.ready():
                pass

    def remove(self, source: HostInput) -> None:
        """Listen to it no longer."""
        for fd, known in list(self._sources.items()):
            if known is source:
                self._drop(fd)

    def close(self) -> None:
        """Stop the thread. Sources are not closed: they are their owners'."""
        thread, self._thread = self._thread, None
        if thread is None or self._epoll is None:
            return
        self._closing = True
        os.eventfd_write(self._wake, 1)
        if thread is not threading.current_thread():
            thread.join()
        self._epoll.close()
        os.close(self._wake)
        self._epoll = None

    def _drop(self, fd: int) -> None:
        self._sources.pop(fd, None)
        if self._epoll is not None:
            with contextlib.suppress(OSError):  # the descriptor may be closed already, which takes it out by itself
                self._epoll.unregister(fd)

    def _run(self) -> None:
        epoll = self._epoll
        while epoll is not None and not self._closing:
            for fd, _ in epoll.poll():
                source = self._sources.get(fd)
                if source is None:
                    continue
                try:
                    goes_on = source.ready()
                except Exception as error:
                    self.errors.append((source, error))
                    goes_on = False
                if not goes_on:
                    self._drop(fd)
