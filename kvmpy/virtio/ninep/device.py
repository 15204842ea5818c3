"""The 9P transport: a folder of the host as a file system of the guest (virtio 1.2, section 5: device ID 9).

The standard has the ID only. Configuration space and feature are those of Linux's include/uapi/linux/virtio_9p.h, and
a request is what its net/9p/trans_virtio.c sends: the message in the readable part, room for the answer in the other.
"""

from __future__ import annotations

import ctypes
import errno
import os
from enum import IntEnum
from struct import Struct
from typing import Any

from kvmpy.errors import UsageError
from kvmpy.virtio.chain import Chain
from kvmpy.virtio.device import VirtioDevice
from kvmpy.virtio.ninep.messages import HEADER, READ_HEADER, Body, Message, MessageType
from kvmpy.virtio.ninep.session import MOST_MSIZE, Session, error_reply
from kvmpy.virtio.ninep.workers import MessageWorkers
from kvmpy.virtio.virtqueue import Virtqueue

__all__ = ["Plan9", "Plan9Feature"]

QUEUE_SIZE = 128
MOST_OF_A_TAG = 64

_WRITE = Struct("<IQI")  # fid, offset, count: then comes the data of a Twrite
_FLUSH = Struct("<H")


class Plan9Feature(IntEnum):
    """What the driver may find in the configuration space."""

    MOUNT_TAG = 0


class _Work:
    """A request with its chain. `head` is where an Rread's header goes, once the room for its data is given out."""

    __slots__ = ("chain", "flushes", "head", "kind", "left", "tag")

    def __init__(self, chain: Chain, kind: int, tag: int, left: int) -> None:
        self.chain = chain
        self.kind = kind
        self.tag = tag
        self.left = left  # bytes of the message behind its header
        self.head: list[memoryview] | None = None
        self.flushes: list[tuple[Chain, int]] = []  # Tflush requests that wait for this one, and their tags


