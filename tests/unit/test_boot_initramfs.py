"""Initial RAM file systems: what is in an archive, read by a reader of its own and by cpio where that is installed."""

import os
import shutil
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.boot.initramfs import DeviceNode, Entry, File, Initramfs, Link
from kvmpy.errors import UsageError

CPIO = shutil.which("cpio")


@dataclass(frozen=True)
class Record:
    """An entry as the kernel's document "initramfs buffer format" lays it out."""

    name: str
    mode: int
    data: bytes
    device: tuple[int, int]
    inode: int
    links: int
    rest: tuple[int, ...]


def read(archive: bytes) -> list[Record]:
    """All entries up to the trailer; asserts on what the format demands."""
    records: list[Record] = []
    position = 0
    while True:
        header = archive[position : position + 110]
        assert header[:6] == b"070701"
        ino, mode, uid, gid, nlink, mtime, size, major, minor, rmajor, rminor, namesize, check = (
            int(header[at : at + 8], 16) for at in range(6, 110, 8)
        )
        name = archive[position + 110 : position + 110 + namesize]
        assert name.endswith(b"\0")
        assert name.count(b"\0") == 1
        start = position + 110 + namesize + 3 & -4
        if name == b"TRAILER!!!\0":
            assert (mode, size, start) == (0, 0, len(archive))
            return records
        data = archive[start : start + size]
        assert len(data) == size
        position = start + size + 3 & -4
        rest = (uid, gid, mtime, major, minor, check)
        records.append(Record(os.fsdecode(name[:-1]), mode, data, (rmajor, rminor), ino, nlink, rest))


def entries(archive: Initramfs) -> dict[str, tuple[int, bytes, tuple[int, int]]]:
    return {record.name: (record.mode, record.data, record.device) for record in read(archive.to_bytes())}


EVERYTHING: dict[str, Entry] = {
    "init": "#!/bin/sh\n",
    "bin/busybox": b"\x7fELF",
    "bin/sh": Link("busybox"),
    "dev/console": DeviceNode("c", 5, 1),
    "dev/vda": DeviceNode("b", 254, 0, 0o660),
    "etc/passwd": File(b"root::0:0::/:/bin/sh\n"),
    "bin/su": File(b"su", 0o4755),
    "tmp": None,
}


def test_files_links_nodes_and_folders_are_what_they_were_given_as() -> None:
    assert entries(Initramfs(EVERYTHING)) == {
        "bin": (0o040755, b"", (0, 0)),
        "bin/busybox": (0o100755, b"\x7fELF", (0, 0)),
        "bin/sh": (0o120777, b"busybox", (0, 0)),
        "bin/su": (0o104755, b"su", (0, 0)),
        "dev": (0o040755, b"", (0, 0)),
        "dev/console": (0o020600, b"", (5, 1)),
        "dev/vda": (0o060660, b"", (254, 0)),
        "etc": (0o040755, b"", (0, 0)),
        "etc/passwd": (0o100644, b"root::0:0::/:/bin/sh\n", (0, 0)),
        "init": (0o100755, b"#!/bin/sh\n", (0, 0)),
        "tmp": (0o040755, b"", (0, 0)),
    }


def test_owner_and_times_are_zero_and_no_two_entries_are_one_file() -> None:
    records = read(Initramfs(EVERYTHING).to_bytes())
    assert {record.rest for record in records} == {(0,) * 6}
    assert len({record.inode for record in records}) == len(records)
    assert all(record.links == (2 if stat.S_ISDIR(record.mode) else 1) for record in records)


def test_the_same_content_gives_the_same_bytes_in_whatever_order() -> None:
    one, other = Initramfs(EVERYTHING), Initramfs(dict(reversed(EVERYTHING.items())))
    assert one.to_bytes() == other.to_bytes() == one.to_bytes()


def test_a_folder_comes_before_what_is_in_it() -> None:
    names = [record.name for record in read(Initramfs({"a/b/c/d": "", "a-b": "", "a.b": ""}).to_bytes())]
    assert all(name.rpartition("/")[0] in ["", *names[:index]] for index, name in enumerate(names))


def test_slashes_around_a_name_do_not_count_and_the_last_entry_of_a_name_does() -> None:
    assert entries(Initramfs({"/init": "old", "init/": "new"})) == {"init": (0o100755, b"new", (0, 0))}


def test_an_empty_archive_is_a_trailer() -> None:
    archive = Initramfs()
    assert read(archive.to_bytes()) == []
    assert repr(archive) == "<Initramfs of 0 entries>"


@pytest.mark.parametrize(
    "name", ["", "/", ".", "..", "a//b", "a/./b", "../a", "a/..", "a\0b", "TRAILER!!!", "x" * 4096, "x/" * 2047 + "yy"]
)
def test_names_that_linux_would_not_unpack_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        Initramfs({name: ""})


