"""The 16550 as its data sheet says, seen from the guest's side of the registers."""

from __future__ import annotations

import os
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_board import RecordingBoard, RecordingLine
from kvmpy.devices.uart16550 import Fcr, Ier, Iir, Lcr, Lsr, Mcr, Msr, Uart16550

THR = RBR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR = 3
MCR = 4
LSR = 5
MSR = 6
SCR = 7
FIFOS = 0xC0


class Wired:
    """A UART on a board, with the accesses a guest makes."""

    def __init__(self, *, ier: int = 0, fcr: int = 0, mcr: int = Mcr.OUT2) -> None:
        self.board = RecordingBoard()
        self.uart = Uart16550()
        self.uart.attach(self.board)
        self.line: RecordingLine = self.board.lines[4]
        self.write(FCR, fcr)
        self.write(MCR, mcr)
        self.write(IER, ier)

    def write(self, register: int, value: int) -> None:
        self.uart.write(register, 1, int(value))

    def read(self, register: int) -> int:
        return self.uart.read(register, 1)

    def drain(self) -> bytes:
        received = bytearray()
        while self.read(LSR) & Lsr.DR:
            received.append(self.read(RBR))
        return bytes(received)


def test_usual_place_is_com1() -> None:
    uart = Uart16550()
    (region,) = uart.regions()
    assert (region.kind, region.start, region.length, region.width, uart.irq) == ("port", 0x3F8, 8, 1, 4)
    (other,) = Uart16550(port=0x2F8, irq=3).regions()
    assert other.start == 0x2F8


def test_registers_after_power_on() -> None:
    w = Wired(mcr=0)
    assert w.read(IER) == 0
    assert w.read(IIR) == Iir.NOT_PENDING
    assert w.read(LCR) == 0
    assert w.read(MCR) == 0
    assert w.read(LSR) == Lsr.THRE | Lsr.TEMT
    assert w.read(MSR) == Msr.CTS | Msr.DSR | Msr.DCD
    assert not w.line.history


def test_written_characters_are_output_and_thr_is_empty_again() -> None:
    w = Wired()
    for character in b"Hi\xc3\xa9\n":
        w.write(THR, character)
        assert w.read(LSR) == Lsr.THRE | Lsr.TEMT
    assert w.uart.output == b"Hi\xc3\xa9\n"
    assert w.uart.text == "Hi\u00e9\n"


def test_dlab_hides_data_and_interrupt_enable() -> None:
    w = Wired()
    w.write(IER, 0x05)
    w.write(LCR, Lcr.DLAB | Lcr.WLS0 | Lcr.WLS1)
    w.write(DLL, 0x34)
    w.write(DLM, 0x12)
    assert (w.read(DLL), w.read(DLM)) == (0x34, 0x12)
    assert w.uart.output == b""
    w.write(LCR, 0x03)
    assert w.read(IER) == 0x05
    w.write(THR, ord("x"))
    assert w.uart.output == b"x"
    w.write(LCR, Lcr.DLAB)
    assert (w.read(DLL), w.read(DLM)) == (0x34, 0x12)


def test_scratch_register_keeps_its_value() -> None:
    w = Wired()
    for value in (0x00, 0xFF, 0x5A):
        w.write(SCR, value)
        assert w.read(SCR) == value


def test_bits_that_do_not_exist_read_as_zero() -> None:
    w = Wired()
    w.write(IER, 0xFF)
    w.write(MCR, 0xFF)
    assert w.read(IER) == 0x0F
    assert w.read(MCR) == 0x1F


@pytest.mark.parametrize("register", [LSR, MSR])
def test_write_to_status_register_changes_nothing_and_is_counted(register: int) -> None:
    w = Wired()
    before = w.uart.state()
    w.write(register, 0xFF)
    assert w.uart.state() == before
    assert w.uart.counters["read_only_write"] == 1


def test_iir_tells_whether_fifos_are_on() -> None:
    w = Wired()
    assert w.read(IIR) & FIFOS == 0
    w.write(FCR, Fcr.ENABLE)
    assert w.read(IIR) & FIFOS == FIFOS
    w.write(FCR, 0)
    assert w.read(IIR) & FIFOS == 0


# --- input ---------------------------------------------------------------------------------------------------------


