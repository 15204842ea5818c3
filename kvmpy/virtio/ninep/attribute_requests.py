"""Requests about files as a whole: what stat(2) and statfs(2) say, and what can be set of it."""

from __future__ import annotations

import errno
import os
import stat
import time
from struct import Struct, pack
from typing import TYPE_CHECKING

from kvmpy.virtio.ninep.folder import by_descriptor
from kvmpy.virtio.ninep.messages import Message, SetAttributes, attributes

if TYPE_CHECKING:
    from kvmpy.virtio.ninep.session import Session

__all__ = ["getattr", "no_extended_attributes", "setattr", "statfs"]

_ONE = Struct("<I")
_GETATTR = Struct("<IQ")
_SETATTR = Struct("<IIIIIQQQQQ")
_FILE_SYSTEM = 0x0102_1997  # V9FS_MAGIC
_NO_OWNER = -1
_SECOND = 1_000_000_000


def getattr(session: Session, message: Message) -> bytes:
    """fid[4] request_mask[8] -> see `attributes`."""
    number, _ = message.body.numbers(_GETATTR)
    status = os.fstat(session.fids.descriptor(session.fids.get(number)))
    return attributes(session.folder.qid(status), status)


def setattr(session: Session, message: Message) -> bytes:
    """fid[4] valid[4] mode[4] uid[4] gid[4] size[8] atime_sec[8] atime_nsec[8] mtime_sec[8] mtime_nsec[8]"""
    number, valid, mode, uid, gid, size, *times = message.body.numbers(_SETATTR)
    fid = session.fids.get(number)
    descriptor = session.fids.descriptor(fid)
    status = os.fstat(descriptor)
    path = by_descriptor(descriptor)
    if valid & (SetAttributes.UID | SetAttributes.GID):
        os.chown(path, uid if valid & SetAttributes.UID else _NO_OWNER, gid if valid & SetAttributes.GID else _NO_OWNER)
    if valid & SetAttributes.MODE:
        if stat.S_ISLNK(status.st_mode):
            raise OSError(errno.EOPNOTSUPP, "a symbolic link has no mode")
        # No set-user-ID programs: they would be ones of the host, too. For a folder set-group-ID means another thing.
        os.chmod(path, mode & (0o3777 if stat.S_ISDIR(status.st_mode) else 0o1777))
    if valid & SetAttributes.SIZE:
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL, "it has no size")
        if fid.flags is not None and fid.flags & os.O_ACCMODE:
            os.ftruncate(descriptor, size)
        else:
            os.truncate(path, size)
    if valid & (SetAttributes.ATIME | SetAttributes.MTIME):
        _set_times(path, status, valid, times)
    return b""


def _set_times(path: str, status: os.stat_result, valid: int, times: list[int]) -> None:
    access = _moment(valid & SetAttributes.ATIME, valid & SetAttributes.ATIME_SET, times[0], times[1])
    change = _moment(valid & SetAttributes.MTIME, valid & SetAttributes.MTIME_SET, times[2], times[3])
    if access == change == 0:
        os.utime(path)  # whoever may write to a file may do that, and its owner only the other
        return
    now = time.time_ns()
    access, change = (
        before if moment is None else moment or now
        for moment, before in ((access, status.st_atime_ns), (change, status.st_mtime_ns))
    )
    os.utime(path, ns=(access, change))


def _moment(wanted: int, given: int, seconds: int, nanoseconds: int) -> int | None:
    """None: unchanged. 0: now."""
    if not wanted:
        return None
    if not given:
        return 0
    if nanoseconds >= _SECOND:
        raise OSError(errno.EINVAL, "more nanoseconds than a second has")
    signed = seconds - (1 << 64) if seconds >> 63 else seconds
    return signed * _SECOND + nanoseconds or 1


def statfs(session: Session, message: Message) -> bytes:
    """fid[4] -> type[4] bsize[4] blocks[8] bfree[8] bavail[8] files[8] ffree[8] fsid[8] namelen[4]"""
    descriptor = session.fids.descriptor(session.fids.get(*message.body.numbers(_ONE)))
    found = os.statvfs(descriptor)
    return pack(
        "<IIQQQQQQI", _FILE_SYSTEM, found.f_frsize, found.f_blocks, found.f_bfree, found.f_bavail, found.f_files,
        found.f_ffree, os.fstat(descriptor).st_dev, found.f_namemax,
    )  # fmt: skip


def no_extended_attributes(session: Session, message: Message) -> bytes:
    """Txattrwalk and Txattrcreate: a client that is told so asks no more."""
    session.fids.get(*message.body.numbers(_ONE))
    raise OSError(errno.EOPNOTSUPP, "no extended attributes")
