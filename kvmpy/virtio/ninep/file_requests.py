"""Requests about what is in files and folders: to open, read and write them."""

from __future__ import annotations

import errno
import os
from struct import Struct, pack
from typing import TYPE_CHECKING

from kvmpy.virtio.ninep.directory import entries
from kvmpy.virtio.ninep.fids import joined
from kvmpy.virtio.ninep.folder import identity
from kvmpy.virtio.ninep.messages import READ_HEADER, Message, string

if TYPE_CHECKING:
    from kvmpy.virtio.ninep.session import Session

__all__ = ["fsync", "getlock", "lcreate", "lock", "lopen", "read", "readdir", "write"]

_ONE, _TWO, _THREE = Struct("<I"), Struct("<II"), Struct("<III")
_FID_OFFSET_COUNT = Struct("<IQI")
_LOCK = Struct("<IBIQQI")
_GETLOCK = Struct("<IBQQI")
_UNLOCKED = 2  # P9_LOCK_TYPE_UNLCK
_NO_UNIT = bytes(4)
"""iounit[4]: 0, so that msize alone limits reads and writes."""

_FLAGS = (
    os.O_ACCMODE | os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_APPEND | os.O_DSYNC | os.O_SYNC | os.O_DIRECTORY
)  # fmt: skip
"""What of the client's flags reaches open(2); 9P2000.L has the numbers of x86 (P9_DOTL_*). O_DIRECT does not: it asks
for buffers that are aligned. Nor does O_NOATIME, which is for the owner of a file only."""
_IOV_MAX = 1024


def _flags(session: Session, flags: int) -> int:
    flags &= _FLAGS
    if flags & os.O_ACCMODE == os.O_ACCMODE:
        raise OSError(errno.EINVAL, "neither for reading nor for writing")
    if flags & (os.O_ACCMODE | os.O_TRUNC | os.O_CREAT):
        session.must_be_writable()
    return flags


def lopen(session: Session, message: Message) -> bytes:
    """fid[4] flags[4] -> qid[13] iounit[4]: open a file or folder."""
    number, flags = message.body.numbers(_TWO)
    fid = session.fids.get(number)
    if fid.flags is not None:
        raise OSError(errno.EBUSY, "the fid is open")
    flags = _flags(session, flags) & ~(os.O_CREAT | os.O_EXCL)
    descriptor = session.folder.open_same(session.fids.descriptor(fid), flags)
    session.fids.opened(fid, descriptor, flags)
    return session.folder.qid(os.fstat(descriptor)) + _NO_UNIT


def lcreate(session: Session, message: Message) -> bytes:
    """fid[4] name[s] flags[4] mode[4] gid[4] -> qid[13] iounit[4]: make a file in the folder fid; fid is that file
    then, open."""
    (number,) = message.body.numbers(_ONE)
    name = message.body.string()
    flags, mode, _ = message.body.numbers(_THREE)
    fid = session.fids.get(number)
    if fid.flags is not None:
        raise OSError(errno.EBUSY, "the fid is open")
    flags = _flags(session, flags)
    path = joined(fid.path, name)
    descriptor = session.folder.create(session.fids.descriptor(fid), name, flags, mode & 0o777)
    status = os.fstat(descriptor)
    session.fids.opened(fid, descriptor, flags)
    fid.path, fid.identity = path, identity(status)
    return session.folder.qid(status) + _NO_UNIT


def read(session: Session, message: Message) -> bytes:
    """fid[4] offset[8] count[4] -> count[4] data[count]. The data goes to the client's memory, not into the answer."""
    number, offset, count = message.body.numbers(_FID_OFFSET_COUNT)
    with session.borrowed(number) as descriptor:
        views, done = message.room(min(count, session.msize - READ_HEADER)), 0
        for some in _portions(views):
            now = os.preadv(descriptor, some, offset + done)
            done += now
            if now < sum(map(len, some)):
                break
        return pack("<I", done)


def write(session: Session, message: Message) -> bytes:
    """fid[4] offset[8] count[4] data[count] -> count[4]"""
    number, offset, count = message.body.numbers(_FID_OFFSET_COUNT)
    session.must_be_writable()
    views = message.payload(count)
    if sum(map(len, views)) < count:
        raise OSError(errno.EBADMSG, "the message is cut off")
    with session.borrowed(number) as descriptor:
        done = 0
        for some in _portions(views):
            try:
                now = os.pwritev(descriptor, some, offset + done)
            except OSError:
                if not done:
                    raise
                break
            done += now
            if now < sum(map(len, some)):
                break
        return pack("<I", done)


def _portions(views: list[memoryview]) -> list[list[memoryview]]:
    return [views[at : at + _IOV_MAX] for at in range(0, len(views), _IOV_MAX)]


def fsync(session: Session, message: Message) -> bytes:
    """fid[4] datasync[4]: what was written is on the disk when this is answered. (Old clients say no `datasync`.)"""
    (number,) = message.body.numbers(_ONE)
    try:
        (only_data,) = message.body.numbers(_ONE)
    except OSError:
        only_data = 0
    with session.borrowed(number) as descriptor:
        if only_data:
            os.fdatasync(descriptor)
        else:
            os.fsync(descriptor)
    return b""


def readdir(session: Session, message: Message) -> bytes:
    """fid[4] offset[8] count[4] -> count[4] (qid[13] offset[8] type[1] name[s])..."""
    number, offset, count = message.body.numbers(_FID_OFFSET_COUNT)
    fid = session.fids.get(number)
    if fid.flags is None:
        raise OSError(errno.EBADF, "the fid is not open")
    descriptor = session.fids.descriptor(fid)
    left = min(count, session.msize - READ_HEADER)
    device = fid.identity[0]
    found: list[bytes] = []
    for inode, after, kind, name in entries(descriptor, offset):
        if name == b".." and not fid.path:
            inode = fid.identity[1]  # the root is its own parent
        qid = pack("<BIQ", 0x80 if kind == 4 else 0x02 if kind == 10 else 0, 0, session.folder.number(device, inode))
        entry = qid + pack("<QB", after & (1 << 64) - 1, kind) + string(name)
        if len(entry) > left:
            if not found:
                raise OSError(errno.EINVAL, "no room for one entry")  # as getdents(2) has it
            break
        left -= len(entry)
        found.append(entry)
    data = b"".join(found)
    return pack("<I", len(data)) + data


def lock(session: Session, message: Message) -> bytes:
    """fid[4] type[1] flags[4] start[8] length[8] proc_id[4] client_id[s] -> status[1]: granted.

    The client has made sure of its own programs before; programs of the host are not asked.
    """
    session.fids.get(message.body.numbers(_LOCK)[0])
    message.body.string()
    return b"\0"


def getlock(session: Session, message: Message) -> bytes:
    """fid[4] type[1] start[8] length[8] proc_id[4] client_id[s] -> type[1] start[8] length[8] proc_id[4] client_id[s]:
    nobody else has a lock."""
    number, _, start, length, process = message.body.numbers(_GETLOCK)
    session.fids.get(number)
    return pack("<BQQI", _UNLOCKED, start, length, process) + string(message.body.string())
