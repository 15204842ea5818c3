"""The 9P device: each request of 9P2000.L on a folder of the host."""

from __future__ import annotations

import ast
import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from struct import pack, unpack_from

import pytest

from kvmpy.errors import UsageError
from kvmpy.virtio.ninep.device import Plan9
from kvmpy.virtio.ninep.messages import HEADER, MessageType, SetAttributes
from ninep_client import NinepClient, string
from virtio_driver import FakeDriver


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shared = tmp_path / "shared"
    (shared / "sub" / "deep").mkdir(parents=True)
    (shared / "hello.txt").write_bytes(b"hello, guest\n")
    (shared / "sub" / "deep" / "file").write_bytes(bytes(range(256)) * 100)
    return shared


@pytest.fixture
def client(folder: Path) -> Iterator[NinepClient]:
    device = Plan9(folder)
    yield NinepClient(device)
    device.close()


def refused(number: int) -> pytest.RaisesExc[OSError]:
    return pytest.raises(OSError, match=rf"\[Errno {number}\]")


# --- what the driver finds --------------------------------------------------------------------------------------------


def test_the_configuration_space_has_the_tag(folder: Path) -> None:
    device = Plan9(folder, "home")
    driver = FakeDriver(device)
    assert driver.read(8) == 9
    assert driver.config(0, 2) == 4
    assert bytes(driver.config(2 + at, 1) for at in range(5)) == b"home\0"
    device.close()


@pytest.mark.parametrize("tag", ["", "x" * 65, "a\0b", "é"])
def test_a_tag_that_is_none_is_the_callers_fault(folder: Path, tag: str) -> None:
    with pytest.raises(UsageError):
        Plan9(folder, tag)


def test_a_file_is_no_folder_to_share(folder: Path) -> None:
    with pytest.raises(NotADirectoryError):
        Plan9(folder / "hello.txt")


# --- version, attach, walk --------------------------------------------------------------------------------------------


def test_the_size_of_messages_is_the_smaller_of_both_wishes(client: NinepClient) -> None:
    assert client.version() == (0x2000, b"9P2000.L")
    client.msize = 0x1000
    assert client.version() == (0x1000, b"9P2000.L")


def test_another_version_is_unknown_and_begins_no_session(client: NinepClient) -> None:
    assert client.version(b"9P2000.u")[1] == b"unknown"
    with refused(errno.EPROTO):
        client.attach()


def test_messages_too_small_are_refused(client: NinepClient) -> None:
    with refused(errno.EMSGSIZE):
        client.rpc(MessageType.TVERSION, pack("<I", 100) + string(b"9P2000.L"))


def test_a_new_version_forgets_all_fids(client: NinepClient) -> None:
    before = client.device.session.fids.descriptors
    client.open(client.walk("hello.txt"))
    assert client.device.session.fids.descriptors == before + 1
    client.version()
    assert client.device.session.fids.descriptors == 0
    with refused(errno.EBADF):
        client.getattr(0)


def test_a_walk_tells_what_each_name_is(client: NinepClient, folder: Path) -> None:
    qids = client.walk_qids(0, 7, [b"sub", b"deep", b"file"])
    assert [(qid[0], unpack_from("<Q", qid, 5)[0]) for qid in qids] == [
        (0x80, (folder / "sub").stat().st_ino),
        (0x80, (folder / "sub" / "deep").stat().st_ino),
        (0, (folder / "sub" / "deep" / "file").stat().st_ino),
    ]


def test_a_walk_that_goes_only_part_of_the_way_makes_no_fid(client: NinepClient) -> None:
    assert len(client.walk_qids(0, 7, [b"sub", b"absent", b"file"])) == 1
    with refused(errno.EBADF):
        client.getattr(7)
    with refused(errno.ENOENT):
        client.walk_qids(0, 7, [b"absent"])


def test_a_fid_may_walk_itself(client: NinepClient, folder: Path) -> None:
    fid = client.walk("sub")
    assert len(client.walk_qids(fid, fid, [b"deep"])) == 1
    assert client.getattr(fid)["path"] == (folder / "sub" / "deep").stat().st_ino


def test_a_fid_that_is_in_use_is_not_given_away(client: NinepClient) -> None:
    fid = client.walk("sub")
    with refused(errno.EBADF):
        client.walk_qids(0, fid, [b"hello.txt"])
    with refused(errno.EBADF):
        client.attach(fid)


