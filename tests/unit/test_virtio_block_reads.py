"""Reads of a disk that the page cache has: several at once, whatever their shape, up to the first that must wait."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from struct import pack

import pytest

from kvmpy.memory import MemoryRegion
from kvmpy.virtio import Block, DeviceStatus, Feature
from kvmpy.virtio.block import cached_reads
from kvmpy.virtio.block.format import SECTOR, BlockType
from kvmpy.virtio.descriptors import read_three_buffers
from virtio_devices import Keeper
from virtio_driver import NEXT, RAM, WRITE, FakeDriver, FakeQueue, buffer_memory

SECTORS = 256
SHARED_MEMORY = Path("/dev/shm")
OK, IOERR = b"\0", b"\1"


def content(sector: int, count: int = 1) -> bytes:
    return b"".join(pack("<Q", number) * (SECTOR // 8) for number in range(sector, sector + count))


def header(sector: int, kind: int = BlockType.IN) -> bytes:
    return pack("<IIQ", kind, 0, sector)


@pytest.fixture
def block(tmp_path: Path) -> Iterator[Block]:
    path = tmp_path / "disk.img"
    path.write_bytes(content(0, SECTORS))
    device = Block(path)
    if not device.file.read_cached([memoryview(bytearray(SECTOR))], 0):
        pytest.skip("the file system of the temporary folder cannot read from the page cache only")
    yield device
    device.close()


@pytest.fixture
def ring(block: Block) -> FakeQueue:
    return FakeDriver(block).start(size=128).queues[0]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Sector and number of sectors of each preadv."""
    made: list[tuple[int, int]] = []
    real = os.preadv

    def preadv(fd: int, views: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        got = real(fd, views, offset, flags)
        made.append((offset // SECTOR, got // SECTOR))
        return got

    monkeypatch.setattr(os, "preadv", preadv)
    return made


def answers(ring: FakeQueue, count: int) -> list[bytes]:
    done: list[tuple[int, int, bytes]] = []
    deadline = time.monotonic() + 10
    while len(done) < count:
        done += ring.used()
        assert time.monotonic() < deadline, f"{len(done)} of {count} requests were answered"
        time.sleep(0.0005)
    return [answer for _, _, answer in done]


@pytest.mark.parametrize("indirect", [False, True])
def test_adjacent_reads_are_done_together(ring: FakeQueue, calls: list[tuple[int, int]], indirect: bool) -> None:
    for sector in range(10, 26, 2):
        ring.add([header(sector)], [2 * SECTOR, 1], indirect=indirect)
    ring.kick()
    assert answers(ring, 8) == [content(sector, 2) + OK for sector in range(10, 26, 2)]
    assert calls == [(10, 16)]


def test_not_too_many_are_done_together(
    ring: FakeQueue, calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached_reads, "TOGETHER", 6 * SECTOR)
    for sector in range(10, 26, 2):
        ring.add([header(sector)], [2 * SECTOR, 1])
    ring.kick()
    assert answers(ring, 8) == [content(sector, 2) + OK for sector in range(10, 26, 2)]
    assert calls == [(10, 6), (16, 6), (22, 4)]


def test_scattered_reads_are_done_one_by_one(ring: FakeQueue, calls: list[tuple[int, int]]) -> None:
    sectors = (7, 8, 200, 3, 4, 5, 0, 255)
    for sector in sectors:
        ring.add([header(sector)], [SECTOR, 1])
    ring.kick()
    assert answers(ring, 8) == [content(sector) + OK for sector in sectors]
    assert calls == [(7, 2), (200, 1), (3, 3), (0, 1), (255, 1)]


def test_descriptors_may_be_anywhere_in_the_table(ring: FakeQueue) -> None:
    # The guest has used its descriptors in another order: those of a chain are not in a row.
    place = ring.driver.place
    data, status = place(bytes(SECTOR)), place(b"\xff")
    ring.desc(127, place(header(9)), 16, NEXT, 5)
    ring.desc(5, data, SECTOR, NEXT | WRITE, 2)
    ring.desc(2, status, 1, WRITE)
    ring.chains[127] = [(data, SECTOR), (status, 1)]
    ring.make_available(127)
    ring.kick()
    assert answers(ring, 1) == [content(9) + OK]


def test_other_requests_are_done_in_between(ring: FakeQueue) -> None:
    ring.add([header(1)], [SECTOR, 1])
    ring.add([header(2)], [100, SECTOR - 100, 1])  # cut up in another way
    ring.add([header(SECTORS)], [SECTOR, 1])  # beyond the end
    ring.add([header(0, BlockType.GET_ID)], [20, 1])
    ring.add([header(3)], [SECTOR - 1, 1])  # not whole sectors
    ring.add([header(4)], [SECTOR, 1])
    ring.kick()
    nothing = bytes(SECTOR)
    assert answers(ring, 6) == [
        content(1) + OK, content(2) + OK, nothing + IOERR, bytes(20) + OK, nothing[1:] + IOERR, content(4) + OK,
    ]  # fmt: skip
    assert ring.driver.device.counters == {"bad_request": 2}


def test_what_the_page_cache_lacks_is_left_to_workers(ring: FakeQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    by: list[tuple[int, bool]] = []
    real = os.preadv

    def preadv(fd: int, views: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        """Sectors 14 to 15 are not in memory."""
        by_worker = threading.current_thread() is not threading.main_thread()
        if not by_worker:
            cached = 14 * SECTOR - offset if offset < 14 * SECTOR else 0 if offset < 16 * SECTOR else SECTORS * SECTOR
            if not cached:
                raise BlockingIOError
            if cached < sum(map(len, views)):  # a short read ends within one of the views
                assert real(fd, views, offset) > cached
                return cached
        by.append((offset // SECTOR, by_worker))
        return real(fd, views, offset, flags)

    monkeypatch.setattr(os, "preadv", preadv)
    for sector in range(8, 24):
        ring.add([header(sector)], [SECTOR, 1])
    ring.kick()
    assert sorted(answers(ring, 16)) == sorted(content(sector) + OK for sector in range(8, 24))
    assert {sector for sector, by_worker in by if by_worker} == {14, 15}


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="needs /dev/shm, which is a tmpfs")
def test_an_image_in_memory_needs_no_workers() -> None:
    with tempfile.NamedTemporaryFile(dir=SHARED_MEMORY) as image:
        image.write(content(0, SECTORS))
        image.flush()
        block = Block(image.name)
        try:
            ring = FakeDriver(block).start().queues[0]
            ring.add([header(3)], [SECTOR, 1])
            ring.kick()
            assert ring.used_idx == 1  # done before the notification was over
            assert answers(ring, 1) == [content(3) + OK]
        finally:
            block.close()


def test_a_long_batch_lets_others_have_their_turn(
    block: Block, ring: FakeQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached_reads, "AT_ONCE", 8 * SECTOR)
    for sector in range(0, 24, 2):
        ring.add([header(sector)], [2 * SECTOR, 1])
    ring.kick()
    assert ring.used_idx == 4
    for used in (8, 12):
        (timer,) = ring.driver.board.timers
        assert timer.deadline is not None
        timer.call()
        assert ring.used_idx == used
    assert answers(ring, 12) == [content(sector, 2) + OK for sector in range(0, 24, 2)]
    assert not [thread for thread in threading.enumerate() if block.name in thread.name]  # nobody had to wait


def test_a_read_longer_than_that_is_a_workers(ring: FakeQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached_reads, "AT_ONCE", 8 * SECTOR)
    for sector, count in ((0, 1), (1, 9), (10, 1)):
        ring.add([header(sector)], [count * SECTOR, 1])
    ring.kick()
    assert sorted(answers(ring, 3)) == sorted([content(0) + OK, content(1, 9) + OK, content(10) + OK])


def test_rom_is_not_read_into(block: Block) -> None:
    memory = buffer_memory()
    memory.add(MemoryRegion.anonymous(RAM, 0x1000, read_only=True))
    driver = FakeDriver(block, memory=memory).start()
    ring = driver.queues[0]
    ring.desc(0, driver.place(header(1)), 16, NEXT, 1)
    ring.desc(1, RAM, SECTOR, NEXT | WRITE, 2)
    ring.desc(2, driver.place(b"\xff"), 1, WRITE)
    ring.make_available(0)
    ring.kick()
    assert driver.status & DeviceStatus.DEVICE_NEEDS_RESET
    assert memory.read(RAM, SECTOR) == bytes(SECTOR)


def test_a_queue_that_keeps_its_order_is_not_looked_ahead_in() -> None:
    device = Keeper()
    device.features |= {Feature.IN_ORDER}
    ring = FakeDriver(device).start().queues[0]
    ring.add([bytes(16)], [SECTOR, 1])
    assert device.queues[0].peek(read_three_buffers) == []
    ring = FakeDriver(Keeper()).start().queues[0]
    ring.add([bytes(16)], [SECTOR, 1])
    assert len(ring.driver.device.queues[0].peek(read_three_buffers)) == 1
