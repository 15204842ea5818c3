"""The real-time clock and CMOS memory, with a clock that the test moves."""

from __future__ import annotations

import calendar
import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_board import RecordingBoard, RecordingLine
from kvmpy.devices import cmos
from kvmpy.devices.cmos import Cmos, RegisterA, RegisterB, RegisterC, RegisterD

SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM, WEEKDAY, DAY, MONTH, YEAR = range(10)
A, B, C, D = range(10, 14)
CENTURY = 0x32
KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30

# A Friday evening
START = calendar.timegm((2024, 2, 28 + 1, 22, 58, 57))


class Wired:
    def __init__(self, start: float = START, memory_below_4g: int = 0, memory_above_4g: int = 0, cpus: int = 1) -> None:
        self.time = float(start)
        self.board = RecordingBoard()
        self.device = Cmos(
            now=lambda: self.time, memory_below_4g=memory_below_4g, memory_above_4g=memory_above_4g, cpus=cpus
        )
        self.device.attach(self.board)
        self.line: RecordingLine = self.board.lines[8]

    def __getitem__(self, index: int) -> int:
        self.device.write(0, 1, index)
        return self.device.read(1, 1)

    def __setitem__(self, index: int, value: int) -> None:
        self.device.write(0, 1, index)
        self.device.write(1, 1, int(value))

    def registers(self) -> list[int]:
        return [self[index] for index in (CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS)]

    def little_endian(self, index: int, length: int) -> int:
        return int.from_bytes(bytes(self[index + place] for place in range(length)), "little")


def test_time_is_bcd_and_24_hours_after_power_on() -> None:
    w = Wired()
    assert w.registers() == [0x20, 0x24, 0x02, 0x29, 0x22, 0x58, 0x57]
    assert w[WEEKDAY] == 5  # Thursday; Sunday is 1


def test_time_in_binary() -> None:
    w = Wired()
    w[B] = RegisterB.BINARY | RegisterB.HOURS_24
    assert w.registers() == [20, 24, 2, 29, 22, 58, 57]


@pytest.mark.parametrize(
    ("hour", "register"), [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (22, 0x90), (23, 0x91)]
)
def test_time_in_12_hours(hour: int, register: int) -> None:
    w = Wired(calendar.timegm((2024, 1, 1, hour, 0, 0)))
    w[B] = 0
    assert w[HOURS] == register
    w[HOURS] = register
    assert w[HOURS] == register
    w[B] = RegisterB.HOURS_24 | RegisterB.BINARY
    assert w[HOURS] == hour


def test_clock_goes_on_over_midnight_month_and_year() -> None:
    w = Wired()
    w.time += 3600 + 63
    assert w.registers() == [0x20, 0x24, 0x03, 0x01, 0x00, 0x00, 0x00]
    assert w[WEEKDAY] == 6
    w.time = calendar.timegm((2099, 12, 31, 23, 59, 59))
    assert w.registers() == [0x20, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59]
    w.time += 1
    assert w.registers() == [0x21, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00]


