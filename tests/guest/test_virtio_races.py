"""Two processors of a guest that agree on nothing, and a host that stops and goes on with the device meanwhile."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from struct import pack

import pytest

from fuzz_settings import PROFILE
from gnu_toolchain import compile_c
from kvmpy import End, Machine, MiB
from kvmpy.boot import ElfImage
from kvmpy.devices import DebugExit
from kvmpy.guest.program import GuestProgram
from kvmpy.virtio import Block, DatagramSocket, Entropy, VirtioConsole, VirtioDevice, VirtioMmio, VirtioNet, Vsock
from kvmpy.virtio.block.format import BlockType
from kvmpy.virtio.ninep.device import Plan9
from network_cable import NO_OFFLOAD, frame
from ninep_client import NinepClient
from virtio_driver import FakeDriver
from vsock_guest import VsockGuest

ADDRESS = 0xD000_0000
SOURCE = str(Path(__file__).with_name("virtio_races.c"))
SECTORS = 64
TABLES, STACK = 0xE0_0000, 0xF0_0000
PATIENCE = 20
SECONDS = {"dev": 0.2, "ci": 2.0}[PROFILE]
"""That the guests without rules run."""


def program(device: VirtioDevice, *, storm: bool = False) -> GuestProgram:
    return compile_c(
        SOURCE, flags=(
            f"-DADDRESS={ADDRESS:#x}", f"-DDEVICE_ID={device.device_id}", f"-DQUEUES={len(device.queues)}",
            f"-DSTORM={int(storm)}",
        ),
    )  # fmt: skip


@contextmanager
def racing(device: VirtioDevice, made: GuestProgram, *, ioeventfd: bool) -> Iterator[tuple[Machine, VirtioMmio]]:
    """A machine whose two processors run, until the end of the context."""
    with Machine(memory=16 * MiB, vcpus=2) as machine:
        transport = machine.add(VirtioMmio(device, address=ADDRESS, irq=5, ioeventfd=ioeventfd, irqfd=ioeventfd))
        machine.add(DebugExit())
        machine.load(ElfImage(made.elf, ring=3))
        machine.vcpus[1].set_long_mode(made.symbols["second"], tables=TABLES, stack=STACK, ring=3)
        machine.start()
        try:
            yield machine, transport
            assert machine.stop().end is End.STOPPED
        finally:
            machine.stop()
        assert machine.host_errors == []


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(pack("<Q", sector) * 64 for sector in range(SECTORS)))
    return path


@pytest.mark.parametrize("ioeventfd", [False, True], ids=["exits", "ioeventfd"])
def test_notifications_without_end_while_the_host_stops_the_disk_lose_no_request(image: Path, ioeventfd: bool) -> None:
    block = Block(image)
    made = program(block, storm=True)
    with racing(block, made, ioeventfd=ioeventfd) as (machine, transport):
        end = time.monotonic() + PATIENCE
        stops = 0
        while stops < 50 or machine.memory.read_u32(made.symbols["done"]) < 200:
            assert time.monotonic() < end
            transport.quiesce()
            assert block.queues[0].in_flight == 0
            done = machine.memory.read_u32(made.symbols["done"])
            time.sleep(0.002)
            assert machine.memory.read_u32(made.symbols["done"]) <= done + 1  # what the guest had not seen yet
            transport.resume()
            stops += 1
            time.sleep(0.002)
    assert block.last_host_error is None


def test_a_guest_whose_image_is_truncated_sees_an_error(image: Path) -> None:
    block = Block(image)
    made = program(block, storm=True)
    with Machine(memory=16 * MiB) as machine:
        machine.add(VirtioMmio(block, address=ADDRESS, irq=5))
        machine.add(DebugExit())
        machine.load(ElfImage(made.elf, ring=3))
        machine.start(timeout=PATIENCE)
        while not machine.memory.read_u32(made.symbols["done"]):
            time.sleep(0.001)
        os.truncate(image, 512)
        outcome = machine.wait(PATIENCE)
        assert (outcome.end, (outcome.code or 0) >> 1) == (End.EXITED, 5)  # the status was not OK
        assert machine.host_errors == []
    assert block.counters == {"host_EIO": 1}
    assert "shorter" in str(block.last_host_error)


# --- a guest that keeps no rule ---------------------------------------------------------------------------------------


def answers(driver: FakeDriver, queue: int = 0) -> list[bytes]:
    """What comes back next on a queue."""
    end = time.monotonic() + PATIENCE
    while not (done := driver.queues[queue].used()):
        assert time.monotonic() < end, "nothing came back"
        time.sleep(0.001)
    return [content for _, _, content in done]


def disk_works(driver: FakeDriver) -> None:
    data = os.urandom(512)
    for out, into, answer in (([pack("<IIQ", BlockType.OUT, 0, 9), data], [1], b"\0"),
                              ([pack("<IIQ", BlockType.IN, 0, 9)], [512, 1], data + b"\0")):  # fmt: skip
        driver.queues[0].add(out, into)
        driver.queues[0].kick()
        assert answers(driver) == [answer]


def entropy_works(driver: FakeDriver) -> None:
    assert driver.request(into=[16]) == b"\x5a" * 16


def console_works(driver: FakeDriver) -> None:
    console = driver.device
    assert isinstance(console, VirtioConsole)
    assert driver.request([b"marker"], queue=1) == b""
    assert console.output.endswith(b"marker")
    console.ports[0]._unread.clear()
    driver.request([pack("<IHH", 0, 6, 1)], queue=3)
    console.send(b"typed")
    assert driver.request(into=[100]) == b"typed"


def folder_works(driver: FakeDriver) -> None:
    device = driver.device
    assert isinstance(device, Plan9)
    client = NinepClient(device, driver=driver)
    client.version()
    client.attach()
    client.create(client.walk(), b"after", os.O_RDWR | os.O_TRUNC)
    assert client.write(1, b"it works") == 8
    assert client.read(1) == b"it works"


def network_works(driver: FakeDriver) -> None:
    device = driver.device
    assert isinstance(device, VirtioNet)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(PATIENCE)
    device.connect(DatagramSocket(theirs))
    with ours:
        driver.request([NO_OFFLOAD, frame(1)], queue=1)
        assert ours.recv(100) == frame(1)
        driver.queues[0].add(into=[1526])
        driver.queues[0].kick()
        ours.send(frame(2))
        assert [content[12:] for content in answers(driver)] == [frame(2)]


def sockets_work(driver: FakeDriver) -> None:
    device = driver.device
    assert isinstance(device, Vsock)
    guest = VsockGuest(device, buffers=0, driver=driver)
    with device.listen(50) as listener:
        guest.offer(2)
        guest.send(1, 1000, 50)
        answers(driver)
        sock, _ = listener.accept(PATIENCE)
    with sock:
        sock.settimeout(PATIENCE)
        guest.send(5, 1000, 50, b"data")
        assert sock.recv(10) == b"data"


def network(folder: Path) -> VirtioNet:
    """A card whose neighbour answers nothing."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.close()
    return VirtioNet(DatagramSocket(theirs))


