"""The 8254's six modes, its ways of being read, and port 0x61, on a clock that counts in ticks of the chip."""

from __future__ import annotations

import pytest

from device_board import RecordingBoard, RecordingLine
from kvmpy.devices.pit import FREQUENCY, Pit8254

CONTROL = 3
PORT_61 = 0x21


class Wired:
    def __init__(self) -> None:
        self.ticks = 1_000_000
        self.board = RecordingBoard()
        self.device = Pit8254(now=self.now)
        self.device.attach(self.board)
        self.line: RecordingLine = self.board.lines[0]

    def now(self) -> int:
        return -(-self.ticks * 1_000_000_000 // FREQUENCY)

    def program(self, counter: int, mode: int, count: int, *, bcd: bool = False) -> None:
        self.device.write(CONTROL, 1, counter << 6 | 0x30 | mode << 1 | bcd)
        self.load(counter, count)

    def load(self, counter: int, count: int) -> None:
        self.device.write(counter, 1, count & 0xFF)
        self.device.write(counter, 1, count >> 8)

    def count(self, counter: int) -> int:
        return self.device.read(counter, 1) | self.device.read(counter, 1) << 8

    def status(self, counter: int) -> int:
        self.device.write(CONTROL, 1, 0xE0 | 2 << counter)
        return self.device.read(counter, 1)

    def out(self, counter: int) -> bool:
        return bool(self.status(counter) & 0x80)

    def wave(self, counter: int, ticks: int) -> str:
        """OUT, tick by tick from now on."""
        levels = ""
        for _ in range(ticks):
            levels += "-" if self.out(counter) else "_"
            self.ticks += 1
        return levels


def test_mode_0_goes_up_at_the_end_and_counts_on() -> None:
    w = Wired()
    w.program(0, 0, 5)
    assert w.wave(0, 8) == "_____---"
    assert w.count(0) == 0xFFFD


def test_mode_0_is_low_from_the_control_word_on() -> None:
    w = Wired()
    w.device.write(CONTROL, 1, 0x30)
    w.ticks += 100
    assert not w.out(0)
    assert w.status(0) & 0x40


def test_mode_0_first_byte_of_a_new_count_stops_it() -> None:
    w = Wired()
    w.program(0, 0, 5)
    w.device.write(0, 1, 0x03)
    w.ticks += 10
    assert not w.out(0)
    w.device.write(0, 1, 0x00)
    assert w.wave(0, 5) == "___--"


def test_mode_2_is_low_for_the_last_tick_of_each_period() -> None:
    w = Wired()
    w.program(0, 2, 4)
    assert w.wave(0, 10) == "---_---_--"


@pytest.mark.parametrize(("count", "wave"), [(4, "--__--__"), (5, "---__---__")])
def test_mode_3_is_a_square_wave(count: int, wave: str) -> None:
    w = Wired()
    w.program(0, 3, count)
    assert w.wave(0, len(wave)) == wave


def test_mode_4_strobes_once() -> None:
    w = Wired()
    w.program(0, 4, 3)
    assert w.wave(0, 8) == "---_----"


@pytest.mark.parametrize(("mode", "wave"), [(1, "___----"), (5, "---_---")])
def test_modes_1_and_5_start_by_the_gate(mode: int, wave: str) -> None:
    w = Wired()
    w.program(2, mode, 3)
    assert w.wave(2, 5) == "-----"
    w.device.write(PORT_61, 1, 1)
    assert w.wave(2, 7) == wave
    w.device.write(PORT_61, 1, 0)
    w.device.write(PORT_61, 1, 1)
    assert w.wave(2, 7) == wave


@pytest.mark.parametrize(("mode", "same_as"), [(6, 2), (7, 3)])
def test_modes_6_and_7_are_2_and_3(mode: int, same_as: int) -> None:
    w = Wired()
    w.program(0, mode, 4)
    assert w.status(0) >> 1 & 7 == same_as


def test_count_of_zero_is_the_longest() -> None:
    w = Wired()
    w.program(0, 0, 0)
    w.ticks += 0xFFFF
    assert not w.out(0)
    assert w.count(0) == 1
    w.ticks += 1
    assert w.out(0)


def test_bcd_counts_in_decimal() -> None:
    w = Wired()
    w.program(0, 0, 0x1000, bcd=True)
    w.ticks += 1
    assert w.count(0) == 0x0999
    w.ticks += 1000
    assert w.count(0) == 0x9999
    w.program(0, 2, 0, bcd=True)
    w.ticks += 1
    assert w.count(0) == 0x9999


def test_new_count_in_mode_2_waits_for_the_end_of_the_period() -> None:
    w = Wired()
    w.program(0, 2, 6)
    w.ticks += 2
    w.load(0, 3)
    assert w.status(0) & 0x40
    assert w.wave(0, 10) == "---_--_--_"
    assert not w.status(0) & 0x40


def test_latch_freezes_the_count_until_it_is_read() -> None:
    w = Wired()
    w.program(0, 2, 0x1234)
    w.device.write(CONTROL, 1, 0x00)
    w.ticks += 7
    w.device.write(CONTROL, 1, 0x00)
    assert w.count(0) == 0x1234
    assert w.count(0) == 0x1234 - 7


def test_latch_between_the_two_bytes_of_a_read_starts_with_the_first_again() -> None:
    w = Wired()
    w.program(0, 2, 0x1234)
    assert w.device.read(0, 1) == 0x34
    w.device.write(CONTROL, 1, 0x00)
    assert w.count(0) == 0x1234
    assert w.count(0) == 0x1234


def test_read_back_gives_status_first_then_the_count() -> None:
    w = Wired()
    w.program(1, 2, 0x1234)
    w.device.write(CONTROL, 1, 0xC0 | 2 << 1)
    w.ticks += 7
    assert w.device.read(1, 1) == 0x80 | 0x30 | 2 << 1
    assert w.count(1) == 0x1234
    assert w.count(1) == 0x1234 - 7


@pytest.mark.parametrize(("access", "expected"), [(1, [0x34, 0x34]), (2, [0x12, 0x12]), (3, [0x34, 0x12])])
def test_access_modes_choose_the_bytes(access: int, expected: list[int]) -> None:
    w = Wired()
    w.program(0, 2, 0x1234)
    w.ticks += 0x1234 * 3
    w.device.write(CONTROL, 1, access << 4 | 2 << 1)
    for byte in {1: [0x34], 2: [0x12], 3: [0x34, 0x12]}[access]:
        w.device.write(0, 1, byte)
    assert [w.device.read(0, 1), w.device.read(0, 1)] == expected


def test_control_word_cannot_be_read() -> None:
    assert Wired().device.read(CONTROL, 1) == 0xFF


def test_port_61_gates_counter_2_and_shows_its_output() -> None:
    """How firmware and kernels measure the processor's speed."""
    w = Wired()
    w.device.write(PORT_61, 1, 0)
    w.program(2, 0, 100)
    w.ticks += 1000
    assert not w.device.read(PORT_61, 1) & 0x20
    w.device.write(PORT_61, 1, 1)
    w.ticks += 99
    assert w.device.read(PORT_61, 1) & 0x21 == 0x01
    w.ticks += 1
    assert w.device.read(PORT_61, 1) & 0x21 == 0x21


def test_gate_of_mode_0_only_interrupts_the_count() -> None:
    w = Wired()
    w.device.write(PORT_61, 1, 1)
    w.program(2, 0, 100)
    w.ticks += 60
    w.device.write(PORT_61, 1, 0)
    w.ticks += 1000
    assert w.count(2) == 40
    w.device.write(PORT_61, 1, 1)
    w.ticks += 39
    assert not w.out(2)
    w.ticks += 1
    assert w.out(2)


def test_port_61_keeps_the_speaker_bit_and_toggles_refresh() -> None:
    w = Wired()
    w.device.write(PORT_61, 1, 2)
    assert w.device.speaker
    assert w.device.read(PORT_61, 1) & 0x03 == 2
    seen = set()
    for _ in range(40):
        w.ticks += 1
        seen.add(w.device.read(PORT_61, 1) & 0x10)
    assert seen == {0x00, 0x10}


# --- interrupts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [2, 3])
def test_poll_interrupts_at_each_period_and_says_when_the_next_is_due(mode: int) -> None:
    w = Wired()
    w.program(0, mode, 1000)
    due = w.device.poll()
    assert due is not None
    assert w.line.edges == 0
    w.ticks += 999
    w.device.poll()
    assert w.line.edges == 0
    w.ticks += 1
    assert w.now() >= due
    w.device.poll()
    w.device.poll()
    assert w.line.history == [True, False]
    w.ticks += 1000
    w.device.poll()
    assert w.line.edges == 2


def test_poll_that_comes_late_interrupts_once_and_counts_the_rest() -> None:
    w = Wired()
    w.program(0, 2, 1000)
    w.ticks += 5500
    w.device.poll()
    assert w.line.edges == 1
    assert w.device.counters["tick_lost"] == 4


def test_poll_in_mode_0_interrupts_once_and_has_nothing_more_to_come() -> None:
    w = Wired()
    w.program(0, 0, 1000)
    assert w.device.poll() is not None
    w.ticks += 1000
    assert w.device.poll() is None
    assert w.line.edges == 1
    w.ticks += 100_000
    assert w.device.poll() is None
    assert w.line.edges == 1


def test_poll_counts_the_period_in_which_the_count_changes() -> None:
    w = Wired()
    w.program(0, 2, 1000)
    w.ticks += 500
    w.load(0, 100)
    w.ticks += 500
    w.device.poll()
    assert w.line.edges == 1
    w.ticks += 100
    w.device.poll()
    assert w.line.edges == 2
    assert w.device.counters["tick_lost"] == 0


def test_poll_of_a_timer_that_was_never_programmed() -> None:
    w = Wired()
    assert w.device.poll() is None
    assert w.line.edges == 0


def test_restored_timer_goes_on_where_it_was_though_the_clock_is_another() -> None:
    w, other = Wired(), Wired()
    w.program(0, 2, 1000)
    w.ticks += 400
    other.ticks = 77
    other.device.restore(w.device.state())
    assert other.count(0) == 600
    other.ticks += 600
    other.device.poll()
    assert other.line.edges == 1


def test_the_timer_ticks_at_each_period_until_the_mode_ends() -> None:
    w = Wired()
    (timer,) = w.board.timers
    assert timer.deadline is None
    w.program(0, 2, 0x2000)
    for edges in (1, 2, 3):
        assert timer.deadline is not None
        w.ticks += 0x2000
        timer.call()
        assert w.line.edges == edges
    w.device.write(CONTROL, 1, 0x30)  # mode 0, and no count yet
    assert timer.deadline is None
