"""How a device reaches guest memory: views of what a driver points at, if that is RAM."""

from __future__ import annotations

from kvmpy.memory import GuestMemory

__all__ = ["GuestBuffers"]


class GuestBuffers:
    """Finds guest-physical ranges and answers views of them, without copying.

    The RAM found last is kept at hand: nearly all buffers of a guest lie in the same region. When regions come or go,
    `GuestMemory.regions` is another tuple, and the region is looked up again.
    """

    __slots__ = ("_buffer", "_end", "_regions", "_start", "memory")

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self._regions: object = None
        self._start = self._end = 0
        self._buffer = memoryview(b"")

    def look(self) -> tuple[int, int, memoryview]:
        """First address, end and bytes of RAM that the guest may read and write; it may be empty."""
        if self._regions is not self.memory.regions:
            self._regions = self.memory.regions
            self._start = self._end = 0
        return self._start, self._end, self._buffer

    def add(self, address: int, length: int, writable: bool, views: list[memoryview]) -> bool:
        """Append views of `length` bytes, more than 0, from `address` on, several where regions meet.

        False, and nothing is appended: some of it is no RAM, or is to be written to and is ROM.
        """
        pieces = []
        position, left = address, length
        regions = self.memory.regions
        while left > 0:
            region = self.memory.region_at(position)
            if region is None:
                return False
            if not (region.read_only or region.buffer.readonly):
                self._start, self._end, self._buffer = region.address, region.end, region.buffer
                self._regions = regions
            elif writable:
                return False
            start = position - region.address
            piece = region.buffer[start : start + left]
            pieces.append(piece)
            position += len(piece)
            left -= len(piece)
        views += pieces
        return True

    def ring(self, address: int, length: int, alignment: int, *, writable: bool = False) -> memoryview | None:
        """A view for a part of a virtqueue, which must be aligned (section 2.7) and in one piece; None: it is not."""
        pieces: list[memoryview] = []
        if address % alignment or not self.add(address, length, writable, pieces) or len(pieces) != 1:
            return None
        return pieces[0]
