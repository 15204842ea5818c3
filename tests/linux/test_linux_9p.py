"""Linux's own 9p driver mounts a folder of the host: what it reads and writes is what is there."""

from __future__ import annotations

import os
import random
from functools import partial
from hashlib import md5
from pathlib import Path

import pytest

from kvmpy.boot.initramfs import File
from kvmpy.virtio import Plan9, VirtioMmio, linux_parameters
from linux_session import LinuxSession, small_kernel

pytestmark = [pytest.mark.kvm, pytest.mark.linux, pytest.mark.slow]

PATIENCE = 240.0
"""Seconds for a command: it takes one, but others may be at work on this computer."""
MOUNT = "mount -t 9p -o trans=virtio,version=9p2000.L"
TAGS = "cat /sys/bus/virtio/drivers/9pnet_virtio/virtio*/mount_tag | tr '\\0' ' '"
SUMS = "cd $1 && busybox find . -type f | sed 's|^./||' | while read -r name; do md5sum \"$name\"; done"
CHANGES = """cd /tree
mkdir -p d/e
echo first > d/e/f
echo second >> d/e/f
busybox mv d/e g
busybox ln -s g/f soft
busybox ln g/f hard
chmod 640 g/f
"""
# The shell breaks what is typed into lines: what is long is a program.
PROGRAMS = {
    f"bin/{name}": File(f"#!/bin/sh\n{text}\n".encode(), 0o755)
    for name, text in (("tags", TAGS), ("sums", SUMS), ("mount9p", f'{MOUNT} "$@"'), ("changes", CHANGES))
}


def make_tree(folder: Path) -> None:
    """Files of some sizes in some folders, with symbolic links that lead out of it."""
    numbers = random.Random(9)
    for place in ("", "a", "a/b", "c c"):
        (folder / place).mkdir(exist_ok=True)
        for length in (0, 1, 4095, 100_000):
            (folder / place / f"{length} bytes").write_bytes(numbers.randbytes(length))
    (folder / "out").symlink_to("/etc/passwd")
    (folder / "up").symlink_to("../secret")


def sums(folder: Path) -> list[str]:
    """As `md5sum` prints them."""
    return sorted(
        f"{md5(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}"
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    )


@pytest.mark.deadline(1200)
def test_linux_reads_and_writes_a_tree(tmp_path: Path) -> None:
    tree, shown = tmp_path / "tree", tmp_path / "shown"
    tree.mkdir()
    make_tree(tree)
    shown.mkdir()
    make_tree(shown)
    (tmp_path / "secret").write_text("nothing for guests")
    devices = [Plan9(tree, "tree"), Plan9(shown, "shown", read_only=True)]
    transports = [VirtioMmio(device, 0xD000_0000 + 0x1000 * at, 5 + 5 * at) for at, device in enumerate(devices)]
    cmdline = f"console=ttyS0 acpi=off {linux_parameters(transports)}"
    with LinuxSession(small_kernel(), cmdline=cmdline, files=PROGRAMS) as session:
        for transport in transports:
            session.machine.add(transport)
        session.boot()
        run = partial(session.run, timeout=PATIENCE)
        assert run("mkdir /shown /tree; tags") == "tree shown "
        assert run("mount9p tree /tree && mount9p shown /shown && echo mounted") == "mounted\n"
        for folder in (tree, shown):
            assert sorted(run(f"sums /{folder.name}").splitlines()) == sums(folder)

        # Links lead where they lead in the guest.
        assert run("cat /tree/out") == "root::0:0:root:/root:/bin/sh\n"
        assert "No such file" in run("cat /tree/up")

        # Written by the guest, seen by the host, and the other way round.
        run("dd if=/dev/urandom of=/tree/new bs=64k count=5; sync")
        assert run("md5sum < /tree/new").split()[0] == md5((tree / "new").read_bytes()).hexdigest()
        assert (tree / "new").stat().st_size == 5 * 65536
        assert run("changes") == ""
        assert (tree / "g" / "f").read_text() == "first\nsecond\n"
        assert os.readlink(tree / "soft") == "g/f"
        assert (tree / "hard").samefile(tree / "g" / "f")
        assert (tree / "hard").stat().st_mode & 0o777 == 0o640
        (tree / "g" / "f").write_text("by the host\n")
        assert run("cat /tree/soft") == "by the host\n"
        run("busybox cp -a /tree/a /tree/copy; rm -r /tree/a /tree/g")
        assert not (tree / "a").exists()
        assert sums(tree / "copy") == sums(shown / "a")

        # Read-only is the host's word: the guest has mounted it for writing.
        assert "Read-only" in run("echo x > /shown/x")
        assert not (shown / "x").exists()

        assert run("umount /tree && umount /shown && echo gone") == "gone\n"
        assert session.machine.host_errors == []
        for device in devices:
            assert device.counters == {}
            assert len(device.session.fids) == 0
