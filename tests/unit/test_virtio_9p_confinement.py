"""The 9P device: whatever a guest says, and whatever changes meanwhile, it stays in the folder.

Beside the folder is another, with a secret in it. Nothing of it is ever read or changed.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from struct import pack

import pytest

from kvmpy.virtio.ninep.device import Plan9
from kvmpy.virtio.ninep.messages import HEADER, MessageType, SetAttributes
from ninep_client import NinepClient, string

SECRET = b"the guest must not see this"


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """What must stay as it is, and does."""
    outside = tmp_path / "outside"
    (outside / "inner").mkdir(parents=True)
    for place in (outside, outside / "inner"):
        (place / "secret").write_bytes(SECRET)
    before = everything(outside)
    yield outside
    assert everything(outside) == before


def everything(folder: Path) -> list[tuple[object, ...]]:
    """All that can be told of the files in a folder, and of itself."""
    found: list[tuple[object, ...]] = []
    for path in (folder, *sorted(folder.rglob("*"))):
        there = path.lstat()
        kept = (there.st_ino, there.st_mode, there.st_nlink, there.st_uid, there.st_size, there.st_mtime_ns)
        found.append((path.name, *kept, there.st_ctime_ns, path.read_bytes() if path.is_file() else b""))
    return found


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    shared = tmp_path / "shared"
    (shared / "sub" / "deep").mkdir(parents=True)
    (shared / "file").write_bytes(b"inside")
    return shared


@pytest.fixture
def client(shared: Path, outside: Path) -> Iterator[NinepClient]:
    device = Plan9(shared)
    client = NinepClient(device)
    yield client
    for fid in device.session.fids._fids.values():
        if fid.descriptor >= 0:
            assert os.readlink(f"/proc/self/fd/{fid.descriptor}").startswith(str(shared))
    device.close()


def number(path: Path) -> int:
    return path.lstat().st_ino


def refused(*numbers: int) -> pytest.RaisesExc[OSError]:
    return pytest.raises(OSError, match="|".join(rf"\[Errno {number}\]" for number in numbers))


def test_the_parent_of_the_root_is_the_root(client: NinepClient, shared: Path) -> None:
    for names in ([b".."] * 16, [b"sub", b"..", b"..", b".."], [b"sub", b"deep"] + [b".."] * 14):
        fid = client.walk(*names)
        assert client.getattr(fid)["path"] == number(shared)
    assert {name: inode for name, _, inode, _ in client.readdir(client.open(fid))}[b".."] == number(shared)


def test_the_parent_of_a_folder_that_was_moved_away_is_not_where_it_is_now(
    client: NinepClient, shared: Path, tmp_path: Path
) -> None:
    fid = client.walk("sub", "deep")
    (shared / "sub").rename(tmp_path / "moved")
    with refused(errno.ENOENT):
        client.walk("..", fid=fid)
    (shared / "sub").mkdir()
    assert client.getattr(client.walk("..", fid=fid))["path"] == number(shared / "sub")
    (shared / "sub").rmdir()
    (tmp_path / "moved").rename(shared / "sub")


BAD_NAMES = (b"", b".", b"..", b"/", b"../outside", b"sub/deep", b"/etc/passwd", b"file\0", b"\0", b"./file", b"../")


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_is_one_name(client: NinepClient, shared: Path, name: bytes) -> None:
    before = everything(shared)
    attempts: list[Callable[[], object]] = [
        lambda: client.create(client.walk(), name),
        lambda: client.create(client.walk(), name, os.O_RDONLY | os.O_DIRECTORY),
        lambda: client.mkdir(0, name),
        lambda: client.mknod(0, name, stat.S_IFREG | 0o644),
        lambda: client.symlink(0, name, b"target"),
        lambda: client.link(0, client.walk("file"), name),
        lambda: client.rename(client.walk("file"), 0, name),
        lambda: client.renameat(0, b"file", 0, name),
        lambda: client.renameat(0, name, 0, b"file"),
        lambda: client.unlink(0, name),
        lambda: client.unlink(0, name, 0x200),
    ]
    if name != b"..":
        attempts += [lambda: client.walk(name), lambda: client.walk_qids(client.walk("sub"), 900, [name])]
    for attempt in attempts:
        with refused(errno.EINVAL):
            attempt()
    assert everything(shared) == before


@pytest.mark.parametrize(
    "target", ["{}/secret", "../outside/secret", "sub/../../outside/secret", "/proc/self/root{}/secret"]
)
def test_a_link_to_a_file_is_read_and_not_followed(
    client: NinepClient, shared: Path, outside: Path, target: str
) -> None:
    target = target.format(outside)
    (shared / "link").symlink_to(target)
    fid = client.walk("link")
    assert client.readlink(fid) == target.encode()
    assert stat.S_ISLNK(client.getattr(fid)["mode"])
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_TRUNC, os.O_PATH, os.O_RDONLY | os.O_NOFOLLOW):
        with refused(errno.ELOOP):
            client.open(client.walk("link"), flags)
    with refused(errno.ELOOP):
        client.create(client.walk(), b"link", os.O_RDWR | os.O_TRUNC)
    with refused(errno.EOPNOTSUPP):
        client.setattr(fid, SetAttributes.MODE, mode=0o777)
    with refused(errno.EINVAL):
        client.setattr(fid, SetAttributes.SIZE, size=0)
    client.setattr(fid, SetAttributes.ATIME | SetAttributes.MTIME)
    client.setattr(fid, SetAttributes.MTIME | SetAttributes.MTIME_SET, times=(0, 0, 5, 0))
    client.setattr(fid, SetAttributes.UID, uid=os.getuid())
    assert (shared / "link").lstat().st_mtime == 5
    client.link(0, fid, b"again")
    assert os.readlink(shared / "again") == target
    client.unlink(0, b"again")
    client.remove(fid)
    assert not (shared / "link").is_symlink()


@pytest.mark.parametrize("target", ["{}", "../outside", "/"])
def test_a_link_to_a_folder_is_no_folder(client: NinepClient, shared: Path, outside: Path, target: str) -> None:
    (shared / "door").symlink_to(target.format(outside))
    fid = client.walk("door")
    assert len(client.walk_qids(0, 900, [b"door", b"secret"])) == 1
    attempts: list[Callable[[], object]] = [
        lambda: client.walk("secret", fid=fid),
        lambda: client.walk("..", fid=fid),
        lambda: client.mkdir(fid, b"new"),
        lambda: client.symlink(fid, b"new", b"x"),
        lambda: client.mknod(fid, b"new", stat.S_IFREG),
        lambda: client.create(client.walk("door"), b"new"),
        lambda: client.link(fid, client.walk("file"), b"new"),
        lambda: client.renameat(0, b"file", fid, b"new"),
        lambda: client.renameat(fid, b"secret", 0, b"new"),
        lambda: client.rename(client.walk("file"), fid, b"new"),
        lambda: client.unlink(fid, b"secret"),
        lambda: client.unlink(fid, b"inner", 0x200),
    ]
    for attempt in attempts:
        with refused(errno.ENOTDIR):
            attempt()
    with refused(errno.ELOOP):
        client.open(client.walk("door"), os.O_RDONLY | os.O_DIRECTORY)


def test_links_that_the_guest_makes_lead_it_nowhere(client: NinepClient, outside: Path) -> None:
    client.symlink(0, b"mine", os.fsencode(outside))
    with refused(errno.ENOTDIR):
        client.walk("secret", fid=client.walk("mine"))
    client.renameat(0, b"mine", client.walk("sub"), b"moved")
    with refused(errno.ELOOP):
        client.open(client.walk("sub", "moved"))


def test_the_kernels_own_links_lead_nowhere_either() -> None:
    device = Plan9("/proc/self", read_only=True)
    client = NinepClient(device)
    for name in ("cwd", "root", "exe"):
        with refused(errno.ENOTDIR):
            client.walk("etc", fid=client.walk(name))
        with refused(errno.ELOOP):
            client.open(client.walk(name))
    descriptor = os.open("/", os.O_RDONLY)
    with refused(errno.ELOOP):
        client.open(client.walk("fd", str(descriptor)))
    os.close(descriptor)
    device.close()


@pytest.mark.parametrize("first", ["folder", "link"])
def test_a_link_that_comes_in_the_midst_of_a_walk_is_not_followed(
    client: NinepClient, shared: Path, outside: Path, first: str
) -> None:
    """Folder and link change places as fast as they can; the guest goes through that door all the time."""
    (shared / "door").mkdir()
    (shared / "door" / "secret").write_bytes(b"inside")
    (shared / "link").symlink_to(outside)
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            os.rename(shared / "door", shared / "away")
            os.rename(shared / "link", shared / "door")
            os.rename(shared / "door", shared / "link")
            os.rename(shared / "away", shared / "door")

    thread = threading.Thread(target=swap)
    thread.start()
    seen: set[bytes] = set()
    errors: set[int | None] = set()
    try:
        for at in range(250):
            try:
                fid = client.walk("door") if first == "folder" else client.walk("link")
                target = client.walk("secret", fid=fid)
                client.open(target, os.O_RDWR)
                seen.add(client.read(target))
                client.write(target, b"inside")
                client.create(fid, f"new {at}".encode())
            except OSError as error:
                errors.add(error.errno)
            for used in range(1, client.next_fid):
                if used in client.device.session.fids:
                    client.clunk(used)
    finally:
        done.set()
        thread.join()
    assert seen <= {b"inside"}
    assert errors <= {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}


def test_a_fid_that_sleeps_is_not_woken_through_a_link(shared: Path, outside: Path) -> None:
    (shared / "door").mkdir()
    (shared / "door" / "secret").write_bytes(b"inside")
    device = Plan9(shared, most_descriptors=2)
    client = NinepClient(device)
    fid = client.walk("door", "secret")
    for _ in range(3):
        client.walk("file")
    assert device.session.fids.get(fid).descriptor == -1
    (shared / "door").rename(shared / "away")
    (shared / "door").symlink_to(outside)
    with refused(errno.ENOTDIR):
        client.open(fid)
    (shared / "door").unlink()
    (shared / "door").mkdir()
    (shared / "door" / "secret").write_bytes(b"another")
    with refused(errno.ESTALE):
        client.open(fid)
    device.close()


def test_what_is_no_file_is_not_opened(client: NinepClient, shared: Path) -> None:
    os.mkfifo(shared / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(shared / "socket"))
        for name in ("fifo", "socket"):
            for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
                with refused(errno.EPERM):
                    client.open(client.walk(name), flags)
                with refused(errno.EPERM):
                    client.create(client.walk(), name.encode(), flags)
            with refused(errno.EINVAL):
                client.setattr(client.walk(name), SetAttributes.SIZE)


def test_device_nodes_are_not_opened() -> None:
    device = Plan9("/dev")
    client = NinepClient(device)
    fid = client.walk("null")
    assert client.getattr(fid)["rdev"] == 0x103
    with refused(errno.EPERM):
        client.open(fid, os.O_RDWR)
    device.close()


def test_names_and_paths_have_an_end(shared: Path) -> None:
    device = Plan9(shared)
    client = NinepClient(device)
    with refused(errno.ENAMETOOLONG):
        client.mkdir(0, b"x" * 256)
    fid = client.walk()
    with refused(errno.ENAMETOOLONG):
        for _ in range(20):
            client.mkdir(fid, b"y" * 255)
            fid = client.walk(b"y" * 255, fid=fid)
    device.close()


def test_a_descriptor_in_use_is_not_closed_under_the_reader(
    client: NinepClient, shared: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were it closed, its number would be that of the next file which this process opens: any file of the host."""
    fid = client.open(client.walk("file"))
    begun, go_on = threading.Event(), threading.Event()
    preadv = os.preadv

    def slow(descriptor: int, *arguments: object) -> int:
        begun.set()
        assert go_on.wait(20)
        return preadv(descriptor, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", slow)
    ring = client.driver.queues[0]
    ring.add([HEADER.pack(23, MessageType.TREAD, 5) + pack("<IQI", fid, 0, 100)], [111])
    ring.kick()
    assert begun.wait(20)
    client.clunk(fid)
    client.version()
    files = [os.open(outside / "secret", os.O_RDONLY) for _ in range(50)]
    go_on.set()
    assert client.wait(1)[0][11:] == b"inside"
    for file in files:
        os.close(file)
    assert client.device.session.fids.descriptors == 0


def test_giant_counts_are_harmless(client: NinepClient, shared: Path) -> None:
    fid = client.create(client.walk(), b"new")
    with refused(errno.EBADMSG):
        client.rpc(MessageType.TWRITE, pack("<IQI", fid, 0, 0xFFFF_FFFF) + b"data")
    with refused(errno.EBADMSG):
        client.rpc(MessageType.TWALK, pack("<IIH", 0, 50, 0xFFFF))
    with refused(errno.EBADMSG):
        client.rpc(MessageType.TMKDIR, pack("<IH", 0, 0xFFFF) + b"name")
    with refused(errno.EBADMSG):
        client.rpc(MessageType.TATTACH, pack("<II", 77, 0xFFFF_FFFF) + string(b"root") + pack("<H", 0x8000))
    assert client.read(fid, 0, 0xFFFF_FFFF) == b""
    assert (shared / "new").stat().st_size == 0
