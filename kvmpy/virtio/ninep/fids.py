"""Fids: the numbers by which a client names what it has walked to or opened."""

from __future__ import annotations

import errno
import os
from typing import Any

from kvmpy.virtio.ninep.folder import MOST_OF_A_PATH, Folder, Identity, identity

__all__ = ["Fid", "FidTable", "joined"]

MOST_FIDS = 0x1_0000
_NOT_AGAIN = os.O_CREAT | os.O_EXCL | os.O_TRUNC


class Fid:
    """One file: its path in the folder, which file that was, and a descriptor.

    The descriptor is an O_PATH one, or with `flags`, those it was opened with, one for input and output. It is -1
    while the fid sleeps; then the path leads to the file when it is wanted.
    """

    __slots__ = ("busy", "descriptor", "flags", "forgotten", "identity", "path")

    def __init__(self, path: bytes, identity: Identity, descriptor: int, flags: int | None = None) -> None:
        self.path = path
        self.identity = identity
        self.descriptor = descriptor
        self.flags = flags
        self.busy = 0
        """Threads that use the descriptor without the session's lock."""
        self.forgotten = False
        """The client has given it back; the descriptor is closed when nobody uses it."""


class FidTable:
    """All fids of a session, with a limit on descriptors: a client that knows many files, as Linux does whose cache is
    on, must not use up those of the process. Fids that were not used for longest go to sleep.

    Not thread-safe: the session's lock is held. `most` limits the descriptors of fids that are not open, and those of
    open ones.
    """

    def __init__(self, folder: Folder, most: int) -> None:
        self._folder = folder
        self._most = most
        self._fids: dict[int, Fid] = {}
        self._awake: dict[Fid, None] = {}  # not open, with a descriptor; used last comes last
        self._open: set[Fid] = set()  # open, with a descriptor

    def __len__(self) -> int:
        return len(self._fids)

    def __contains__(self, number: int) -> bool:
        return number in self._fids

    @property
    def descriptors(self) -> int:
        """How many descriptors there are."""
        return len(self._awake) + len(self._open)

    def get(self, number: int) -> Fid:
        """The fid of this number. Raises OSError (EBADF) when there is none."""
        fid = self._fids.get(number)
        if fid is None:
            raise OSError(errno.EBADF, "no such fid")
        return fid

    def add(self, number: int, fid: Fid) -> None:
        """Let `number` be this fid from now on, instead of another if there was one."""
        if number in self._fids:
            self.remove(number)
        elif len(self._fids) >= MOST_FIDS:
            self._close(fid)
            raise OSError(errno.ENFILE, "too many fids")
        self._fids[number] = fid
        self._note_use(fid)

    def remove(self, number: int) -> None:
        """Forget a fid. Raises OSError (EBADF) when there is none."""
        self._release(self.get(number))
        del self._fids[number]

    def clear(self) -> None:
        """Forget all."""
        for fid in self._fids.values():
            self._release(fid)
        self._fids.clear()

    def descriptor(self, fid: Fid) -> int:
        """A descriptor of the file, which stays valid as long as the session's lock is held.

        Raises OSError (ESTALE) when the fid slept and there is another file at its path by now.
        """
        if fid.descriptor < 0:
            self._wake(fid)
        self._note_use(fid)
        return fid.descriptor

    def opened(self, fid: Fid, descriptor: int, flags: int) -> None:
        """The fid was opened for input and output: this descriptor takes the place of the other."""
        if len(self._open) >= self._most:
            os.close(descriptor)
            raise OSError(errno.ENFILE, "too many open files")
        self._close(fid)
        fid.descriptor, fid.flags = descriptor, flags
        self._note_use(fid)

    def borrow(self, number: int) -> Fid:
        """An open fid whose descriptor stays open without the lock, until `give_back`."""
        fid = self.get(number)
        if fid.flags is None:
            raise OSError(errno.EBADF, "the fid is not open")
        self.descriptor(fid)
        fid.busy += 1
        return fid

    def give_back(self, fid: Fid) -> None:
        """Undo `borrow`."""
        fid.busy -= 1
        if fid.forgotten and not fid.busy:
            self._close(fid)

    def renamed(self, old: bytes, new: bytes) -> None:
        """What was at the path `old` is at `new` now, and so is all that is in it."""
        inside = old + b"/"
        for fid in self._fids.values():
            if fid.path == old:
                fid.path = new
            elif fid.path.startswith(inside):
                fid.path = new + fid.path[len(old) :]

    def _note_use(self, fid: Fid) -> None:
        if fid.descriptor < 0:
            return
        if fid.flags is not None:
            self._open.add(fid)
            return
        self._awake.pop(fid, None)
        self._awake[fid] = None
        while len(self._awake) > self._most:
            self._close(next(iter(self._awake)))

    def _wake(self, fid: Fid) -> None:
        descriptor = self._folder.open_path(fid.path)
        try:
            if identity(os.fstat(descriptor)) != fid.identity:
                raise OSError(errno.ESTALE, "another file is there now")
            if fid.flags is None:
                fid.descriptor, descriptor = descriptor, -1
            else:
                if len(self._open) >= self._most:
                    raise OSError(errno.ENFILE, "too many open files")
                fid.descriptor = self._folder.open_same(descriptor, fid.flags & ~_NOT_AGAIN)
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _release(self, fid: Fid) -> None:
        fid.forgotten = True
        if not fid.busy:
            self._close(fid)

    def _close(self, fid: Fid) -> None:
        self._awake.pop(fid, None)
        self._open.discard(fid)
        descriptor, fid.descriptor = fid.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def state(self) -> list[list[Any]]:
        """All fids: number, path, identity, and flags if open."""
        return [[number, fid.path, list(fid.identity), fid.flags] for number, fid in self._fids.items()]

    def restore(self, state: list[list[Any]]) -> None:
        """Take back what `state` gave. They sleep: files are looked for when they are used."""
        self.clear()
        for number, path, (device, inode), flags in state:
            self._fids[number] = Fid(path, (device, inode), -1, flags)


def joined(path: bytes, name: bytes) -> bytes:
    """The path of `name` in the folder at `path`. Raises OSError (ENAMETOOLONG)."""
    whole = path + b"/" + name if path else name
    if len(whole) > MOST_OF_A_PATH:
        raise OSError(errno.ENAMETOOLONG, "a path too long")
    return whole
