"""One thread that waits for host input of all devices, terminals, sockets, files (epoll(7)), and for their timers."""

import contextlib
import os
import select
import threading

from kvmpy.devices.host_input import HostInput
from kvmpy.errors import ClosedError, UsageError
from kvmpy.machine.host_timer import HostTimer, TimerQueue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["HostEvents"]


class HostEvents:
    """Polls `fileno()` of each source and calls its `ready()`; takes it out when that answers False or raises.

    The thread starts with the first source, or the first timer that is set, and sleeps in epoll, where it does not hold
    the interpreter. An error of a source or timer is kept in `errors`, with the source, and ends only that source.
    """

    def __init__(self) -> None:
        self._epoll: select.epoll | None = None
        self._wake = -1
        self._thread: threading.Thread | None = None
        self._sources: dict[int, HostInput] = {}
        self._timers = TimerQueue(self._wake_thread)
        self._lock = threading.Lock()
        self._closing = False
        self._pid = os.getpid()
        self.errors: list[tuple[HostInput | HostTimer, Exception]] = []

    def add(self, source: HostInput) -> None:
        """Listen to a source from now on. What cannot be polled (a regular file) is read to its end at once.

        Raises UsageError when another source has its descriptor, ClosedError after `close`, OSError for a descriptor
        that is not open.
        """
        fd = source.fileno()
        os.fstat(fd)  # before epoll and eventfd are opened: a closed descriptor's number could become theirs
        with self._lock:
            if self._closing:
                raise ClosedError("host input is closed")
            epoll = self._epoll or self._start()
            try:
                epoll.register(fd, select.EPOLLIN)
            except FileExistsError:
                raise UsageError(f"descriptor {fd} is read already, for {self._sources.get(fd)!r}") from None
            except PermissionError:  # always ready, and epoll refuses it
                pollable = False
            else:
                pollable = True
                self._sources[fd] = source
        while not pollable and self._serve(source):
            pass

    def _start(self) -> select.epoll:
        epoll, wake = select.epoll(), -1
        try:
            wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            epoll.register(wake, select.EPOLLIN)
            thread = threading.Thread(target=self._run, args=(epoll,), name="kvmpy host input", daemon=True)
            thread.start()
        except BaseException:
            epoll.close()
            if wake >= 0:
                os.close(wake)
            raise
        self._epoll, self._wake, self._thread = epoll, wake, thread
        return epoll

    def timer(self, call: "Callable[[], object]") -> HostTimer:
        """A timer, not set, that calls `call` in this thread. epoll counts milliseconds, and so late it may be."""
        return HostTimer(self._timers, call)

    def _wake_thread(self) -> None:
        with self._lock:
            if self._closing or os.getpid() != self._pid:
                return
            if self._epoll is None:
                self._start()  # it looks at the timers before it sleeps
            else:
                os.eventfd_write(self._wake, 1)

    def remove(self, source: HostInput) -> None:
        """Listen to it no longer."""
        for fd, known in list(self._sources.items()):
            if known is source:
                self._drop(fd, source)

    def close(self) -> None:
        """Stop the thread. Sources are not closed: they are their owners'."""
        forked = os.getpid() != self._pid  # then the thread is the parent's, and so may be the lock's holder
        with contextlib.nullcontext() if forked else self._lock:
            if self._closing:
                return
            self._closing = True
        thread, epoll = self._thread, self._epoll
        if thread is None or epoll is None:
            return
        if not forked:
            os.eventfd_write(self._wake, 1)
            if thread is not threading.current_thread():
                thread.join()
            with self._lock:
                self._epoll = None
        epoll.close()
        os.close(self._wake)

    def _drop(self, fd: int, source: HostInput) -> None:
        # A source that closed its descriptor may find the number in use again, by a source that came meanwhile.
        with self._lock:
            if self._sources.get(fd) is source:
                del self._sources[fd]
                if self._epoll is not None:
                    with contextlib.suppress(OSError):  # a closed descriptor is out already
                        self._epoll.unregister(fd)

    def _run(self, epoll: select.epoll) -> None:
        while not self._closing:
            for fd, _ in epoll.poll(self._timers.pause()):
                source = self._sources.get(fd)
                if source is not None:
                    if not self._serve(source):
                        self._drop(fd, source)
                elif fd == self._wake and not self._closing:
                    os.eventfd_read(fd)
            for timer in self._timers.take_due():
                self._ring(timer)

    def _ring(self, timer: HostTimer) -> None:
        try:
            timer.call()
        except Exception as error:
            self.errors.append((timer, error))

    def _serve(self, source: HostInput) -> bool:
        """Let a source take what is there. False: it has ended, or failed."""
        try:
            return source.ready()
        except Exception as error:
            self.errors.append((source, error))
            return False