def test_a_fid_is_gone_after_clunk(client: NinepClient) -> None:
    fid = client.walk("hello.txt")
    client.clunk(fid)
    with refused(errno.EBADF):
        client.getattr(fid)
    with refused(errno.EBADF):
        client.clunk(fid)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_file_is_read_from_any_offset(client: NinepClient) -> None:
    fid = client.open(client.walk("sub", "deep", "file"))
    content = bytes(range(256)) * 100
    assert client.read(fid, 0, 300) == content[:300]
    assert client.read(fid, 25500, 0x1000) == content[25500:]
    assert client.read(fid, 25600) == b""
    assert client.read(fid, 0, 0xFFFF_FFFF) == content[: 0x2000 - 11], "no more than a message holds"


def test_the_buffers_of_an_answer_may_be_cut_anyhow(client: NinepClient) -> None:
    fid = client.open(client.walk("hello.txt"))
    body = pack("<IQI", fid, 0, 0x1000)
    for into in ((11, 0x1000), (3, 5, 3, 2, 100), (1,) * 14 + (50,)):
        assert client.rpc(MessageType.TREAD, body, into=into)[4:] == b"hello, guest\n"
    assert client.rpc(MessageType.TREAD, body, into=(16,))[4:] == b"hello", "as much as there is room for"


def test_a_folder_is_listed_in_pieces(client: NinepClient, folder: Path) -> None:
    (folder / "many").mkdir()
    names = sorted(f"{'x' * (number % 50)}{number}".encode() for number in range(300))
    for name in names:
        (folder / "many" / os.fsdecode(name)).touch()
    fid = client.open(client.walk("many"))
    assert client.names(fid, 200) == names
    assert client.names(fid, 0x1F00) == names


def test_a_listing_says_what_things_are(client: NinepClient, folder: Path) -> None:
    (folder / "link").symlink_to("/etc/passwd")
    found = {name: (kind, inode) for name, kind, inode, _ in client.readdir(client.open(client.walk()))}
    root = folder.stat().st_ino
    assert found == {
        b".": (4, root),
        b"..": (4, root),
        b"sub": (4, (folder / "sub").stat().st_ino),
        b"hello.txt": (8, (folder / "hello.txt").stat().st_ino),
        b"link": (10, (folder / "link").lstat().st_ino),
    }


def test_a_listing_without_room_for_one_entry_is_refused(client: NinepClient) -> None:
    fid = client.open(client.walk())
    with refused(errno.EINVAL):
        client.readdir(fid, 0, 20)
    with refused(errno.EINVAL):
        client.readdir(fid, 1 << 63, 0x1000)


def test_attributes_are_those_of_the_host(client: NinepClient, folder: Path) -> None:
    path = folder / "hello.txt"
    os.utime(path, ns=(1_500_000_000_123_456_789, -5_000_000_001))
    there, found = path.stat(), client.getattr(client.walk("hello.txt"))
    assert (found["mode"], found["uid"], found["gid"], found["size"], found["nlink"], found["blocks"]) == (
        there.st_mode, there.st_uid, there.st_gid, 13, 1, there.st_blocks,
    )  # fmt: skip
    assert (found["atime"], found["atime_ns"]) == (1_500_000_000, 123_456_789)
    assert (found["mtime"], found["mtime_ns"]) == ((1 << 64) - 6, 999_999_999)
    assert found["rdev"] == 0


def test_a_file_system_has_a_size(client: NinepClient, folder: Path) -> None:
    kind, block, blocks, *_, longest_name = client.statfs(0)
    there = os.statvfs(folder)
    assert (kind, block, blocks, longest_name) == (0x0102_1997, there.f_frsize, there.f_blocks, there.f_namemax)


# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_file_is_made_written_and_read(client: NinepClient, folder: Path) -> None:
    fid = client.create(client.walk("sub"), b"new", mode=0o666)
    data = os.urandom(5000)
    assert client.write(fid, data, 100) == 5000
    client.fsync(fid)
    assert (folder / "sub" / "new").read_bytes() == bytes(100) + data
    assert client.read(fid, 100, 0x1800) == data
    assert client.getattr(fid)["size"] == 5100
    assert stat.S_IMODE((folder / "sub" / "new").stat().st_mode) == 0o666, "whatever this process's umask is"