def test_without_fifo_one_character_at_a_time_and_none_is_lost() -> None:
    w = Wired()
    w.uart.send(b"abc")
    assert len(w.uart.state()["fifo"]) == 1
    assert w.drain() == b"abc"
    assert w.read(RBR) == 0
    assert w.uart.counters["overrun"] == 0


def test_fifo_full_keeps_the_rest_on_the_host() -> None:
    w = Wired(fcr=Fcr.ENABLE)
    data = bytes(range(100))
    w.uart.send(data)
    assert len(w.uart.state()["fifo"]) == 16
    assert w.uart.unread == 100
    assert w.drain() == data
    assert w.uart.unread == 0


def test_text_is_sent_as_utf8() -> None:
    w = Wired(fcr=Fcr.ENABLE)
    w.uart.send("\u00e9")
    assert w.drain() == b"\xc3\xa9"


def test_reset_of_the_receiver_fifo_discards_what_is_in_it_only() -> None:
    w = Wired(fcr=Fcr.ENABLE)
    w.uart.send(bytes(range(20)))
    w.write(FCR, Fcr.ENABLE | Fcr.RESET_RECEIVER)
    assert w.drain() == bytes(range(16, 20))
    assert w.uart.counters["fifo_reset"] == 16


def test_reset_of_the_transmitter_fifo_leaves_the_receiver_alone() -> None:
    w = Wired(fcr=Fcr.ENABLE)
    w.uart.send(b"keep")
    w.write(FCR, Fcr.ENABLE | Fcr.RESET_TRANSMITTER)
    assert w.drain() == b"keep"


def test_fifo_bits_are_ignored_without_the_enable_bit() -> None:
    w = Wired(ier=Ier.ERBFI)
    w.write(FCR, 0xC0 | Fcr.RESET_RECEIVER)
    w.uart.send(b"x")
    assert w.read(IIR) == Iir.RECEIVED_DATA
    assert w.uart.state()["trigger"] == 1


# --- interrupts ----------------------------------------------------------------------------------------------------


def test_received_data_raises_the_line_until_it_is_read() -> None:
    w = Wired(ier=Ier.ERBFI)
    w.uart.send(b"x")
    assert w.line.level
    assert w.read(IIR) == Iir.RECEIVED_DATA
    assert w.line.level
    assert w.read(RBR) == ord("x")
    assert not w.line.level
    assert w.read(IIR) == Iir.NOT_PENDING


def test_each_character_without_fifo_gives_an_edge() -> None:
    """A handler that reads one character and ends must be called again, also by an edge-triggered controller."""
    w = Wired(ier=Ier.ERBFI)
    w.uart.send(b"abc")
    received = bytearray()
    handled = 0
    while w.line.edges > handled:
        handled = w.line.edges
        received.append(w.read(RBR))
    assert received == b"abc"
    assert w.line.history == [True, False] * 3


@pytest.mark.parametrize(("bits", "level"), [(0x00, 1), (0x40, 4), (0x80, 8), (0xC0, 14)])
def test_trigger_level_tells_data_from_timeout(bits: int, level: int) -> None:
    w = Wired(ier=Ier.ERBFI, fcr=Fcr.ENABLE | bits)
    w.uart.send(bytes(level))
    assert w.read(IIR) == FIFOS | Iir.RECEIVED_DATA
    w.read(RBR)
    expected = Iir.NOT_PENDING if level == 1 else Iir.CHARACTER_TIMEOUT
    assert w.read(IIR) == FIFOS | expected
    assert w.line.level == (level > 1)


def test_read_after_character_timeout_gives_a_new_edge_while_data_is_left() -> None:
    w = Wired(ier=Ier.ERBFI, fcr=Fcr.ENABLE | 0x80)
    w.uart.send(b"ab")
    assert w.read(IIR) == FIFOS | Iir.CHARACTER_TIMEOUT
    w.read(RBR)
    assert w.line.history == [True, False, True]
    w.read(RBR)
    assert w.line.history == [True, False, True, False]


def test_enabling_the_thr_interrupt_raises_it_at_once() -> None:
    w = Wired(ier=Ier.ETBEI)
    assert w.line.level
    assert w.read(IIR) == Iir.THR_EMPTY


def test_thr_interrupt_is_cleared_by_reading_iir() -> None:
    w = Wired(ier=Ier.ETBEI)
    w.read(IIR)
    assert not w.line.level
    assert w.read(IIR) == Iir.NOT_PENDING
    assert w.read(LSR) & Lsr.THRE


