"""Reading a folder from any position on: getdents64(2), which Python's os module hides behind iterators."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from struct import Struct

__all__ = ["entries"]

_GETDENTS64 = 217
"""Its number on x86-64."""
_ENTRY = Struct("<QqHB")
"""struct linux_dirent64: d_ino, d_off, d_reclen, d_type, then d_name with a NUL."""
_MOST = 0x8000

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


def entries(descriptor: int, offset: int) -> Iterator[tuple[int, int, int, bytes]]:
    """What is in an open folder from `offset` on: inode number, offset of the next entry, type (DT_REG ...), name.

    `offset` is 0 or one that was given. Entries that come and go meanwhile are seen or not; others are seen once.
    """
    os.lseek(descriptor, offset, os.SEEK_SET)
    buffer = ctypes.create_string_buffer(_MOST)
    while True:
        length = _syscall(_GETDENTS64, ctypes.c_int(descriptor), buffer, ctypes.c_size_t(_MOST))
        if length < 0:
            number = ctypes.get_errno()
            if number == errno.EINTR:
                continue
            raise OSError(number, os.strerror(number))
        if not length:
            return
        content, at = buffer.raw[:length], 0
        while at < length:
            inode, after, size, kind = _ENTRY.unpack_from(content, at)
            yield inode, after, kind, content[at + _ENTRY.size : at + size].partition(b"\0")[0]
            at += size
