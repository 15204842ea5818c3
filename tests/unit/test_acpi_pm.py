"""ACPI's fixed hardware and its hardware-reduced registers, on a clock that the test moves."""

from __future__ import annotations

import time

import pytest

from device_board import RecordingBoard, RecordingLine
from kvmpy.devices.acpi_pm import FREQUENCY, AcpiPm, AcpiSleep

STATUS, ENABLE, CONTROL, TIMER, RESET = 0x0, 0x2, 0x4, 0x8, 0xC
TMR, GBL, PWRBTN = 0x001, 0x020, 0x100
SLP_EN = 1 << 13


class Wired:
    """A device on a board whose time is `ticks` of the PM timer."""

    def __init__(self, timer_bits: int = 32) -> None:
        self.ticks = 0
        self.board = RecordingBoard()
        self.device = AcpiPm(timer_bits=timer_bits, now=self.now)
        self.device.attach(self.board)
        self.line: RecordingLine = self.board.lines[9]

    def now(self) -> int:
        return -(-self.ticks * 1_000_000_000 // FREQUENCY)

    def timer(self) -> int:
        return self.device.read(TIMER, 4)


# the timer


def test_the_timer_counts_3579545_times_a_second() -> None:
    w = Wired()
    assert w.timer() == 0
    w.ticks += FREQUENCY
    assert w.timer() == 3_579_545
    w.ticks += 100
    assert w.timer() == 3_579_645


@pytest.mark.parametrize("bits", [24, 32])
def test_the_timer_wraps_and_its_highest_bit_sets_the_status_each_time_it_changes(bits: int) -> None:
    w = Wired(bits)
    half = 1 << bits - 1
    for _ in range(3):
        w.ticks += half - 1
        assert w.device.read(STATUS, 2) == 0
        w.ticks += 1
        assert w.device.read(STATUS, 2) == TMR
        w.device.write(STATUS, 2, TMR)
        assert w.device.read(STATUS, 2) == 0
    assert w.timer() == half
    w.ticks += half + 7
    assert w.timer() == 7


def test_a_timer_has_24_or_32_bits() -> None:
    with pytest.raises(ValueError, match="24 or 32"):
        AcpiPm(timer_bits=31)


def test_the_timer_cannot_be_written() -> None:
    w = Wired()
    w.ticks += 99
    w.device.write(TIMER, 4, 0)
    assert w.timer() == 99


def test_a_wide_read_sees_one_moment_of_the_timer() -> None:
    w = Wired()
    w.ticks += 0x1234_5678
    assert [w.device.read(TIMER + place, 1) for place in range(4)] == [0x78, 0x56, 0x34, 0x12]
    assert w.device.read(TIMER + 1, 2) == 0x3456


def test_the_timer_interrupts_when_its_highest_bit_changes_if_the_guest_wants_it() -> None:
    w = Wired(24)
    (alarm,) = w.board.timers
    assert alarm.deadline is None, "nobody waits, nothing ticks"
    before = time.monotonic()
    w.device.write(ENABLE, 2, TMR)
    assert alarm.deadline is not None
    assert before + 2.3 < alarm.deadline < time.monotonic() + 2.4, "2 to the 23rd ticks"
    w.ticks += 1 << 23
    alarm.call()
    assert w.line.level
    assert alarm.deadline is None, "not before the guest has taken notice"
    w.device.write(STATUS, 2, TMR)
    assert not w.line.level
    assert alarm.deadline is not None
    w.device.write(ENABLE, 2, 0)
    assert alarm.deadline is None


# events and the interrupt


def test_the_power_button_interrupts_a_guest_that_listens() -> None:
    w = Wired()
    w.device.write(ENABLE, 2, PWRBTN)
    w.device.press_power_button()
    assert w.line.level
    assert w.device.read(STATUS, 2) == PWRBTN
    w.device.write(STATUS, 2, 0xFFFF & ~PWRBTN)
    assert w.line.level, "only a 1 clears"
    w.device.write(STATUS, 2, PWRBTN)
    assert (w.line.level, w.device.read(STATUS, 2)) == (False, 0)


def test_a_button_pressed_before_the_guest_listens_is_not_forgotten() -> None:
    w = Wired()
    w.device.press_power_button()
    assert not w.line.level
    w.device.write(ENABLE + 1, 1, PWRBTN >> 8)
    assert w.line.level
    w.device.write(STATUS + 1, 1, PWRBTN >> 8)
    assert not w.line.level


def test_enables_that_a_driver_sets_read_back_and_others_do_not() -> None:
    w = Wired()
    w.device.write(ENABLE, 2, 0xFFFF)
    assert w.device.read(ENABLE, 2) == 0x0721
    w.device.write(ENABLE, 1, 0)
    assert w.device.read(ENABLE, 2) == 0x0700
    assert w.device.read(STATUS, 4) == 0x0700_0000


def test_acpi_mode_is_always_on() -> None:
    w = Wired()
    assert w.device.read(CONTROL, 2) & 1
    w.device.write(CONTROL, 2, 0)
    assert w.device.read(CONTROL, 2) == 1


# ends


def test_sleep_type_5_switches_off_and_only_with_sleep_enable() -> None:
    w = Wired()
    w.device.write(CONTROL, 2, 5 << 10)
    assert w.board.ended == []
    assert w.device.read(CONTROL, 2) == 5 << 10 | 1
    w.device.write(CONTROL, 2, 5 << 10 | SLP_EN)
    assert w.board.ended == [("shutdown", None)]
    assert w.device.read(CONTROL, 2) == 5 << 10 | 1, "SLP_EN reads zero"


def test_a_driver_may_write_the_control_register_in_bytes_and_sleep_enable_last() -> None:
    w = Wired()
    w.device.write(CONTROL + 1, 1, 5 << 2)
    w.device.write(CONTROL, 1, 1)
    assert w.board.ended == []
    w.device.write(CONTROL + 1, 1, 5 << 2 | 1 << 5)
    assert w.board.ended == [("shutdown", None)]


def test_other_sleep_types_are_counted() -> None:
    w = Wired()
    w.device.write(CONTROL, 2, 3 << 10 | SLP_EN)
    assert w.board.ended == []
    assert w.device.counters == {"unknown_sleep_type": 1}


def test_the_reset_register_takes_its_value_only() -> None:
    w = Wired()
    w.device.write(RESET, 1, 6)
    assert w.board.ended == []
    assert w.device.counters == {"bad_reset_value": 1}
    w.device.write(RESET, 1, 1)
    assert w.board.ended == [("reset", None)]
    assert w.device.read(RESET, 1) == 0


def test_without_a_board_ends_are_counted() -> None:
    device = AcpiPm()
    device.write(CONTROL, 2, 5 << 10 | SLP_EN)
    device.write(RESET, 1, 1)
    assert device.counters == {"shutdown_without_board": 1, "reset_without_board": 1}


# life


def test_restored_registers_and_interrupt_are_as_they_were_and_the_timer_goes_on() -> None:
    w, other = Wired(), Wired()
    w.device.write(ENABLE, 2, PWRBTN | TMR)
    w.device.press_power_button()
    w.ticks += 1000
    other.device.restore(w.device.state())
    assert other.line.level
    assert other.timer() == 1000
    other.ticks += 5
    assert other.timer() == 1005
    assert [other.device.read(at, 2) for at in (STATUS, ENABLE, CONTROL)] == [PWRBTN, PWRBTN | TMR, 1]
    assert other.board.timers[0].deadline is not None


def test_reset_is_power_on() -> None:
    w = Wired()
    w.device.write(ENABLE, 2, PWRBTN)
    w.device.write(CONTROL, 2, 5 << 10)
    w.device.press_power_button()
    w.ticks += 77
    w.device.reset()
    assert (w.line.level, w.timer(), w.device.read(STATUS, 4), w.device.read(CONTROL, 2)) == (False, 0, 0, 1)


def test_it_can_be_elsewhere() -> None:
    board = RecordingBoard()
    device = AcpiPm(0xB000, 11)
    device.attach(board)
    (region,) = device.regions()
    assert (region.start, region.length, list(board.lines)) == (0xB000, 16, [11])


# hardware-reduced


def test_the_sleep_control_register_switches_off() -> None:
    board, device = RecordingBoard(), AcpiSleep()
    device.attach(board)
    device.write(0, 1, 5 << 2)
    assert (board.ended, device.read(0, 1)) == ([], 5 << 2)
    device.write(0, 1, 5 << 2 | 1 << 5)
    assert (board.ended, device.read(0, 1)) == ([("shutdown", None)], 5 << 2)
    assert device.read(1, 1) == 0
    device.write(1, 1, 0x80)
    device.write(2, 1, 1)
    assert board.ended == [("shutdown", None), ("reset", None)]


def test_what_the_sleep_registers_do_not_know_is_counted() -> None:
    board, device = RecordingBoard(), AcpiSleep()
    device.attach(board)
    device.write(0, 1, 1 << 2 | 1 << 5)
    device.write(2, 1, 0)
    assert board.ended == []
    assert device.counters == {"unknown_sleep_type": 1, "bad_reset_value": 1}


def test_the_sleep_type_is_kept_until_reset() -> None:
    device, other = AcpiSleep(), AcpiSleep()
    device.write(0, 1, 7 << 2)
    other.restore(device.state())
    assert other.read(0, 1) == 7 << 2
    other.reset()
    assert other.read(0, 1) == 0