def test_thr_interrupt_comes_again_when_it_is_enabled_again() -> None:
    """Linux probes for UARTs that fail here and falls back to polling with a timer."""
    w = Wired(ier=Ier.ETBEI)
    w.read(IIR)
    w.write(IER, Ier.ETBEI)
    assert w.read(IIR) == Iir.NOT_PENDING
    w.write(IER, 0)
    w.write(IER, Ier.ETBEI)
    assert w.read(IIR) == Iir.THR_EMPTY


def test_write_to_thr_gives_an_edge_even_if_iir_was_not_read() -> None:
    w = Wired(ier=Ier.ETBEI)
    w.write(THR, ord("a"))
    w.write(THR, ord("b"))
    assert w.line.history == [True, False, True, False, True]
    assert w.uart.output == b"ab"


def test_thr_interrupt_survives_reading_iir_for_a_higher_source() -> None:
    w = Wired(ier=Ier.ETBEI | Ier.ERBFI)
    w.uart.send(b"x")
    assert w.read(IIR) == Iir.RECEIVED_DATA
    w.read(RBR)
    assert w.read(IIR) == Iir.THR_EMPTY
    assert w.read(IIR) == Iir.NOT_PENDING


def test_priorities_from_line_status_down_to_modem_status() -> None:
    w = Wired(ier=0x0F)
    w.uart.set_modem_inputs(Msr.DSR | Msr.DCD)
    w.uart.send_break()
    seen = [w.read(IIR)]
    w.read(LSR)
    seen.append(w.read(IIR))
    w.read(RBR)
    seen.append(w.read(IIR))
    seen.append(w.read(IIR))
    assert w.line.level
    w.read(MSR)
    seen.append(w.read(IIR))
    assert seen == [Iir.LINE_STATUS, Iir.RECEIVED_DATA, Iir.THR_EMPTY, Iir.MODEM_STATUS, Iir.NOT_PENDING]
    assert not w.line.level


def test_out2_connects_the_interrupt_to_the_bus() -> None:
    w = Wired(ier=Ier.ETBEI, mcr=0)
    assert not w.line.history
    assert w.uart.state()["thre_pending"]
    w.write(MCR, Mcr.OUT2)
    assert w.line.level
    w.write(MCR, Mcr.DTR)
    assert not w.line.level


def test_disabling_an_interrupt_lowers_the_line() -> None:
    w = Wired(ier=Ier.ERBFI)
    w.uart.send(b"x")
    w.write(IER, 0)
    assert not w.line.level
    w.write(IER, Ier.ERBFI)
    assert w.line.level


# --- errors on the line --------------------------------------------------------------------------------------------


def test_break_is_a_zero_character_with_error_bits_shown_once() -> None:
    w = Wired(ier=Ier.ELSI)
    w.uart.send_break()
    assert w.line.level
    assert w.read(LSR) == Lsr.THRE | Lsr.TEMT | Lsr.DR | Lsr.BI | Lsr.FE
    assert not w.line.level
    assert w.read(LSR) == Lsr.THRE | Lsr.TEMT | Lsr.DR
    assert w.read(RBR) == 0


def test_error_in_the_fifo_is_announced_and_shown_when_it_reaches_the_top() -> None:
    w = Wired(fcr=Fcr.ENABLE, ier=Ier.ELSI)
    w.uart.send(b"a")
    w.uart.send_break()
    w.uart.send(b"b")
    assert w.read(LSR) & (Lsr.FIFO_ERROR | Lsr.BI) == Lsr.FIFO_ERROR
    assert not w.line.level
    assert w.read(RBR) == ord("a")
    assert w.line.level
    assert w.read(LSR) & (Lsr.FIFO_ERROR | Lsr.BI) == Lsr.FIFO_ERROR | Lsr.BI
    assert w.read(LSR) & (Lsr.FIFO_ERROR | Lsr.BI) == 0
    assert w.drain() == b"\0b"


# --- loop mode -----------------------------------------------------------------------------------------------------


def test_loop_mode_sends_to_itself_and_not_out() -> None:
    w = Wired(mcr=Mcr.LOOP)
    w.write(THR, ord("q"))
    assert w.read(LSR) & Lsr.DR
    assert w.read(RBR) == ord("q")
    assert w.uart.output == b""
    w.write(MCR, 0)
    w.write(THR, ord("r"))
    assert w.uart.output == b"r"


