"""An initial RAM file system: a cpio archive in the format "newc", as Linux unpacks it (initramfs buffer format).

Made from a folder or a dict, without root and without changing anything on disk: device nodes and owners are only
numbers in the archive. The same content always gives the same bytes: names are sorted, times are 0, inodes are counted.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping

from kvmpy._value import frozen
from kvmpy.errors import UsageError

__all__ = ["DeviceNode", "File", "Initramfs", "Link"]

_TRAILER = "TRAILER!!!"
_LARGEST = 0xFFFF_FFFF
"""The size of a file: eight hexadecimal digits."""
_NAME_LIMIT = 4096  # PATH_MAX, which the kernel's unpacker holds names and the targets of links to
_MAJOR_LIMIT, _MINOR_LIMIT = 1 << 12, 1 << 20  # a dev_t of Linux


@frozen
class File:
    """A regular file with `data` and permission bits `mode`."""

    data: bytes
    mode: int = 0o644


@frozen
class Link:
    """A symbolic link to `target`."""

    target: str


@frozen
class DeviceNode:
    """A device node: `kind` "c" (character) or "b" (block), with its numbers. /dev/console is ("c", 5, 1)."""

    kind: str
    major: int
    minor: int
    mode: int = 0o600


Entry = bytes | str | File | Link | DeviceNode | None
"""What a dict holds: bytes or text of a file that may be executed, one of the classes above, or None for a folder."""


class Initramfs:
    """An archive to be filled, and given to `LinuxKernel(initrd=...)`.

    Folders on the way to a file are made by themselves. Adding a name again replaces it; a folder that has something in
    it stays a folder.
    """

    def __init__(self, entries: Mapping[str, Entry] | None = None) -> None:
        self._entries: dict[str, tuple[int, bytes, tuple[int, int]]] = {}
        for name, entry in (entries or {}).items():
            self.add(name, entry)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Initramfs:
        """All that is in a folder: files, links and subfolders with their permissions; owned by root.

        Device nodes are taken over too. Sockets and FIFOs are left out. Raises OSError as `open` does.
        """
        archive = cls()
        root = os.fspath(folder)
        for place, folders, files in os.walk(root, onerror=_raise):
            for name in (*folders, *files):
                path = os.path.join(place, name)
                archive._add_path(os.path.relpath(path, root), path)
        return archive

    def add(self, name: str, entry: Entry) -> None:
        """Add a file, link, device node or (None) folder. Raises UsageError for a name or content that cannot be."""
        match entry:
            case None:
                self._put(name, stat.S_IFDIR | 0o755, b"")
            case str():
                self._put(name, stat.S_IFREG | 0o755, entry.encode())
            case bytes():
                self._put(name, stat.S_IFREG | 0o755, entry)
            case File(data=data, mode=mode):
                self._put(name, stat.S_IFREG | mode & 0o7777, data)
            case Link(target=target):
                self._put(name, stat.S_IFLNK | 0o777, os.fsencode(target))
            case DeviceNode(kind="c" | "b" as kind, major=major, minor=minor, mode=mode):
                self._put(name, (stat.S_IFCHR if kind == "c" else stat.S_IFBLK) | mode & 0o7777, b"", (major, minor))
            case _:
                raise UsageError(
                    f"{name}: an initramfs holds bytes, text, File, Link, DeviceNode or None, not {entry!r}"
                )

    def _add_path(self, name: str, path: str) -> None:
        status = os.lstat(path)
        mode = status.st_mode
        if stat.S_ISREG(mode):
            with open(path, "rb") as file:
                self._put(name, mode, file.read())
        elif stat.S_ISLNK(mode):
            self._put(name, mode, os.fsencode(os.readlink(path)))
        elif stat.S_ISDIR(mode):
            self._put(name, mode, b"")
        elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            self._put(name, mode, b"", (os.major(status.st_rdev), os.minor(status.st_rdev)))

    def _put(self, name: str, mode: int, data: bytes, device: tuple[int, int] = (0, 0)) -> None:
        parts = name.strip("/").split("/")
        if "" in parts or "." in parts or ".." in parts or "\0" in name or parts == [_TRAILER]:
            raise UsageError(f"{name!r} is no name for an entry of an initramfs")
        if len(os.fsencode(name)) >= _NAME_LIMIT:
            raise UsageError(f"a name of {len(name)} characters is longer than Linux takes: {name[:40]!r}...")
        if len(data) > _LARGEST:
            raise UsageError(f"{name}: {len(data)} bytes do not fit the archive's 32 bits")
        if stat.S_ISLNK(mode) and (not 0 < len(data) < _NAME_LIMIT or b"\0" in data):
            raise UsageError(f"{name}: a link to {data[:40]!r} is one that Linux does not make")
        if not (0 <= device[0] < _MAJOR_LIMIT and 0 <= device[1] < _MINOR_LIMIT):
            raise UsageError(f"{name}: Linux has no device {device[0]}:{device[1]}; majors have 12 bits, minors 20")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            if not stat.S_ISDIR(self._entries.setdefault(folder, (stat.S_IFDIR | 0o755, b"", (0, 0)))[0]):
                raise UsageError(f"{name}: {folder} is no folder")
        path = "/".join(parts)
        was_folder = path in self._entries and stat.S_ISDIR(self._entries[path][0])
        if was_folder and not stat.S_ISDIR(mode) and any(other.startswith(path + "/") for other in self._entries):
            raise UsageError(f"{name} is a folder that has something in it")
        self._entries[path] = (mode, data, device)

    def to_bytes(self) -> bytes:
        """The archive, not compressed: unpacking costs a guest more time than loading costs the host."""
        parts = [
            piece
            for number, name in enumerate(sorted(self._entries), 1)
            for piece in _record(name, number, *self._entries[name])
        ]
        parts += _record(_TRAILER, 0, 0, b"", (0, 0))
        return b"".join(parts)

    def __contains__(self, name: object) -> bool:
        """Whether there is an entry of that name."""
        return isinstance(name, str) and name.strip("/") in self._entries

    def __repr__(self) -> str:
        return f"<Initramfs of {len(self._entries)} entries>"


def _raise(error: OSError) -> None:
    raise error  # os.walk would go on without the folder


def _record(name: str, inode: int, mode: int, data: bytes, device: tuple[int, int]) -> list[bytes]:
    """One entry: header of thirteen fields of eight hexadecimal digits, name, content, each padded to 4 bytes."""
    path = os.fsencode(name) + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    # ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
    fields = (inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(path), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return [header, path, bytes(-(len(header) + len(path)) % 4), data, bytes(-len(data) % 4)]
