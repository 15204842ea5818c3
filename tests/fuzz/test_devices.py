"""Whatever a guest does to the registers of a device, the device answers; and a restored device answers alike."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_board import RecordingBoard
from fuzz_settings import DEVICE_EXAMPLES, PROFILE, PROPERTY_EXAMPLES
from kvmpy.devices import (
    I8042,
    AcpiPm,
    AcpiSleep,
    AtaDisk,
    Cmos,
    DebugConsole,
    DebugExit,
    Device,
    FwCfg,
    HypercallChannel,
    PciHostBridge,
    Pit8254,
    PostPort,
    PvPanic,
    Uart16550,
)


class Clock:
    """Time that moves only with the accesses: each asks later than the one before, by very different steps."""

    STEPS = (0, 1, 900, 200_000, 54_925_439, 1_000_000_000, 86_400_000_000_000)

    def __init__(self) -> None:
        self.ns = 1_700_000_000_000_000_000

    def nanoseconds(self) -> int:
        return self.ns

    def seconds(self) -> float:
        return self.ns / 1e9


class Ram:
    """64 KiB of guest memory."""

    def __init__(self) -> None:
        self.content = bytearray(0x10000)

    def read(self, address: int, length: int) -> bytes:
        if address + length > len(self.content):
            raise ValueError("outside")
        return bytes(self.content[address : address + length])

    def guest_write(self, address: int, data: bytes) -> None:
        if address + len(data) > len(self.content):
            raise ValueError("outside")
        self.content[address : address + len(data)] = data


class FwCfgWithRam(FwCfg):
    """Reaches 64 KiB of RAM, for which the tests stand in."""

    def __init__(self) -> None:
        self.ram = Ram()
        super().__init__(cpus=2, ram_size=1 << 27, e820=[(0, 1 << 27, 1)], boot_order=["/rom@x"], memory=self.ram)


class AtaDiskInMemory(AtaDisk):
    """Eight sectors that are gone with it."""

    SIZE = 8 * 512

    def __init__(self) -> None:
        fd = os.memfd_create("disk")
        os.write(fd, bytes(range(256)) * (self.SIZE // 256))
        super().__init__(f"/proc/self/fd/{fd}")
        self.copy = fd

    def __del__(self) -> None:
        os.close(self.copy)
        self.close()

    @property
    def content(self) -> bytes:
        return os.pread(self.copy, self.SIZE, 0)

    @content.setter
    def content(self, content: bytes) -> None:
        os.pwrite(self.copy, content, 0)


def fw_cfg(clock: Clock) -> Device:
    device = FwCfgWithRam()
    device.add_file("opt/test", bytes(range(50)))
    return device


DEVICES: dict[str, Callable[[Clock], Device]] = {
    "Uart16550": lambda clock: Uart16550(history=64),
    "DebugConsole": lambda clock: DebugConsole(history=64),
    "PostPort": lambda clock: PostPort(),
    "DebugExit": lambda clock: DebugExit(),
    "PvPanic": lambda clock: PvPanic(),
    "HypercallChannel": lambda clock: HypercallChannel(),
    "I8042": lambda clock: I8042(),
    "AtaDisk": lambda clock: AtaDiskInMemory(),
    "Cmos": lambda clock: Cmos(now=clock.seconds, memory_below_4g=1 << 30),
    "Pit8254": lambda clock: Pit8254(now=clock.nanoseconds),
    "AcpiPm": lambda clock: AcpiPm(now=clock.nanoseconds),
    "AcpiPm, 24 bits": lambda clock: AcpiPm(timer_bits=24, now=clock.nanoseconds),
    "AcpiSleep": lambda clock: AcpiSleep(),
    "PciHostBridge": lambda clock: PciHostBridge(),
    "PciHostBridge, absent": lambda clock: PciHostBridge(present=False),
    "FwCfg": fw_cfg,
}

VALUES = st.one_of(
    st.integers(0, 0xFF),
    st.integers(0, 0xFFFF),
    st.integers(0, (1 << 64) - 1),
    # a configuration address of the host bridge; a DMA descriptor's address, as the guest stores it
    # commands of a disk, and numbers of sectors that it has
    st.sampled_from([0x20, 0x30, 0xC4, 0xC5, 0xC6, 0xE7, 0xEC, 0xEF, 0, 1, 2, 4]),
    st.sampled_from([0x8000_0000, 0x8000_0058, 0x8000_003C, 0x0010_0000, 0x00FF_0000, 0x1900, 0x1980]),
)
# (write?, which of the device's own offsets, offset if it is to be any, size, value, time step)
ACCESS = st.tuples(
    st.sampled_from(["read", "write", "host"]),
    st.integers(0, 31),
    st.one_of(st.none(), st.none(), st.none(), st.integers(0, 1 << 16)),
    st.sampled_from([1, 1, 1, 2, 4, 8]),
    VALUES,
    st.sampled_from(Clock.STEPS),
)
Access = tuple[str, int, int | None, int, int, int]
ACCESSES = st.lists(ACCESS, max_size=30)

fewer = settings(max_examples=PROPERTY_EXAMPLES[PROFILE])
"""The first test alone gets many examples: eleven devices times four tests would take too long."""


class Bench:
    """A device on a board, with its clock."""

    def __init__(self, kind: str) -> None:
        self.clock = Clock()
        self.board = RecordingBoard()
        self.device = DEVICES[kind](self.clock)
        self.device.attach(self.board)
        self.offsets = list(
            itertools.chain.from_iterable(
                range(region.base, region.base + region.length) for region in self.device.regions()
            )
        )

    def play(self, accesses: list[Access]) -> list[Any]:
        """What the guest (and whoever holds the lines) sees."""
        seen: list[Any] = []
        for kind, which, anywhere, size, value, step in accesses:
            self.clock.ns += step
            offset = self.offsets[which % len(self.offsets)] if anywhere is None else anywhere
            if kind == "read":
                answer = self.device.read(offset, size)
                assert isinstance(answer, int)
                assert 0 <= answer < 1 << 8 * size, f"read of {size} bytes at {offset:#x} gave {answer:#x}"
                seen.append(answer)
            elif kind == "write":
                self.device.write(offset, size, value & (1 << 8 * size) - 1)
            else:
                seen.append(self.host(value & 0xFF))
            seen += [line.level for line in self.board.lines.values()]
        return seen

    def host(self, value: int) -> int | None:
        """Something happens on the host's side. What it is told there, if anything."""
        device = self.device
        if isinstance(device, Uart16550):
            if value:
                device.send(bytes([value]) * (value % 20))
            else:
                device.send_break()
        elif isinstance(device, I8042):
            device.press(bytes([value]))
        elif isinstance(device, Cmos):
            device.poll()
        elif isinstance(device, AcpiPm):
            if value & 1:
                device.press_power_button()
            else:
                device.poll()
        elif isinstance(device, Pit8254):
            due = device.poll()
            return None if due is None else due - self.clock.ns
        return None


