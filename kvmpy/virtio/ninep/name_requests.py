"""Requests about names: to find, make, move and remove files."""

from __future__ import annotations

import errno
import os
import stat
from struct import Struct, pack
from typing import TYPE_CHECKING

from kvmpy.virtio.ninep.fids import Fid, joined
from kvmpy.virtio.ninep.folder import by_descriptor, checked_name, identity
from kvmpy.virtio.ninep.messages import NO_FID, Message, string

if TYPE_CHECKING:
    from kvmpy.virtio.ninep.session import Session

__all__ = [
    "attach", "clunk", "link", "mkdir", "mknod", "readlink", "remove", "rename", "renameat", "symlink", "unlinkat",
    "walk",
]  # fmt: skip

_ONE, _TWO, _THREE = Struct("<I"), Struct("<II"), Struct("<III")
_MODE_AND_GROUP = Struct("<II")
_REMOVE_FOLDER = 0x200
"""AT_REMOVEDIR of unlinkat(2)."""
_NODES = (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK)


def attach(session: Session, message: Message) -> bytes:
    """fid[4] afid[4] uname[s] aname[s] n_uname[4] -> qid[13]: begin at the root of the folder."""
    number, auth = message.body.numbers(_TWO)
    message.body.string()
    name = message.body.string()
    if auth != NO_FID:
        raise OSError(errno.EOPNOTSUPP, "there is no authentication")
    if name not in (b"", b"/"):
        raise OSError(errno.ENOENT, "there is one tree, the folder")
    if number == NO_FID or number in session.fids:
        raise OSError(errno.EBADF, "the fid is in use")
    descriptor = session.folder.open_root()
    status = os.fstat(descriptor)
    session.fids.add(number, Fid(b"", identity(status), descriptor))
    return session.folder.qid(status)


def walk(session: Session, message: Message) -> bytes:
    """fid[4] newfid[4] nwname[2] name[s]... -> nwqid[2] qid[13]...: newfid is what the names lead to from fid.

    When not all names are there, the qids of those that are; newfid stays unused then. No names: a copy of fid.
    """
    number, new = message.body.numbers(_TWO)
    names = message.body.strings()
    fids, folder = session.fids, session.folder
    source = fids.get(number)
    if new == NO_FID or (new != number and new in fids):
        raise OSError(errno.EBADF, "the fid is in use")
    if new == number and source.flags is not None:
        raise OSError(errno.EBUSY, "the fid is open")
    qids: list[bytes] = []
    path, before = source.path, fids.descriptor(source)
    current = os.dup(before) if source.flags is None else folder.open_handle(before)
    try:
        status = os.fstat(current)
        for name in names:
            if name == b"..":
                if not stat.S_ISDIR(status.st_mode):
                    raise OSError(errno.ENOTDIR, "no folder")
                path = path.rpartition(b"/")[0]  # that of the root is the root
                child = folder.open_path(path)
            else:
                path = joined(path, name)
                child = folder.open_child(current, name)
            os.close(current)
            current = child
            status = os.fstat(current)
            qids.append(folder.qid(status))
    except OSError:
        os.close(current)
        if not qids:
            raise
        return pack("<H", len(qids)) + b"".join(qids)
    fids.add(new, Fid(path, identity(status), current))
    return pack("<H", len(qids)) + b"".join(qids)


def clunk(session: Session, message: Message) -> bytes:
    """fid[4]: give a fid back."""
    session.fids.remove(*message.body.numbers(_ONE))
    return b""


def readlink(session: Session, message: Message) -> bytes:
    """fid[4] -> target[s]: what a symbolic link says. Where it leads is the client's matter."""
    fid = session.fids.get(*message.body.numbers(_ONE))
    # With an empty path readlinkat(2) takes the file that the descriptor is of.
    return string(os.readlink(b"", dir_fd=session.fids.descriptor(fid)))


def symlink(session: Session, message: Message) -> bytes:
    """fid[4] name[s] target[s] gid[4] -> qid[13]"""
    (number,) = message.body.numbers(_ONE)
    name, target = message.body.string(), message.body.string()
    parent = _folder(session, number)
    os.symlink(target, checked_name(name), dir_fd=parent)
    return _qid_of(session, parent, name)


def mknod(session: Session, message: Message) -> bytes:
    """dfid[4] name[s] mode[4] major[4] minor[4] gid[4] -> qid[13]: a FIFO or socket; never a device of the host."""
    (number,) = message.body.numbers(_ONE)
    name = message.body.string()
    mode, _, _ = message.body.numbers(_THREE)
    if stat.S_IFMT(mode) not in _NODES:
        raise OSError(errno.EPERM, "no device nodes")
    parent = _folder(session, number)
    os.mknod(checked_name(name), stat.S_IFMT(mode) | mode & 0o777, dir_fd=parent)
    return _qid_of(session, parent, name)