@given(st.lists(st.floats(0, 40_000_000), max_size=6))
def test_clock_agrees_with_the_calendar_however_it_is_looked_at(steps: list[float]) -> None:
    w = Wired()
    w[B] = RegisterB.BINARY | RegisterB.HOURS_24
    for step in steps:
        w.time += step
        utc = time.gmtime(int(w.time))
        assert w.registers() == [utc.tm_year // 100, utc.tm_year % 100, *utc[1:6]]
        assert w[WEEKDAY] == (utc.tm_wday + 1) % 7 + 1


def test_time_set_by_the_guest_keeps_its_distance() -> None:
    w = Wired()
    w[B] = w[B] | RegisterB.SET
    w[CENTURY], w[YEAR], w[MONTH], w[DAY] = 0x19, 0x99, 0x12, 0x31
    w[HOURS], w[MINUTES], w[SECONDS] = 0x23, 0x59, 0x58
    w[B] = w[B] & ~RegisterB.SET
    w.time += 3
    assert w.registers() == [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x01]


def test_time_set_register_by_register_while_running() -> None:
    """On the way the date is 31 February; it must not become another one before it is complete."""
    w = Wired(calendar.timegm((2023, 1, 31, 12, 0, 0)))
    w[MONTH] = 0x02
    assert (w[MONTH], w[DAY]) == (0x02, 0x31)
    w[DAY] = 0x15
    assert (w[MONTH], w[DAY]) == (0x02, 0x15)


def test_clock_stands_while_set_or_while_the_divider_is_reset() -> None:
    for index, value in ((B, RegisterB.SET | RegisterB.HOURS_24), (A, 0x76)):
        w = Wired()
        running = w[index]
        w[index] = value
        w.time += 10
        assert w[SECONDS] == 0x57
        w[index] = running
        assert w[SECONDS] == 0x57
        w.time += 2
        assert w[SECONDS] == 0x59


def test_time_before_the_clock_is_stopped_counts() -> None:
    w = Wired()
    w.time += 10
    w[B] = RegisterB.SET | RegisterB.HOURS_24
    w.time += 10
    assert w[SECONDS] == 0x07


def test_time_that_does_not_exist_is_counted() -> None:
    w = Wired()
    w[HOURS] = 0x99
    assert w[HOURS] == 0x03
    assert w.device.counters["invalid_time"] == 1


def test_update_in_progress_shortly_before_the_second_only() -> None:
    w = Wired(START)
    seen = []
    for fraction in (0.0, 0.5, 0.9997, 0.9998, 0.99999, 1.0):
        w.time = START + fraction
        seen.append(bool(w[A] & RegisterA.UIP))
    assert seen == [False, False, False, True, True, False]


def test_update_in_progress_is_never_seen_while_the_clock_is_set() -> None:
    w = Wired(START)
    w[B] = RegisterB.SET
    w.time += 0.9999
    assert not w[A] & RegisterA.UIP


def test_battery_is_good_and_cannot_be_written() -> None:
    w = Wired()
    w[D] = 0
    w[C] = 0xFF
    assert w[D] == RegisterD.VRT
    assert w[C] == 0
    assert w.device.counters["read_only_write"] == 2


# --- flags and interrupts ------------------------------------------------------------------------------------------


def test_update_flag_once_for_any_number_of_updates() -> None:
    w = Wired()
    w[A] = 0x20  # no periodic rate
    assert w[C] == 0
    w.time += 0.5
    assert w[C] == 0
    w.time += 2
    assert w[C] == RegisterC.UF
    assert w[C] == 0


def test_update_interrupt_is_raised_by_poll_and_ended_by_reading_c() -> None:
    w = Wired()
    w[A] = 0x20
    w[B] = RegisterB.HOURS_24 | RegisterB.UIE
    w.device.poll()
    assert not w.line.level
    w.time += 1
    w.device.poll()
    assert w.line.level
    assert w[C] == RegisterC.IRQF | RegisterC.UF
    assert not w.line.level


def test_set_bit_disables_the_update_interrupt() -> None:
    w = Wired()
    w[B] = RegisterB.SET | RegisterB.UIE
    assert w[B] == RegisterB.SET


@pytest.mark.parametrize(
    ("rate", "period"), [(0x6, 1 / 1024), (0xF, 0.5), (0x3, 1 / 8192), (0x1, 1 / 256), (0x2, 1 / 128)]
)
def test_periodic_flag_follows_the_rate(rate: int, period: float) -> None:
    w = Wired()
    w[A] = 0x20 | rate
    w[C]
    w.time += period * 0.75
    assert w[C] & RegisterC.PF == 0
    w.time += period * 0.5
    assert w[C] & RegisterC.PF == RegisterC.PF


@pytest.mark.parametrize(
    ("alarm", "after", "rings"),
    [
        ((0x22, 0x58, 0x59), 1, False),
        ((0x22, 0x58, 0x59), 2, True),
        ((0x22, 0x58, 0x59), 3, True),
        ((0x22, 0x58, 0x57), 86_399, False),
        ((0x22, 0x58, 0x57), 86_400, True),
        ((0xFF, 0xFF, 0xFF), 1, True),
        ((0xC0, 0xC0, 0x05), 7, False),
        ((0xC0, 0xC0, 0x05), 8, True),
        ((0xC0, 0x01, 0x00), 122, False),
        ((0xC0, 0x01, 0x00), 123, True),
        ((0x03, 0xC0, 0x00), 3600 * 4 + 62, False),
        ((0x03, 0xC0, 0x00), 3600 * 4 + 63, True),
        ((0x22, 0x58, 0x7A), 10 * 86_400, False),
        ((0x25, 0x00, 0x00), 10 * 86_400, False),
    ],
)
def test_alarm(alarm: tuple[int, int, int], after: int, rings: bool) -> None:
    w = Wired()
    w[HOURS_ALARM], w[MINUTES_ALARM], w[SECONDS_ALARM] = alarm
    w[C]
    w.time += after
    assert bool(w[C] & RegisterC.AF) == rings


def test_alarm_is_found_across_a_look_at_the_clock() -> None:
    w = Wired()
    w[HOURS_ALARM], w[MINUTES_ALARM], w[SECONDS_ALARM] = 0x22, 0x58, 0x59
    w[C]
    w.time += 10
    assert w[SECONDS] == 0x07
    assert w[C] & RegisterC.AF


def test_alarm_at_the_second_to_which_a_look_has_moved_the_clock_is_found() -> None:
    w = Wired(START + 0.5)
    w[HOURS_ALARM], w[MINUTES_ALARM], w[SECONDS_ALARM] = 0x22, 0x58, 0x58
    w[C]
    w.time += 0.75
    assert w[SECONDS] == 0x58
    assert w[C] & RegisterC.AF


# --- the timer ------------------------------------------------------------------------------------------------------


NOW = 1000.0


@pytest.fixture
def standing_monotonic(monkeypatch: pytest.MonkeyPatch) -> None:
    """`time.monotonic()` stands at NOW for the device, however long a busy host takes for the test."""
    monkeypatch.setattr(cmos, "time", SimpleNamespace(monotonic=lambda: NOW, gmtime=time.gmtime))


def sleep(w: Wired) -> float:
    """Let time pass until the timer rings, and ring; answers how long that was."""
    (timer,) = w.board.timers
    assert timer.deadline is not None, "nothing would ever happen"
    passed = timer.deadline - NOW
    w.time += passed
    timer.deadline = None
    timer.call()
    return passed


def test_no_timer_is_set_while_no_interrupt_is_enabled() -> None:
    w = Wired()
    w[B] = RegisterB.HOURS_24
    w[SECONDS_ALARM] = 0x59
    assert w[C] == 0
    assert w.board.timers[0].deadline is None


@pytest.mark.usefixtures("standing_monotonic")
def test_the_timer_raises_the_update_interrupt_each_second_once_the_last_was_seen() -> None:
    w = Wired(START + 0.25)
    w[A] = 0x20
    w[B] = RegisterB.HOURS_24 | RegisterB.UIE
    assert sleep(w) == 0.75
    assert w.line.level
    assert w.board.timers[0].deadline is None  # the line is up: what else happens changes nothing
    assert w[C] == RegisterC.IRQF | RegisterC.UF
    assert sleep(w) == 1
    assert w.line.level


@pytest.mark.usefixtures("standing_monotonic")
def test_the_timer_raises_the_alarm_though_it_looks_at_the_clock_on_the_way() -> None:
    w = Wired()  # at 22:58:57
    w[HOURS_ALARM], w[MINUTES_ALARM], w[SECONDS_ALARM] = 0x23, 0x01, 0x00
    w[B] = RegisterB.HOURS_24 | RegisterB.AIE
    assert sleep(w) == 60
    assert not w.line.level
    assert sleep(w) == 60
    assert not w.line.level
    assert sleep(w) == 3
    assert w.line.level
    assert w[C] & RegisterC.AF


@pytest.mark.usefixtures("standing_monotonic")
def test_the_timer_follows_the_periodic_rate() -> None:
    w = Wired()
    w[A] = 0x2E  # four times a second
    w[B] = RegisterB.HOURS_24 | RegisterB.PIE
    for _ in range(3):
        assert sleep(w) == 0.25
        assert w.line.level
        assert w[C] == RegisterC.IRQF | RegisterC.PF | (w.device.state()["ram"][C] & RegisterC.UF)
    w[A] = 0x20  # none
    assert w.board.timers[0].deadline is None


@pytest.mark.usefixtures("standing_monotonic")
def test_reset_stops_the_timer_and_a_restored_clock_sets_its_own() -> None:
    w, other = Wired(), Wired()
    w[B] = RegisterB.HOURS_24 | RegisterB.UIE
    state = w.device.state()
    w.device.reset()
    assert w.board.timers[0].deadline is None
    other.device.restore(state)
    sleep(other)
    assert other.line.level


def test_reset_ends_interrupts_and_keeps_time_and_memory() -> None:
    w = Wired()
    w[B] = RegisterB.HOURS_24 | RegisterB.UIE | RegisterB.AIE
    w[0x0F] = 0x0A
    w[HOURS] = 0x11
    w.time += 1
    w.device.poll()
    assert w.line.level
    w.device.reset()
    assert not w.line.level
    assert w[B] == RegisterB.HOURS_24
    assert w[C] == 0
    assert w[0x0F] == 0x0A
    assert w[HOURS] == 0x11


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("below", "above", "base", "extended", "beyond_16m", "beyond_4g"),
    [
        (64 * KiB, 0, 64, 0, 0, 0),
        (640 * KiB, 0, 640, 0, 0, 0),
        (16 * MiB, 0, 640, 15 * 1024, 0, 0),
        (128 * MiB, 0, 640, 0xFFFF, 112 * 16, 0),
        (3 * GiB, 5 * GiB, 640, 0xFFFF, (3 * 1024 - 16) * 16, 5 * 1024 * 16),
    ],
)
def test_memory_size_is_where_firmware_looks(
    below: int, above: int, base: int, extended: int, beyond_16m: int, beyond_4g: int
) -> None:
    w = Wired(memory_below_4g=below, memory_above_4g=above)
    assert w.little_endian(0x15, 2) == base
    assert w.little_endian(0x17, 2) == extended
    assert w.little_endian(0x30, 2) == extended
    assert w.little_endian(0x34, 2) == beyond_16m
    assert w.little_endian(0x5B, 3) == beyond_4g