@pytest.mark.parametrize("kind", DEVICES)
@given(accesses=ACCESSES)
@settings(max_examples=DEVICE_EXAMPLES)
def test_any_accesses_are_answered_and_fit(kind: str, accesses: list[Access]) -> None:
    bench = Bench(kind)
    bench.play(accesses)
    bench.device.reset()
    bench.play(accesses)


@fewer
@pytest.mark.parametrize("kind", DEVICES)
@given(before=ACCESSES, after=ACCESSES)
def test_restored_device_behaves_as_the_original(kind: str, before: list[Access], after: list[Access]) -> None:
    original, copy = Bench(kind), Bench(kind)
    original.play(before)
    copy.clock.ns = original.clock.ns
    if isinstance(original.device, FwCfgWithRam) and isinstance(copy.device, FwCfgWithRam):
        copy.device.ram.content[:] = original.device.ram.content  # RAM is saved by others
    if isinstance(original.device, AtaDiskInMemory) and isinstance(copy.device, AtaDiskInMemory):
        copy.device.content = original.device.content  # so are images
    copy.device.restore(original.device.state())
    assert [line.level for line in copy.board.lines.values()] == [line.level for line in original.board.lines.values()]
    original.board.ended.clear()
    assert copy.play(after) == original.play(after)
    assert copy.board.ended == original.board.ended
    assert copy.device.state() == original.device.state()


@fewer
@pytest.mark.parametrize("kind", DEVICES)
@given(accesses=ACCESSES)
def test_state_is_plain_data_and_a_copy(kind: str, accesses: list[Access]) -> None:
    bench = Bench(kind)
    bench.play(accesses)
    state = bench.device.state()
    check_plain(state)
    before = repr(state)
    bench.play(accesses)
    assert repr(state) == before


def check_plain(value: object) -> None:
    if isinstance(value, dict):
        assert all(type(key) is str for key in value)
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            check_plain(item)
    else:
        assert value is None or type(value) in (int, float, bool, str, bytes), f"{value!r} is no plain data"


@fewer
@pytest.mark.parametrize("kind", DEVICES)
@given(accesses=ACCESSES)
def test_lines_are_told_only_of_changes(kind: str, accesses: list[Access]) -> None:
    bench = Bench(kind)
    bench.play(accesses)
    for line in bench.board.lines.values():
        assert line.history == [index % 2 == 0 for index in range(len(line.history))]