def mkdir(session: Session, message: Message) -> bytes:
    """dfid[4] name[s] mode[4] gid[4] -> qid[13]"""
    (number,) = message.body.numbers(_ONE)
    name = message.body.string()
    mode, _ = message.body.numbers(_MODE_AND_GROUP)
    parent = _folder(session, number)
    os.mkdir(checked_name(name), mode & 0o1777, dir_fd=parent)
    made = session.folder.open_child(parent, name)
    try:
        status = os.fstat(made)
        # As in Folder.create: this process's umask does not count.
        if stat.S_ISDIR(status.st_mode) and mode & 0o777 & ~status.st_mode:
            os.chmod(by_descriptor(made), stat.S_IMODE(status.st_mode) | mode & 0o777)
        return session.folder.qid(status)
    finally:
        os.close(made)


def link(session: Session, message: Message) -> bytes:
    """dfid[4] fid[4] name[s]: a further name of a file."""
    number, file_number = message.body.numbers(_TWO)
    name = checked_name(message.body.string())
    file = session.fids.descriptor(session.fids.get(file_number))
    # linkat(2) with AT_SYMLINK_FOLLOW follows the link in /proc, to the file itself.
    os.link(by_descriptor(file), name, dst_dir_fd=_folder(session, number), follow_symlinks=True)
    return b""


def renameat(session: Session, message: Message) -> bytes:
    """olddirfid[4] oldname[s] newdirfid[4] newname[s]"""
    (number,) = message.body.numbers(_ONE)
    name = checked_name(message.body.string())
    (new_number,) = message.body.numbers(_ONE)
    new_name = checked_name(message.body.string())
    old, new = session.fids.get(number), session.fids.get(new_number)
    new_path = joined(new.path, new_name)
    os.rename(name, new_name, src_dir_fd=_folder(session, number), dst_dir_fd=_folder(session, new_number))
    session.fids.renamed(joined(old.path, name), new_path)
    return b""


def rename(session: Session, message: Message) -> bytes:
    """fid[4] dfid[4] name[s]: what old clients have instead of renameat."""
    number, new_number = message.body.numbers(_TWO)
    new_name = checked_name(message.body.string())
    fid = session.fids.get(number)
    new_path = joined(session.fids.get(new_number).path, new_name)
    parent = _parent_of(session, fid)
    try:
        os.rename(_own_name(fid), new_name, src_dir_fd=parent, dst_dir_fd=_folder(session, new_number))
    finally:
        os.close(parent)
    session.fids.renamed(fid.path, new_path)
    return b""


def unlinkat(session: Session, message: Message) -> bytes:
    """dirfd[4] name[s] flags[4]"""
    (number,) = message.body.numbers(_ONE)
    name = checked_name(message.body.string())
    (flags,) = message.body.numbers(_ONE)
    parent = _folder(session, number)
    if flags == _REMOVE_FOLDER:
        os.rmdir(name, dir_fd=parent)
    elif not flags:
        os.unlink(name, dir_fd=parent)
    else:
        raise OSError(errno.EINVAL, "unknown flags")
    return b""


def remove(session: Session, message: Message) -> bytes:
    """fid[4]: remove the file, and give the fid back whether that works or not."""
    (number,) = message.body.numbers(_ONE)
    fid = session.fids.get(number)
    try:
        session.must_be_writable()
        parent = _parent_of(session, fid)
        try:
            if stat.S_ISDIR(os.fstat(session.fids.descriptor(fid)).st_mode):
                os.rmdir(_own_name(fid), dir_fd=parent)
            else:
                os.unlink(_own_name(fid), dir_fd=parent)
        finally:
            os.close(parent)
    finally:
        session.fids.remove(number)
    return b""


def _folder(session: Session, number: int) -> int:
    return session.fids.descriptor(session.fids.get(number))


def _own_name(fid: Fid) -> bytes:
    return fid.path.rpartition(b"/")[2]


def _parent_of(session: Session, fid: Fid) -> int:
    """A new descriptor of the folder that the file is in. Raises OSError when it is there no longer."""
    if not fid.path:
        raise OSError(errno.EBUSY, "the root of the tree")
    parent = session.folder.open_path(fid.path.rpartition(b"/")[0])
    try:
        if identity(os.lstat(_own_name(fid), dir_fd=parent)) != fid.identity:
            raise OSError(errno.ESTALE, "another file is there now")
    except OSError:
        os.close(parent)
        raise
    return parent


def _qid_of(session: Session, parent: int, name: bytes) -> bytes:
    return session.folder.qid(os.lstat(name, dir_fd=parent))