DEVICES: dict[str, tuple[Callable[[Path], VirtioDevice], Callable[[FakeDriver], None]]] = {
    "disk": (lambda folder: Block(folder / "disk.img", discard=False), disk_works),
    "entropy": (lambda folder: Entropy(lambda length: b"\x5a" * length), entropy_works),
    "console": (lambda folder: VirtioConsole(channels=["agent"]), console_works),
    "folder": (lambda folder: Plan9(folder), folder_works),
    "network": (network, network_works),
    "sockets": (lambda folder: Vsock(7, folder / "v.sock"), sockets_work),
}
COUNTS = ("made", "done")
"""What each processor of the guest counts."""


@pytest.mark.parametrize("ioeventfd", [False, True], ids=["exits", "ioeventfd"])
@pytest.mark.parametrize("kind", DEVICES)
def test_rings_that_move_while_they_are_used_harm_nobody(
    image: Path, tmp_path: Path, kind: str, ioeventfd: bool
) -> None:
    make, works = DEVICES[kind]
    device = make(tmp_path)
    made = program(device)
    size = image.stat().st_size
    with racing(device, made, ioeventfd=ioeventfd) as (machine, transport):
        end = time.monotonic() + SECONDS
        # And until both processors have done something: a busy host may leave them little of the time.
        while time.monotonic() < end or any(machine.memory.read_u32(made.symbols[name]) <= 10 for name in COUNTS):
            if isinstance(device, VirtioConsole):
                device.send(b"typed")
            transport.quiesce()
            assert all(queue.in_flight == 0 for queue in device.queues)
            transport.state()
            transport.resume()
            time.sleep(0.005)
        machine.stop()
        works(FakeDriver(device, mmio=transport, memory=machine.memory).start())
    assert image.stat().st_size == size
