"""A 9P2000.L client in Python: what tests of the 9P device need of a guest.

`NinepClient(device)` drives the device behind a `FakeDriver`. Each method is one request, and raises OSError with the
number that the server answers; `rpc` sends any message, and `raw` any bytes.
"""

from __future__ import annotations

import os
import time
from struct import calcsize, pack, unpack, unpack_from

from kvmpy.virtio.ninep.device import Plan9
from kvmpy.virtio.ninep.messages import HEADER, NO_FID, MessageType
from virtio_driver import FakeDriver

__all__ = ["NinepClient", "string"]

MSIZE = 0x2000
ROOT = 0


def string(text: bytes) -> bytes:
    return pack("<H", len(text)) + text


class NinepClient:
    """`attach` is done already: fid 0 is the root."""

    def __init__(self, device: Plan9, *, driver: FakeDriver | None = None, msize: int = MSIZE) -> None:
        self.driver = driver or FakeDriver(device).start()
        self.device = device
        self.msize = msize
        self.next_fid = 1
        if driver is None:
            self.version()
            self.attach()

    # Messages

    def raw(self, *out: bytes, into: tuple[int, ...] | None = None) -> bytes:
        """Send any bytes, and wait for what comes back."""
        ring = self.driver.queues[0]
        ring.add(out, (self.msize,) if into is None else into)
        ring.kick()
        return self.wait(1)[0]

    def wait(self, count: int) -> list[bytes]:
        """The next `count` answers, in the order in which they come."""
        ring = self.driver.queues[0]
        done: list[bytes] = []
        deadline = time.monotonic() + 20
        while len(done) < count:
            done += [answer for _, _, answer in ring.used()]
            assert time.monotonic() < deadline, "the request was not answered"
            time.sleep(0)
        return done

    def rpc(self, kind: int, body: bytes, *, tag: int = 1, into: tuple[int, ...] | None = None) -> bytes:
        """Send a message, and answer the body of the reply. Raises OSError for an Rlerror."""
        answer = self.raw(HEADER.pack(7 + len(body), kind, tag) + body, into=into)
        size, kind_of_reply, tag_of_reply = HEADER.unpack_from(answer)
        assert (size, tag_of_reply) == (len(answer), tag)
        if kind_of_reply == MessageType.RLERROR:
            (number,) = unpack("<I", answer[7:])
            raise OSError(number, os.strerror(number))
        assert kind_of_reply == kind + 1
        return answer[7:]

    # Requests

    def version(self, text: bytes = b"9P2000.L") -> tuple[int, bytes]:
        answer = self.rpc(MessageType.TVERSION, pack("<I", self.msize) + string(text), tag=0xFFFF)
        return unpack_from("<I", answer)[0], answer[6:]

    def attach(self, fid: int = ROOT) -> bytes:
        return self.rpc(MessageType.TATTACH, pack("<II", fid, NO_FID) + string(b"root") + string(b"") + pack("<I", 0))

    def walk_qids(self, fid: int, new: int, names: list[bytes]) -> list[bytes]:
        """A walk whose names need not all be there."""
        body = pack("<IIH", fid, new, len(names)) + b"".join(map(string, names))
        answer = self.rpc(MessageType.TWALK, body)
        (count,) = unpack_from("<H", answer)
        assert len(answer) == 2 + 13 * count
        return [answer[at : at + 13] for at in range(2, len(answer), 13)]

    def walk(self, *names: bytes | str, fid: int = ROOT) -> int:
        """A new fid for what the names lead to."""
        new, self.next_fid = self.next_fid, self.next_fid + 1
        wanted = [os.fsencode(name) for name in names]
        if len(self.walk_qids(fid, new, wanted)) != len(wanted):
            raise FileNotFoundError(*names)
        return new

    def open(self, fid: int, flags: int = os.O_RDONLY) -> int:
        assert len(self.rpc(MessageType.TLOPEN, pack("<II", fid, flags))) == 17
        return fid

    def create(self, fid: int, name: bytes, flags: int = os.O_RDWR, mode: int = 0o644) -> int:
        self.rpc(MessageType.TLCREATE, pack("<I", fid) + string(name) + pack("<III", flags, mode, 0))
        return fid

    def read(self, fid: int, offset: int = 0, count: int = 0x1000) -> bytes:
        answer = self.rpc(MessageType.TREAD, pack("<IQI", fid, offset, count))
        assert unpack_from("<I", answer)[0] == len(answer) - 4
        return answer[4:]

    def write(self, fid: int, data: bytes, offset: int = 0) -> int:
        answer = self.rpc(MessageType.TWRITE, pack("<IQI", fid, offset, len(data)) + data)
        return int(unpack("<I", answer)[0])

    def readdir(self, fid: int, offset: int = 0, count: int = 0x1000) -> list[tuple[bytes, int, int, int]]:
        """Entries from `offset` on: name, type, inode number, offset of the next."""
        answer = self.rpc(MessageType.TREADDIR, pack("<IQI", fid, offset, count))
        found, at = [], 4
        while at < len(answer):
            _, _, inode, after, kind, length = unpack_from("<BIQQBH", answer, at)
            at += calcsize("<BIQQBH") + length
            found.append((answer[at - length : at], kind, inode, after))
        return found

    def names(self, fid: int, count: int = 0x1000) -> list[bytes]:
        """All names in an open folder but "." and ".."."""
        found, offset = [], 0
        while some := self.readdir(fid, offset, count):
            found += [entry[0] for entry in some]
            offset = some[-1][3]
        return sorted(name for name in found if name not in (b".", b".."))

    def getattr(self, fid: int) -> dict[str, int]:
        answer = self.rpc(MessageType.TGETATTR, pack("<IQ", fid, 0x7FF))
        names = (
            "valid", "kind", "version", "path", "mode", "uid", "gid", "nlink", "rdev", "size", "blksize", "blocks",
            "atime", "atime_ns", "mtime", "mtime_ns", "ctime", "ctime_ns", "btime", "btime_ns", "generation", "data",
        )  # fmt: skip
        return dict(zip(names, unpack("<QBIQIII15Q", answer), strict=True))

    def setattr(
        self, fid: int, valid: int, *, mode: int = 0, uid: int = 0, gid: int = 0, size: int = 0,
        times: tuple[int, int, int, int] = (0, 0, 0, 0),
    ) -> None:  # fmt: skip
        self.rpc(MessageType.TSETATTR, pack("<IIIIIQ4Q", fid, valid, mode, uid, gid, size, *times))

    def readlink(self, fid: int) -> bytes:
        return self.rpc(MessageType.TREADLINK, pack("<I", fid))[2:]

    def symlink(self, fid: int, name: bytes, target: bytes) -> None:
        self.rpc(MessageType.TSYMLINK, pack("<I", fid) + string(name) + string(target) + pack("<I", 0))

    def mkdir(self, fid: int, name: bytes, mode: int = 0o755) -> None:
        self.rpc(MessageType.TMKDIR, pack("<I", fid) + string(name) + pack("<II", mode, 0))

    def mknod(self, fid: int, name: bytes, mode: int) -> None:
        self.rpc(MessageType.TMKNOD, pack("<I", fid) + string(name) + pack("<IIII", mode, 1, 3, 0))

    def link(self, folder: int, fid: int, name: bytes) -> None:
        self.rpc(MessageType.TLINK, pack("<II", folder, fid) + string(name))

    def renameat(self, fid: int, name: bytes, new: int, new_name: bytes) -> None:
        self.rpc(MessageType.TRENAMEAT, pack("<I", fid) + string(name) + pack("<I", new) + string(new_name))

    def rename(self, fid: int, new: int, new_name: bytes) -> None:
        self.rpc(MessageType.TRENAME, pack("<II", fid, new) + string(new_name))

    def unlink(self, fid: int, name: bytes, flags: int = 0) -> None:
        self.rpc(MessageType.TUNLINKAT, pack("<I", fid) + string(name) + pack("<I", flags))

    def clunk(self, fid: int) -> None:
        self.rpc(MessageType.TCLUNK, pack("<I", fid))

    def remove(self, fid: int) -> None:
        self.rpc(MessageType.TREMOVE, pack("<I", fid))

    def fsync(self, fid: int) -> None:
        self.rpc(MessageType.TFSYNC, pack("<II", fid, 0))

    def statfs(self, fid: int) -> tuple[int, ...]:
        return unpack("<IIQQQQQQI", self.rpc(MessageType.TSTATFS, pack("<I", fid)))
