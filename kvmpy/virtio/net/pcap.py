"""Captures of what goes over a network device, as tcpdump and Wireshark read them (pcap with nanoseconds)."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import time
from collections.abc import Sequence

__all__ = ["PcapFile"]

_FILE_HEADER = struct.Struct("<IHHiIII")  # magic number, version, time zone, accuracy, snapshot length, link type
_MAGIC_NANOSECONDS = 0xA1B2_3C4D
_ETHERNET = 1
_RECORD = struct.Struct("<IIII")  # seconds, nanoseconds, bytes here, bytes on the wire
_MOST_VIEWS = 1000
"""Of one writev(2): the kernel takes 1024 (IOV_MAX)."""


class PcapFile:
    """Ethernet frames in the file `path`, which is made anew. Of long ones the first `snapshot` bytes are kept.

    A frame is in the file when `record` returns, so a capture can be read while it grows. When the file cannot be
    written any more, it ends with the last whole frame, and `error` says why.

    Raises OSError where the file cannot be made.
    """

    def __init__(self, path: str | os.PathLike[str], *, snapshot: int = 0x4_0000) -> None:
        self.snapshot = snapshot
        self.frames = 0
        """How many were written."""
        self.error: OSError | None = None
        self._size = 0
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._write([_FILE_HEADER.pack(_MAGIC_NANOSECONDS, 2, 4, 0, 0, snapshot, _ETHERNET)])

    def record(self, parts: Sequence[bytes | memoryview]) -> None:
        """Write a frame that consists of these parts, with the time of now. Does nothing after an error."""
        if self._fd < 0:
            return
        length = sum(map(len, parts))
        if len(parts) > _MOST_VIEWS or length > self.snapshot:
            parts = [b"".join(parts)[: self.snapshot]]
        seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
        header = _RECORD.pack(seconds & 0xFFFF_FFFF, nanoseconds, min(length, self.snapshot), length)
        if self._write([header, *parts]):
            self.frames += 1

    def _write(self, parts: Sequence[bytes | memoryview]) -> bool:
        wanted = sum(map(len, parts))
        try:
            if os.writev(self._fd, parts) < wanted:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.error = error
            with contextlib.suppress(OSError):
                os.truncate(self._fd, self._size)  # half a record would spoil what is there
            self.close()
            return False
        self._size += wanted
        return True

    def close(self) -> None:
        """Close the file. Calling it again does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
