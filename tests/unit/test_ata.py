"""The ATA disk, as a driver that polls or waits for interrupts sees it. Clauses are those of ATA/ATAPI-6."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from device_board import RecordingBoard, RecordingLine
from kvmpy.devices import AtaDisk
from kvmpy.devices.ata_registers import Command, Control, Error, Status
from kvmpy.errors import UsageError

READY = int(Status.DRDY | Status.DSC)
DATA, ERROR, COUNT, LOW, MID, HIGH, DEVICE, STATUS, CONTROL = range(9)
SECTORS = 100
CONTENT = b"".join(struct.pack("<Q", sector) * 64 for sector in range(SECTORS))


class Driver:
    """Writes registers and reads them."""

    def __init__(self, image: Path, read_only: bool = False) -> None:
        self.disk = AtaDisk(image, read_only=read_only)
        self.board = RecordingBoard()
        self.disk.attach(self.board)

    @property
    def line(self) -> RecordingLine:
        return self.board.lines[14]

    def set(self, offset: int, value: int, size: int = 1) -> None:
        self.disk.write(offset, size, value)

    def get(self, offset: int, size: int = 1) -> int:
        return self.disk.read(offset, size)

    def command(self, code: int, sector: int = 0, count: int = 1, feature: int = 0, device: int = 0xE0) -> int:
        """Give a command with 28 bits of address; answers the status."""
        for offset, value in (
            (DEVICE, device | sector >> 24), (ERROR, feature), (COUNT, count & 0xFF), (LOW, sector & 0xFF),
            (MID, sector >> 8 & 0xFF), (HIGH, sector >> 16 & 0xFF), (STATUS, code),
        ):  # fmt: skip
            self.set(offset, value)
        return self.get(CONTROL)

    def command48(self, code: int, sector: int, count: int) -> int:
        self.set(DEVICE, 0xE0)
        for offset, value in (
            (COUNT, count >> 8), (COUNT, count), (LOW, sector >> 24), (LOW, sector), (MID, sector >> 32),
            (MID, sector >> 8), (HIGH, sector >> 40), (HIGH, sector >> 16), (STATUS, code),
        ):  # fmt: skip
            self.set(offset, value & 0xFF)
        return self.get(CONTROL)

    def take(self, length: int, size: int = 2) -> bytes:
        return b"".join(self.get(DATA, size).to_bytes(size, "little") for _ in range(length // size))

    def give(self, data: bytes, size: int = 2) -> None:
        for at in range(0, len(data), size):
            self.set(DATA, int.from_bytes(data[at : at + size], "little"), size)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def driver(image: Path) -> Iterator[Driver]:
    driver = Driver(image)
    yield driver
    driver.disk.close()


def test_after_power_on_it_is_ready_and_has_the_signature_of_a_disk(driver: Driver) -> None:
    assert driver.get(STATUS) == driver.get(CONTROL) == READY
    assert [driver.get(offset) for offset in (ERROR, COUNT, LOW, MID, HIGH)] == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("size", [2, 4])
def test_identify_tells_size_and_names(driver: Driver, size: int) -> None:
    assert driver.command(Command.IDENTIFY_DEVICE) == READY | Status.DRQ
    data = driver.take(512, size)
    words = struct.unpack("<256H", data)
    assert words[60] | words[61] << 16 == words[100] == SECTORS
    assert words[49] & 1 << 9  # LBA
    assert words[83] & 1 << 10  # 48 bits
    text = b"".join(struct.pack(">H", word) for word in words)
    assert text[20:40] == b"KVMPY0001".ljust(20)
    assert text[54:94] == b"kvmpy ATA disk".ljust(40)
    assert sum(data) & 0xFF == 0
    assert driver.get(STATUS) == READY


def test_sectors_are_read_one_by_one_each_with_an_interrupt(driver: Driver) -> None:
    driver.command(Command.READ_SECTORS, sector=7, count=3)
    for sector in (7, 8, 9):
        assert driver.line.level
        assert driver.get(STATUS) == READY | Status.DRQ
        assert not driver.line.level
        assert driver.take(512) == CONTENT[512 * sector :][:512]
    assert not driver.line.level  # 9.5: none after the last one
    assert driver.get(STATUS) == READY
    assert driver.line.edges == 3


def test_a_string_instruction_goes_on_over_blocks(driver: Driver) -> None:
    driver.command(Command.READ_SECTORS, sector=1, count=4)
    got = driver.disk.read_string(DATA, 2, 300) + driver.disk.read_string(DATA, 4, (2048 - 600) // 4)
    assert got == CONTENT[512 : 5 * 512]
    assert driver.get(STATUS) == READY
    assert driver.disk.sectors_read == 4


def test_a_count_of_0_is_256_sectors(tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.write_bytes(bytes(512 * 256))
    driver = Driver(path)
    driver.command(Command.READ_SECTORS, count=0)
    assert driver.disk.read_string(DATA, 4, 256 * 128) == bytes(256 * 512)
    assert driver.get(STATUS) == READY
    driver.disk.close()


@pytest.mark.parametrize("size", [2, 4])
def test_what_is_written_is_in_the_image(driver: Driver, image: Path, size: int) -> None:
    assert driver.command(Command.WRITE_SECTORS, sector=5, count=2) == READY | Status.DRQ
    assert not driver.line.level  # 9.6: none for the first block
    driver.give(b"first sector".ljust(512), size)
    assert driver.line.level
    assert driver.get(STATUS) == READY | Status.DRQ
    driver.give(b"second".ljust(512), size)
    assert driver.line.level
    assert driver.get(STATUS) == READY
    assert driver.command(Command.FLUSH_CACHE) == READY
    written = b"first sector".ljust(512) + b"second".ljust(512)
    assert image.read_bytes() == CONTENT[: 5 * 512] + written + CONTENT[7 * 512 :]
    assert driver.disk.sectors_written == 2


def test_multiple_makes_blocks_of_several_sectors(driver: Driver, image: Path) -> None:
    assert driver.command(Command.READ_MULTIPLE) == READY | Status.ERR  # not set yet
    assert driver.command(Command.SET_MULTIPLE_MODE, count=3) == READY | Status.ERR
    assert driver.command(Command.SET_MULTIPLE_MODE, count=8) == READY
    edges = driver.line.edges
    driver.command(Command.READ_MULTIPLE, sector=0, count=20)
    assert driver.disk.read_string(DATA, 2, 20 * 256) == CONTENT[: 20 * 512]
    assert driver.line.edges - edges <= 3  # 8, 8 and 4 sectors; not acknowledged, the line stays high
    driver.command(Command.WRITE_MULTIPLE, sector=0, count=10)
    driver.give(bytes(10 * 512), 4)
    assert driver.get(STATUS) == READY
    assert image.read_bytes()[: 11 * 512] == bytes(10 * 512) + CONTENT[10 * 512 : 11 * 512]


def test_addresses_of_48_bits_are_written_in_two_halves(driver: Driver) -> None:
    driver.command48(Command.READ_SECTORS_EXT, sector=42, count=2)
    assert driver.disk.read_string(DATA, 2, 512) == CONTENT[42 * 512 : 44 * 512]
    assert driver.command48(Command.READ_SECTORS_EXT, 42 | 1 << 40, 1) == READY | Status.ERR
    driver.set(CONTROL, Control.HOB)
    assert (driver.get(LOW), driver.get(HIGH)) == (0, 1)
    driver.set(LOW, 3)
    assert driver.get(LOW) == 3  # a write ends the look at the halves before


def test_cylinder_head_and_sector_are_translated(driver: Driver) -> None:
    driver.command(Command.READ_SECTORS, device=0xA1, sector=1)  # cylinder 0, head 1, sector 1
    assert driver.take(512) == CONTENT[63 * 512 :][:512]
    assert driver.command(Command.READ_SECTORS, device=0xA0, sector=0) == READY | Status.ERR  # sectors begin with 1


@pytest.mark.parametrize(("sector", "count"), [(SECTORS, 1), (SECTORS - 1, 2), ((1 << 28) - 1, 255)])
@pytest.mark.parametrize("code", [Command.READ_SECTORS, Command.WRITE_SECTORS, Command.READ_VERIFY])
def test_sectors_that_are_not_there_are_not_found(driver: Driver, code: int, sector: int, count: int) -> None:
    assert driver.command(code, sector, count) == READY | Status.ERR
    assert driver.get(ERROR) == Error.IDNF
    assert driver.line.level
    assert driver.disk.counters["bad_sector"] == 1
    assert driver.command(Command.READ_VERIFY, SECTORS - 1) == READY  # the next command begins without error


def test_unknown_commands_are_aborted_and_counted(driver: Driver) -> None:
    for code in (0xA1, 0xB0, 0xC8, 0xF6):
        assert driver.command(code) == READY | Status.ERR
        assert driver.get(ERROR) == Error.ABRT
    assert driver.disk.counters["bad_command"] == 4


def test_a_read_only_disk_aborts_writes(image: Path) -> None:
    image.chmod(0o444)
    driver = Driver(image, read_only=True)
    assert driver.command(Command.WRITE_SECTORS) == READY | Status.ERR
    assert driver.get(ERROR) == Error.ABRT
    driver.give(bytes(512))
    assert driver.disk.counters["data_not_asked_for"] > 0
    driver.disk.close()
    assert image.read_bytes() == CONTENT


def test_without_interrupts_wanted_the_line_stays_low_until_they_are(driver: Driver) -> None:
    driver.set(CONTROL, Control.NIEN)
    driver.command(Command.IDENTIFY_DEVICE)
    assert not driver.line.level
    driver.set(CONTROL, 0)
    assert driver.line.level
    driver.get(CONTROL)
    assert driver.line.level  # the alternate status does not acknowledge
    driver.get(STATUS)
    assert not driver.line.level


def test_device_1_is_absent(driver: Driver) -> None:
    assert driver.command(Command.IDENTIFY_DEVICE, device=0xF0) == 0  # 9.16.1
    assert driver.get(STATUS) == 0
    assert driver.take(2) == b"\xff\xff"
    driver.set(DEVICE, 0xE0)
    assert driver.get(STATUS) == READY


def test_a_software_reset_gives_up_the_transfer(driver: Driver) -> None:
    driver.command(Command.READ_SECTORS, count=8)
    driver.set(CONTROL, Control.SRST)
    assert driver.get(STATUS) == Status.BSY
    driver.set(STATUS, Command.IDENTIFY_DEVICE)  # is not taken
    driver.set(CONTROL, 0)
    assert driver.get(STATUS) == READY
    assert [driver.get(offset) for offset in (ERROR, COUNT, LOW, MID, HIGH)] == [1, 1, 1, 0, 0]
    assert not driver.line.level


def test_set_features_switches_the_write_cache(driver: Driver) -> None:
    def cache() -> bool:
        driver.command(Command.IDENTIFY_DEVICE)
        return bool(struct.unpack("<256H", driver.take(512))[85] & 1 << 5)

    assert cache()
    assert driver.command(Command.SET_FEATURES, feature=0x82) == READY
    assert not cache()
    assert driver.command(Command.SET_FEATURES, feature=0x03, count=0x0C) == READY  # PIO mode 4
    assert driver.command(Command.SET_FEATURES, feature=0x03, count=0x45) == READY | Status.ERR  # Ultra DMA
    assert driver.command(Command.SET_FEATURES, feature=0x99) == READY | Status.ERR


def test_an_image_that_became_shorter_is_an_error_of_the_disk(driver: Driver, image: Path) -> None:
    os.truncate(image, 512)
    assert driver.command(Command.READ_SECTORS, sector=50) == READY | Status.ERR
    assert driver.get(ERROR) == Error.UNC
    assert driver.disk.counters["host_error"] == 1


def test_what_the_host_refuses_to_write_is_an_error(driver: Driver) -> None:
    full = os.open("/dev/full", os.O_RDWR)
    os.dup2(full, driver.disk.image.fd)
    os.close(full)
    driver.command(Command.WRITE_SECTORS)
    driver.give(bytes(512))
    assert driver.get(STATUS) == READY | Status.ERR
    assert driver.disk.last_host_error is not None


def test_a_transfer_goes_on_in_a_restored_disk(driver: Driver, image: Path) -> None:
    driver.command(Command.READ_SECTORS, sector=3, count=2)
    got = driver.take(700)
    other = Driver(image)
    other.disk.restore(driver.disk.state())
    assert other.line.level == driver.line.level
    assert got + other.take(1024 - 700) == CONTENT[3 * 512 : 5 * 512]
    assert other.get(STATUS) == READY
    other.disk.close()


@pytest.mark.parametrize("content", [b"", bytes(513)])
def test_an_image_is_whole_sectors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="multiple of 512"):
        AtaDisk(path)
