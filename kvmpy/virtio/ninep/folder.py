"""The one door to the host's files: a folder and what is in it, and no way out.

What keeps a client inside, however it names things and whatever changes meanwhile:

* A file is reached by the descriptor of the folder it is in and one name, with O_NOFOLLOW: `open_child`. A name has no
  "/" and is neither "." nor "..", so the kernel has no path to resolve; a symbolic link is opened as the link itself
  (O_PATH) and never followed, also if it was put there between two looks. What it says is only read.
* ".." is never given to the kernel. A path within the folder is a sequence of names; its parent is what one reaches
  by all names but the last, from the root of the folder on.
* What is done to a file is done to the descriptor, by way of /proc/self/fd, which leads to that file and no other: no
  name is resolved a second time. Only regular files and folders are opened for input and output: no device, no FIFO.
"""

from __future__ import annotations

import errno
import os
import stat
from struct import pack

__all__ = ["MOST_OF_A_PATH", "Folder", "Identity", "by_descriptor", "checked_name", "identity"]

Identity = tuple[int, int]
"""st_dev and st_ino: which file it is."""

MOST_OF_A_PATH = 4096
"""Bytes, as PATH_MAX: a client may not make the server remember longer ones."""

_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_QID = {stat.S_IFDIR: 0x80, stat.S_IFLNK: 0x02}  # QTDIR, QTSYMLINK


def by_descriptor(descriptor: int) -> str:
    """A path that leads to an open file, whatever its name is now."""
    return f"/proc/self/fd/{descriptor}"


def checked_name(name: bytes) -> bytes:
    """The name of a file within a folder. Raises OSError for what is more or less than that."""
    if not name or b"/" in name or b"\0" in name:
        raise OSError(errno.EINVAL, "no name of a file")
    if name in (b".", b".."):
        raise OSError(errno.EINVAL, "a name that leads elsewhere")
    return name


def identity(status: os.stat_result) -> Identity:
    """Which file it is."""
    return status.st_dev, status.st_ino


class Folder:
    """The folder `path` of the host. Paths in it are names with "/" between them, and b"" is the folder itself.

    Raises OSError where it is no folder, or may not be entered.
    """

    def __init__(self, path: str | bytes | os.PathLike[str]) -> None:
        self.root = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.identity = identity(os.fstat(self.root))
        self.devices = [self.identity[0]]
        """The file systems that were met: more than one where something is mounted below the folder."""

    def close(self) -> None:
        """Let go of it."""
        root, self.root = self.root, -1
        if root >= 0:
            os.close(root)

    def open_child(self, parent: int, name: bytes) -> int:
        """A descriptor (O_PATH) of what has this name in an open folder; a symbolic link is not followed."""
        return os.open(checked_name(name), _PATH, dir_fd=parent)

    def open_root(self) -> int:
        """A further descriptor of the folder."""
        return os.dup(self.root)

    def open_path(self, path: bytes) -> int:
        """A descriptor (O_PATH) of what is at a path within the folder."""
        descriptor = self.open_root()
        for name in path.split(b"/") if path else ():
            try:
                child = self.open_child(descriptor, name)
            finally:
                os.close(descriptor)
            descriptor = child
        return descriptor

    def open_same(self, descriptor: int, flags: int) -> int:
        """Open the file that `descriptor` is of for input and output. Raises OSError where it is no file or folder."""
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISLNK(mode):
            raise OSError(errno.ELOOP, "a symbolic link")
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            # Where the guest keeps a device node, it means a device of its own.
            raise OSError(errno.EPERM, "no file and no folder")
        return os.open(by_descriptor(descriptor), flags | os.O_CLOEXEC | os.O_NOCTTY)

    def open_handle(self, descriptor: int) -> int:
        """An O_PATH descriptor of the same file."""
        return os.open(by_descriptor(descriptor), os.O_PATH | os.O_CLOEXEC)

    def create(self, parent: int, name: bytes, flags: int, mode: int) -> int:
        """Make a file and open it; or open one that is there, unless flags has O_EXCL.

        The client has applied its umask to `mode`. That of this process does not count: to change it for a moment
        would be seen by all threads, so the mode is set afterwards.
        """
        checked_name(name)
        how = flags & ~os.O_EXCL | os.O_CLOEXEC
        for _ in range(8):
            try:
                made = os.open(name, how | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode, dir_fd=parent)
            except FileExistsError:
                if flags & os.O_EXCL:
                    raise
            else:
                if mode & ~os.fstat(made).st_mode:
                    os.fchmod(made, mode)
                return made
            try:
                there = self.open_child(parent, name)
            except FileNotFoundError:
                continue  # it has gone meanwhile
            try:
                return self.open_same(there, how & ~os.O_CREAT)
            finally:
                os.close(there)
        raise OSError(errno.EBUSY, "the file comes and goes")

    def qid(self, status: os.stat_result) -> bytes:
        """What the client knows a file by: type[1] version[4] path[8]. The version changes with the contents."""
        kind = _QID.get(stat.S_IFMT(status.st_mode), 0)
        version = (status.st_mtime_ns ^ status.st_mtime_ns >> 32 ^ status.st_size << 8) & 0xFFFF_FFFF
        return pack("<BIQ", kind, version, self.number(status.st_dev, status.st_ino))

    def number(self, device: int, inode: int) -> int:
        """A number that no two files below the folder share: inode numbers are those of one file system only."""
        if device not in self.devices:
            self.devices.append(device)
        return (inode ^ self.devices.index(device) << 48) & (1 << 64) - 1
