"""The block device on real KVM: a driver in C checks what it reads, what its requests cost in exits, and what is on
the disk when the whole process is killed."""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from struct import pack

import pytest

from gnu_toolchain import compile_c
from kvmpy import End, Machine, MiB
from kvmpy.boot import ElfImage
from kvmpy.devices import DebugExit
from kvmpy.guest.program import GuestProgram
from kvmpy.virtio import Block, Feature, VirtioMmio
from kvmpy.virtio import mmio_registers as reg
from kvmpy.virtio.block.format import BlockFeature

SOURCE = str(Path(__file__).with_name("virtio_block.c"))
ADDRESS = 0xD000_0000
EVENT_IDX = 1 << Feature.EVENT_IDX
ALL = EVENT_IDX | 1 << Feature.INDIRECT_DESC | sum(1 << feature for feature in BlockFeature)
SECTORS = 2048
ROUNDS = 10


def content(first: int = 0, count: int = SECTORS) -> bytes:
    return b"".join(pack("<Q", sector) * 64 for sector in range(first, first + count))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(content())
    return path


def program(
    work: str, *, wanted: int = ALL, interrupt: bool = False, batch: int = 1, size: int = 4096, kind: int = 0,
    seed: int = 0, rounds: int = ROUNDS,
) -> GuestProgram:  # fmt: skip
    return compile_c(
        SOURCE, flags=(
            f"-DADDRESS={ADDRESS:#x}", f"-DWANTED={wanted:#x}ULL", f"-DINTERRUPT={int(interrupt)}", f"-DWORK={work}",
            f"-DBATCH={batch}", f"-DROUNDS={rounds}", f"-DBYTES={size}", f"-DKIND={kind}", f"-DSEED={seed}",
        ),
    )  # fmt: skip


def run(
    made: GuestProgram, block: Block, *, ioeventfd: bool = False, irqfd: bool = False, ring: int = 0,
    meanwhile: Callable[[VirtioMmio], object] | None = None,
) -> Counter[str]:  # fmt: skip
    """Run the guest, which checks all it can see; the exits that the requests cost, and `interrupts`.

    `meanwhile` is called in another thread."""
    with Machine(memory=16 * MiB) as machine:
        transport = machine.add(VirtioMmio(block, address=ADDRESS, irq=5, ioeventfd=ioeventfd, irqfd=irqfd))
        thread = threading.Thread(target=meanwhile, args=(transport,)) if meanwhile else None
        if thread:
            thread.start()
        machine.add(DebugExit())
        machine.load(ElfImage(made.elf, ring=ring))
        outcome = machine.run(timeout=30)
        if thread:
            thread.join()
        assert (outcome.end, (outcome.code or 0) >> 1) == (End.EXITED, 0)
        assert machine.host_errors == []
        assert block.last_host_error is None
        statistics = machine.statistics()
        return +Counter(
            notify=statistics.count("mmio", ADDRESS + reg.QUEUE_NOTIFY),
            status=statistics.count("mmio", ADDRESS + reg.INTERRUPT_STATUS),
            acknowledge=statistics.count("mmio", ADDRESS + reg.INTERRUPT_ACK),
            other=sum(statistics.exits.values()),
            interrupts=machine.memory.read_u32(made.symbols["interrupts"]),
        )


@pytest.mark.parametrize("wanted", [0, ALL], ids=["bare", "all features"])
@pytest.mark.parametrize("ioeventfd", [False, True], ids=["exits", "ioeventfd"])
def test_a_guest_reads_and_writes(image: Path, ioeventfd: bool, wanted: int) -> None:
    if not wanted:  # the program discards, so it needs the features that bring this
        wanted = 1 << BlockFeature.DISCARD | 1 << BlockFeature.WRITE_ZEROES
    run(program("CHECK", wanted=wanted), Block(image, serial="freestanding"), ioeventfd=ioeventfd)
    written = image.read_bytes()
    assert written[10 * 512 : 11 * 512] == pack("<Q", 0x1111) * 64
    assert written[20 * 512 : 22 * 512] == bytes(1024)
    assert written[42 * 512 :] == content(42, SECTORS - 42)


def test_a_guest_in_ring_3_reads_and_writes(image: Path) -> None:
    # Natively, also where KVM emulates ring 0: guest, host input thread and workers are at the rings at once.
    run(program("CHECK"), Block(image, serial="freestanding"), ioeventfd=True, ring=3)


@pytest.mark.parametrize("kind", [0, 1], ids=["reads", "writes"])
@pytest.mark.parametrize("batch", [1, 32])
def test_requests_that_are_polled_for_cost_no_exit_with_ioeventfd(image: Path, batch: int, kind: int) -> None:
    assert run(program("BATCHES", batch=batch, kind=kind), Block(image), ioeventfd=True) == {}


@pytest.mark.parametrize("kind", [0, 1], ids=["reads", "writes"])
@pytest.mark.parametrize("batch", [1, 32])
def test_without_it_they_cost_one(image: Path, batch: int, kind: int) -> None:
    exits = run(program("BATCHES", batch=batch, kind=kind), Block(image))
    # Fewer when a worker answers so late that the device still looks at the queue: then it need not be notified.
    assert set(exits) == {"notify"}
    assert exits["notify"] <= ROUNDS