class Plan9(VirtioDevice):
    """A folder of the host that the guest mounts by its tag: `mount -t 9p -o trans=virtio,version=9p2000.L host /mnt`.

    The guest reaches what is in the folder, and nothing else: it cannot leave it by "..", nor by symbolic links,
    whoever made them and whenever (see kvmpy.virtio.ninep.folder). It sees the owners and modes of the host's files,
    and may do what this process may; it gets neither device nodes nor set-user-ID programs made. With `read_only` it
    changes nothing.

    Files are read and written by up to `workers` threads, so no vCPU waits for a disk. `most_descriptors` limits how
    many files it has open, by default to a quarter of what the process may have.

    Raises UsageError for a tag that is none; OSError when `folder` is none.
    """

    name = "virtio-9p"
    device_id = 9
    queue_sizes = (QUEUE_SIZE,)
    features = frozenset({int(Plan9Feature.MOUNT_TAG)})

    def __init__(
        self, folder: str | bytes | os.PathLike[str], tag: str = "host", *, read_only: bool = False, workers: int = 4,
        most_descriptors: int | None = None,
    ) -> None:  # fmt: skip
        if not 0 < len(tag) <= MOST_OF_A_TAG or not tag.isascii() or not tag.isprintable():
            raise UsageError(f"a tag has 1 to {MOST_OF_A_TAG} printable ASCII characters, not {tag!r}")
        if workers < 1:
            raise UsageError("there must be at least one worker")
        super().__init__()
        self.tag = tag
        self.folder = folder
        self.read_only = read_only
        self.config = _config(tag.encode())
        self.last_host_error: Exception | None = None
        """The last failure that is no answer of the host's file system, but a fault of the server."""
        self.session = Session(folder, read_only=read_only, most_descriptors=most_descriptors)
        self._workers = MessageWorkers(f"kvmpy {self.name}", workers, self._answer)
        self._pending: dict[int, _Work] = {}
        self._closing = False

    # --- requests ---------------------------------------------------------------------------------------------------

    def handle(self, queue: Virtqueue, chain: Chain) -> None:
        header = chain.read(HEADER.size)
        if len(header) < HEADER.size:
            self._refuse(chain)
            return
        size, kind, tag = HEADER.unpack(header)
        left = size - HEADER.size
        if not 0 <= left <= min(chain.readable_left, MOST_MSIZE):
            self.counters["bad_request"] += 1
            _put(chain, error_reply(tag, errno.EBADMSG))
            chain.complete()
        elif kind == MessageType.TFLUSH:
            self._flush(chain, tag)
        else:
            work = self._pending[tag] = _Work(chain, kind, tag, left)
            self._workers.submit(work)

    def _refuse(self, chain: Chain) -> None:
        """What is no message has no tag that could be answered."""
        self.counters["bad_request"] += 1
        chain.complete(0)

    def _flush(self, chain: Chain, tag: int) -> None:
        """oldtag[2]: answered when the request of that tag has been; it is not worth stopping one."""
        content = chain.read(_FLUSH.size)
        old = self._pending.get(_FLUSH.unpack(content)[0]) if len(content) == _FLUSH.size else None
        if old is None:
            _put(chain, HEADER.pack(HEADER.size, MessageType.TFLUSH + 1, tag))
            chain.complete()
        else:
            old.flushes.append((chain, tag))

    # --- in worker threads ------------------------------------------------------------------------------------------

    def _answer(self, work: _Work) -> None:
        written = self._perform(work)
        with work.chain.queue.batch():
            if not written:
                self.counters["no_room"] += 1
            work.chain.complete(written)
            if self._pending.get(work.tag) is work:
                del self._pending[work.tag]
            for chain, tag in work.flushes:
                _put(chain, HEADER.pack(HEADER.size, MessageType.TFLUSH + 1, tag))
                chain.complete()

    def _perform(self, work: _Work) -> int:
        """Write the answer into the chain; answers its length."""
        chain = work.chain
        length = min(work.left, _WRITE.size) if work.kind == MessageType.TWRITE else work.left

        def payload(count: int) -> list[memoryview]:
            return chain.take_readable(min(count, work.left - length))

        def room(count: int) -> list[memoryview]:
            work.head = chain.take_writable(READ_HEADER)
            return chain.take_writable(count)

        if self._closing or self.resetting:  # nobody waits for the answer
            answer = error_reply(work.tag, errno.ECANCELED)
        else:
            body = Body(chain.read(length))
            try:
                answer = self.session.answer(Message(work.kind, work.tag, body, payload, room))
            except Exception as error:  # whatever it is: the guest must not wait for ever
                with self.lock:
                    self.counters["host_" + type(error).__name__] += 1
                    self.last_host_error = error
                answer = error_reply(work.tag, errno.EIO)
        if work.head is None:
            return _put(chain, answer)
        if sum(map(len, work.head)) < len(answer):
            return 0
        length = int(HEADER.unpack_from(answer)[0])  # with the data of an Rread, which is in its place
        for view in work.head:
            view[:], answer = answer[: len(view)], answer[len(view) :]
        return length

    # --- life -------------------------------------------------------------------------------------------------------

    def stopped(self) -> None:
        self._pending.clear()
        self.session.reset()

    def device_state(self) -> dict[str, Any]:
        return self.session.state()

    def restore_device_state(self, state: dict[str, Any]) -> None:
        self.session.restore(state)

    def close(self) -> None:
        """End the threads, and close all files."""
        self._closing = True
        self._workers.close()
        self.session.close()


def _config(tag: bytes) -> ctypes.LittleEndianStructure:
    """struct virtio_9p_config: tag_len, then the tag without a NUL."""

    class Config(ctypes.LittleEndianStructure):
        _pack_ = 1
        _layout_ = "ms"
        _fields_ = (("tag_len", ctypes.c_uint16), ("tag", ctypes.c_uint8 * len(tag)))

    return Config(len(tag), (ctypes.c_uint8 * len(tag))(*tag))


def _put(chain: Chain, answer: bytes) -> int:
    """Write an answer, or an error if there is no room for it. Answers its length; 0 if there is not even for that."""
    if len(answer) > chain.writable_left:
        answer = error_reply(HEADER.unpack_from(answer)[2], errno.EMSGSIZE)
    return chain.write(answer) if len(answer) <= chain.writable_left else 0
