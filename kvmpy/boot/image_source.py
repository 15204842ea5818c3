"""Where the bytes of an image come from: bytes at hand, or a file of which only the needed parts are read."""

from __future__ import annotations

import os
import stat

from kvmpy.boot.placement import ram_views
from kvmpy.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmpy.memory import GuestMemory

__all__ = ["ImageSource"]


class ImageSource:
    """The `size` bytes of an image; `name` is what errors call it.

    `source` is a path (str or PathLike) or the bytes themselves, which are copied. A file is opened for each use and
    closed again, so that an image holds no descriptor; that it is still the same file is checked each time. Not mapped
    into memory: a file that shrinks under a mapping kills the process (SIGBUS), here it is an ImageError.

    Raises ImageError for what is no regular file, OSError as `open` does.
    """

    __slots__ = ("_data", "_identity", "_path", "name", "size")

    def __init__(self, source: bytes | bytearray | memoryview | str | os.PathLike[str]) -> None:
        self._data: bytes | None = None
        self._path = ""
        self._identity: tuple[int, ...] = ()
        if isinstance(source, (bytes, bytearray, memoryview)):
            self._data = bytes(source)
            self.size = len(self._data)
            self.name = f"image of {self.size:#x} bytes"
            return
        self._path = self.name = os.fspath(source)
        # Before it is opened: opening a FIFO would block.
        status = os.stat(self._path)
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("is not a regular file", self.name)
        self.size = status.st_size
        self._identity = _identity(status)

    def read(self, offset: int, length: int, what: str) -> bytes:
        """`length` bytes from `offset` on; `what` they are is what the ImageError says when the image ends before."""
        self._check(offset, length, what)
        if self._data is not None:
            return self._data[offset : offset + length]
        data = bytearray(length)
        self._read_file(offset, [memoryview(data)])
        return bytes(data)

    def copy_to(self, memory: GuestMemory, address: int, offset: int, length: int, what: str) -> None:
        """Copy `length` bytes from `offset` on to guest RAM at `address`, straight from the file.

        Raises ImageError, before anything is written, when they are not all in the image or would not all be in RAM.
        """
        self._check(offset, length, what)
        views = ram_views(memory, address, length, self.name, what)
        if self._data is None:
            self._read_file(offset, views)
            return
        data = memoryview(self._data)  # a slice of bytes would be a copy more
        for view in views:
            view[:] = data[offset : offset + len(view)]
            offset += len(view)

    def read_all(self) -> bytes:
        """The whole image. For formats that have checked `size` before."""
        return self.read(0, self.size, "the image")

    def _check(self, offset: int, length: int, what: str) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ImageError(
                f"{what} ends at {offset + length:#x}, but the file at {self.size:#x}: truncated", self.name, offset
            )

    def _read_file(self, offset: int, views: list[memoryview]) -> None:
        file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if _identity(os.fstat(file)) != self._identity:
                raise ImageError("the file has changed since this image was made from it", self.name)
            for view in views:
                while len(view):
                    # At most 1 GiB at a time: the kernel stops at 2 GiB anyway.
                    count = os.preadv(file, [view[:0x4000_0000]], offset)
                    if not count:
                        raise ImageError("the file became shorter while it was read", self.name, offset)
                    view = view[count:]
                    offset += count
        finally:
            os.close(file)

    def __repr__(self) -> str:
        return f"<ImageSource {self.name}>"


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