def test_number_of_cpus_less_one() -> None:
    assert Wired(cpus=4)[0x5F] == 3
    with pytest.raises(ValueError, match="cpus"):
        Cmos(cpus=0)
    with pytest.raises(ValueError, match="cpus"):
        Cmos(cpus=257)


@pytest.mark.parametrize(
    ("order", "first_two", "third"), [("cd", 0x32, 0x01), ("acd", 0x21, 0x31), ("n", 0x04, 0x01), ("", 0, 1)]
)
def test_boot_order(order: str, first_two: int, third: int) -> None:
    device = Cmos(boot_order=order)
    device.write(0, 1, 0x3D)
    assert device.read(1, 1) == first_two
    device.write(0, 1, 0x38)
    assert device.read(1, 1) == third


@pytest.mark.parametrize("order", ["x", "cdna"])
def test_boot_order_that_cannot_be_is_refused(order: str) -> None:
    with pytest.raises(ValueError, match="boot_order"):
        Cmos(boot_order=order)


def test_checksum_covers_the_standard_area() -> None:
    w = Wired(memory_below_4g=64 * MiB)
    assert w[0x2E] << 8 | w[0x2F] == sum(w[index] for index in range(0x10, 0x2E))


def test_memory_keeps_what_is_written_and_ignores_the_nmi_bit_of_the_index() -> None:
    w = Wired()
    w[0x40] = 0xA5
    assert w[0x40 | 0x80] == 0xA5
    assert w.device.read(0, 1) == 0xFF


def test_restored_clock_has_gone_on_meanwhile() -> None:
    w = Wired()
    w[HOURS] = 0x01
    state = w.device.state()
    later = Wired(START + 61)
    later.device.restore(state)
    assert later.registers()[4:] == [0x01, 0x59, 0x58]
