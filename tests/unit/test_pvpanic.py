"""pvpanic, register by register."""

import pytest

from device_board import RecordingBoard
from kvmpy.devices.pvpanic import PvPanic, PvPanicEvent


def plugged_in() -> tuple[PvPanic, RecordingBoard]:
    device, board = PvPanic(), RecordingBoard()
    device.attach(board)
    return device, board


def test_a_read_says_which_events_are_understood() -> None:
    device, _ = plugged_in()
    assert device.read(0, 1) == PvPanicEvent.PANICKED | PvPanicEvent.CRASH_LOADED | PvPanicEvent.SHUTDOWN


@pytest.mark.parametrize(
    ("event", "ended", "counted"),
    [
        (0, [], {}),
        (PvPanicEvent.PANICKED, [("panic", None)], {}),
        (PvPanicEvent.SHUTDOWN, [("shutdown", None)], {}),
        (PvPanicEvent.CRASH_LOADED, [], {"crash_loaded": 1}),
        (PvPanicEvent.CRASH_LOADED | PvPanicEvent.PANICKED, [], {"crash_loaded": 1}),
        (0x80, [], {"unknown_event": 1}),
        (0x81, [("panic", None)], {"unknown_event": 1}),
    ],
)
def test_an_event_ends_the_run_or_is_counted(event: int, ended: list[object], counted: dict[str, int]) -> None:
    device, board = plugged_in()
    device.write(0, 1, int(event))
    assert board.ended == ended
    assert device.counters == counted


def test_without_a_board_nothing_happens() -> None:
    device = PvPanic()
    device.write(0, 1, 1)
    device.write(0, 1, 4)
    assert device.state() == {}