def test_a_message_may_be_cut_anyhow(client: NinepClient, folder: Path) -> None:
    fid = client.create(client.walk(), b"new")
    body = pack("<IQI", fid, 0, 10) + b"0123456789"
    message = HEADER.pack(7 + len(body), MessageType.TWRITE, 9) + body
    client.raw(message[:3], message[3:8], message[8:25], message[25:], into=(4, 3, 4))
    assert (folder / "new").read_bytes() == b"0123456789"


def test_create_opens_what_is_there_unless_it_must_be_new(client: NinepClient, folder: Path) -> None:
    fid = client.create(client.walk(), b"hello.txt", os.O_RDWR, mode=0o777)
    assert client.read(fid) == b"hello, guest\n"
    assert stat.S_IMODE((folder / "hello.txt").stat().st_mode) != 0o777
    client.create(client.walk(), b"hello.txt", os.O_RDWR | os.O_TRUNC)
    assert (folder / "hello.txt").read_bytes() == b""
    with refused(errno.EEXIST):
        client.create(client.walk(), b"hello.txt", os.O_RDWR | os.O_EXCL)


def test_appending_goes_to_the_end(client: NinepClient, folder: Path) -> None:
    fid = client.open(client.walk("hello.txt"), os.O_WRONLY | os.O_APPEND)
    with (folder / "hello.txt").open("ab") as file:
        file.write(b"the host\n")
    client.write(fid, b"the guest\n", 0)
    assert (folder / "hello.txt").read_bytes() == b"hello, guest\nthe host\nthe guest\n"


def test_what_was_opened_for_reading_is_not_written(client: NinepClient) -> None:
    fid = client.open(client.walk("hello.txt"))
    with refused(errno.EBADF):
        client.write(fid, b"x")
    with refused(errno.EBADF):
        client.read(client.walk("hello.txt"))
    with refused(errno.EBUSY):
        client.open(fid)


def test_folders_links_and_names_are_made(client: NinepClient, folder: Path) -> None:
    client.mkdir(0, b"made", 0o777)
    made = client.walk("made")
    client.symlink(made, b"soft", b"../hello.txt")
    client.link(made, client.walk("hello.txt"), b"hard")
    client.mknod(made, b"fifo", stat.S_IFIFO | 0o600)
    assert stat.S_IMODE((folder / "made").stat().st_mode) == 0o777
    assert os.readlink(folder / "made" / "soft") == "../hello.txt"
    assert (folder / "made" / "hard").samefile(folder / "hello.txt")
    assert stat.S_ISFIFO((folder / "made" / "fifo").stat().st_mode)
    assert client.readlink(client.walk("made", "soft")) == b"../hello.txt"


def test_files_move_with_those_who_know_them(client: NinepClient, folder: Path) -> None:
    inner = client.walk("sub", "deep")
    client.renameat(0, b"sub", 0, b"other")
    assert (folder / "other" / "deep" / "file").exists()
    assert client.getattr(client.walk("..", fid=inner))["path"] == (folder / "other").stat().st_ino
    client.rename(inner, 0, b"top")
    assert (folder / "top" / "file").exists()
    assert client.getattr(client.walk("..", fid=inner))["path"] == folder.stat().st_ino


def test_files_and_folders_are_removed(client: NinepClient, folder: Path) -> None:
    deep = client.walk("sub", "deep")
    with refused(errno.EISDIR):
        client.unlink(client.walk("sub"), b"deep")
    client.unlink(deep, b"file")
    client.unlink(client.walk("sub"), b"deep", 0x200)
    client.remove(client.walk("sub"))
    fid = client.walk("hello.txt")
    client.remove(fid)
    assert list(folder.iterdir()) == []
    with refused(errno.EBADF):
        client.clunk(fid)
    with refused(errno.EBUSY):
        client.remove(client.walk())


def test_a_file_that_was_removed_while_open_stays_until_it_is_closed(client: NinepClient) -> None:
    fid = client.open(client.walk("hello.txt"), os.O_RDWR)
    client.unlink(0, b"hello.txt")
    assert client.write(fid, b"HELLO") == 5
    assert client.read(fid) == b"HELLO, guest\n"
    assert client.getattr(fid)["nlink"] == 0


