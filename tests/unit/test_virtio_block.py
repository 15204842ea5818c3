"""The block device, driven by a driver in Python on plain memory: requests, cache modes, faults of the host, state."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from struct import pack
from typing import Any

import pytest

from kvmpy.errors import UsageError
from kvmpy.virtio import Block, DeviceStatus, Feature
from kvmpy.virtio.block.format import BlockConfig, BlockFeature, BlockType
from virtio_driver import FakeDriver, FakeQueue

SECTOR = 512
SECTORS = 256
OK, IOERR, UNSUPP = 0, 1, 2


def content(sector: int, count: int = 1) -> bytes:
    """What the image of the tests has there: each sector its own."""
    return b"".join(pack("<Q", number) * (SECTOR // 8) for number in range(sector, sector + count))


class Disk:
    """A Block, a driver that has started it, and requests that wait for their answer."""

    def __init__(self, block: Block, *, without: Sequence[int] = (), legacy: bool = False, start: bool = True) -> None:
        self.block = block
        self.driver = FakeDriver(block, legacy=legacy)
        if start:
            self.driver.start(without=without)

    def add(self, kind: int, sector: int = 0, data: bytes = b"", room: int = 0) -> int:
        """Make a request available; answers its head."""
        out = [pack("<IIQ", kind, 0, sector), *([data] if data else [])]
        return self.driver.queues[0].add(out, [*([room] if room else []), 1])

    def wait(self, count: int) -> list[bytes]:
        """What the next `count` requests answered, in the order in which they ended."""
        done: list[tuple[int, int, bytes]] = []
        deadline = time.monotonic() + 10
        while len(done) < count:
            done += self.driver.queues[0].used()
            assert time.monotonic() < deadline, f"{len(done)} of {count} requests were answered"
            time.sleep(0.0005)
        return [answer for _, _, answer in done]

    def request(self, kind: int, sector: int = 0, data: bytes = b"", room: int = 0) -> tuple[int, bytes]:
        """Status and data of one request."""
        self.add(kind, sector, data, room)
        self.driver.queues[0].kick()
        (answer,) = self.wait(1)
        return answer[-1], answer[:-1]

    def read(self, sector: int, count: int = 1) -> tuple[int, bytes]:
        return self.request(BlockType.IN, sector, room=count * SECTOR)

    def write(self, sector: int, data: bytes) -> int:
        return self.request(BlockType.OUT, sector, data)[0]

    def ranges(self, kind: int, *ranges: tuple[int, int, int]) -> int:
        return self.request(kind, data=b"".join(pack("<QII", *one) for one in ranges))[0]

    def flush(self) -> int:
        return self.request(BlockType.FLUSH)[0]

    def config(self, name: str) -> int:
        field = getattr(BlockConfig, name)
        return self.driver.config(field.offset, field.size)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(content(0, SECTORS))
    return path


@pytest.fixture
def disks(image: Path) -> Iterator[Callable[..., Disk]]:
    """Makes disks of the image, and closes them."""
    made: list[Block] = []

    def make(
        source: Any = image, *, without: Sequence[int] = (), legacy: bool = False, start: bool = True, **options: Any
    ) -> Disk:
        made.append(Block(source, **options))
        return Disk(made[-1], without=without, legacy=legacy, start=start)

    yield make
    for block in made:
        block.close()


# --- requests -------------------------------------------------------------------------------------------------------


def test_reads_sectors(disks: Callable[..., Disk]) -> None:
    disk = disks()
    assert disk.read(0) == (OK, content(0))
    assert disk.read(7, 16) == (OK, content(7, 16))
    assert disk.read(SECTORS - 1) == (OK, content(SECTORS - 1))
    assert disk.block.counters == {}


def test_writes_sectors(disks: Callable[..., Disk], image: Path) -> None:
    disk = disks()
    assert disk.write(3, b"\xa5" * 1024) == OK
    assert disk.read(2, 4) == (OK, content(2) + b"\xa5" * 1024 + content(5))
    assert image.read_bytes() == content(0, 3) + b"\xa5" * 1024 + content(5, SECTORS - 5)


def test_a_request_may_be_cut_up_anyhow(disks: Callable[..., Disk], image: Path) -> None:
    # 2.7.4: the device must not make assumptions about the arrangement of descriptors.
    disk = disks()
    ring = disk.driver.queues[0]
    header = pack("<IIQ", BlockType.IN, 0, 5)
    ring.add([header[:3], header[3:9], header[9:]], [1, 500, 523, 1], indirect=True)
    ring.kick()
    assert disk.wait(1) == [content(5, 2) + b"\0"]
    data = b"\x77" * 1024
    ring.add([pack("<IIQ", BlockType.OUT, 0, 9) + data[:100], data[100:101], data[101:]], [1])
    ring.kick()
    assert disk.wait(1) == [b"\0"]
    assert image.read_bytes()[9 * SECTOR : 11 * SECTOR] == data


def test_tells_how_many_bytes_it_wrote(disks: Callable[..., Disk]) -> None:
    disk = disks()
    ring = disk.driver.queues[0]
    for kind, data, room, written in ((BlockType.IN, b"", 1024, 1025), (BlockType.OUT, bytes(512), 0, 1)):
        disk.add(kind, 0, data, room)
        ring.kick()
        while not (done := ring.used()):
            time.sleep(0.001)
        assert done[0][1] == written


def test_nothing_beyond_the_capacity_is_read_or_written(disks: Callable[..., Disk], image: Path) -> None:
    disk = disks()
    for sector in (SECTORS, SECTORS - 1, 1 << 55, (1 << 64) - 1):
        assert disk.read(sector, 2)[0] == IOERR
        assert disk.write(sector, bytes(1024)) == IOERR
    assert disk.block.counters["bad_request"] == 8
    assert image.read_bytes() == content(0, SECTORS)


def test_what_is_not_whole_sectors_is_an_error(disks: Callable[..., Disk], image: Path) -> None:
    disk = disks()
    assert disk.request(BlockType.IN, 0, room=511)[0] == IOERR
    assert disk.request(BlockType.OUT, 0, data=bytes(100))[0] == IOERR
    assert image.read_bytes() == content(0, SECTORS)


def test_malformed_requests_are_counted(disks: Callable[..., Disk]) -> None:
    disk = disks()
    ring = disk.driver.queues[0]
    ring.add([b"short"], [1])  # no whole header
    ring.add([pack("<IIQ", BlockType.IN, 0, 0)], [])  # no room for a status
    ring.kick()
    assert disk.wait(2) == [b"\1", b""]
    assert disk.block.counters == {"bad_request": 2}
    assert disk.read(1) == (OK, content(1))


def test_unknown_requests_are_unsupported(disks: Callable[..., Disk]) -> None:
    disk = disks()
    for kind in (2, 3, 9, BlockType.GET_LIFETIME, BlockType.SECURE_ERASE, 15, 16, 0x8000_0000, 0xFFFF_FFFF):
        assert disk.request(kind, 0, room=512)[0] == UNSUPP


@pytest.mark.parametrize("serial", ["", "disk-1", "twenty characters ok"])
def test_tells_its_serial_number(disks: Callable[..., Disk], serial: str) -> None:
    assert disks(serial=serial).request(BlockType.GET_ID, room=20) == (OK, serial.encode().ljust(20, b"\0"))


def test_several_requests_are_under_way_at_once(disks: Callable[..., Disk], monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(4, timeout=10)
    monkeypatch.setattr(os, "fdatasync", lambda fd: together.wait())  # passes only if four are in it
    disk = disks(workers=4)
    for _ in range(4):
        disk.add(BlockType.FLUSH)
    disk.driver.queues[0].kick()
    assert disk.wait(4) == [b"\0"] * 4


def test_a_slow_disk_holds_nobody_up(disks: Callable[..., Disk], monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(os, "fdatasync", lambda fd: released.wait(10))
    disk = disks()
    disk.add(BlockType.FLUSH)
    disk.driver.queues[0].kick()  # comes back
    assert disk.read(4) == (OK, content(4))
    released.set()
    assert disk.wait(1) == [b"\0"]


def test_what_is_not_cached_is_read_by_a_worker(disks: Callable[..., Disk], monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    real = os.preadv

    def preadv(fd: int, views: Any, offset: int, flags: int = 0) -> int:
        threads.append(threading.current_thread())
        if threads[-1] is threading.main_thread():
            raise BlockingIOError
        return real(fd, views, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    assert disks().read(1, 8) == (OK, content(1, 8))
    assert threads[0] is threading.current_thread()
    assert threads[-1] is not threading.current_thread()


@pytest.mark.parametrize("nowait", [True, False])
def test_a_short_transfer_goes_on(disks: Callable[..., Disk], monkeypatch: pytest.MonkeyPatch, nowait: bool) -> None:
    # read(2): fewer bytes than asked for are no error.
    preadv, pwritev = os.preadv, os.pwritev

    def some(views: Sequence[memoryview]) -> list[memoryview]:
        return [views[0][:700]]

    def read_some(fd: int, views: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        if flags and not nowait:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return preadv(fd, some(views), offset)

    monkeypatch.setattr(os, "preadv", read_some)
    monkeypatch.setattr(os, "pwritev", lambda fd, views, offset, flags=0: pwritev(fd, some(views), offset, flags))
    disk = disks()
    ring = disk.driver.queues[0]
    assert disk.read(1, 8) == (OK, content(1, 8))
    ring.add([pack("<IIQ", BlockType.OUT, 0, 2), b"\x11" * 1000, b"\x22" * 1048], [1])
    ring.kick()
    assert disk.wait(1) == [b"\0"]
    assert disk.read(1, 6) == (OK, content(1) + b"\x11" * 1000 + b"\x22" * 1048 + content(6))


def test_a_batch_of_cached_reads_interrupts_once(disks: Callable[..., Disk]) -> None:
    disk = disks(without=[Feature.EVENT_IDX])
    disk.read(0, 64)
    disk.driver.acknowledge()
    edges = disk.driver.board.lines[5].edges
    for sector in range(4):
        disk.add(BlockType.IN, sector, room=SECTOR)
    disk.driver.queues[0].kick()
    assert disk.wait(4) == [content(sector) + b"\0" for sector in range(4)]
    assert disk.driver.board.lines[5].edges == edges + 1


def test_several_queues(disks: Callable[..., Disk]) -> None:
    disk = disks(queues=3)
    assert disk.config("num_queues") == 3
    for index, ring in enumerate(disk.driver.queues):
        ring.add([pack("<IIQ", BlockType.OUT, 0, index), bytes([index]) * SECTOR], [1])
        ring.add([pack("<IIQ", BlockType.IN, 0, 10 + index)], [SECTOR, 1])
        ring.kick()
    for index, ring in enumerate(disk.driver.queues):
        while ring.used_idx < 2:
            time.sleep(0.001)
        assert sorted(answer for _, _, answer in ring.used()) == sorted([b"\0", content(10 + index) + b"\0"])
    assert disk.read(0, 3)[1] == b"".join(bytes([index]) * SECTOR for index in range(3))


# --- discard and write zeroes ---------------------------------------------------------------------------------------


def space(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_discard_gives_space_back(disks: Callable[..., Disk], image: Path) -> None:
    os.truncate(image, 1 << 20)
    image.write_bytes(os.urandom(1 << 20))
    os.sync()
    disk = disks()
    before = space(image)
    assert disk.ranges(BlockType.DISCARD, (0, 128, 0), (256, 128, 0)) == OK
    assert space(image) <= before - 0x10000  # where holes are made in larger units, at least some
    assert disk.read(0, 128) == (OK, bytes(128 * SECTOR))
    assert image.stat().st_size == 1 << 20


@pytest.mark.parametrize("unmap", [0, 1])
@pytest.mark.parametrize("known", [True, False], ids=["fallocate", "no fallocate"])
def test_zeroes_are_written(
    disks: Callable[..., Disk], image: Path, monkeypatch: pytest.MonkeyPatch, unmap: int, known: bool
) -> None:
    disk = disks()
    if not known:
        monkeypatch.setattr(disk.block.file, "_allocate", lambda mode, offset, length: False)
    assert disk.ranges(BlockType.WRITE_ZEROES, (1, 3, unmap), (100, 1, unmap), (7, 0, unmap)) == OK
    expected = bytearray(content(0, SECTORS))
    expected[SECTOR : 4 * SECTOR] = bytes(3 * SECTOR)
    expected[100 * SECTOR : 101 * SECTOR] = bytes(SECTOR)
    assert image.read_bytes() == expected


def test_zeroes_keep_their_space_unless_unmap_is_said(disks: Callable[..., Disk], image: Path) -> None:
    image.write_bytes(os.urandom(1 << 20))
    os.sync()
    disk = disks()
    before = space(image)
    assert disk.ranges(BlockType.WRITE_ZEROES, (0, 1024, 0)) == OK
    assert space(image) >= before
    assert disk.ranges(BlockType.WRITE_ZEROES, (0, 1024, 1)) == OK
    assert space(image) < before


def test_ranges_are_checked_before_anything_is_done(disks: Callable[..., Disk], image: Path) -> None:
    disk = disks()
    for kind in (BlockType.DISCARD, BlockType.WRITE_ZEROES):
        assert disk.ranges(kind, (0, 1, 0), (0, 1, 2)) == UNSUPP  # unknown flags
        assert disk.ranges(kind, (0, 1, 0), (SECTORS, 1, 0)) == IOERR
        assert disk.ranges(kind, (0, 1, 0), ((1 << 64) - 1, 1, 0)) == IOERR
        assert disk.ranges(kind, (0, 1, 0), (0, 0xFFFF_FFFF, 0)) == IOERR
        assert disk.ranges(kind, *[(0, 1, 0)] * 65) == IOERR
        assert disk.request(kind, data=bytes(15))[0] == IOERR
        assert disk.request(kind)[0] == IOERR
    assert disk.ranges(BlockType.DISCARD, (0, 1, 0), (0, 1, 1)) == UNSUPP  # unmap is not for discards
    assert image.read_bytes() == content(0, SECTORS)


def test_without_the_feature_they_are_unsupported(disks: Callable[..., Disk], image: Path) -> None:
    disk = disks(discard=False, without=[BlockFeature.WRITE_ZEROES])
    assert disk.ranges(BlockType.DISCARD, (0, 1, 0)) == UNSUPP
    assert disk.ranges(BlockType.WRITE_ZEROES, (0, 1, 0)) == UNSUPP
    assert image.read_bytes() == content(0, SECTORS)


def test_without_discard_no_space_is_given_back(disks: Callable[..., Disk], image: Path) -> None:
    os.sync()
    disk = disks(discard=False)
    assert disk.config("write_zeroes_may_unmap") == 0
    before = space(image)
    assert disk.ranges(BlockType.WRITE_ZEROES, (0, SECTORS, 1)) == OK
    assert (space(image), image.read_bytes()) == (before, bytes(SECTORS * SECTOR))


# --- what is on the disk, and when ----------------------------------------------------------------------------------


class Syncs:
    """Counts what brings data to the disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.flushes = self.through = self.cached = 0
        fdatasync, pwritev = os.fdatasync, os.pwritev

        def flush(fd: int) -> None:
            self.flushes += 1
            fdatasync(fd)

        def write(fd: int, views: Any, offset: int, flags: int = 0) -> int:
            self.through += bool(flags & os.RWF_DSYNC)
            self.cached += not flags & os.RWF_DSYNC
            return pwritev(fd, views, offset, flags)

        monkeypatch.setattr(os, "fdatasync", flush)
        monkeypatch.setattr(os, "pwritev", write)

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.cached, self.through, self.flushes


