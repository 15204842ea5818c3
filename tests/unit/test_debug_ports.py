"""The POST port and the debug exit."""

from __future__ import annotations

import pytest

from device_board import RecordingBoard
from kvmpy.devices.debug_console import DebugConsole
from kvmpy.devices.debug_exit import DebugExit
from kvmpy.devices.post_port import PostPort


def test_post_port_reads_back_the_last_code() -> None:
    port = PostPort()
    assert port.last is None
    assert port.read(0, 1) == 0
    port.write(0, 1, 0x11)
    port.write(0, 1, 0x22)
    assert port.read(0, 1) == 0x22
    assert port.last == 0x22
    assert port.codes == (0x11, 0x22)


def test_post_port_keeps_the_last_codes_and_counts_all() -> None:
    port = PostPort(history=4)
    for code in range(10):
        port.write(0, 1, code)
    assert port.codes == (6, 7, 8, 9)
    assert port.count == 10


def test_post_port_after_reset_reads_zero_and_keeps_the_record() -> None:
    port = PostPort()
    port.write(0, 1, 0x33)
    port.reset()
    assert port.read(0, 1) == 0
    assert port.codes == (0x33,)


@pytest.mark.parametrize(("value", "code"), [(0, 1), (1, 3), (0x10, 0x21), (0x7F, 0xFF), (0xFFFFFFFF, 0x1FFFFFFFF)])
def test_debug_exit_ends_the_run_with_an_odd_code(value: int, code: int) -> None:
    board = RecordingBoard()
    device = DebugExit()
    device.attach(board)
    device.write(0, 4, value)
    assert board.ended == [("exit", code)]


def test_debug_exit_reads_zero_and_lasts_four_ports() -> None:
    device = DebugExit()
    (region,) = device.regions()
    assert (region.start, region.length, region.width) == (0xF4, 4, 4)
    assert device.read(0, 1) == 0


def test_debug_exit_without_a_board_is_counted() -> None:
    device = DebugExit()
    device.write(0, 1, 0)
    assert device.counters["exit_without_board"] == 1


def test_only_a_queued_debug_console_has_its_writes_queued() -> None:
    for queued in (False, True):
        board = RecordingBoard()
        DebugConsole(0x402, queued=queued).attach(board)
        assert board.queued == ({0x402} if queued else set())