def test_attributes_are_set(client: NinepClient, folder: Path) -> None:
    fid, path = client.walk("hello.txt"), folder / "hello.txt"
    client.setattr(fid, SetAttributes.MODE, mode=0o640)
    client.setattr(fid, SetAttributes.SIZE, size=5)
    both = SetAttributes.ATIME | SetAttributes.ATIME_SET | SetAttributes.MTIME | SetAttributes.MTIME_SET
    client.setattr(fid, both, times=(1000, 1, 2000, 2))
    assert (stat.S_IMODE(path.stat().st_mode), path.read_bytes()) == (0o640, b"hello")
    assert (path.stat().st_atime_ns, path.stat().st_mtime_ns)[1] == 2_000_000_000_002
    client.setattr(fid, SetAttributes.MTIME)
    assert path.stat().st_mtime > 1_000_000_000
    client.setattr(fid, SetAttributes.UID | SetAttributes.GID, uid=os.getuid(), gid=os.getgid())
    assert (path.stat().st_uid, path.stat().st_gid) == (os.getuid(), os.getgid())
    with refused(errno.EINVAL):
        client.setattr(fid, SetAttributes.SIZE, size=(1 << 64) - 1)
    with refused(errno.EINVAL):
        client.setattr(fid, both, times=(0, 1 << 40, 0, 0))


def test_no_program_with_another_identity_and_no_device_is_made(client: NinepClient, folder: Path) -> None:
    client.setattr(client.walk("hello.txt"), SetAttributes.MODE, mode=0o6755)
    client.create(client.walk(), b"new", mode=0o6755)
    assert stat.S_IMODE((folder / "hello.txt").stat().st_mode) == 0o755
    assert stat.S_IMODE((folder / "new").stat().st_mode) == 0o755
    for kind in (stat.S_IFCHR, stat.S_IFBLK, 0):
        with refused(errno.EPERM):
            client.mknod(0, b"node", kind | 0o666)
    assert not (folder / "node").exists()


def test_locks_are_granted(client: NinepClient) -> None:
    fid = client.walk("hello.txt")
    lock = pack("<IBIQQI", fid, 1, 0, 0, 10, 77) + string(b"guest")
    assert client.rpc(MessageType.TLOCK, lock) == b"\0"
    question = pack("<IBQQI", fid, 1, 5, 10, 77) + string(b"guest")
    assert client.rpc(MessageType.TGETLOCK, question) == pack("<BQQI", 2, 5, 10, 77) + string(b"guest")


def test_there_are_no_extended_attributes(client: NinepClient) -> None:
    with refused(errno.EOPNOTSUPP):
        client.rpc(MessageType.TXATTRWALK, pack("<II", 0, 55) + string(b"security.capability"))


@pytest.mark.parametrize("kind", [0, 3, 98, 102, 200, 255])
def test_a_request_that_is_unknown_is_refused(client: NinepClient, kind: int) -> None:
    with refused(errno.EOPNOTSUPP):
        client.rpc(kind, bytes(40))


# --- read-only --------------------------------------------------------------------------------------------------------


def test_a_read_only_folder_is_not_changed(folder: Path) -> None:
    def everything() -> list[tuple[object, ...]]:
        return sorted((str(path), path.lstat()[:7], path.lstat().st_mtime_ns) for path in folder.rglob("*"))

    before = everything()
    device = Plan9(folder, read_only=True)
    client = NinepClient(device)
    file = client.walk("hello.txt")
    attempts: list[Callable[[], object]] = [
        lambda: client.create(client.walk(), b"new"),
        lambda: client.create(client.walk(), b"hello.txt", os.O_RDONLY),
        lambda: client.open(client.walk("hello.txt"), os.O_WRONLY),
        lambda: client.open(client.walk("hello.txt"), os.O_RDWR),
        lambda: client.open(client.walk("hello.txt"), os.O_TRUNC),
        lambda: client.mkdir(0, b"new"),
        lambda: client.mknod(0, b"new", stat.S_IFREG),
        lambda: client.symlink(0, b"new", b"x"),
        lambda: client.link(0, file, b"new"),
        lambda: client.rename(file, 0, b"new"),
        lambda: client.renameat(0, b"hello.txt", 0, b"new"),
        lambda: client.unlink(0, b"hello.txt"),
        lambda: client.setattr(file, SetAttributes.MODE, mode=0),
        lambda: client.setattr(file, SetAttributes.SIZE),
        lambda: client.write(client.open(client.walk("hello.txt")), b"x"),
        lambda: client.remove(client.walk("hello.txt")),
        lambda: client.rpc(MessageType.TXATTRCREATE, pack("<I", file) + string(b"user.x") + pack("<QI", 1, 0)),
    ]
    for attempt in attempts:
        with refused(errno.EROFS):
            attempt()
    assert everything() == before
    assert client.read(client.open(file)) == b"hello, guest\n"
    device.close()