def test_loop_mode_overrun_without_fifo_keeps_the_newest() -> None:
    w = Wired(mcr=Mcr.LOOP | Mcr.OUT2, ier=Ier.ELSI)
    w.write(THR, 1)
    w.write(THR, 2)
    assert w.read(IIR) == Iir.LINE_STATUS
    assert w.read(LSR) & Lsr.OE
    assert not w.read(LSR) & Lsr.OE
    assert w.drain() == b"\x02"


def test_loop_mode_overrun_with_fifo_keeps_the_oldest() -> None:
    w = Wired(mcr=Mcr.LOOP, fcr=Fcr.ENABLE)
    for value in range(18):
        w.write(THR, value)
    assert w.read(LSR) & Lsr.OE
    assert w.drain() == bytes(range(16))
    assert w.uart.counters["overrun"] == 2


@pytest.mark.parametrize(
    ("mcr", "msr"), [(Mcr.DTR, Msr.DSR), (Mcr.RTS, Msr.CTS), (Mcr.OUT1, Msr.RI), (Mcr.OUT2, Msr.DCD), (0, 0)]
)
def test_loop_mode_connects_modem_outputs_to_inputs(mcr: int, msr: int) -> None:
    w = Wired(mcr=Mcr.LOOP)
    w.read(MSR)
    w.write(MCR, Mcr.LOOP | mcr)
    assert w.read(MSR) & 0xF0 == msr


def test_loop_mode_holds_back_input_from_the_host() -> None:
    w = Wired(mcr=Mcr.LOOP)
    w.uart.send(b"host")
    assert not w.read(LSR) & Lsr.DR
    w.write(MCR, 0)
    assert w.drain() == b"host"


def test_linux_autoconfiguration_finds_a_16550a() -> None:
    """The steps of the 8250 driver: IER holds four bits, the loop shows RTS and OUT2, IIR shows working FIFOs."""
    w = Wired(mcr=0)
    w.write(IER, 0)
    assert w.read(IER) == 0
    w.write(IER, 0x0F)
    assert w.read(IER) == 0x0F
    w.write(IER, 0)
    w.write(MCR, Mcr.LOOP | Mcr.OUT2 | Mcr.RTS)
    assert w.read(MSR) & 0xF0 == 0x90
    w.write(MCR, 0)
    w.write(LCR, 0xBF)
    w.write(FCR, 0)
    w.write(LCR, 0)
    w.write(FCR, Fcr.ENABLE)
    assert w.read(IIR) >> 6 == 3


# --- modem lines ---------------------------------------------------------------------------------------------------


def test_modem_line_change_is_noted_until_msr_is_read() -> None:
    w = Wired(ier=Ier.EDSSI)
    w.uart.set_modem_inputs(Msr.DSR | Msr.DCD)
    assert w.line.level
    assert w.read(MSR) == Msr.DSR | Msr.DCD | Msr.DCTS
    assert not w.line.level
    assert w.read(MSR) == Msr.DSR | Msr.DCD


def test_ring_indicator_is_noted_at_its_trailing_edge() -> None:
    w = Wired()
    w.uart.set_modem_inputs(Msr.RI)
    assert not w.read(MSR) & Msr.TERI
    w.uart.set_modem_inputs(0)
    assert w.read(MSR) & Msr.TERI


# --- output on the host --------------------------------------------------------------------------------------------


def test_sink_that_answers_does_not_block() -> None:
    w = Wired(ier=Ier.ETBEI | Ier.ERBFI, fcr=Fcr.ENABLE)
    w.uart.connect_sink(lambda data: w.uart.send(data.upper()))
    w.write(THR, ord("a"))
    assert w.read(RBR) == ord("A")


# --- input from host files -----------------------------------------------------------------------------------------


def test_input_from_a_socket_until_it_ends() -> None:
    w = Wired(fcr=Fcr.ENABLE)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        w.uart.connect_input(ours)
        assert w.uart.host_input is not None
        assert w.uart.host_input.fileno() == ours.fileno()
        theirs.sendall(b"typed")
        assert w.uart.host_input.ready()
        assert w.drain() == b"typed"
        theirs.close()
        assert not w.uart.host_input.ready()


def test_input_from_a_terminal_until_it_hangs_up() -> None:
    w = Wired(fcr=Fcr.ENABLE)
    master, slave = os.openpty()
    try:
        w.uart.connect_input(master)
        assert w.uart.host_input is not None
        os.write(slave, b"x")
        assert w.uart.host_input.ready()
        assert w.drain() == b"x"
    finally:
        os.close(slave)
    assert not w.uart.host_input.ready()
    os.close(master)


