"""The wire format of 9P2000.L: numbers in little endian, strings and lists with a count of two bytes before them."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from enum import IntEnum, IntFlag
from struct import Struct, error, pack

__all__ = [
    "HEADER", "NO_FID", "READ_HEADER", "VERSION", "Attributes", "Body", "Message", "MessageType",
    "SetAttributes", "attributes", "reply", "string",
]  # fmt: skip

HEADER = Struct("<IBH")
"""Each message begins with size[4] type[1] tag[2]; the size counts these, too."""
READ_HEADER = HEADER.size + 4
"""What is before the data of an Rread; an Rlerror is as long."""
NO_FID = 0xFFFF_FFFF
VERSION = b"9P2000.L"
Views = Callable[[int], list[memoryview]]
MOST_NAMES = 16
"""Of one Twalk (MAXWELEM)."""


class MessageType(IntEnum):
    """Requests. The type of an answer is that of its request plus one; errors are answered by RLERROR."""

    RLERROR = 7
    TSTATFS = 8
    TLOPEN = 12
    TLCREATE = 14
    TSYMLINK = 16
    TMKNOD = 18
    TRENAME = 20
    TREADLINK = 22
    TGETATTR = 24
    TSETATTR = 26
    TXATTRWALK = 30
    TXATTRCREATE = 32
    TREADDIR = 40
    TFSYNC = 50
    TLOCK = 52
    TGETLOCK = 54
    TLINK = 70
    TMKDIR = 72
    TRENAMEAT = 74
    TUNLINKAT = 76
    TVERSION = 100
    TAUTH = 102
    TATTACH = 104
    TFLUSH = 108
    TWALK = 110
    TREAD = 116
    TWRITE = 118
    TCLUNK = 120
    TREMOVE = 122


class Attributes(IntFlag):
    """What Rgetattr says: all that stat(2) has (P9_GETATTR_BASIC)."""

    BASIC = 0x7FF


class SetAttributes(IntFlag):
    """What Tsetattr is to set."""

    MODE = 1
    UID = 2
    GID = 4
    SIZE = 8
    ATIME = 0x10
    MTIME = 0x20
    CTIME = 0x40
    ATIME_SET = 0x80
    MTIME_SET = 0x100


class Body:
    """What follows the header of a request. Reading beyond its end raises OSError (EBADMSG)."""

    __slots__ = ("_at", "_content")

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    def numbers(self, layout: Struct) -> tuple[int, ...]:
        """The next numbers, as the layout has them."""
        try:
            values = layout.unpack_from(self._content, self._at)
        except error:
            raise OSError(errno.EBADMSG, "the message is cut off") from None
        self._at += layout.size
        return values

    def string(self) -> bytes:
        """The next string, of any bytes."""
        (length,) = self.numbers(_COUNT)
        text = self._content[self._at : self._at + length]
        if len(text) < length:
            raise OSError(errno.EBADMSG, "the message is cut off")
        self._at += length
        return text

    def strings(self) -> list[bytes]:
        """The names of a walk."""
        (count,) = self.numbers(_COUNT)
        if count > MOST_NAMES:
            raise OSError(errno.EBADMSG, "a walk with too many names")
        return [self.string() for _ in range(count)]


_COUNT = Struct("<H")


class Message:
    """One request: its type, tag and body. `payload(length)` answers views of what a Twrite has to write, and
    `room(length)` of where the data of an Rread goes: memory of the client, not copied; both fewer where it ends."""

    __slots__ = ("body", "kind", "payload", "room", "tag")

    def __init__(self, kind: int, tag: int, body: Body, payload: Views, room: Views) -> None:
        self.kind = kind
        self.tag = tag
        self.body = body
        self.payload = payload
        self.room = room


def reply(kind: int, tag: int, body: bytes, more: int = 0) -> bytes:
    """An answer of this type, which `more` bytes follow."""
    return HEADER.pack(HEADER.size + len(body) + more, kind, tag) + body


def string(text: bytes) -> bytes:
    """A string as messages have it."""
    return _COUNT.pack(len(text)) + text


_ATTRIBUTES = Struct("<III5Q8QQQ")


def attributes(qid: bytes, status: os.stat_result) -> bytes:
    """The body of an Rgetattr: valid, qid, mode, uid, gid, nlink, rdev, size, blksize, blocks, the times of access,
    modification, change and birth (which is not told) in seconds and nanoseconds, generation and data version."""
    times = [part for ns in (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns) for part in _split(ns)]
    return pack("<Q", Attributes.BASIC) + qid + _ATTRIBUTES.pack(
        status.st_mode, status.st_uid, status.st_gid, status.st_nlink, _device(status), status.st_size,
        status.st_blksize, status.st_blocks, *times, 0, 0, 0, 0,
    )  # fmt: skip


def _split(nanoseconds: int) -> tuple[int, int]:
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return seconds & (1 << 64) - 1, rest  # times before 1970 are negative


def _device(status: os.stat_result) -> int:
    """The number of a device node as Linux's new_encode_dev has it; 0 for other files."""
    if not (stat.S_ISBLK(status.st_mode) or stat.S_ISCHR(status.st_mode)):
        return 0
    major, minor = os.major(status.st_rdev), os.minor(status.st_rdev)
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12
