"""The hypercall channel, register by register."""

from __future__ import annotations

import struct

import pytest

from device_board import RecordingBoard
from kvmpy.devices.hypercall_channel import EFAULT, ENOSYS, Hypercall, HypercallChannel
from kvmpy.errors import UsageError
from kvmpy.memory.region import MemoryRegion

BLOCK = 0x1000
HIGH_RAM = 5 << 32


def plugged_in() -> tuple[HypercallChannel, RecordingBoard]:
    channel, board = HypercallChannel(), RecordingBoard()
    board.memory.add(MemoryRegion.anonymous(0, 0x10000))
    board.memory.add(MemoryRegion.anonymous(HIGH_RAM, 0x1000))
    channel.attach(board)
    return channel, board


def put(board: RecordingBoard, number: int, *arguments: int, at: int = BLOCK) -> None:
    board.memory.write(at, struct.pack("<7Qq", number, *arguments, *[0] * (6 - len(arguments)), 99))


def result(board: RecordingBoard, at: int = BLOCK) -> int:
    (value,) = struct.unpack("<q", board.memory.read(at + 56, 8))
    return int(value)


def test_a_call_is_answered_when_the_write_is_done() -> None:
    channel, board = plugged_in()
    seen: list[Hypercall] = []

    def add(call: Hypercall) -> int:
        seen.append(call)
        return call.arguments[0] + call.arguments[1]

    channel.on(7, add)
    put(board, 7, 40, 2)
    channel.write(0, 4, BLOCK)
    assert result(board) == 42
    assert (seen[0].number, seen[0].arguments) == (7, (40, 2, 0, 0, 0, 0))
    assert channel.calls == {7: 1}


@pytest.mark.parametrize(("answer", "seen"), [(None, 0), (-5, -5), ((1 << 64) - 1, -1), (-(1 << 63), -(1 << 63))])
def test_results_have_64_bits(answer: int | None, seen: int) -> None:
    channel, board = plugged_in()
    channel.on(0, lambda call: answer)
    put(board, 0)
    channel.write(0, 8, BLOCK)
    assert result(board) == seen


@pytest.mark.parametrize("answer", [1 << 64, -(1 << 63) - 1])
def test_a_result_that_does_not_fit_is_the_callers_mistake(answer: int) -> None:
    channel, board = plugged_in()
    channel.on(0, lambda call: answer)
    put(board, 0)
    with pytest.raises(UsageError, match="64 bits"):
        channel.write(0, 4, BLOCK)


def test_a_block_above_4_gib_has_its_upper_half_written_first() -> None:
    channel, board = plugged_in()
    channel.on(1, lambda call: 5)
    put(board, 1, at=HIGH_RAM)
    channel.write(4, 4, HIGH_RAM >> 32)
    restored, _ = plugged_in()
    restored.restore(channel.state())
    restored.board, restored._handlers = board, channel._handlers
    restored.write(0, 4, 0)
    assert result(board, HIGH_RAM) == 5
    restored.write(0, 4, 0xF000)  # the upper half counts for one call
    assert board.memory.read(0xF038, 8) == struct.pack("<q", -ENOSYS)


def test_memory_is_read_and_written_by_the_handler() -> None:
    channel, board = plugged_in()

    def upper(call: Hypercall) -> int:
        text = call.read(call.arguments[0], call.arguments[1])
        call.write(call.arguments[0], text.upper())
        return len(text)

    channel.on(2, upper)
    board.memory.write(0x2000, b"hello")
    put(board, 2, 0x2000, 5)
    channel.write(0, 4, BLOCK)
    assert (result(board), board.memory.read(0x2000, 5)) == (5, b"HELLO")
    put(board, 2, 0xFFFF, 5)
    channel.write(0, 4, BLOCK)
    assert result(board) == -EFAULT
    assert channel.counters == {"bad_address": 1}


@pytest.mark.parametrize("block", [0x10000 - 56, 0x10000, 0xFFFF_FFFF, 1 << 62])
def test_a_block_that_is_not_in_memory_is_counted(block: int) -> None:
    channel, _ = plugged_in()
    channel.write(0, 8, block)
    assert channel.counters == {"bad_address": 1}


def test_rom_is_read_and_never_written() -> None:
    channel, board = plugged_in()
    board.memory.add(MemoryRegion.anonymous(0x10000, 0x1000, read_only=True))
    before = struct.pack("<7Qq", 1, 0x10000, *[0] * 5, 99)
    board.memory.write(0x10000, before)
    channel.on(1, lambda call: call.write(call.arguments[0], b"data"))
    channel.write(0, 4, 0x10000)  # nor is the call made: its result would have no place
    assert channel.counters == {"bad_address": 1}
    assert not channel.calls
    put(board, 1, 0x10000)
    channel.write(0, 4, BLOCK)
    assert result(board) == -EFAULT
    assert board.memory.read(0x10000, 64) == before


def test_an_unknown_number_gets_enosys() -> None:
    channel, board = plugged_in()
    put(board, 1 << 63)
    channel.write(0, 4, BLOCK)
    assert result(board) == -ENOSYS
    assert channel.counters == {"unknown": 1}


def test_reads_say_what_it_is() -> None:
    channel, _ = plugged_in()
    assert channel.read(0, 4).to_bytes(4, "little") == b"kvmp"
    assert (channel.read(4, 4), channel.read(0, 8) >> 32, channel.read(8, 4)) == (1, 1, 0xFFFF_FFFF)


def test_other_accesses_are_counted() -> None:
    channel, _ = plugged_in()
    channel.write(0, 2, 1)
    channel.write(2, 4, 1)
    HypercallChannel().write(0, 4, 0)
    assert channel.counters == {"bad_access": 2}


def test_places_can_be_chosen() -> None:
    assert [region.start for region in HypercallChannel(port=0x100, address=None).regions()] == [0x100]
    assert [region.kind for region in HypercallChannel(port=None).regions()] == ["mmio"]
    with pytest.raises(UsageError):
        HypercallChannel(port=None, address=None)
    with pytest.raises(UsageError):
        HypercallChannel().on(-1, lambda call: 0)