def test_input_that_has_nothing_yet_is_not_the_end() -> None:
    w = Wired()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        w.uart.connect_input(ours)
        assert w.uart.host_input is not None
        assert w.uart.host_input.ready()
        assert w.uart.unread == 0


def test_input_from_two_threads_arrives_whole() -> None:
    w = Wired(fcr=Fcr.ENABLE)

    def type_it(character: bytes) -> None:
        for _ in range(200):
            w.uart.send(character * 10)

    threads = [threading.Thread(target=type_it, args=(character,)) for character in (b"a", b"b")]
    for thread in threads:
        thread.start()
    received = bytearray()
    while any(thread.is_alive() for thread in threads) or w.uart.unread:
        received += w.drain()
    for thread in threads:
        thread.join()
    assert received.count(b"a") == received.count(b"b") == 2000
    assert all(received[i : i + 10] in (b"a" * 10, b"b" * 10) for i in range(0, 4000, 10))


# --- saving, restoring, resetting ----------------------------------------------------------------------------------


def test_state_with_a_pending_thr_interrupt() -> None:
    w = Wired(ier=Ier.ETBEI)
    copy = Wired()
    copy.uart.restore(w.uart.state())
    assert copy.line.level
    assert copy.read(IIR) == Iir.THR_EMPTY


def test_restore_lowers_a_line_that_was_up() -> None:
    w = Wired(ier=Ier.ETBEI)
    w.uart.restore(Wired().uart.state())
    assert not w.line.level


def test_state_keeps_unread_input() -> None:
    w = Wired(fcr=Fcr.ENABLE)
    w.uart.send(b"0123456789abcdefghij")
    w.read(RBR)
    copy = Wired()
    copy.uart.restore(w.uart.state())
    assert copy.drain() == b"123456789abcdefghij"


def test_reset_is_power_on_and_keeps_output_and_queued_input() -> None:
    w = Wired(ier=Ier.ETBEI, fcr=Fcr.ENABLE)
    w.write(THR, ord("o"))
    w.uart.send(bytes(20))
    w.uart.reset()
    assert not w.line.level
    assert w.read(IER) == 0
    assert w.read(MCR) == 0
    assert w.read(IIR) == Iir.NOT_PENDING
    assert w.uart.output == b"o"
    assert w.uart.unread == 4


ACCESSES = st.lists(
    st.one_of(
        st.tuples(st.just("w"), st.integers(0, 7), st.integers(0, 255)),
        st.tuples(st.just("r"), st.integers(0, 7), st.just(0)),
        st.tuples(st.just("send"), st.just(0), st.integers(0, 20)),
        st.tuples(st.just("break"), st.just(0), st.just(0)),
        st.tuples(st.just("modem"), st.just(0), st.integers(0, 255)),
    ),
    max_size=40,
)


def play(w: Wired, accesses: list[tuple[str, int, int]]) -> list[int]:
    answers: list[int] = []
    for kind, register, value in accesses:
        if kind == "w":
            w.write(register, value)
        elif kind == "r":
            answers.append(w.read(register))
        elif kind == "send":
            w.uart.send(bytes(range(value)))
        elif kind == "break":
            w.uart.send_break()
        else:
            w.uart.set_modem_inputs(value)
        answers.append(w.line.level)
    return answers


@given(before=ACCESSES, after=ACCESSES)
def test_restored_uart_behaves_as_the_original(
    before: list[tuple[str, int, int]], after: list[tuple[str, int, int]]
) -> None:
    original, copy = Wired(), Wired()
    play(original, before)
    copy.uart.restore(original.uart.state())
    assert copy.line.level == original.line.level
    assert play(copy, after) == play(original, after)
    assert copy.uart.state() == original.uart.state()


@given(accesses=ACCESSES)
def test_line_is_told_only_of_changes_and_agrees_with_iir(accesses: list[tuple[str, int, int]]) -> None:
    w = Wired()
    for access in accesses:
        play(w, [access])
        pending = w.uart._iir != Iir.NOT_PENDING
        assert w.line.level == (pending and bool(w.read(MCR) & Mcr.OUT2))
    history = w.line.history
    assert history == [index % 2 == 0 for index in range(len(history))]