# --- several at once, flush, messages that are none -------------------------------------------------------------------


def test_many_requests_at_once_are_all_answered(client: NinepClient) -> None:
    fid = client.open(client.walk("sub", "deep", "file"))
    ring = client.driver.queues[0]
    content = bytes(range(256)) * 100
    for tag in range(8):
        ring.add([HEADER.pack(23, MessageType.TREAD, tag) + pack("<IQI", fid, tag * 1000, 1000)], [1011])
    ring.kick()
    answers = client.wait(8)
    assert {HEADER.unpack_from(answer)[2]: answer[11:] for answer in answers} == {
        tag: content[tag * 1000 :][:1000] for tag in range(8)
    }


def test_a_flush_is_answered_after_the_request_that_it_is_for(
    client: NinepClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    fid = client.open(client.walk("hello.txt"))
    begun, go_on = threading.Event(), threading.Event()
    preadv = os.preadv

    def slow(*arguments: object) -> int:
        begun.set()
        assert go_on.wait(20)
        return preadv(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", slow)
    ring = client.driver.queues[0]
    ring.add([HEADER.pack(23, MessageType.TREAD, 5) + pack("<IQI", fid, 0, 100)], [111])
    ring.add([HEADER.pack(9, MessageType.TFLUSH, 6) + pack("<H", 5)], [7])
    ring.add([HEADER.pack(9, MessageType.TFLUSH, 7) + pack("<H", 1234)], [7])
    ring.kick()
    assert begun.wait(20)
    assert client.wait(1) == [HEADER.pack(7, MessageType.TFLUSH + 1, 7)], "there is nothing to wait for"
    go_on.set()
    answers = client.wait(2)
    assert answers[0][11:] == b"hello, guest\n"
    assert answers[1] == HEADER.pack(7, MessageType.TFLUSH + 1, 6)


def test_a_flush_of_itself_is_answered(client: NinepClient) -> None:
    assert client.rpc(MessageType.TFLUSH, pack("<H", 3), tag=3) == b""


def test_a_tag_that_is_used_twice_gets_two_answers(client: NinepClient) -> None:
    ring = client.driver.queues[0]
    for _ in range(2):
        ring.add([HEADER.pack(19, MessageType.TGETATTR, 5) + pack("<IQ", 0, 0)], [200])
    ring.kick()
    first, second = client.wait(2)
    assert first == second
    assert len(first) == 160


def test_messages_that_are_cut_off_are_refused(client: NinepClient) -> None:
    whole = pack("<IIH", 0, 50, 1) + string(b"hello.txt")
    for length in range(len(whole)):
        with refused(errno.EBADMSG):
            client.rpc(MessageType.TWALK, whole[:length])
    with refused(errno.EBADMSG):
        client.rpc(MessageType.TWALK, pack("<IIH", 0, 50, 17) + string(b"x") * 17)
    fid = client.create(client.walk(), b"new")
    with refused(errno.EBADMSG):
        client.rpc(MessageType.TWRITE, pack("<IQI", fid, 0, 11) + b"0123456789")
    with refused(errno.EBADF):
        client.getattr(50)


def test_sizes_that_are_not_true_are_refused(client: NinepClient) -> None:
    for size in (0, 6, 20, 0x7FFF_FFFF, 0xFFFF_FFFF):
        answer = client.raw(HEADER.pack(size, MessageType.TGETATTR, 4) + pack("<IQ", 0, 0))
        assert answer == HEADER.pack(11, MessageType.RLERROR, 4) + pack("<I", errno.EBADMSG)
    assert client.raw(b"\7\0\0") == b""
    assert client.device.counters["bad_request"] == 6


def test_an_answer_that_finds_no_room_becomes_an_error(client: NinepClient) -> None:
    body = pack("<IQ", 0, 0)
    with refused(errno.EMSGSIZE):
        client.rpc(MessageType.TGETATTR, body, into=(159,))
    assert client.raw(HEADER.pack(19, MessageType.TGETATTR, 1) + body, into=(10,)) == b""
    assert client.raw(HEADER.pack(19, MessageType.TGETATTR, 1) + body, into=()) == b""
    assert client.device.counters["no_room"] == 2


def test_numbers_that_no_system_call_takes_are_refused(client: NinepClient) -> None:
    fid = client.open(client.walk("hello.txt"), os.O_RDWR)
    with refused(errno.EINVAL):
        client.read(fid, (1 << 64) - 1)
    with refused(errno.EINVAL):
        client.write(fid, b"x", 1 << 63)
    with refused(errno.EINVAL):
        client.open(client.walk("hello.txt"), 3)


def test_a_fault_of_the_server_is_an_io_error_and_is_kept(client: NinepClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.device.session, "answer", lambda message: 1 // 0)
    with refused(errno.EIO):
        client.getattr(0)
    assert client.device.counters["host_ZeroDivisionError"] == 1
    assert isinstance(client.device.last_host_error, ZeroDivisionError)


# --- descriptors ------------------------------------------------------------------------------------------------------


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_files_that_are_only_known_need_few_descriptors(folder: Path) -> None:
    for number in range(100):
        (folder / str(number)).write_text(str(number))
    device = Plan9(folder, most_descriptors=4)
    client = NinepClient(device)
    fids = [client.walk(str(number)) for number in range(100)]
    assert device.session.fids.descriptors == 4
    os.rename(folder / "3", folder / "4")
    client.unlink(0, b"5")
    for number in (0, 1, 2, 50, 99):
        fid = client.open(client.walk(fid=fids[number]))
        assert client.read(fid) == str(number).encode()
        client.clunk(fid)
    for number, error in ((3, errno.ENOENT), (4, errno.ESTALE), (5, errno.ENOENT)):
        with refused(error):
            client.getattr(fids[number])
    for number in range(10, 14):
        client.open(fids[number])
    with refused(errno.ENFILE):
        client.open(fids[20])
    device.close()


def test_nothing_stays_open(folder: Path) -> None:
    before = open_files()
    device = Plan9(folder)
    client = NinepClient(device)
    for _ in range(5):
        client.open(client.walk("hello.txt"))
        client.create(client.walk("sub"), b"new")
        client.walk_qids(0, 999, [b"sub", b"absent"])
    client.driver.write(0x70, 0)
    assert open_files() == before + 1, "the folder itself"
    client.driver.mmio.close()
    assert open_files() == before


# --- state ------------------------------------------------------------------------------------------------------------

SECOND = f"""
import ast, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from kvmpy.virtio.ninep.device import Plan9
from ninep_client import NinepClient
from virtio_driver import FakeDriver

device = Plan9(sys.argv[1])
client = NinepClient(device, driver=FakeDriver(device).start())
device.restore_device_state(ast.literal_eval(sys.stdin.read()))
print(client.read(2), client.write(2, b"J"), client.names(client.open(0)))
for fid in (1, 3, 4):
    try:
        client.getattr(fid)
    except OSError as error:
        print(error.errno)
device.close()
"""


def test_another_process_goes_on_with_the_same_files(client: NinepClient, folder: Path) -> None:
    assert client.walk("sub", "deep") == 1
    client.open(client.walk("hello.txt"), os.O_RDWR)
    client.open(client.walk("sub"))
    client.create(client.walk("sub"), b"new", os.O_RDWR | os.O_EXCL | os.O_TRUNC)
    client.unlink(client.walk("sub"), b"new")
    client.device.quiesce()
    state = client.device.state()["device"]
    assert ast.literal_eval(repr(state)) == state, "plain data"
    (folder / "sub").rename(folder / "elsewhere")
    (folder / "sub" / "deep").mkdir(parents=True)
    command = [sys.executable, "-c", SECOND, str(folder)]
    done = subprocess.run(command, input=repr(state), capture_output=True, text=True, timeout=30, check=False)
    assert done.stderr == ""
    names = [b"elsewhere", b"hello.txt", b"sub"]
    assert done.stdout == f"b'hello, guest\\n' 1 {names}\n{errno.ESTALE}\n{errno.ESTALE}\n{errno.ENOENT}\n"
    assert (folder / "hello.txt").read_bytes() == b"Jello, guest\n"
