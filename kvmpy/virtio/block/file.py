"""The file behind a block device: a raw image, or a block device of the host."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Callable
from typing import Any

from kvmpy.errors import UsageError
from kvmpy.virtio.block.format import SECTOR

__all__ = ["ImageFile", "ImageSource"]

ImageSource = str | os.PathLike[str] | int | Any
"""A path, a file descriptor, or an object with `fileno()`."""

_MOST_VIEWS = 1024
"""IOV_MAX: buffers that one preadv takes."""

_STEP = 8 << 20
"""Bytes of one call. A request of gigabytes is done in steps, so that it can be given up between two."""

_ZEROS = 1 << 18
"""Bytes of zeros that are written at once, where the file system knows no better way."""

_LOCK_SH, _LOCK_EX, _LOCK_NB = 1, 2, 4  # <sys/file.h>
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16  # <linux/falloc.h>
_NOT_THAT_WAY = {errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL}
"""What fallocate says where the file system cannot do it, or a host's disk not in such small pieces."""

_TMPFS = 0x0102_1994  # <linux/magic.h>

_QCOW_MAGIC = b"QFI\xfb"

_libc = ctypes.CDLL(None, use_errno=True)
_flock = _libc.flock
_flock.argtypes = (ctypes.c_int, ctypes.c_int)
_fallocate = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fstatfs = _libc.fstatfs
_fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)
if hasattr(_libc, "fallocate64"):  # glibc: with 64 bits whatever off_t is
    _fallocate = _libc.fallocate64
    _fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class ImageFile:
    """An open image. All transfers are between the file and views of guest memory, without a copy in between.

    They raise OSError, and may be made from several threads at once: none of them uses the file's position.

    Only one at a time. The image is locked (flock(2)): by one who writes against all others, by one who only reads
    against those who write. It lasts until the file is closed, also by the end of the process. `lock=False` leaves it.

    Truncated by somebody else. The size at the beginning is what the guest was told. Reads behind the present end
    fail, and so do writes and flushes once the file is shorter: otherwise the file would grow again, and what was lost
    would read as zeros.
    """

    def __init__(self, source: ImageSource, *, read_only: bool = False, lock: bool = True) -> None:
        self.read_only = read_only
        self.fd = -1
        self.interrupted: Callable[[], bool] = _never
        """Asked between the steps of a long transfer, which is given up with ECANCELED if so."""
        self.flush_error = 0
        """The errno of a flush that failed. See `flush`."""
        self.reads_cached = True
        """Whether the file system can read from the page cache only."""
        if isinstance(source, (str, os.PathLike)):
            self.name = os.fspath(source)
            self.fd = os.open(source, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        else:
            number = source if isinstance(source, int) else source.fileno()
            self.name = str(getattr(source, "name", None) or f"descriptor {number}")
            self.fd = os.dup(number)
        try:
            self._examine(isinstance(source, (str, os.PathLike)))
            if lock:
                self._lock()
        except BaseException:
            self.close()
            raise

    def _examine(self, opened_here: bool) -> None:
        status = os.fstat(self.fd)
        self._regular = stat.S_ISREG(status.st_mode)
        if not self._regular and not stat.S_ISBLK(status.st_mode):
            raise UsageError(f"{self.name} is neither a file nor a block device")
        if not opened_here:
            self._examine_flags()
        self.size = self.sectors = 0
        self.measure()
        if not self.size:
            raise UsageError(f"{self.name} is empty; `truncate -s 1G {self.name}` gives it a size, and takes no space")
        self.block_size = max(os.fstatvfs(self.fd).f_bsize if self._regular else 4096, SECTOR)
        """The file system's unit of space."""
        # tmpfs has everything in memory, as the guest's RAM is: what was swapped out is waited for. It knows no NOWAIT.
        self._at_once = 0 if self._regular and _file_system(self.fd) == _TMPFS else os.RWF_NOWAIT
        # Nobody may guess the format of a file that a guest can write; but a path to a qcow2 image is a mistake.
        if opened_here and os.pread(self.fd, 4, 0) == _QCOW_MAGIC:
            raise UsageError(
                f"{self.name} is a qcow2 image: `qemu-img convert -O raw` makes a raw one of it, and "
                "qemu-storage-daemon exports it as one; to use its bytes as they are, pass the open file"
            )

    def _lock(self) -> None:
        failed = _flock(self.fd, (_LOCK_SH if self.read_only else _LOCK_EX) | _LOCK_NB)
        # Other errors (ENOLCK, EOPNOTSUPP) come from file systems that know no locks: then there is none.
        if failed and ctypes.get_errno() == errno.EWOULDBLOCK:
            raise UsageError(
                f"{self.name} is in use by another machine or program; images that all open read-only may be shared, "
                "and lock=False does without the lock"
            )

    def measure(self) -> None:
        """Set `size`, in bytes, and `sectors`, of which the last may be a part only: the rest of it reads as zeros, and
        is there once it is written. Raises UsageError when the image is shorter than before.
        """
        size = os.fstat(self.fd).st_size if self._regular else os.lseek(self.fd, 0, os.SEEK_END)
        if size < self.size:
            raise UsageError(f"{self.name} has become shorter: {size} bytes, not {self.size}")
        self.size, self.sectors = size, -(-size // SECTOR)

    def _examine_flags(self) -> None:
        with open(f"/proc/self/fdinfo/{self.fd}", "rb") as file:
            flags = next(int(line.split()[1], 8) for line in file if line.startswith(b"flags:"))
        access = flags & os.O_ACCMODE
        if access == os.O_WRONLY or (access == os.O_RDONLY and not self.read_only):
            needed = "reading" if self.read_only else "reading and writing"
            raise UsageError(f"{self.name} is not open for {needed}; say read_only=True, or open it with 'r+b'")
        if flags & os.O_APPEND:  # pwrite(2), "BUGS": Linux appends, wherever it was to write
            raise UsageError(f"{self.name} is open for appending; open it with 'r+b'")

    def close(self) -> None:
        """Close it, and so give up the lock."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    # --- reading and writing ----------------------------------------------------------------------------------------

    def read_cached(self, views: list[memoryview], offset: int) -> int:
        """Fill the views from `offset` on without waiting for a disk. Answers how many bytes were in memory, from the
        first on; after an error none: `read` tells."""
        if not self.reads_cached or len(views) > _MOST_VIEWS:
            return 0
        try:
            return os.preadv(self.fd, views, offset, self._at_once)
        except BlockingIOError:  # and the host begins to read ahead
            return 0
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:  # FUSE, for instance
                self.reads_cached = False
            return 0

    def read(self, views: list[memoryview], offset: int) -> None:
        """Fill the views from `offset` on."""
        fd = self.fd
        while views:
            got = os.preadv(fd, _step(views), offset)
            if got == 0:
                if offset < self.size:
                    raise OSError(errno.EIO, "the image has become shorter", self.name)
                for view in views:  # the rest of the last sector
                    view[:] = bytes(len(view))
                return
            offset += got
            views = self._rest(views, got)

    def write(self, views: list[memoryview], offset: int, through: bool) -> None:
        """Write the views at `offset`; `through` to the disk."""
        self._check_size()
        fd, flags = self.fd, os.RWF_DSYNC if through else 0
        while views:
            put = os.pwritev(fd, _step(views), offset, flags)
            offset += put
            views = self._rest(views, put)

    def _rest(self, views: list[memoryview], done: int) -> list[memoryview]:
        """What of the views is left after a call that did `done` bytes."""
        for count, view in enumerate(views):
            if done < len(view):
                left = [view[done:], *views[count + 1 :]]
                break
            done -= len(view)
        else:
            return []
        if self.interrupted():
            raise OSError(errno.ECANCELED, "given up", self.name)
        return left

    def _check_size(self) -> None:
        if self._regular and os.fstat(self.fd).st_size < self.size:
            raise OSError(errno.EIO, "the image has become shorter", self.name)

    def flush(self) -> None:
        """Return when all that was written is on the disk.

        After one that failed, none succeeds any more: the kernel reports a failed write once, and may drop the pages.
        """
        if self.flush_error:
            raise OSError(self.flush_error, "an earlier flush failed", self.name)
        self._check_size()
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            self.flush_error = error.errno or errno.EIO
            raise

    # --- without data -----------------------------------------------------------------------------------------------

    def can_punch(self) -> bool:
        """Whether space can be given back. (Asked with a hole behind the end, where there is nothing to lose.)"""
        if not self._regular:
            return True  # the host's disk may have an opinion of its own, each time
        try:
            return self._allocate(_PUNCH_HOLE | _KEEP_SIZE, self.size + self.block_size, self.block_size)
        except OSError:  # it knows how, but not there
            return True

    def discard(self, offset: int, length: int) -> None:
        """Give the space back, as far as the file system can; these bytes then read as zeros."""
        self._check_size()
        self._allocate(_PUNCH_HOLE | _KEEP_SIZE, offset, length)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """These bytes read as zeros from now on; with `unmap` their space may be given back."""
        self._check_size()
        if unmap and self._allocate(_PUNCH_HOLE | _KEEP_SIZE, offset, length):
            return
        if self._allocate(_ZERO_RANGE | _KEEP_SIZE, offset, length):
            return
        zeros = bytes(min(length, _ZEROS))
        while length:
            put = os.pwrite(self.fd, zeros if length >= len(zeros) else zeros[:length], offset)
            offset += put
            length -= put
            if length and self.interrupted():
                raise OSError(errno.ECANCELED, "given up", self.name)

    def _allocate(self, mode: int, offset: int, length: int) -> bool:
        """fallocate(2). False: the file system does not know this mode."""
        while _fallocate(self.fd, mode, offset, length):
            number = ctypes.get_errno()
            if number in _NOT_THAT_WAY:
                return False
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number), self.name)
        return True


def _file_system(fd: int) -> int:
    """Of which kind it is: f_type, the first member of struct statfs."""
    status = ctypes.create_string_buffer(0x100)
    return ctypes.c_long.from_buffer(status).value if not _fstatfs(fd, status) else 0


def _step(views: list[memoryview]) -> list[memoryview]:
    """As much of the views as one call is to do."""
    total = 0
    for count, view in enumerate(views):
        total += len(view)
        if total > _STEP:
            return views[:count] if count else [view[:_STEP]]
        if count == _MOST_VIEWS:
            return views[:count]
    return views


def _never() -> bool:
    return False