@pytest.mark.parametrize("irqfd", [False, True], ids=["line", "irqfd"])
@pytest.mark.parametrize("kind", [0, 1], ids=["reads", "writes"])
@pytest.mark.parametrize("batch", [1, 32])
def test_a_batch_that_interrupts_costs_two_exits(image: Path, batch: int, kind: int, irqfd: bool) -> None:
    made = program("BATCHES", batch=batch, kind=kind, interrupt=True)
    assert run(made, Block(image), ioeventfd=True, irqfd=irqfd) == {
        "status": ROUNDS, "acknowledge": ROUNDS, "interrupts": ROUNDS,
    }  # fmt: skip


@pytest.mark.parametrize("kind", [0, 1], ids=["reads", "writes"])
def test_a_request_that_interrupts_costs_three_without_ioeventfd(image: Path, kind: int) -> None:
    assert run(program("BATCHES", kind=kind, interrupt=True), Block(image)) == {
        "notify": ROUNDS, "status": ROUNDS, "acknowledge": ROUNDS, "interrupts": ROUNDS,
    }  # fmt: skip


def test_a_batch_of_reads_interrupts_once_even_without_the_event_index(image: Path) -> None:
    image.read_bytes()  # into the page cache
    exits = run(program("BATCHES", batch=32, interrupt=True, wanted=ALL & ~EVENT_IDX), Block(image), ioeventfd=True)
    assert exits["status"] <= ROUNDS


@pytest.mark.parametrize("kind", [0, 1], ids=["reads", "writes"])
@pytest.mark.parametrize("ioeventfd", [False, True], ids=["exits", "ioeventfd"])
def test_a_disk_that_is_stopped_and_goes_on_loses_nothing(image: Path, ioeventfd: bool, kind: int) -> None:
    stops: list[int] = []

    def stop_and_go(transport: VirtioMmio) -> None:
        while len(set(stops)) < 10 and len(stops) < 1000:
            transport.quiesce()
            assert [queue.in_flight for queue in transport.device.queues] == [0]
            stops.append(transport.state()["device"]["queues"][0]["used"])
            transport.resume()
            time.sleep(0.001)

    made = program("BATCHES", kind=kind, batch=32, rounds=300)
    for _ in range(10):  # a guest may be done before anybody stops its disk
        stops.clear()
        run(made, Block(image), ioeventfd=ioeventfd, ring=3, meanwhile=stop_and_go)
        if len(set(stops)) > 2:  # it was stopped in the midst
            return
    pytest.fail("the guest was always quicker than who stopped its disk")


# --- what is on the disk --------------------------------------------------------------------------------------------


class _Cachestat(ctypes.Structure):
    """struct cachestat of <linux/mman.h>: pages of a file in the page cache."""

    _fields_ = (
        ("cached", ctypes.c_uint64), ("dirty", ctypes.c_uint64), ("writeback", ctypes.c_uint64),
        ("evicted", ctypes.c_uint64), ("recently_evicted", ctypes.c_uint64),
    )  # fmt: skip


def pages_not_on_the_disk(path: Path) -> int | None:
    """How many pages of a file wait for being written (cachestat(2), Linux 6.5); None where the kernel cannot say."""
    whole, answer = (ctypes.c_uint64 * 2)(0, 0), _Cachestat()
    with path.open("rb") as file:
        if ctypes.CDLL(None).syscall(451, file.fileno(), ctypes.byref(whole), ctypes.byref(answer), 0):
            return None
    return int(answer.dirty + answer.writeback)


CHILD = """
import os, sys
sys.path.insert(0, sys.argv[3])
from kvmpy import Machine, MiB
from kvmpy.boot import ElfImage
from kvmpy.devices import DebugExit
from kvmpy.virtio import Block, VirtioMmio
with Machine(memory=16 * MiB) as machine:
    machine.add(VirtioMmio(Block(sys.argv[1]), address=0xD0000000, irq=5))
    machine.add(DebugExit())
    machine.map_ports(0xE0, 1, write=lambda offset, size, value: os.write(1, b"flushed"))
    machine.load(ElfImage(sys.argv[2]))
    machine.run(timeout=30)
"""


def kill_after_a_flush(image: Path, made: GuestProgram, seed: int) -> None:
    """A machine in a process of its own, killed as soon as its guest knows that what it wrote is on the disk."""
    root = str(Path(__file__).parents[2])
    with subprocess.Popen([sys.executable, "-c", CHILD, image, made.elf, root], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        said = process.stdout.read(7)
        process.kill()
    assert said == b"flushed"
    assert pages_not_on_the_disk(image) in (0, None)
    expected = b"".join(
        pack("<Q", seed + sector if sector & 1 else sector) * 64 for sector in range(64)
    )  # fmt: skip
    assert image.read_bytes() == expected + content(64, SECTORS - 64)


def test_what_was_flushed_is_on_the_disk_when_the_process_is_killed(image: Path) -> None:
    for seed in (0x1000, 0x2000):
        kill_after_a_flush(image, program("FLUSHED", seed=seed), seed)


@pytest.mark.slow
def test_it_is_on_the_disk_two_hundred_times(image: Path) -> None:
    seeds = [random.getrandbits(40) for _ in range(8)]
    made = [program("FLUSHED", seed=seed) for seed in seeds]
    for number in range(200):
        kill_after_a_flush(image, made[number % 8], seeds[number % 8])


def test_pages_that_wait_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "dirty"
    path.write_bytes(os.urandom(1 << 16))
    if pages_not_on_the_disk(path) is None:
        pytest.skip("this kernel has no cachestat(2)")
    assert pages_not_on_the_disk(path)
