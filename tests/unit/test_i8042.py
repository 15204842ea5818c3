"""The keyboard controller as firmware and Linux probe it."""

from __future__ import annotations

import pytest

from device_board import RecordingBoard, RecordingLine
from kvmpy.devices.i8042 import I8042, Config, Status

DATA, COMMAND, PORT_92 = 0x00, 0x04, 0x32
ACK = 0xFA


class Wired:
    def __init__(self) -> None:
        self.board = RecordingBoard()
        self.device = I8042()
        self.device.attach(self.board)
        self.line: RecordingLine = self.board.lines[1]

    def command(self, value: int, *arguments: int) -> None:
        self.device.write(COMMAND, 1, value)
        self.data(*arguments)

    def data(self, *values: int) -> None:
        for value in values:
            self.device.write(DATA, 1, value)

    @property
    def status(self) -> int:
        return self.device.read(COMMAND, 1)

    def drain(self) -> list[int]:
        received = []
        while self.status & Status.OBF:
            received.append(self.device.read(DATA, 1))
        return received


def test_usual_ports_and_interrupt() -> None:
    device = I8042()
    assert [(region.start, region.length, region.base) for region in device.regions()] == [
        (0x60, 1, 0), (0x64, 1, 4), (0x92, 1, 0x32),
    ]  # fmt: skip
    assert device.irq == 1


def test_probe_by_self_test_and_port_test() -> None:
    w = Wired()
    w.command(0xAA)
    assert w.drain() == [0x55]
    w.command(0xAB)
    assert w.drain() == [0x00]
    assert w.status & Status.SYS


def test_status_never_reports_a_full_input_buffer() -> None:
    w = Wired()
    for value in range(0x100):
        w.device.write(COMMAND, 1, value)
        assert not w.status & Status.IBF


def test_status_tells_command_from_data() -> None:
    w = Wired()
    w.command(0x20)
    assert w.status & Status.COMMAND
    w.data(0xF4)
    assert not w.status & Status.COMMAND


def test_configuration_is_read_back_and_aux_stays_disabled() -> None:
    w = Wired()
    w.command(0x60, 0x00)
    w.command(0x20)
    assert w.drain() == [Config.AUX_DISABLED]
    w.command(0x60, 0x47)
    w.command(0x20)
    assert w.drain() == [0x47 | Config.AUX_DISABLED]


def test_controller_memory_is_read_back() -> None:
    w = Wired()
    w.command(0x7F, 0xA5)
    w.command(0x3F)
    assert w.drain() == [0xA5]


def test_aux_probe_is_answered_at_once_and_finds_nothing() -> None:
    """Linux waits 500 ms for each answer that does not come."""
    w = Wired()
    w.command(0xD3, 0x5A)
    assert w.status & (Status.OBF | Status.AUX_OBF) == Status.OBF
    assert w.drain() == [0x5A]
    w.command(0xA9)
    assert w.drain() == [0x01]
    w.command(0xD4, 0xFF)
    assert w.drain() == [0xFE]


def test_reset_by_pulse() -> None:
    w = Wired()
    w.command(0xFF)
    assert w.board.ended == []
    w.command(0xFE)
    assert w.board.ended == [("reset", None)]


def test_reset_by_output_port() -> None:
    w = Wired()
    w.command(0xD1, 0x03)
    assert w.board.ended == []
    w.command(0xD1, 0x02)
    assert w.board.ended == [("reset", None)]


def test_reset_by_port_92() -> None:
    w = Wired()
    w.device.write(PORT_92, 1, 0x03)
    assert w.board.ended == [("reset", None)]


def test_a20_follows_output_port_and_port_92_and_short_commands() -> None:
    w = Wired()
    seen = []
    w.command(0xD1, 0x01)
    seen.append(w.device.a20_enabled)
    w.command(0xD1, 0x03)
    seen.append(w.device.a20_enabled)
    w.device.write(PORT_92, 1, 0x00)
    seen.append(w.device.a20_enabled)
    w.device.write(PORT_92, 1, 0x02)
    seen.append(w.device.a20_enabled)
    w.command(0xDD)
    seen.append(w.device.a20_enabled)
    w.command(0xDF)
    seen.append(w.device.a20_enabled)
    assert seen == [False, True] * 3


