"""Linux's own driver uses disks: a root file system made by Debian's tools, a disk to write to, of both kinds."""

from __future__ import annotations

import os
import random
from hashlib import md5
from pathlib import Path
from typing import Any

import pytest

from kvmpy.virtio import Block, Feature, VirtioMmio
from kvmpy.virtio.block.format import BlockFeature
from linux_disks import SIZE, check_ext2, dump_from_ext2, make_ext2, sums
from linux_session import LinuxSession, small_kernel, write_root


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root file system as a folder, with some files of random content."""
    root = tmp_path_factory.mktemp("root")
    write_root(root)
    return root


def session_with(*transports: VirtioMmio) -> LinuxSession:
    return LinuxSession(small_kernel(), cmdline="console=ttyS0 root=/dev/vda ro", transports=transports, disk_root=True)


@pytest.mark.parametrize("events", [True, False], ids=["ioeventfd and irqfd", "exits and lines"])
def test_linux_has_its_root_on_a_disk_and_writes_to_others(tree: Path, tmp_path: Path, events: bool) -> None:
    root_image, data_image, raw_image = (tmp_path / name for name in ("root.img", "data.img", "raw.img"))
    make_ext2(root_image, tree)
    make_ext2(data_image)
    raw_image.write_bytes(random.Random(6).randbytes(1 << 20) * 16)
    before = root_image.read_bytes()
    root, data = Block(root_image, read_only=True, serial="root-disk"), Block(data_image)
    raw = Block(raw_image, serial="twenty characters ok")
    transports = [
        VirtioMmio(root, 0xD000_0000, 5, ioeventfd=events, irqfd=events),
        VirtioMmio(data, 0xD000_1000, 10, ioeventfd=events, irqfd=events),
        VirtioMmio(raw, 0xD000_2000, 11, legacy=True, ioeventfd=events, irqfd=events),
    ]
    with session_with(*transports) as session:
        session.boot()
        # What Linux knows of the disks.
        assert session.run("cat /sys/block/vda/size /sys/block/vda/ro /sys/block/vda/serial").split() == [
            str(SIZE // 512), "1", "root-disk",
        ]  # fmt: skip
        assert session.run("cat /sys/block/vdc/serial").strip() == "twenty characters ok"
        assert session.run("cat /sys/block/vd?/queue/write_cache").split() == ["write", "back"] * 3
        assert data.has_feature(Feature.EVENT_IDX)
        assert data.has_feature(BlockFeature.DISCARD)
        # All that it reads is what Debian's tools have put there.
        assert session.run("cd / && find ./bin/busybox ./etc ./files -type f | sort | xargs md5sum", 120) == sums(tree)
        # Files that it writes are there on the host.
        assert session.run("mount -t ext2 /dev/vdb /mnt && cp -r /files /mnt/copy; echo $?", 120).endswith("0\n")
        assert session.run("cd /mnt/copy && find -type f | sort | xargs md5sum", 120) == sums(tree / "files")
        assert session.run("cd / && umount /mnt; echo $?") == "0\n"
        # A disk of before version 1, block by block.
        whole = md5(raw_image.read_bytes()).hexdigest()
        assert session.run("md5sum /dev/vdc", 120).split()[0] == whole
        session.run("dd if=/files/deep/er/file-5 of=/dev/vdc bs=64k seek=40 conv=fsync 2>/dev/null", 120)
        assert session.run("blkdiscard -o 8388608 -l 4194304 /dev/vdc; echo $?") == "0\n"
        assert session.run("sync; poweroff -f & echo $?").startswith("0")
        assert session.machine.host_errors == []
        assert [block.counters for block in (root, data, raw)] == [{}, {}, {}]
    assert root_image.read_bytes() == before
    check_ext2(data_image)
    dump_from_ext2(data_image, "/copy", tmp_path)
    assert sums(tmp_path / "copy") == sums(tree / "files")
    written = (tree / "files/deep/er/file-5").read_bytes()
    contents = raw_image.read_bytes()
    assert contents[40 << 16 :][: len(written)] == written
    assert contents[8 << 20 : 12 << 20] == bytes(4 << 20)
    assert os.stat(raw_image).st_blocks * 512 < SIZE


def test_linux_switches_the_cache_off(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, data_image = tmp_path / "root.img", tmp_path / "data.img"
    make_ext2(image, tree)
    data_image.write_bytes(bytes(1 << 20))
    data = Block(data_image)
    through: list[bool] = []
    pwritev = os.pwritev

    def write(fd: int, views: Any, offset: int, flags: int = 0) -> int:
        if fd == data.file.fd:
            through.append(bool(flags & os.RWF_DSYNC))
        return pwritev(fd, views, offset, flags)

    monkeypatch.setattr(os, "pwritev", write)
    transports = VirtioMmio(Block(image, read_only=True), 0xD000_0000, 5), VirtioMmio(data, 0xD000_1000, 10)
    with session_with(*transports) as session:
        session.boot()
        session.run("dd if=/bin/busybox of=/dev/vdb bs=4k count=4 conv=fsync 2>/dev/null")
        assert through
        assert not any(through)
        session.run('echo "write through" > /sys/block/vdb/cache_type')
        assert session.run("cat /sys/block/vdb/cache_type") == "write through\n"
        through.clear()
        session.run("dd if=/bin/busybox of=/dev/vdb bs=4k count=4 conv=fsync 2>/dev/null")
        assert through
        assert all(through)
