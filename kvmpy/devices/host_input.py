"""Where a console device's input comes from on the host: anything with a file descriptor that can be read."""

from __future__ import annotations

import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol
else:
    Protocol = object

__all__ = ["HasFileno", "HostInput", "InputStream"]


class HostInput(Protocol):
    """What a machine's input thread waits on: it polls `fileno()` and calls `ready()` when there is something.

    `ready()` answers False at the end of the input: take it out of the poll set. epoll refuses regular files
    (EPERM); they are always ready, so `ready()` is called until it answers False.
    """

    def fileno(self) -> int: ...
    def ready(self) -> bool: ...


class HasFileno(Protocol):
    """A file object, a socket, a terminal."""

    def fileno(self) -> int: ...


class InputStream:
    """Reads a file descriptor when it is ready and gives what came to `deliver`.

    It reads the descriptor itself: what a buffered file object (such as `sys.stdin`) has read ahead is not seen. The
    source stays the caller's: it is never closed here, nor made non-blocking.
    """

    CHUNK = 0x1000

    def __init__(self, source: HasFileno | int, deliver: Callable[[bytes], object]) -> None:
        self._source = source  # kept, so that the file is not closed by the garbage collector
        self._fd = source if isinstance(source, int) else source.fileno()
        self._deliver = deliver

    def fileno(self) -> int:
        return self._fd

    def ready(self) -> bool:
        """Read once and deliver. False: the input has ended (end of file, or the other end of a terminal closed)."""
        try:
            data = os.read(self._fd, self.CHUNK)
        except BlockingIOError:
            return True
        except OSError as error:
            # A pseudo-terminal answers EIO and a socket ECONNRESET when the other side has gone; EBADF: closed here.
            if error.errno in (errno.EIO, errno.ECONNRESET, errno.EBADF):
                return False
            raise
        if not data:
            return False
        self._deliver(data)
        return True
