"""The 16550 UART, a PC's serial port (National Semiconductor PC16550D data sheet, "Registers").

The line is infinitely fast: a character written is on the host before the next instruction of the guest, so the
transmitter is always empty, and a character timeout passes at once. The divisor and the line format (word length,
parity) are kept but change no character, for many small guests never set them. See `Uart16550` for the rest.
"""

from __future__ import annotations

import threading
from collections import deque

from kvmpy.devices.console_output import ConsoleOutput
from kvmpy.devices.device import Device, Region
from kvmpy.devices.host_input import InputStream
from kvmpy.devices.uart16550_registers import (
    FIFO_SIZE,
    IER,
    IIR_FCR,
    LCR,
    LSR,
    MCR,
    MSR,
    RBR_THR,
    SCR,
    TRIGGER_LEVELS,
    Fcr,
    Ier,
    Iir,
    Lcr,
    Lsr,
    Mcr,
    Msr,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvmpy.devices.console_output import Sink
    from kvmpy.devices.device import Board
    from kvmpy.devices.host_input import HasFileno, HostInput

__all__ = ["Fcr", "Ier", "Iir", "Lcr", "Lsr", "Mcr", "Msr", "Uart16550"]

_ERBFI, _ETBEI, _ELSI, _EDSSI = Ier.ERBFI, Ier.ETBEI, Ier.ELSI, Ier.EDSSI
_DR = Lsr.DR
_EMPTY = Lsr.THRE | Lsr.TEMT
_CHARACTER_ERRORS = Lsr.PE | Lsr.FE | Lsr.BI
_LINE_ERRORS = Lsr.OE | _CHARACTER_ERRORS
_FIFO_ERROR = Lsr.FIFO_ERROR
_CLEARED_BY_READ = _LINE_ERRORS | _FIFO_ERROR
_DLAB = Lcr.DLAB
_LOOP = Mcr.LOOP
_OUT2 = Mcr.OUT2
_CONNECTED = Msr.DCD | Msr.DSR | Msr.CTS


class Uart16550(ConsoleOutput, Device):
    """A 16550 at eight ports from `port`, with interrupt `irq` (COM1 unless told otherwise).

    What the guest sends is in `text` and `output` (the last `history` bytes) and goes to `sink`; `expect` waits for it.
    `send` queues input without bound: the 16-byte FIFO fills from there as the guest reads, so nothing overruns; a
    guest that resets its FIFO does lose what is in it (counted as `fifo_reset`). `connect_input` names a file,
    socket or terminal as input. Guest and host threads may use it at the same time.

    The other end of the line is there: DCD, DSR and CTS are on until `set_modem_inputs` says otherwise. Interrupts
    reach the PC's interrupt controller only while MCR.OUT2 is set; the diagnostic loop does not cut them off (the
    data sheet calls them operational in loop mode; in the super I/O chips of later PCs they reach the controller then).
    """

    name = "uart16550"

    def __init__(self, port: int = 0x3F8, irq: int = 4, *, sink: Sink | None = None, history: int = 64 * 1024) -> None:
        Device.__init__(self)
        ConsoleOutput.__init__(self, sink=sink, history=history)
        self.port = port
        self.irq = irq
        self.host_input: HostInput | None = None
        self._lock = threading.Lock()
        # Characters carry their LSR error bits in bits 8 to 15, as the FIFO of the chip does (3 bits beside each).
        self._fifo: deque[int] = deque()
        self._queue: deque[int] = deque()  # host input on its way
        self._level = False  # what the interrupt line was last told
        self._plain = True
        self._power_on()

    def regions(self) -> tuple[Region, ...]:
        return (Region("port", self.port, 8, self.name, self.read, self.write, width=1),)

    def _power_on(self) -> None:
        """The state after master reset. (SCR and the divisor are undefined then; here 0 and 9600 baud.)"""
        self._ier = 0
        self._fifos_enabled = False
        self._trigger = 1
        self._lcr = 0
        self._mcr = 0
        self._lsr = _EMPTY
        self._inputs = _CONNECTED  # the modem lines as the host sets them
        self._msr = _CONNECTED
        self._scr = 0
        self._divisor = 0x000C
        self._thre_pending = False
        self._iir = Iir.NOT_PENDING

    # --- the guest's side -------------------------------------------------------------------------------------------

    def write(self, offset: int, size: int, value: int) -> None:
        if not offset and self._plain:  # THR, and nothing hangs on it: no loop, no interrupt, no DLAB
            self._put(value & 0xFF)
            return
        value &= 0xFF
        if not offset and not (self._lcr & _DLAB or self._mcr & _LOOP):
            self._put(value)  # before the lock is taken: the sink may answer with send()
        with self._lock:
            self._write_register(offset, value)

    def read(self, offset: int, size: int) -> int:
        if offset == LSR and not self._lsr & _CLEARED_BY_READ:  # polled for every character: no lock
            return self._lsr
        with self._lock:
            return self._read_register(offset)

    def _write_register(self, offset: int, value: int) -> None:
        if offset == RBR_THR:
            if self._lcr & _DLAB:
                self._divisor = self._divisor & 0xFF00 | value
            else:
                self._transmit(value)
        elif offset == IER:
            if self._lcr & _DLAB:
                self._divisor = self._divisor & 0x00FF | value << 8
            else:
                value &= 0x0F
                if value & _ETBEI and not self._ier & _ETBEI:
                    self._thre_pending = True  # enabling it with THR empty interrupts at once; Linux probes for this
                self._ier = value
        elif offset == IIR_FCR:
            self._control_fifos(value)
        elif offset == LCR:
            self._lcr = value
        elif offset == MCR:
            self._mcr = value & 0x1F
            self._follow_modem_lines()
            self._feed()  # host input was held back while in the loop
        elif offset == SCR:
            self._scr = value
        else:  # LSR and MSR: writes are for factory tests only
            self.counters["read_only_write"] += 1
        self._look_whether_plain()
        self._update()

    def _look_whether_plain(self) -> None:
        """Whether a character written has no effect but to be sent: then it may as well wait in the host's queue."""
        plain = not (self._lcr & _DLAB or self._mcr & _LOOP or self._ier & _ETBEI)
        if plain != self._plain:
            self._plain = plain
            if self.board is not None:
                self.board.queue_writes(self.port, plain)

    def _read_register(self, offset: int) -> int:
        value = 0xFF
        if offset == RBR_THR:
            value = self._divisor & 0xFF if self._lcr & _DLAB else self._receive()
        elif offset == IER:
            value = self._divisor >> 8 if self._lcr & _DLAB else self._ier
        elif offset == IIR_FCR:
            value = self._iir | (Iir.FIFOS_ENABLED if self._fifos_enabled else 0)
            if self._iir == Iir.THR_EMPTY:
                self._thre_pending = False  # reading IIR resets this source, and no other
        elif offset == LCR:
            value = self._lcr
        elif offset == MCR:
            value = self._mcr
        elif offset == LSR:
            value = self._lsr
            if self._fifo:
                self._fifo[0] &= 0xFF  # the errors of the character at the top are revealed once
            self._lsr &= ~_LINE_ERRORS
            self._show_fifo()
        elif offset == MSR:
            value = self._msr
            self._msr &= 0xF0
        elif offset == SCR:
            value = self._scr
        self._update()
        return value

    def _transmit(self, value: int) -> None:
        # The interrupt goes away with the write and comes back when THR is empty again, which is at once. Both steps
        # are shown to the line: an edge-triggered controller needs the edge if the handler did not read IIR.
        self._thre_pending = False
        self._update()
        if self._mcr & _LOOP:
            self._arrive(value)
        self._thre_pending = True

    def _receive(self) -> int:
        """The guest reads RBR."""
        value = self._fifo.popleft() & 0xFF if self._fifo else 0
        self._show_fifo()
        # Reading resets the timeout; the next one is four character times later, which is at once. And again
        # the line sees both.
        self._update(timed_out=False)
        self._feed()
        return value

    def _control_fifos(self, value: int) -> None:
        enable = bool(value & Fcr.ENABLE)
        if enable != self._fifos_enabled or (enable and value & Fcr.RESET_RECEIVER):
            if self._fifo:
                self.counters["fifo_reset"] += len(self._fifo)
            self._fifo.clear()
            self._lsr &= ~(_LINE_ERRORS & ~Lsr.OE)
        self._fifos_enabled = enable
        self._trigger = TRIGGER_LEVELS[value >> 6] if enable else 1  # programmed only along with bit 0
        self._show_fifo()
        self._update(timed_out=False)
        self._feed()

    # --- the line ---------------------------------------------------------------------------------------------------

    def _arrive(self, character: int) -> None:
        """A character has come in whole. Where there is no room, it overruns."""
        if len(self._fifo) >= (FIFO_SIZE if self._fifos_enabled else 1):
            self._lsr |= Lsr.OE
            self.counters["overrun"] += 1
            if self._fifos_enabled:
                return  # the FIFO stays, the shift register is overwritten
            self._fifo.clear()  # without FIFOs the new character destroys the old one
        self._fifo.append(character)
        self._show_fifo()

    def _feed(self) -> None:
        """Take host input into the FIFO as far as there is room. In the loop the input pin is disconnected."""
        if self._mcr & _LOOP:
            return
        room = FIFO_SIZE if self._fifos_enabled else 1
        while self._queue and len(self._fifo) < room:
            self._arrive(self._queue.popleft())

    def _show_fifo(self) -> None:
        """Let LSR show what is in the FIFO: data, the errors of the first character, errors further back."""
        fifo = self._fifo
        lsr = self._lsr & ~(_DR | _FIFO_ERROR)
        if fifo:
            lsr |= _DR | fifo[0] >> 8
            if self._fifos_enabled and any(character >> 8 for character in fifo):
                lsr |= _FIFO_ERROR
        self._lsr = lsr

    def _follow_modem_lines(self) -> None:
        """Set MSR from the pins, or in the loop from MCR, and note what changed."""
        lines = self._inputs
        if self._mcr & _LOOP:
            mcr = self._mcr
            lines = (mcr & 2) << 3 | (mcr & 1) << 5 | (mcr & 4) << 4 | (mcr & 8) << 4
        before = self._msr & 0xF0
        changed = (lines ^ before) >> 4
        if changed & 4 and lines & Msr.RI:
            changed &= ~4  # TERI tells only the trailing edge of the ring indicator
        self._msr = self._msr & 0x0F | changed | lines

    def _update(self, *, timed_out: bool = True) -> None:
        """Find the source of the highest priority and drive the interrupt line, if its level changes."""
        ier = self._ier
        source = 0x01
        if ier:
            if ier & _ELSI and self._lsr & _LINE_ERRORS:
                source = 0x06
            elif ier & _ERBFI and len(self._fifo) >= self._trigger:
                source = 0x04
            elif ier & _ERBFI and self._fifo and timed_out:
                source = 0x0C
            elif ier & _ETBEI and self._thre_pending:
                source = 0x02
            elif ier & _EDSSI and self._msr & 0x0F:
                source = 0x00
        self._iir = source
        level = source != 0x01 and bool(self._mcr & _OUT2)
        if level != self._level:
            self._level = level
            if level:
                self.line.raise_line()
            else:
                self.line.lower_line()

    # --- the host's side --------------------------------------------------------------------------------------------

    def send(self, data: bytes | str) -> None:
        """Type `data` (a str as UTF-8) on the other end of the line. From any thread; never blocks, loses nothing."""
        self._enqueue(data.encode() if isinstance(data, str) else data)

    def send_break(self) -> None:
        """Send a break: a zero character with framing error and break indication. To Linux: the start of a SysRq."""
        self._enqueue([(Lsr.BI | Lsr.FE) << 8])

    def _enqueue(self, characters: bytes | list[int]) -> None:
        with self._lock:
            self._queue.extend(characters)
            self._feed()
            self._update()

    @property
    def unread(self) -> int:
        """How many characters of input the guest has not read yet."""
        with self._lock:
            return len(self._queue) + len(self._fifo)

    def set_modem_inputs(self, lines: int) -> None:
        """Set the four modem lines that come in: any of CTS, DSR, RI and DCD of `Msr`, 0 for none."""
        with self._lock:
            self._inputs = lines & 0xF0
            self._follow_modem_lines()
            self._update()

    def connect_input(self, source: HasFileno | int | None) -> None:
        """Take input from a file object, socket or terminal from now on; None: only from `send`."""
        before, self.host_input = self.host_input, None if source is None else InputStream(source, self.send)
        if self.board is not None:
            if before is not None:
                self.board.forget(before)
            if self.host_input is not None:
                self.board.listen(self.host_input)

    def attach(self, board: Board) -> None:
        super().attach(board)
        if self.host_input is not None:
            board.listen(self.host_input)
        board.queue_writes(self.port, self._plain)

    # --- life -------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Master reset. Input that the guest has not taken into its FIFO stays queued."""
        with self._lock:
            inputs = self._inputs
            self._fifo.clear()
            self._power_on()
            self._inputs = self._msr = inputs
            self._look_whether_plain()
            self._feed()
            self._update()

    def state(self) -> dict[str, Any]:
        """Registers, FIFO, input not yet read, level of the interrupt line. Not `output`: that is the host's record."""
        with self._lock:
            return {
                "ier": self._ier, "lcr": self._lcr, "mcr": self._mcr, "lsr": self._lsr, "msr": self._msr,
                "scr": self._scr, "divisor": self._divisor, "inputs": self._inputs,
                "fifos_enabled": self._fifos_enabled, "trigger": self._trigger, "thre_pending": self._thre_pending,
                "fifo": list(self._fifo), "queue": list(self._queue), "level": self._level,
            }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        with self._lock:
            self._ier, self._lcr, self._mcr = state["ier"], state["lcr"], state["mcr"]
            self._lsr, self._msr, self._scr = state["lsr"], state["msr"], state["scr"]
            self._divisor, self._inputs = state["divisor"], state["inputs"]
            self._fifos_enabled, self._trigger = state["fifos_enabled"], state["trigger"]
            self._thre_pending = state["thre_pending"]
            self._fifo, self._queue = deque(state["fifo"]), deque(state["queue"])
            self._look_whether_plain()
            self._update()

    def close(self) -> None:
        """Whoever waits in `expect` is told that nothing more comes."""
        self._close_output()
