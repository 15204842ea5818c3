"""Whatever a guest does to a shared folder, the device works again after a reset, and nothing outside was touched."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from struct import pack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.virtio.ninep.device import Plan9
from kvmpy.virtio.ninep.fids import Fid
from kvmpy.virtio.ninep.messages import HEADER, NO_FID, Body, Message, MessageType
from kvmpy.virtio.ninep.session import Session
from ninep_client import NinepClient, string
from virtio_driver import FakeDriver
from virtio_hostile import EXAMPLES, PROGRAMS, HostileTarget

SECRET = b"the guest must not see this"
PLACE = tempfile.TemporaryDirectory(prefix="kvmpy 9p ")
"""For all examples of the session: a folder that is shared, and one beside it that is not."""
SHARED, OUTSIDE = Path(PLACE.name) / "shared", Path(PLACE.name) / "outside"
NAMES = (
    b"file", b"folder", b"link", b"up", b"door", b"new", b"secret", b"..", b".", b"", b"a/b", b"../outside",
    os.fsencode(OUTSIDE), b"file\0", b"x" * 300,
)  # fmt: skip


def make_tree() -> None:
    """A folder with links that lead out of it, as it was at the beginning."""
    SHARED.mkdir(mode=0o700, exist_ok=True)
    SHARED.chmod(0o700)  # the guest may have taken that away, here and below
    for place, folders, _ in os.walk(SHARED):
        for name in folders:
            if not os.path.islink(path := os.path.join(place, name)):
                os.chmod(path, 0o700)
    for entry in os.scandir(SHARED):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry)
        else:
            os.unlink(entry)
    (SHARED / "folder" / "folder").mkdir(parents=True)
    (SHARED / "file").write_bytes(b"inside")
    (SHARED / "folder" / "secret").write_bytes(b"inside, too")
    (SHARED / "link").symlink_to(OUTSIDE / "secret")
    (SHARED / "up").symlink_to("..")
    (SHARED / "door").symlink_to(OUTSIDE)


def outside() -> list[tuple[object, ...]]:
    """All that can be told of what must stay as it is."""
    return [
        (path, *(getattr(path.lstat(), name) for name in ("st_mode", "st_uid", "st_nlink", "st_size", "st_ctime_ns")))
        for path in (OUTSIDE, *sorted(OUTSIDE.rglob("*")))
    ] + [sorted(os.listdir(PLACE.name))]  # type: ignore[list-item]


(OUTSIDE / "folder").mkdir(parents=True)
(OUTSIDE / "secret").write_bytes(SECRET)
(OUTSIDE / "folder" / "secret").write_bytes(SECRET)
make_tree()
BEFORE = outside()


def descriptors_are_inside(session: Session) -> None:
    """All that the session has open is in the folder, or was when it was removed."""
    for fid in session.fids._fids.values():
        if fid.descriptor >= 0:
            path = os.readlink(f"/proc/self/fd/{fid.descriptor}")
            assert path == str(SHARED) or path.startswith(f"{SHARED}/"), path


# --- messages to a session --------------------------------------------------------------------------------------------

FLAGS = (
    os.O_RDONLY, os.O_RDWR, os.O_WRONLY, os.O_TRUNC, os.O_RDWR | os.O_CREAT, os.O_RDONLY | os.O_DIRECTORY, os.O_PATH,
    os.O_RDWR | os.O_EXCL | os.O_TRUNC, 0xFFFF_FFFF, os.O_TMPFILE | os.O_RDWR, 3,
)  # fmt: skip
MODES = (0o644, 0o7777, 0o10644, 0o20666, 0o60666, 0o100600, 0o140600, 0o40755, 0xFFFF_FFFF)
OFFSETS = (0, 0, 0, 1, 3, 4096, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
COUNTS = (0, 1, 6, 100, 100, 0x2000, 0x7FFF_FFFF, 0xFFFF_FFFF)
FIELDS: dict[int, str] = {
    MessageType.TATTACH: "new no_fid name none zero", MessageType.TWALK: "fid new names", MessageType.TCLUNK: "fid",
    MessageType.TREMOVE: "fid", MessageType.TLOPEN: "fid flags", MessageType.TLCREATE: "fid name flags mode zero",
    MessageType.TREAD: "fid offset count", MessageType.TWRITE: "fid offset little",
    MessageType.TREADDIR: "fid offset count", MessageType.TREADLINK: "fid", MessageType.TGETATTR: "fid offset",
    MessageType.TSETATTR: "fid attributes", MessageType.TSTATFS: "fid", MessageType.TFSYNC: "fid zero",
    MessageType.TSYMLINK: "fid name name zero", MessageType.TMKNOD: "fid name mode count count zero",
    MessageType.TMKDIR: "fid name mode zero", MessageType.TLINK: "fid fid name", MessageType.TRENAME: "fid fid name",
    MessageType.TRENAMEAT: "fid name fid name", MessageType.TUNLINKAT: "fid name removal",
    MessageType.TXATTRWALK: "fid new name",
}  # fmt: skip
# What leads somewhere comes more often than the rest.
KINDS = (*FIELDS, *[MessageType.TWALK] * 10, *[MessageType.TLOPEN] * 6, *[MessageType.TREAD] * 4)


class Guest:
    """What a guest says by chance: mostly messages in which a thing or two is wrong."""

    def __init__(self, chance: random.Random, session: Session) -> None:
        self.chance, self.session = chance, session

    def message(self) -> tuple[int, bytes]:
        kind = self.chance.choice(KINDS)
        body = b"".join(self.field(name) for name in FIELDS[kind].split())
        if self.chance.random() < 0.03:
            body = body[: self.chance.randrange(len(body))]
        return kind, body

    def field(self, name: str) -> bytes:
        choice = self.chance.choice
        match name:
            case "fid":
                known = list(self.session.fids._fids) if self.chance.random() < 0.95 else []
                return pack("<I", choice(known or [99]))
            case "new":
                return pack("<I", self.chance.randrange(12))
            case "name":
                return string(choice(NAMES))
            case "names":
                names = self.chance.choices(NAMES, k=choice((0, 1, 1, 1, 2, 2, 3)))
                return pack("<H", len(names)) + b"".join(map(string, names))
            case "flags":
                return pack("<I", choice(FLAGS) & 0xFFFF_FFFF)
            case "mode":
                return pack("<I", choice(MODES))
            case "offset":
                return pack("<Q", choice(OFFSETS))
            case "count" | "little":
                return pack("<I", choice(COUNTS) if name == "count" else choice((0, 5, 9, 10)))
            case "removal":
                return pack("<I", choice((0, 0, 0x200, 0xFFFF)))
            case "attributes":  # never another owner: the test may be run as root
                valid, mode = choice((1, 2, 4, 8, 0x10, 0x20, 0x1B0, 0x1FF)), choice((0, 0o7777))
                size, moment = choice((0, 5, 4096)), choice(OFFSETS)
                return pack("<IIIIQ4Q", valid, mode, os.getuid(), os.getgid(), size, *(moment,) * 4)
            case "no_fid":
                return pack("<I", NO_FID)
            case "none":
                return string(b"")
        return bytes(4)


START: tuple[tuple[int, bytes], ...] = (
    (MessageType.TVERSION, pack("<I", 0x2000) + string(b"9P2000.L")),
    (MessageType.TATTACH, pack("<II", 0, NO_FID) + string(b"root") + string(b"") + bytes(4)),
    (MessageType.TWALK, pack("<IIH", 0, 1, 1) + string(b"folder")),
)


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


def swap(name: bytes) -> None:
    """The host puts a link out of the folder where a folder was, and the other way round."""
    try:
        if name == b"door":
            os.rename(SHARED / "folder", SHARED / "away")
            os.symlink(OUTSIDE, SHARED / "folder")
        else:
            os.unlink(SHARED / "folder")
            os.rename(SHARED / "away", SHARED / "folder")
    except OSError:
        pass  # it is not as it was at the beginning


@given(st.integers(0, (1 << 64) - 1))
def test_messages(seed: int) -> None:
    chance = random.Random(seed)
    make_tree()
    session = Session(SHARED, read_only=chance.random() < 0.2, most_descriptors=3)
    guest = Guest(chance, session)
    room = bytearray(0x3000)
    for kind, body in START:
        say(session, kind, body, room)
    for _ in range(60):
        if chance.random() < 0.1:
            swap(chance.choice((b"door", b"away")))
        else:
            say(session, *guest.message(), room)
            descriptors_are_inside(session)
    assert outside() == BEFORE
    session.close()


def say(session: Session, kind: int, body: bytes, room: bytearray) -> None:
    answer = session.answer(
        Message(
            kind, 7, Body(body), lambda count: [memoryview(b"overwrite")[:count]],
            lambda count: [memoryview(room)[:count]],
        )
    )  # fmt: skip
    size, kind_of_answer, tag = HEADER.unpack_from(answer)
    assert tag == 7
    assert kind_of_answer in (kind + 1, MessageType.RLERROR)
    assert size == len(answer) or kind == MessageType.TREAD
    assert size <= 0x2000
    assert SECRET not in answer
    assert SECRET not in room
    assert session.fids.descriptors <= 6


# --- the device behind its queue --------------------------------------------------------------------------------------


class Attached(Plan9):
    """A client that has said some words already whenever the driver is ready: few programs get so far."""

    def started(self) -> None:
        for number, path in enumerate((b"", b"folder", b"file", b"link", b"door")):
            try:
                descriptor = self.session.folder.open_path(path)
            except OSError:
                continue
            status = os.fstat(descriptor)
            self.session.fids.add(number, Fid(path, (status.st_dev, status.st_ino), descriptor))
        self.session.msize = 0x2000


def works(driver: FakeDriver) -> None:
    device = driver.device
    assert isinstance(device, Plan9)
    descriptors_are_inside(device.session)
    assert outside() == BEFORE
    make_tree()
    client = NinepClient(device, driver=driver)
    client.version()
    client.attach()
    assert client.read(client.open(client.walk("folder", "secret"))) == b"inside, too"


def begin(kind: int, body: bytes) -> bytes:
    return HEADER.pack(7 + len(body), kind, 3) + body


REQUESTS = tuple(
    begin(kind, body)
    for kind, body in (
        *START,
        *((MessageType.TWALK, pack("<IIH", fid, 5, 1) + string(name)) for fid in (0, 1, 4) for name in NAMES[:8]),
        *((MessageType.TLOPEN, pack("<II", fid, flags)) for fid in (1, 2, 3, 5) for flags in (0, 2)),
        *((MessageType.TREAD, pack("<IQI", fid, 0, 200)) for fid in (2, 5)),
        *((MessageType.TWRITE, pack("<IQI", fid, 0, 8) + b"12345678") for fid in (2, 5)),
        *((MessageType.TREADDIR, pack("<IQI", fid, 0, 200)) for fid in (0, 1)),
        *((MessageType.TLCREATE, pack("<I", fid) + string(b"new") + pack("<III", 2, 0o644, 0)) for fid in (0, 1, 4)),
        (MessageType.TMKDIR, pack("<I", 4) + string(b"made") + pack("<II", 0o755, 0)),
        (MessageType.TRENAMEAT, pack("<I", 0) + string(b"file") + pack("<I", 4) + string(b"stolen")),
        (MessageType.TSETATTR, pack("<IIIIIQ4Q", 3, 0x1B9, 0, 0, 0, 0, 0, 0, 0, 0)),
        (MessageType.TCLUNK, pack("<I", 2)),
        (MessageType.TFLUSH, pack("<H", 3)),
    )
)
TARGET = HostileTarget(
    lambda: Attached(SHARED, "hostile", workers=2, most_descriptors=3), works=works, requests=REQUESTS,
    right=[(0, (request,), (0x100,)) for request in REQUESTS], config_size=12,
)  # fmt: skip


@settings(max_examples=EXAMPLES)
@given(PROGRAMS)
def test_9p(program: bytes) -> None:
    TARGET.play(program)
