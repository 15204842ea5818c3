"""The file that a trace is written to: whatever breaks, what is in it up to the last whole batch is sound."""

from __future__ import annotations

import os
import stat

__all__ = ["TraceFile"]


class TraceFile:
    """Appends text, with an ending after each piece that the next piece replaces.

    So a reader finds a complete file between any two writes (SIGKILL may tear one). In a pipe the ending is written
    only once, by `close`. A write that fails (a full disk) takes back what it wrote of its piece, raises OSError, and
    leaves the file as it was.
    """

    def __init__(self, path: str | os.PathLike[str], ending: str = "") -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
        self._ending = ending.encode()
        self._written = 0
        """How long the file is without its ending."""

    def write(self, text: str) -> None:
        """Append `text`. Raises OSError."""
        data = text.encode("utf-8", "backslashreplace")
        if not self._regular:
            self._put(data)
            return
        try:
            os.lseek(self._fd, self._written, os.SEEK_SET)
            self._put(data + self._ending)
        except BaseException:
            self._take_back()
            raise
        self._written += len(data)

    def _put(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._fd, rest) :]

    def _take_back(self) -> None:
        """End the file where it was sound. Its ending takes the place of what was written there a moment ago."""
        os.lseek(self._fd, self._written, os.SEEK_SET)
        os.write(self._fd, self._ending)
        os.ftruncate(self._fd, self._written + len(self._ending))

    def close(self) -> None:
        """Complete the file. Raises OSError when its data does not reach the disk."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        try:
            if not self._regular:
                rest = memoryview(self._ending)
                while rest:
                    rest = rest[os.write(fd, rest) :]
        finally:
            os.close(fd)