@pytest.mark.parametrize("enabled", [False, True])
def test_a20_is_seen_in_output_port_and_port_92(enabled: bool) -> None:
    w = Wired()
    w.device.write(PORT_92, 1, enabled << 1)
    assert w.device.read(PORT_92, 1) == enabled << 1
    w.command(0xD0)
    assert w.drain() == [0x01 | enabled << 1]


# --- keyboard ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "answers"),
    [
        ([0xFF], [ACK, 0xAA]),
        ([0xEE], [0xEE]),
        ([0xF2], [ACK, 0xAB, 0x41]),
        ([0xED, 0x07], [ACK, ACK]),
        ([0xF3, 0x20], [ACK, ACK]),
        ([0xF0, 0x02], [ACK, ACK]),
        ([0xF0, 0x00], [ACK, ACK, 0x41]),
        ([0xF4], [ACK]),
        ([0xF5], [ACK]),
        ([0xF6], [ACK]),
        ([0xE0], [0xFE]),
        ([0xEE, 0xFE], [0xEE, 0xEE]),
    ],
)
def test_keyboard_answers(written: list[int], answers: list[int]) -> None:
    w = Wired()
    received = []
    for value in written:
        w.data(value)
        received += w.drain()
    assert received == answers


def test_identity_is_not_translated_when_translation_is_off() -> None:
    w = Wired()
    w.command(0x60, Config.SYS)
    w.data(0xF2)
    assert w.drain() == [ACK, 0xAB, 0x83]


def test_keyboard_remembers_its_scan_code_set() -> None:
    w = Wired()
    w.command(0x60, Config.SYS)
    w.data(0xF0, 0x03, 0xF0, 0x00)
    assert w.drain() == [ACK, ACK, ACK, ACK, 0x03]


def test_keys_raise_the_interrupt_once_each() -> None:
    w = Wired()
    w.device.press(b"\x1e\x9e")
    assert w.line.level
    assert w.drain() == [0x1E, 0x9E]
    assert w.line.history == [True, False, True, False]


def test_answers_of_the_controller_do_not_interrupt() -> None:
    w = Wired()
    w.command(0xAA)
    w.drain()
    w.command(0x20)
    w.drain()
    assert w.line.edges == 0


def test_byte_put_in_as_the_keyboards_interrupts() -> None:
    w = Wired()
    w.command(0xD2, 0x1E)
    assert w.line.level
    assert w.drain() == [0x1E]
    assert not w.line.level


def test_no_interrupt_unless_the_configuration_allows_it() -> None:
    w = Wired()
    w.command(0x60, Config.TRANSLATE)
    w.device.press(b"\x1e")
    assert w.status & Status.OBF
    assert not w.line.level
    w.command(0x60, Config.TRANSLATE | Config.KEYBOARD_INTERRUPT)
    assert w.line.level


def test_disabled_keyboard_holds_its_keys_back() -> None:
    w = Wired()
    w.command(0xAD)
    w.device.press(b"\x1e")
    assert w.drain() == []
    w.command(0xAE)
    assert w.drain() == [0x1E]


def test_byte_to_a_disabled_keyboard_enables_it() -> None:
    w = Wired()
    w.command(0xAD)
    w.data(0xEE)
    assert w.drain() == [0xEE]


def test_silenced_keyboard_drops_keys_and_counts_them() -> None:
    w = Wired()
    w.data(0xF5)
    w.drain()
    w.device.press(b"\x1e\x9e")
    assert w.drain() == []
    assert w.device.counters["scan_code_dropped"] == 2
    w.data(0xF4)
    w.drain()
    w.device.press(b"\x1e")
    assert w.drain() == [0x1E]


def test_reset_is_power_on() -> None:
    w = Wired()
    power_on = w.device.state()
    w.command(0x60, 0x00)
    w.device.write(PORT_92, 1, 0)
    w.device.press(b"\x1e")
    w.device.reset()
    assert w.device.state() == power_on
    assert not w.line.level


def test_state_with_a_key_waiting_and_an_argument_expected() -> None:
    w, copy = Wired(), Wired()
    w.device.press(b"\x1e\x9e")
    w.command(0x60)
    copy.device.restore(w.device.state())
    assert copy.line.level
    copy.data(0x00)
    assert not copy.line.level
    assert copy.drain() == [0x1E, 0x9E]