def test_writes_are_cached_until_a_flush(disks: Callable[..., Disk], monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = Syncs(monkeypatch)
    disk = disks()
    assert disk.config("writeback") == 1
    disk.write(0, bytes(SECTOR))
    assert syncs.counts == (1, 0, 0)
    assert disk.flush() == OK
    assert syncs.counts == (1, 0, 1)
    assert disk.request(BlockType.FLUSH_OUT)[0] == OK
    assert syncs.counts == (1, 0, 2)


def test_a_driver_that_knows_no_flush_has_each_write_on_the_disk(
    disks: Callable[..., Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs = Syncs(monkeypatch)
    disk = disks(without=[BlockFeature.FLUSH, BlockFeature.CONFIG_WCE])
    disk.write(0, bytes(SECTOR))
    assert syncs.counts == (0, 1, 0)
    disk.ranges(BlockType.WRITE_ZEROES, (1, 1, 0))
    disk.ranges(BlockType.DISCARD, (1, 1, 0))
    assert syncs.counts == (0, 1, 2)


def test_wce_without_flush_begins_as_writethrough(disks: Callable[..., Disk], monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = Syncs(monkeypatch)
    disk = disks(without=[BlockFeature.FLUSH])
    assert disk.config("writeback") == 0
    disk.write(0, bytes(SECTOR))
    assert syncs.counts == (0, 1, 0)


def test_the_driver_switches_the_cache(disks: Callable[..., Disk], monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = Syncs(monkeypatch)
    disk = disks()
    at = 0x100 + BlockConfig.writeback.offset
    disk.write(0, bytes(SECTOR))
    disk.driver.write(at, 0, 1)
    assert disk.config("writeback") == 0
    disk.write(1, bytes(SECTOR))
    # What was written before the switch is brought to the disk as well.
    assert syncs.counts == (1, 1, 1)
    disk.driver.write(at, 1, 1)
    disk.write(2, bytes(SECTOR))
    assert syncs.counts == (2, 1, 1)
    disk.driver.write(at, 0, 1)
    disk.driver.start()
    assert disk.config("writeback") == 1


def test_a_driver_that_switches_the_cache_to_and_fro_makes_no_heap_of_flushes(
    disks: Callable[..., Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    flushes, go_on = 0, threading.Event()

    def slow(fd: int) -> None:
        nonlocal flushes
        flushes += 1
        assert go_on.wait(20)

    monkeypatch.setattr(os, "fdatasync", slow)
    disk = disks(workers=1)
    for _ in range(1000):
        for value in (0, 1):
            disk.driver.write(0x100 + BlockConfig.writeback.offset, value, 1)
    assert len(disk.block._workers._waiting) <= 1
    go_on.set()
    assert disk.flush() == OK
    assert 2 <= flushes <= 3  # one that was under way, one for all that came after it had begun, and the last


def test_nothing_else_of_the_configuration_can_be_written(disks: Callable[..., Disk]) -> None:
    disk = disks()
    before = bytes(disk.block.config)
    at = BlockConfig.writeback.offset
    for offset, size in ((0, 4), (at, 2), (at, 4), (at - 1, 4), (at + 1, 1), (24, 1), (0xF0, 4)):
        disk.driver.write(0x100 + offset, 0, size)
    assert bytes(disk.block.config) == before
    assert disk.block.counters == {"config_write": 7}
    disk.driver.start(without=[BlockFeature.CONFIG_WCE])
    disk.driver.write(0x100 + at, 0, 1)
    assert disk.config("writeback") == 1


def legacy_queue(driver: FakeDriver) -> FakeQueue:
    """Queue 0 of a legacy device: the driver says in which page it begins (section 4.2.4)."""
    queue = FakeQueue(driver, 0, 16, 0x1000)
    driver.write(0x30, 0)
    driver.write(0x38, 16)
    driver.write(0x3C, 4096)
    driver.write(0x40, 1)
    queue.used_ring = 0x2000
    driver.queues.append(queue)
    return queue


def test_a_legacy_driver_is_served(disks: Callable[..., Disk], monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = Syncs(monkeypatch)
    disk = disks(legacy=True, start=False)
    driver = disk.driver
    driver.write(0x70, 0)
    driver.write(0x70, 3)
    driver.write(0x20, driver.read(0x10) & ~(1 << BlockFeature.FLUSH | 1 << BlockFeature.CONFIG_WCE))
    driver.write(0x28, 4096)
    queue = legacy_queue(driver)
    driver.write(0x70, 7)
    assert disk.config("writeback") == 0
    queue.add([pack("<IIQ", BlockType.OUT, 0, 3), b"\x42" * SECTOR], [1])
    queue.kick()
    assert disk.wait(1) == [b"\0"]
    assert syncs.counts == (0, 1, 0)
    assert disk.read(3) == (OK, b"\x42" * SECTOR)


# --- what the driver is told ----------------------------------------------------------------------------------------


def test_describes_the_disk(disks: Callable[..., Disk]) -> None:
    disk = disks()
    described = {name: disk.config(name) for name, *_ in BlockConfig._fields_ if name != "unused1"}
    assert described == {
        "capacity": SECTORS, "size_max": 0, "seg_max": 254, "cylinders": 0, "heads": 0, "sectors": 0, "blk_size": 512,
        "physical_block_exp": 3, "alignment_offset": 0, "min_io_size": 8, "opt_io_size": 0, "writeback": 1,
        "unused0": 0, "num_queues": 0, "max_discard_sectors": 1 << 22, "max_discard_seg": 64,
        "discard_sector_alignment": disk.block.file.block_size // 512, "max_write_zeroes_sectors": 1 << 22,
        "max_write_zeroes_seg": 64, "write_zeroes_may_unmap": 1, "max_secure_erase_sectors": 0,
        "max_secure_erase_seg": 0, "secure_erase_sector_alignment": 0,
    }  # fmt: skip
    # The offsets of virtio 1.2, section 5.2.4; Linux's <linux/virtio_blk.h> has the same.
    assert (BlockConfig.blk_size.offset, BlockConfig.writeback.offset, BlockConfig.num_queues.offset) == (20, 32, 34)
    assert (BlockConfig.max_write_zeroes_sectors.offset, BlockConfig.secure_erase_sector_alignment.offset) == (48, 68)


def test_larger_blocks(disks: Callable[..., Disk]) -> None:
    disk = disks(block_size=4096)
    assert (disk.config("blk_size"), disk.config("physical_block_exp"), disk.config("min_io_size")) == (4096, 0, 1)
    assert disk.config("capacity") == SECTORS  # still in sectors of 512 bytes


def test_a_part_of_a_sector_at_the_end_is_a_sector(disks: Callable[..., Disk], image: Path) -> None:
    image.write_bytes(content(0, 2) + b"end")
    disk = disks()
    assert disk.config("capacity") == 3
    assert disk.read(1, 2) == (OK, content(1) + b"end".ljust(SECTOR, b"\0"))
    assert disk.write(2, b"\x33" * SECTOR) == OK
    assert image.read_bytes() == content(0, 2) + b"\x33" * SECTOR


def test_a_sparse_image_takes_only_the_space_that_is_written(disks: Callable[..., Disk], tmp_path: Path) -> None:
    path = tmp_path / "sparse.img"
    path.touch()
    os.truncate(path, 1 << 40)
    disk = disks(path)
    last = (1 << 40) // SECTOR - 1
    assert disk.write(last, b"\x01" * SECTOR) == OK
    assert disk.read(last - 1, 2) == (OK, bytes(SECTOR) + b"\x01" * SECTOR)
    assert disk.flush() == OK
    assert space(path) < 1 << 20


def test_a_read_only_disk_is_not_written(disks: Callable[..., Disk], image: Path) -> None:
    image.chmod(0o444)
    disk = disks(read_only=True)
    assert disk.driver.offered >> BlockFeature.RO & 1
    assert disk.write(0, bytes(SECTOR)) == IOERR
    assert disk.ranges(BlockType.DISCARD, (0, 1, 0)) == UNSUPP
    assert disk.ranges(BlockType.WRITE_ZEROES, (0, 1, 0)) == UNSUPP
    assert disk.flush() == OK
    assert disk.read(0) == (OK, content(0))
    assert image.read_bytes() == content(0, SECTORS)


def test_an_open_file_will_do(disks: Callable[..., Disk], image: Path) -> None:
    with image.open("r+b") as file:
        disk = disks(file)
    assert disk.write(0, bytes(SECTOR)) == OK  # the device has a descriptor of its own
    assert image.read_bytes()[: 2 * SECTOR] == bytes(SECTOR) + content(1)


def test_a_disk_that_grows_tells_the_driver(disks: Callable[..., Disk], image: Path) -> None:
    disk = disks()
    generation = disk.driver.read(0xFC)
    os.truncate(image, 2 * SECTORS * SECTOR)
    disk.block.resize()
    assert disk.driver.interrupt_status & 2
    assert disk.driver.read(0xFC) != generation
    assert disk.config("capacity") == 2 * SECTORS
    assert disk.block.capacity == 2 * SECTORS * SECTOR
    assert disk.read(2 * SECTORS - 1) == (OK, bytes(SECTOR))
    os.truncate(image, SECTOR)
    with pytest.raises(UsageError, match="shorter"):
        disk.block.resize()


# --- mistakes of the user -------------------------------------------------------------------------------------------


def test_an_image_that_is_written_is_used_once(disks: Callable[..., Disk], image: Path) -> None:
    disks()
    for read_only in (False, True):
        with pytest.raises(UsageError, match="in use"):
            Block(image, read_only=read_only)
    disks(lock=False)


def test_readers_share_an_image(disks: Callable[..., Disk], image: Path) -> None:
    disks(read_only=True)
    disks(read_only=True)
    with pytest.raises(UsageError, match="in use"):
        Block(image)


def test_closing_gives_the_image_back(image: Path) -> None:
    for _ in range(3):
        Block(image).close()


def become_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_bytes(b"QFI\xfb" + bytes(1000)), "qcow2"),
        (lambda path: become_fifo(path), "neither a file"),
    ],
)
def test_what_is_no_raw_image_is_refused(image: Path, make: Callable[[Path], object], says: str) -> None:
    make(image)
    with pytest.raises(UsageError, match=says):
        Block(image)


def test_the_mode_of_an_open_file_must_fit(image: Path) -> None:
    with image.open("rb") as file, pytest.raises(UsageError, match="not open for reading and writing"):
        Block(file)
    with image.open("wb") as file, pytest.raises(UsageError, match="not open for reading"):
        Block(file, read_only=True)
    with image.open("a+b") as file, pytest.raises(UsageError, match="appending"):
        Block(file)


@pytest.mark.parametrize(
    "options", [{"serial": "x" * 21}, {"serial": "ä"}, {"block_size": 3}, {"queues": 0}, {"workers": 0}]
)
def test_wrong_options_are_refused(image: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Block(image, **options)
    Block(image).close()  # and nothing is left locked


def test_an_absent_image_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Block(tmp_path / "absent.img")


# --- faults of the host ---------------------------------------------------------------------------------------------


def test_an_image_that_was_truncated_gives_errors(disks: Callable[..., Disk], image: Path) -> None:
    disk = disks()
    os.truncate(image, 10 * SECTOR)
    assert disk.read(9) == (OK, content(9))
    assert disk.read(9, 2)[0] == IOERR
    # Nor may it grow again: what was lost would read as zeros.
    assert disk.write(100, bytes(SECTOR)) == IOERR
    assert disk.ranges(BlockType.WRITE_ZEROES, (100, 1, 0)) == IOERR
    assert disk.flush() == IOERR
    assert image.stat().st_size == 10 * SECTOR
    assert disk.block.counters == {"host_EIO": 4}
    assert "shorter" in str(disk.block.last_host_error)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_an_error_of_the_host_is_one_of_the_disk(
    disks: Callable[..., Disk], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fails(*_: object) -> int:
        raise OSError(number, "as the test wants it")

    disk = disks()
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", fails)
        patched.setattr(os, "preadv", fails)
        assert disk.write(0, bytes(SECTOR)) == IOERR
        assert disk.read(0)[0] == IOERR
    assert disk.block.counters == {"host_" + errno.errorcode[number]: 2}
    assert disk.read(0) == (OK, content(0))
    assert disk.write(0, bytes(SECTOR)) == OK


def test_after_a_flush_that_failed_none_succeeds(disks: Callable[..., Disk], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(fd: int) -> None:
        raise OSError(errno.EIO, "as the test wants it")

    disk = disks()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", fails)
        assert disk.flush() == IOERR
    assert disk.flush() == IOERR
    assert disk.block.device_state() == {"flush_error": errno.EIO}


def test_a_full_file_system_gives_errors(tmp_path: Path) -> None:
    # A real one: 64 KiB of tmpfs, in a mount namespace of its own.
    program = """
import os, sys
sys.path[:0] = sys.argv[2:]
from test_virtio_block import Block, Disk, SECTOR
os.truncate(os.open(sys.argv[1] + "/disk.img", os.O_CREAT | os.O_RDWR), 1 << 20)
disk = Disk(Block(sys.argv[1] + "/disk.img"))
statuses = [disk.write(sector, b"\\x99" * 4096) for sector in range(0, 400, 8)]
good = statuses.index(1)
assert 0 < good <= 16 and statuses[good:] == [1] * (50 - good), statuses
assert disk.block.counters == {"host_ENOSPC": 50 - good}, disk.block.counters
assert disk.flush() == 0
assert [disk.read(8 * number, 8) for number in range(good)] == [(0, b"\\x99" * 4096)] * good
assert disk.ranges(11, (0, 8 * good, 0)) == 0   # a discard makes room
assert disk.write(0, b"\\x98" * 4096) == 0
disk.block.close()
"""
    tests = Path(__file__).parents[1]
    script = 'mount -t tmpfs -o size=64k none "$1" && exec "$0" -c "$2" "$1" "$3" "$4" "$5"'
    arguments = [sys.executable, str(tmp_path), program, str(tests), str(tests / "unit"), str(tests.parent)]
    done = subprocess.run(
        ["unshare", "-r", "-m", "sh", "-c", script, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert (done.returncode, done.stderr) == (0, "")


# --- reset, state, close --------------------------------------------------------------------------------------------


def test_a_reset_waits_for_what_is_under_way(disks: Callable[..., Disk], monkeypatch: pytest.MonkeyPatch) -> None:
    entered = threading.Event()
    order = []

    def slow_flush(fd: int) -> None:
        entered.set()
        time.sleep(0.05)
        order.append("flushed")

    monkeypatch.setattr(os, "fdatasync", slow_flush)
    disk = disks()
    disk.add(BlockType.FLUSH)
    disk.driver.queues[0].kick()
    entered.wait(10)
    disk.driver.write(0x70, 0)
    order.append("reset")
    assert order == ["flushed", "reset"]
    assert disk.driver.status == DeviceStatus(0)
    disk.driver.start()
    assert disk.read(3) == (OK, content(3))


def test_a_long_transfer_is_given_up_at_a_reset(disks: Callable[..., Disk], monkeypatch: pytest.MonkeyPatch) -> None:
    pwritev = os.pwritev
    calls = []
    entered, go_on = threading.Event(), threading.Event()

    def some(fd: int, views: Any, offset: int, flags: int = 0) -> int:
        calls.append(offset)
        entered.set()
        go_on.wait(10)
        return pwritev(fd, [views[0][:SECTOR]], offset, flags)

    monkeypatch.setattr(os, "pwritev", some)
    disk = disks()
    disk.add(BlockType.OUT, 0, bytes(64 * SECTOR))
    disk.add(BlockType.OUT, 64, bytes(SECTOR))
    disk.driver.queues[0].kick()
    entered.wait(10)
    reset = threading.Thread(target=disk.driver.write, args=(0x70, 0))
    reset.start()
    while not disk.block.resetting:
        time.sleep(0.001)
    go_on.set()
    reset.join(10)
    assert calls == [0]
    assert disk.block.counters == {}


def test_close_ends_the_threads(image: Path) -> None:
    before = threading.active_count()
    disk = Disk(Block(image))
    assert disk.flush() == OK
    assert threading.active_count() > before
    disk.block.close()
    assert threading.active_count() == before


def test_the_state_holds_the_cache_mode(disks: Callable[..., Disk]) -> None:
    disk = disks()
    disk.driver.write(0x100 + BlockConfig.writeback.offset, 0, 1)
    disk.driver.mmio.quiesce()
    state = disk.driver.mmio.state()
    disk.block.close()
    again = disks(start=False)
    again.driver.memory.write(0, disk.driver.memory.read(0, 0x10_0000))
    again.driver.mmio.restore(state)
    again.driver.mmio.resume()
    assert again.config("writeback") == 0
    again.driver.queues = disk.driver.queues
    for queue in again.driver.queues:
        queue.driver, queue.memory = again.driver, again.driver.memory
    assert again.read(9) == (OK, content(9))


STOPPED = """
import os, pickle, signal, sys, threading
sys.path[:0] = sys.argv[2:]
from test_virtio_block import SECTOR, Block, BlockType, Disk
disk = Disk(Block(sys.argv[1]))
never, real = threading.Event(), os.pwritev

def pwritev(fd, views, offset, flags=0):
    if offset >= 100 * SECTOR:
        real(fd, [views[0][:100]], offset)  # a part is written, and there it ends
        never.wait()
    return real(fd, views, offset, flags)

os.pwritev = pwritev
for number in range(3):
    disk.add(BlockType.IN, number, room=SECTOR)
    disk.add(BlockType.OUT, 50 + number, bytes([number]) * SECTOR)
    disk.driver.queues[0].kick()
disk.wait(6)
disk.add(BlockType.OUT, 100, b"\\xaa" * 4 * SECTOR)
disk.add(BlockType.IN, 7, room=SECTOR)
disk.add(BlockType.OUT, 120, b"\\xbb" * SECTOR)
disk.driver.queues[0].kick()
disk.wait(1)
disk.add(BlockType.OUT, 130, b"\\xcc" * SECTOR)  # of which the device does not know yet
ring = disk.driver.queues[0]
saved = disk.driver.mmio.state(), disk.driver.memory.read(0, 0x10_0000), vars(ring) | {"driver": 0, "memory": 0}
sys.stdout.buffer.write(pickle.dumps(saved))
sys.stdout.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_under_way_is_finished_in_another_process(disks: Callable[..., Disk], image: Path) -> None:
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-c", STOPPED, str(image), str(tests), str(tests / "unit"), str(tests.parent)]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (-9, b"")
    state, memory, ring = pickle.loads(done.stdout)
    assert image.read_bytes()[100 * SECTOR :][: 4 * SECTOR] == b"\xaa" * 100 + content(100, 4)[100:]
    assert len(state["device"]["queues"][0]["in_flight"]) == 2

    disk = disks(start=False)
    driver = disk.driver
    driver.memory.write(0, memory)
    driver.mmio.restore(state)
    driver.queues = [FakeQueue.__new__(FakeQueue)]
    vars(driver.queues[0]).update(ring, driver=driver, memory=driver.memory)
    assert [timer.deadline for timer in driver.board.timers] == [None]
    driver.mmio.resume()
    driver.board.timers[0].call()  # what the host input thread does
    assert disk.wait(3) == [b"\0"] * 3
    expected = bytearray(content(0, SECTORS))
    for sector, data in ((50, b"\0"), (51, b"\1"), (52, b"\2"), (100, b"\xaa" * 4), (120, b"\xbb"), (130, b"\xcc")):
        expected[sector * SECTOR : (sector + len(data)) * SECTOR] = data * SECTOR
    assert image.read_bytes() == expected
    assert disk.read(7) == (OK, content(7))


def test_a_state_needs_an_image_of_its_size(disks: Callable[..., Disk], image: Path) -> None:
    disk = disks()
    state = disk.driver.mmio.state()
    disk.block.close()
    os.truncate(image, 10 * SECTOR)
    again = disks(start=False)
    with pytest.raises(UsageError, match="10 sectors"):
        again.driver.mmio.restore(state)
