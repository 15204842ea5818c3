"""Reads of what the host's page cache has: done at once by whoever looks at the queue, several by one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpy.virtio.block.format import HEADER, SECTOR, BlockStatus, BlockType
from kvmpy.virtio.descriptors import read_three_buffers
from kvmpy.virtio.virtqueue import BATCH

if TYPE_CHECKING:
    from kvmpy.virtio.block.file import ImageFile
    from kvmpy.virtio.descriptors import ThreeBuffers
    from kvmpy.virtio.virtqueue import Virtqueue

__all__ = ["CachedReads"]

AT_ONCE = 4 << 20
"""Bytes that are read for one notification. That is a copy, but none that is long may hold the host input thread, which
then looks at other devices first. A single read that is longer is the workers'."""

TOGETHER = 512 << 10
"""Bytes after which adjacent requests are answered, and others begun: a driver that polls can add more meanwhile."""

_IN, _OK = int(BlockType.IN), int(BlockStatus.OK)
_HEADER_BYTES, _unpack_header = HEADER.size, HEADER.unpack_from


class CachedReads:
    """The reads of a disk that need not wait. Used with the device's lock held.

    Why they are not handed to a thread: to wake one takes longer than to copy 64 KiB, and while it copies, this one
    would compete with it for the interpreter.
    """

    __slots__ = ("_file", "_left", "_sectors")

    def __init__(self, file: ImageFile) -> None:
        self._file = file
        self._left = self._sectors = 0

    def begin(self, sectors: int) -> None:
        """The disk, which has so many sectors, is notified."""
        self._sectors, self._left = sectors, AT_ONCE

    def read(self, views: list[memoryview], offset: int, length: int) -> bool:
        """Fill the views. False: not all of it is cached, or this has taken long enough."""
        if length > self._left:
            return False
        self._left -= length
        return self._file.read_cached(views, offset) == length

    def read_next(self, queue: Virtqueue) -> int:
        """Answer those requests of the queue that are next, up to the first that is not a read of cached sectors, or
        that is cut up in an unusual way. Answers how many; BATCH: the rest has to wait until others had their turn.

        Adjacent ones are read together.
        """
        requests = queue.peek(read_three_buffers)
        if not requests:
            return 0
        ram, sectors, left = queue.ram, self._sectors, self._left
        together: list[ThreeBuffers] = []
        done = first = end = 0
        for request in requests:
            _, header, header_bytes, _, length, _, status_bytes = request
            if header_bytes != _HEADER_BYTES or status_bytes != 1 or not length or length % SECTOR:
                break
            kind, _, sector = _unpack_header(ram, header)
            after = sector + length // SECTOR
            if kind != _IN or after > sectors or length > AT_ONCE:
                break
            if sector != end or (sector - first) * SECTOR >= TOGETHER:
                if together:
                    answered = self._read_together(queue, ram, together, first)
                    done += answered
                    if answered < len(together):
                        self._left = left
                        return done
                    together = []
                first = sector
            left -= length
            if left < 0:
                done = BATCH
                break
            end = after
            together.append(request)
        self._left = left
        if together:
            done += self._read_together(queue, ram, together, first)
        return done

    def _read_together(self, queue: Virtqueue, ram: memoryview, requests: list[ThreeBuffers], sector: int) -> int:
        """Read adjacent sectors, from `sector` on; how many of the requests the page cache had."""
        views = [ram[data : data + length] for _, _, _, data, length, _, _ in requests]
        got = self._file.read_cached(views, sector * SECTOR)
        answers = []
        for head, _, _, _, length, status, _ in requests:
            got -= length
            if got < 0:
                break
            ram[status] = _OK
            answers.append((head, length + 1))
        if answers:
            queue.use(answers)
        return len(answers)
