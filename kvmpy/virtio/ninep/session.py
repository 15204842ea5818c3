"""The server: a session with one client, from the agreement on a version to the next one."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from struct import Struct, pack
from typing import Any

from kvmpy.virtio.ninep import attribute_requests, file_requests, name_requests
from kvmpy.virtio.ninep.fids import FidTable
from kvmpy.virtio.ninep.folder import Folder
from kvmpy.virtio.ninep.messages import VERSION, Message, MessageType, reply, string

__all__ = ["LEAST_MSIZE", "MOST_MSIZE", "Session", "error_reply"]

LEAST_MSIZE = 4096
MOST_MSIZE = 1 << 20
"""The largest message, in bytes. Linux asks for 128 KiB, and for 500 KiB at most by virtio."""

_VERSION = Struct("<I")


class Session:
    """Answers requests about one folder. From any thread, several at once: reads, writes and fsync wait for disks at
    the same time; what changes fids and names is done one after the other.

    With `read_only` all that would change something is refused (EROFS). `most_descriptors` limits open files, and as
    many that are only known, see `FidTable`.
    """

    def __init__(
        self, folder: str | bytes | os.PathLike[str], *, read_only: bool = False, most_descriptors: int | None = None
    ) -> None:
        self.folder = Folder(folder)
        self.read_only = read_only
        self.lock = threading.RLock()
        """Held while fids are looked at."""
        self.fids = FidTable(self.folder, max(2, most_descriptors or _descriptors()))
        self.msize = 0
        """The largest message that both sides take; 0 before they have agreed on a version."""

    def answer(self, message: Message) -> bytes:
        """The answer to a request; that to a Tread without its data, which is in the client's memory already."""
        try:
            if message.kind == MessageType.TVERSION:
                with self.lock:
                    body = self._version(message)
            elif not self.msize:
                raise OSError(errno.EPROTO, "no version was agreed on")
            else:
                body = self._perform(message)
        except OSError as error:
            return error_reply(message.tag, error.errno or errno.EIO)
        except (ValueError, OverflowError):  # numbers and strings that no system call takes
            return error_reply(message.tag, errno.EINVAL)
        more = int.from_bytes(body[:4], "little") if message.kind == MessageType.TREAD else 0
        return reply(message.kind + 1, message.tag, body, more)

    def _perform(self, message: Message) -> bytes:
        perform = _AT_ONCE.get(message.kind)
        if perform is not None:
            return perform(self, message)
        perform = _REQUESTS.get(message.kind)
        if perform is None:
            raise OSError(errno.EOPNOTSUPP, "no such request")
        if message.kind in _CHANGES:
            self.must_be_writable()
        with self.lock:
            return perform(self, message)

    def _version(self, message: Message) -> bytes:
        """msize[4] version[s] -> msize[4] version[s]: a new session, in which there are no fids."""
        (msize,) = message.body.numbers(_VERSION)
        version = message.body.string()
        self.reset()
        if msize < LEAST_MSIZE:
            raise OSError(errno.EMSGSIZE, "messages too small")
        msize = min(msize, MOST_MSIZE)
        if version != VERSION:
            return pack("<I", msize) + string(b"unknown")
        self.msize = msize
        return pack("<I", msize) + string(VERSION)

    @contextmanager
    def borrowed(self, number: int) -> Iterator[int]:
        """The descriptor of an open fid, for use without the lock: it is not closed within this context."""
        with self.lock:
            fid = self.fids.borrow(number)
        try:
            yield fid.descriptor
        finally:
            with self.lock:
                self.fids.give_back(fid)

    def must_be_writable(self) -> None:
        """Raise OSError (EROFS) if nothing may be changed."""
        if self.read_only:
            raise OSError(errno.EROFS, "read-only")

    def reset(self) -> None:
        """End the session: forget all fids."""
        with self.lock:
            self.msize = 0
            self.fids.clear()

    def close(self) -> None:
        """End the session, and let go of the folder."""
        with self.lock:
            self.reset()
            self.folder.close()

    def state(self) -> dict[str, Any]:
        """The session: message size and fids."""
        with self.lock:
            return {"msize": self.msize, "devices": list(self.folder.devices), "fids": self.fids.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave. A fid whose file is not at its path any more gets ESTALE when it is used."""
        with self.lock:
            self.fids.restore(state["fids"])
            self.msize = state["msize"]
            self.folder.devices[:] = state["devices"]


def error_reply(tag: int, number: int) -> bytes:
    """An Rlerror."""
    return reply(MessageType.RLERROR, tag, pack("<I", number))


def _descriptors() -> int:
    """A quarter of those that the process may have, but no more than are useful."""
    import resource

    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(64, min(4096, soft // 4 if soft >= 0 else 4096))


Perform = Callable[[Session, Message], bytes]

_AT_ONCE: dict[int, Perform] = {
    MessageType.TREAD: file_requests.read,
    MessageType.TWRITE: file_requests.write,
    MessageType.TFSYNC: file_requests.fsync,
}
"""Done without the lock."""

_REQUESTS: dict[int, Perform] = {
    MessageType.TSTATFS: attribute_requests.statfs,
    MessageType.TLOPEN: file_requests.lopen,
    MessageType.TLCREATE: file_requests.lcreate,
    MessageType.TSYMLINK: name_requests.symlink,
    MessageType.TMKNOD: name_requests.mknod,
    MessageType.TRENAME: name_requests.rename,
    MessageType.TREADLINK: name_requests.readlink,
    MessageType.TGETATTR: attribute_requests.getattr,
    MessageType.TSETATTR: attribute_requests.setattr,
    MessageType.TXATTRWALK: attribute_requests.no_extended_attributes,
    MessageType.TXATTRCREATE: attribute_requests.no_extended_attributes,
    MessageType.TREADDIR: file_requests.readdir,
    MessageType.TLOCK: file_requests.lock,
    MessageType.TGETLOCK: file_requests.getlock,
    MessageType.TLINK: name_requests.link,
    MessageType.TMKDIR: name_requests.mkdir,
    MessageType.TRENAMEAT: name_requests.renameat,
    MessageType.TUNLINKAT: name_requests.unlinkat,
    MessageType.TATTACH: name_requests.attach,
    MessageType.TWALK: name_requests.walk,
    MessageType.TCLUNK: name_requests.clunk,
    MessageType.TREMOVE: name_requests.remove,
}

_CHANGES = frozenset({
    MessageType.TLCREATE, MessageType.TSYMLINK, MessageType.TMKNOD, MessageType.TRENAME, MessageType.TSETATTR,
    MessageType.TXATTRCREATE, MessageType.TLINK, MessageType.TMKDIR, MessageType.TRENAMEAT, MessageType.TUNLINKAT,
})  # fmt: skip
