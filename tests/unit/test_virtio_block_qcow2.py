"""A qcow2 image as a disk, exported as a raw file by qemu-storage-daemon, as the page about disks says."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from struct import pack

import pytest

from kvmpy.virtio import Block
from kvmpy.virtio.block.format import BlockType
from virtio_driver import FakeDriver

DAEMON = shutil.which("qemu-storage-daemon")
SIZE = 4 << 20

pytestmark = [
    pytest.mark.skipif(DAEMON is None, reason="needs `qemu-storage-daemon` (Debian package qemu-system-common)"),
    pytest.mark.skipif(not os.access("/dev/fuse", os.W_OK), reason="needs /dev/fuse"),
]


@contextmanager
def daemon(folder: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    assert DAEMON is not None
    with subprocess.Popen([DAEMON, *options], cwd=folder, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.terminate()


def create(folder: Path) -> None:
    """disk.qcow2, by the daemon's own commands."""
    options = ("--chardev", "socket,path=control,server=on,wait=off,id=control", "--monitor", "chardev=control")
    with daemon(folder, *options), socket.socket(socket.AF_UNIX) as control:
        deadline = time.monotonic() + 10
        while control.connect_ex(str(folder / "control")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        stream = control.makefile("rw")

        def command(name: str, **arguments: object) -> object:
            stream.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
            stream.flush()
            while True:
                answer = json.loads(stream.readline())
                assert "error" not in answer, answer
                if "return" in answer:
                    return answer["return"]

        def create(**options: object) -> None:
            command("blockdev-create", options=options, **{"job-id": "create"})
            while command("query-jobs") != [
                {"id": "create", "type": "create", "status": "concluded", "current-progress": 1, "total-progress": 1}
            ]:
                time.sleep(0.01)
            command("job-dismiss", id="create")

        command("qmp_capabilities")
        create(driver="file", filename="disk.qcow2", size=0)
        command("blockdev-add", driver="file", filename="disk.qcow2", **{"node-name": "file"})
        create(driver="qcow2", file="file", size=SIZE)


@contextmanager
def exported(folder: Path) -> Iterator[FakeDriver]:
    """A driver of a Block on the export."""
    raw = folder / "disk.raw"
    raw.touch()
    options = (
        "--blockdev", "qcow2,node-name=disk,discard=unmap,file.driver=file,file.filename=disk.qcow2",
        "--export", "fuse,id=disk,node-name=disk,mountpoint=disk.raw,writable=on",
    )  # fmt: skip
    with daemon(folder, *options) as process:
        deadline = time.monotonic() + 10
        while raw.stat().st_size != SIZE:
            if process.poll() is not None:
                assert process.stderr is not None
                pytest.skip(f"no FUSE export: {process.stderr.read().decode()}")
            assert time.monotonic() < deadline
            time.sleep(0.01)
        block = Block(raw)
        try:
            yield FakeDriver(block).start()
        finally:
            block.close()


def request(driver: FakeDriver, kind: int, sector: int, data: bytes = b"", room: int = 0) -> bytes:
    ring = driver.queues[0]
    ring.add([pack("<IIQ", kind, 0, sector), *([data] if data else [])], [*([room] if room else []), 1])
    ring.kick()
    while not (done := ring.used()):
        time.sleep(0.001)
    return done[0][2]


def test_a_qcow2_image_is_a_disk_by_a_fuse_export(tmp_path: Path) -> None:
    create(tmp_path)
    with exported(tmp_path) as driver:
        assert driver.config(0, 4) == SIZE // 512
        assert request(driver, BlockType.OUT, 100, b"\x5a" * 4096) == b"\0"
        assert request(driver, BlockType.OUT, 1024, b"\xa5" * 512) == b"\0"
        assert request(driver, BlockType.DISCARD, 0, pack("<QII", 0, 256, 0)) == b"\0"
        assert request(driver, BlockType.FLUSH, 0) == b"\0"
        assert driver.device.counters == {}
    assert (tmp_path / "disk.qcow2").read_bytes()[:4] == b"QFI\xfb"
    with exported(tmp_path) as driver:
        assert request(driver, BlockType.IN, 1023, room=1024) == bytes(512) + b"\xa5" * 512 + b"\0"
        assert request(driver, BlockType.IN, 100, room=512) == bytes(512) + b"\0"
