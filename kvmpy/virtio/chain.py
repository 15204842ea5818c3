"""One request of a driver: a descriptor chain, as the device sees it (virtio 1.2, sections 2.6 and 2.7)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmpy.virtio.virtqueue import Virtqueue

__all__ = ["Chain"]


class Chain:
    """The buffers of one request: first what the device may read, then what it may write (section 2.6).

    `readable` and `writable` are views of guest memory, without copies: what is left of the two parts. `read`, `write`
    and the two `take_` methods go through them from the front; how the driver cut its buffers up does not matter
    (section 2.7.4: the device must not make assumptions about it). `complete` gives the chain back, from any thread.

    The guest chose the sizes, up to 4 GiB in all, and may change the contents at any moment: look at a value once.
    """

    __slots__ = ("done", "head", "queue", "readable", "readable_left", "writable", "writable_left", "written")

    def __init__(
        self, queue: Virtqueue, head: int, readable: list[memoryview], writable: list[memoryview],
        readable_left: int, writable_left: int,
    ) -> None:  # fmt: skip
        self.queue = queue
        self.head = head
        self.readable = readable
        self.writable = writable
        self.readable_left = readable_left
        """Bytes that were not read yet."""
        self.writable_left = writable_left
        """Bytes that can still be written."""
        self.written = 0
        """Bytes of the writable part that `write` filled or `take_writable` gave out, all of them from the front."""
        self.done = False

    def read(self, length: int) -> bytes:
        """A copy of the next `length` bytes; fewer where the readable part ends."""
        views = self.readable
        if views and len(views[0]) == length:  # a header in a buffer of its own, as most drivers have it
            self.readable_left -= length
            return views.pop(0).tobytes()
        return b"".join(self.take_readable(length))

    def take_readable(self, length: int) -> list[memoryview]:
        """Views of the next `length` bytes, or of fewer where the readable part ends."""
        taken = _take(self.readable, min(length, self.readable_left))
        self.readable_left -= min(length, self.readable_left)
        return taken

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write to the next bytes; answers how many there was room for."""
        length = len(data)
        views = self.writable
        if views and len(views[0]) == length:
            views.pop(0)[:] = data
            self.writable_left -= length
            self.written += length
            return length
        source, done = memoryview(data), 0
        for view in self.take_writable(length):
            view[:] = source[done : done + len(view)]
            done += len(view)
        return done

    def take_writable(self, length: int) -> list[memoryview]:
        """Views of the next `length` bytes to be written, or of fewer where the writable part ends.

        They count as `written`. One who writes less says so to `complete`.
        """
        length = min(length, self.writable_left)
        taken = _take(self.writable, length)
        self.writable_left -= length
        self.written += length
        return taken

    def complete(self, written: int | None = None) -> None:
        """Give the chain back to the driver. `written`: how many bytes, from the start of the writable part on, hold
        an answer (section 2.7.8); by default those that were `written`.

        From any thread. After a reset of the device, when the driver has forgotten the chain, nothing happens.
        Raises UsageError the second time.
        """
        self.queue.complete(self, self.written if written is None else written)

    def __repr__(self) -> str:
        left = f"{self.readable_left} bytes to read, {self.writable_left} to write"
        return f"<Chain {self.head} of queue {self.queue.index}, {left}>"


def _take(views: list[memoryview], length: int) -> list[memoryview]:
    """Remove `length` bytes, which must be there, from the front of `views`."""
    if length <= 0:
        return []
    taken = []
    for count, view in enumerate(views):
        size = len(view)
        if size >= length:
            if size == length:
                taken.append(view)
                del views[: count + 1]
            else:
                taken.append(view[:length])
                views[: count + 1] = [view[length:]]
            break
        taken.append(view)
        length -= size
    return taken
