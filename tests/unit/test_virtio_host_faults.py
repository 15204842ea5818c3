"""What goes wrong on the host is an error to the guest, or to the program: never an exception in a vCPU, nor a silence.

More of it: test_virtio_block.py (full disks, truncated images, I/O errors), test_virtio_net.py (the other end closes,
passt is killed), test_virtio_vsock.py (programs that close), tests/guest/test_virtio_net.py (a TAP that is deleted).
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kvmpy.virtio import Block, DeviceStatus, VirtioConsole
from kvmpy.virtio.ninep.device import Plan9
from ninep_client import NinepClient
from virtio_driver import FakeDriver

NEEDS_RESET = DeviceStatus.DEVICE_NEEDS_RESET


def in_process(program: str, *arguments: str, namespace: bool = False) -> None:
    """Run a test in a process of its own; with `namespace` the first argument is a tmpfs of 64 KiB there."""
    here = Path(__file__).parent
    paths = [str(path) for path in (here, here.parent, here.parents[1])]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{program}", *arguments]
    if namespace:
        # $0 is the interpreter, $3 the folder.
        mount = 'mount -t tmpfs -o size=64k none "$3" && exec "$0" "$@"'
        command = ["unshare", "-r", "-m", "sh", "-c", mount, *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert (done.returncode, done.stderr) == (0, "")


# --- disks ------------------------------------------------------------------------------------------------------------


def test_an_image_that_may_not_grow_so_far_gives_errors(tmp_path: Path) -> None:
    with open(tmp_path / "disk.img", "wb") as file:
        file.truncate(1 << 20)
    in_process(
        """
import resource
from test_virtio_block import Block, Disk
disk = Disk(Block(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
assert disk.write(0, b"1" * 8192) == 0
assert disk.write(8, b"2" * 8192) == 1  # the half of it is there, and the guest was not told that all is
assert disk.write(16, b"3" * 512) == 1
assert disk.block.counters == {"host_EFBIG": 2}, disk.block.counters
assert disk.flush() == 0
assert disk.read(0, 16) == (0, b"1" * 4096 + b"2" * 4096)
disk.block.close()
""",
        str(tmp_path / "disk.img"),
    )


def test_a_disk_that_hangs_is_closed_when_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(0x1_0000))
    began, go_on = threading.Event(), threading.Event()

    def hangs(fd: int) -> None:
        began.set()
        assert go_on.wait(20)

    monkeypatch.setattr(os, "fdatasync", hangs)
    before = threading.active_count()
    block = Block(path, workers=1)
    driver = FakeDriver(block).start()
    for kind in (4, 4, 1):  # flush, flush, write
        driver.queues[0].add([kind.to_bytes(16, "little"), *([b"\xff" * 512] if kind == 1 else [])], [1])
    driver.queues[0].kick()
    assert began.wait(20)
    closing = threading.Thread(target=driver.mmio.close)
    closing.start()
    while not block._closing:
        time.sleep(0.001)
    go_on.set()
    closing.join(20)
    assert not closing.is_alive()
    assert threading.active_count() == before
    # All are answered, those that nobody has begun with an error.
    assert [content for _, _, content in driver.queues[0].used()] == [b"\0", b"\1", b"\1"]


# --- shared folders ---------------------------------------------------------------------------------------------------


def test_a_full_file_system_gives_errors_to_who_writes_a_shared_folder(tmp_path: Path) -> None:
    in_process(
        """
import errno, os
from kvmpy.virtio.ninep.device import Plan9
from ninep_client import NinepClient
device = Plan9(sys.argv[1])
client = NinepClient(device)
client.create(client.walk(), b"file", os.O_RDWR)
written = 0
try:
    while written < 1 << 20:
        written += client.write(1, b"x" * 4096, written)
except OSError as error:
    assert error.errno == errno.ENOSPC, error
assert 0 < written <= 1 << 16
client.fsync(1)
assert os.stat(sys.argv[1] + "/file").st_size == written  # what was said to be written, and no more
assert client.read(1, written - 10, 4096) == b"x" * 10
client.setattr(1, 8, size=0)
assert client.write(1, b"y") == 1
client.driver.mmio.close()
""",
        str(tmp_path), namespace=True,
    )  # fmt: skip


def test_a_file_that_is_truncated_under_the_guest_ends_where_it_ends_now(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 10_000)
    client = NinepClient(Plan9(tmp_path))
    client.open(client.walk("file"))
    assert client.read(1, 0, 4096) == b"x" * 4096
    os.truncate(tmp_path / "file", 5000)
    assert client.read(1, 4096, 4096) == b"x" * 904
    assert client.read(1, 8192, 4096) == b""
    os.unlink(tmp_path / "file")
    assert client.read(1, 4990, 100) == b"x" * 10  # it is open
    with pytest.raises(OSError, match=os.strerror(errno.ENOENT)):
        client.open(client.walk("file"))
    client.driver.mmio.close()


# --- consoles ---------------------------------------------------------------------------------------------------------


def test_who_reads_a_console_goes_and_the_guest_and_the_host_learn_of_it() -> None:
    ours, theirs = socket.socketpair()
    console = VirtioConsole(sink=ours.sendall)
    driver = FakeDriver(console, events=True).start()
    notified = driver.board.write_events["mmio", driver.mmio.address + 0x50, 4, 1]  # type: ignore[operator]
    queue = driver.queues[1]
    with ours:
        queue.add([b"one"])
        notified.call()
        assert theirs.recv(10) == b"one"
        theirs.close()
        queue.add([b"two"])
        with pytest.raises(BrokenPipeError):  # kept in the machine's host_errors
            notified.call()
    assert len(queue.used()) == 1  # "two" was not taken
    assert driver.status & NEEDS_RESET
    assert driver.acknowledge() & 2
    console.connect_sink(None)
    driver.start()
    assert driver.request([b"three"], queue=1) == b""
    assert console.output == b"onethree"
    driver.mmio.close()


def test_who_types_on_a_console_goes_and_what_was_typed_stays() -> None:
    ours, theirs = socket.socketpair()
    console = VirtioConsole()
    driver = FakeDriver(console).start()
    with ours:
        console.connect_input(ours)
        (source,) = driver.board.inputs
        theirs.sendall(b"typed")
        theirs.close()
        assert source.ready()
        assert not source.ready()  # the host's thread does not look again
    console.send(b" and sent")
    assert driver.request(into=[100]) == b"typed and sent"
    driver.mmio.close()