def test_the_longest_name_that_linux_takes_is_taken() -> None:
    assert "x" * 4095 in entries(Initramfs({"x" * 4095: ""}))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (Link(""), "a link to b''"),
        (Link("x" * 4096), "a link to"),
        (Link("a\0b"), "a link to"),
        (DeviceNode("c", 1 << 12, 0), "no device 4096:0"),
        (DeviceNode("c", 0, 1 << 20), "no device 0:1048576"),
        (DeviceNode("b", -1, 0), "no device -1:0"),
        (DeviceNode("p", 1, 1), "an initramfs holds"),
        (5, "an initramfs holds"),
    ],
)
def test_entries_that_cannot_be_are_refused(entry: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Initramfs({"name": entry})  # type: ignore[dict-item]


def test_a_file_is_no_folder() -> None:
    for first in ("text", Link("elsewhere"), DeviceNode("c", 1, 3)):
        with pytest.raises(UsageError, match="a/b: a is no folder"):
            Initramfs({"a": first, "a/b": "text"})
    with pytest.raises(UsageError, match="a is a folder that has something in it"):
        Initramfs({"a/b": "text", "a": "text"})
    assert entries(Initramfs({"a": None, "b": None} | {"a": "text"}))["a"] == (0o100755, b"text", (0, 0))
    assert "a/b" in entries(Initramfs({"a/b": "text", "a": None}))


def test_a_folder_of_the_host_is_taken_with_its_permissions(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir(mode=0o711)
    (tmp_path / "bin" / "tool").write_bytes(b"tool")
    (tmp_path / "bin" / "tool").chmod(0o4750)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty").chmod(0o1777)
    (tmp_path / "file").symlink_to("bin/tool")
    (tmp_path / "folder").symlink_to("bin")
    (tmp_path / "nowhere").symlink_to("/does/not/exist")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / os.fsdecode(b"caf\xe9")).write_bytes(b"not UTF-8")
    expected = {
        "bin": (0o040711, b"", (0, 0)),
        "bin/tool": (0o104750, b"tool", (0, 0)),
        "empty": (0o041777, b"", (0, 0)),
        "file": (0o120777, b"bin/tool", (0, 0)),
        "folder": (0o120777, b"bin", (0, 0)),
        "nowhere": (0o120777, b"/does/not/exist", (0, 0)),
        "caf\udce9": (0o100644, b"not UTF-8", (0, 0)),
    }
    found = entries(Initramfs.from_folder(tmp_path))
    assert found.pop("caf\udce9")[1] == expected.pop("caf\udce9")[1]  # its permissions are the umask's
    assert found == expected
    assert b"caf\xe9\0" in Initramfs.from_folder(tmp_path).to_bytes()


def test_a_folder_that_is_not_there_is_an_error_and_no_empty_archive(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Initramfs.from_folder(tmp_path / "nothing")


def test_a_folder_can_be_added_to(tmp_path: Path) -> None:
    (tmp_path / "init").write_text("#!/bin/sh\n")
    archive = Initramfs.from_folder(tmp_path)
    archive.add("dev/console", DeviceNode("c", 5, 1))
    assert set(entries(archive)) == {"init", "dev", "dev/console"}


NAMES = st.lists(st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=6), min_size=1)


@given(st.dictionaries(NAMES.map("/".join), st.binary(max_size=9)))
def test_any_names_and_contents_come_back(files: dict[str, bytes]) -> None:
    archive, expected = Initramfs(), {}
    for name, data in files.items():
        try:
            archive.add(name, data)
        except UsageError:
            continue
        expected[name] = data
    found = entries(archive)
    assert {name: data for name, (mode, data, _) in found.items() if stat.S_ISREG(mode)} == expected


@pytest.mark.skipif(CPIO is None, reason="cpio is not installed")
def test_cpio_lists_and_unpacks_the_same(tmp_path: Path) -> None:
    archive = Initramfs(EVERYTHING).to_bytes()
    listing = subprocess.run(
        [str(CPIO), "-itvn", "--quiet"], input=archive, capture_output=True, check=True, timeout=60
    ).stdout.decode()
    modes = {line.split()[-1]: line.split()[0] for line in listing.splitlines() if "->" not in line}
    assert modes == {record.name: stat.filemode(record.mode) for record in read(archive) if record.name != "bin/sh"}
    assert [line.split()[-3:] for line in listing.splitlines() if "->" in line] == [["bin/sh", "->", "busybox"]]
    assert [line.split()[4:6] for line in listing.splitlines() if "dev/" in line] == [["5,", "1"], ["254,", "0"]]
    # Nodes need root.
    subprocess.run([str(CPIO), "-idm", "--quiet", "-f", "dev/*"], input=archive, cwd=tmp_path, check=True, timeout=60)
    unpacked = Initramfs.from_folder(tmp_path)
    without_nodes = {name: entry for name, entry in EVERYTHING.items() if not isinstance(entry, DeviceNode)}
    assert unpacked.to_bytes() == Initramfs(without_nodes | {"dev": None}).to_bytes()
