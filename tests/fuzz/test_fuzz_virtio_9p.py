"""Whatever a guest does to a shared folder, the device works again after a reset, and nothing outside was touched."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from struct import pack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.virtio.ninep.fids import Fid
from kvmpy.virtio.ninep.messages import HEADER, NO_FID, Body, Message, MessageType
from kvmpy.virtio.ninep.session import Session
from kvmpy.virtio.ninep_device import Plan9
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
    for path in SHARED.iterdir() if SHARED.exists() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
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

FIDS = st.integers(0, 5).map(lambda number: pack("<I", number))
STRINGS = st.sampled_from(NAMES).map(string)
FLAGS = st.sampled_from(
    (os.O_RDONLY, os.O_RDWR, os.O_WRONLY, os.O_TRUNC, os.O_RDWR | os.O_CREAT, os.O_RDONLY | os.O_DIRECTORY, os.O_PATH,
     os.O_RDWR | os.O_EXCL | os.O_TRUNC, 0xFFFF_FFFF, os.O_TMPFILE | os.O_RDWR, 3)
).map(lambda flags: pack("<I", flags & 0xFFFF_FFFF))  # fmt: skip
MODES = st.sampled_from((0o644, 0o7777, 0o10644, 0o20666, 0o60666, 0o100600, 0o140600, 0o40755, 0xFFFF_FFFF)).map(
    lambda mode: pack("<I", mode)
)
OFFSETS = st.sampled_from((0, 1, 3, 4096, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)).map(lambda at: pack("<Q", at))
COUNTS = st.sampled_from((0, 1, 6, 100, 0x2000, 0x7FFF_FFFF, 0xFFFF_FFFF)).map(lambda count: pack("<I", count))
ZERO = st.just(bytes(4))
WALKS = st.lists(STRINGS, max_size=4).map(lambda names: pack("<H", len(names)) + b"".join(names))
ATTRIBUTES = st.tuples(
    st.sampled_from((1, 2, 4, 8, 0x10, 0x20, 0x1B0, 0x1FF)), st.sampled_from((0, 0o7777)), OFFSETS, OFFSETS
).map(  # never another owner: the test may be run as root
    lambda parts: (
        pack("<IIII", parts[0], parts[1], os.getuid(), os.getgid()) + min(parts[2], pack("<Q", 4096)) + parts[3] * 4
    )
)
FIELDS: dict[int, tuple[st.SearchStrategy[bytes], ...]] = {
    MessageType.TATTACH: (FIDS, st.just(pack("<I", NO_FID)), STRINGS, st.just(string(b"")), ZERO),
    MessageType.TWALK: (FIDS, FIDS, WALKS),
    MessageType.TCLUNK: (FIDS,),
    MessageType.TREMOVE: (FIDS,),
    MessageType.TLOPEN: (FIDS, FLAGS),
    MessageType.TLCREATE: (FIDS, STRINGS, FLAGS, MODES, ZERO),
    MessageType.TREAD: (FIDS, OFFSETS, COUNTS),
    MessageType.TWRITE: (FIDS, st.just(bytes(8)), st.sampled_from((0, 5, 9)).map(lambda count: pack("<I", count))),
    MessageType.TREADDIR: (FIDS, OFFSETS, COUNTS),
    MessageType.TREADLINK: (FIDS,),
    MessageType.TGETATTR: (FIDS, OFFSETS),
    MessageType.TSETATTR: (FIDS, ATTRIBUTES),
    MessageType.TSTATFS: (FIDS,),
    MessageType.TSYMLINK: (FIDS, STRINGS, STRINGS, ZERO),
    MessageType.TMKNOD: (FIDS, STRINGS, MODES, COUNTS, COUNTS, ZERO),
    MessageType.TMKDIR: (FIDS, STRINGS, MODES, ZERO),
    MessageType.TLINK: (FIDS, FIDS, STRINGS),
    MessageType.TRENAME: (FIDS, FIDS, STRINGS),
    MessageType.TRENAMEAT: (FIDS, STRINGS, FIDS, STRINGS),
    MessageType.TUNLINKAT: (FIDS, STRINGS, st.sampled_from((bytes(4), pack("<I", 0x200), pack("<I", 0xFFFF)))),
    MessageType.TXATTRWALK: (FIDS, FIDS, STRINGS),
}
# What leads somewhere comes more often than the rest.
OFTEN = [MessageType.TWALK] * 8 + [MessageType.TLOPEN] * 4 + [MessageType.TREAD] * 3 + [MessageType.TLCREATE] * 2
MESSAGES = st.sampled_from([*OFTEN, *FIELDS]).flatmap(
    lambda kind: st.tuples(st.just(int(kind)), st.tuples(*FIELDS[kind]).map(b"".join))
)
CUT = st.tuples(st.sampled_from([*FIELDS]).map(int), st.binary(max_size=30))
HOST = st.tuples(st.just(-1), st.sampled_from((b"door", b"away")))
PLAYS = st.lists(st.one_of(MESSAGES, MESSAGES, MESSAGES, MESSAGES, CUT, HOST), min_size=5, max_size=40)
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


@given(PLAYS, st.booleans())
def test_messages(play: list[tuple[int, bytes]], read_only: bool) -> None:
    make_tree()
    session = Session(SHARED, read_only=read_only, most_descriptors=3)
    room = bytearray(0x3000)
    for kind, body in (*START, *play):
        if kind < 0:
            swap(body)
            continue
        message = Message(
            kind, 7, Body(body), lambda count: [memoryview(b"overwrite")[:count]],
            lambda count: [memoryview(room)[:count]],
        )  # fmt: skip
        answer = session.answer(message)
        size, kind_of_answer, tag = HEADER.unpack_from(answer)
        assert tag == 7
        assert kind_of_answer in (kind + 1, MessageType.RLERROR)
        assert size == len(answer) or kind == MessageType.TREAD
        assert size <= 0x2000
        assert SECRET not in answer
        assert SECRET not in room
        descriptors_are_inside(session)
        assert session.fids.descriptors <= 6
    assert outside() == BEFORE
    session.close()


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
    lambda: Attached(SHARED, "hostile", workers=2, most_descriptors=3), works=works, requests=REQUESTS, config_size=12
)  # fmt: skip


@settings(max_examples=EXAMPLES)
@given(PROGRAMS)
def test_9p(program: bytes) -> None:
    TARGET.play(program)
