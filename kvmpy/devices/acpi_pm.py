"""ACPI's power management registers: switching off, reset, the power button, and a timer (ACPI specification 6.5).

`AcpiPm` is the fixed hardware of a PC (section 4.8.3), `AcpiSleep` the little that hardware-reduced ACPI has instead. A
guest finds either by its ACPI tables, which a machine makes for what is plugged in.
"""

from __future__ import annotations

import threading
import time

from kvmpy.devices.device import NULL_LINE, Device, Region

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvmpy.devices.device import Board, Timer

__all__ = ["FREQUENCY", "AcpiPm", "AcpiSleep", "Pm1Control", "Pm1Event", "SleepControl", "SleepStatus"]

FREQUENCY = 3_579_545  # Hz, of the PM timer
SECOND = 1_000_000_000  # ns

PM1_STATUS, PM1_ENABLE, PM1_CONTROL, PM_TIMER, RESET = 0x0, 0x2, 0x4, 0x8, 0xC
SIZE = 0x10
RESET_VALUE = 0x01
S5 = 5  # the sleep type that switches off: the number is the platform's to choose, and told by \_S5


class Pm1Event:
    """Events in the status register, where a 1 written clears them, and in the enable register (tables 4.15, 4.16)."""

    TMR = 1 << 0  # the timer's highest bit has changed
    GBL = 1 << 5
    PWRBTN = 1 << 8
    SLPBTN = 1 << 9
    RTC = 1 << 10
    WAK = 1 << 15  # status only


class Pm1Control:
    """The control register (table 4.17)."""

    SCI_EN = 1 << 0  # ACPI mode: always on, as there is no other
    BM_RLD = 1 << 1
    GBL_RLS = 1 << 2  # reads zero
    SLP_TYP = 7 << 10
    SLP_EN = 1 << 13  # reads zero


class SleepControl:
    """The sleep control register of hardware-reduced ACPI (table 4.20)."""

    SLP_TYP = 7 << 2
    SLP_EN = 1 << 5  # reads zero


class SleepStatus:
    """The sleep status register (table 4.21)."""

    WAK = 1 << 7


_ENABLES = Pm1Event.TMR | Pm1Event.GBL | Pm1Event.PWRBTN | Pm1Event.SLPBTN | Pm1Event.RTC
_KEPT = Pm1Control.BM_RLD | Pm1Control.SLP_TYP
_SCI_EN = Pm1Control.SCI_EN
_SLP_EN = Pm1Control.SLP_EN
_TMR = Pm1Event.TMR


class _SwitchesOff(Device):
    """What both kinds of registers do to the machine."""

    def _sleep(self, sleep_type: int) -> None:
        if sleep_type != S5:
            self.counters["unknown_sleep_type"] += 1
        elif self.board is None:
            self.counters["shutdown_without_board"] += 1
        else:
            self.board.shutdown(f"{self.name}: sleep type {S5}, soft off")

    def _reset_machine(self, value: int) -> None:
        if value != RESET_VALUE:
            self.counters["bad_reset_value"] += 1
        elif self.board is None:
            self.counters["reset_without_board"] += 1
        else:
            self.board.reset(f"{self.name}: write of {value:#x} to the reset register")


class AcpiPm(_SwitchesOff):
    """The PM1 event and control block, the PM timer and the reset register, at 16 ports from `port` on.

    Offsets: 0x0 PM1 status, 0x2 PM1 enable, 0x4 PM1 control (words), 0x8 PM timer (a dword), 0xC reset (a byte). Events
    come by the interrupt SCI, `irq`, which is level-triggered. The timer counts 3,579,545 times a second, by `now()`
    (monotonic, in nanoseconds), and has `timer_bits`, 24 or 32.

    Sleep type 5 ends the run as a shutdown, a write of 1 to the reset register as a reset. `press_power_button` is what
    the guest may take as a wish to switch itself off.
    """

    name = "ACPI PM"
    irq: int

    def __init__(
        self, port: int = 0x600, irq: int = 9, *, timer_bits: int = 32, now: Callable[[], int] = time.monotonic_ns
    ) -> None:
        super().__init__()
        if timer_bits not in (24, 32):
            raise ValueError(f"the PM timer has 24 or 32 bits, not {timer_bits}")
        self.port = port
        self.irq = irq
        self.timer_bits = timer_bits
        self._now = now
        self._lock = threading.Lock()
        self._timer: Timer | None = None
        self._level = False
        self._power_on()

    def _power_on(self) -> None:
        self._status = 0
        self._enable = 0
        self._control = _SCI_EN
        self._started = self._now()
        self._halves = 0  # how often the timer's highest bit had changed when it was last looked at

    def regions(self) -> tuple[Region, ...]:
        return (Region("port", self.port, SIZE, self.name, self.read, self.write, width=4),)

    def attach(self, board: Board) -> None:
        super().attach(board)
        if self.line is not NULL_LINE:
            self._timer = board.timer(self.poll)

    # --- the guest's side -------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        with self._lock:
            self._look()
            ticks = self._ticks()
            registers = (
                self._status | self._enable << 16 | self._control << 32
                | (ticks & (1 << self.timer_bits) - 1) << 8 * PM_TIMER
            )  # fmt: skip
        return registers >> 8 * offset & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        value <<= 8 * offset
        touched = (1 << 8 * size) - 1 << 8 * offset
        sleep_type = None
        with self._lock:
            self._look()
            self._status &= ~value
            mask = touched >> 8 * PM1_ENABLE & _ENABLES
            self._enable = self._enable & ~mask | value >> 8 * PM1_ENABLE & mask
            mask = touched >> 8 * PM1_CONTROL & _KEPT
            control = value >> 8 * PM1_CONTROL
            self._control = self._control & ~mask | control & mask
            if control & _SLP_EN:
                sleep_type = self._control >> 10 & 7
            self._update()
        if sleep_type is not None:
            self._sleep(sleep_type)
        if offset <= RESET < offset + size:
            self._reset_machine(value >> 8 * RESET & 0xFF)

    # --- timer and interrupt ----------------------------------------------------------------------------------------

    def _ticks(self) -> int:
        return (self._now() - self._started) * FREQUENCY // SECOND

    def _look(self) -> None:
        """Note a change of the timer's highest bit, and interrupt for it."""
        halves = self._ticks() >> self.timer_bits - 1
        if halves != self._halves:
            self._halves = halves
            self._status |= _TMR
            self._update()

    def poll(self) -> None:
        """Interrupt for the timer, if its time has come. The board's timer calls it."""
        with self._lock:
            self._look()
            self._update()  # also when it was called too early: the alarm has to be set again

    def _update(self) -> None:
        """Drive the interrupt line, and have the next change of the timer's highest bit noticed, if it interrupts."""
        level = bool(self._status & self._enable)
        if level != self._level:
            self._level = level
            if level:
                self.line.raise_line()
            else:
                self.line.lower_line()
        if self._timer is None:
            return
        if self._enable & _TMR and not self._status & _TMR:
            due = -(-(self._halves + 1 << self.timer_bits - 1) * SECOND // FREQUENCY)
            self._timer.start(time.monotonic() + (self._started + due - self._now()) / SECOND)
        else:
            self._timer.stop()

    # --- the host's side --------------------------------------------------------------------------------------------

    def press_power_button(self) -> None:
        """Press it and let go: the guest is interrupted if it listens, and does what it likes. From any thread."""
        with self._lock:
            self._status |= Pm1Event.PWRBTN
            self._update()

    def reset(self) -> None:
        with self._lock:
            self._power_on()
            self._update()

    def state(self) -> dict[str, Any]:
        """All registers. The timer goes on after `restore` from where it was."""
        with self._lock:
            self._look()
            return {
                "status": self._status, "enable": self._enable, "control": self._control,
                "elapsed": self._now() - self._started, "halves": self._halves,
            }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        with self._lock:
            self._status, self._enable, self._control = state["status"], state["enable"], state["control"]
            self._started, self._halves = self._now() - state["elapsed"], state["halves"]
            self._update()


class AcpiSleep(_SwitchesOff):
    """Sleep control, sleep status and reset register, at three ports from `port` on: hardware-reduced ACPI.

    A kernel that finds these tables leaves a PC's old timer and interrupt controllers alone (section 4.1); Linux then
    needs another clock, such as the TSC with a known frequency.
    """

    name = "ACPI sleep registers"

    CONTROL, STATUS, RESET = range(3)

    def __init__(self, port: int = 0x600) -> None:
        super().__init__()
        self.port = port
        self._control = 0

    def regions(self) -> tuple[Region, ...]:
        return (Region("port", self.port, 3, self.name, self.read, self.write, width=1),)

    def read(self, offset: int, size: int) -> int:
        return self._control if offset == self.CONTROL else 0  # it never slept, so it never woke up

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == self.CONTROL:
            self._control = value & SleepControl.SLP_TYP
            if value & SleepControl.SLP_EN:
                self._sleep(self._control >> 2)
        elif offset == self.RESET:
            self._reset_machine(value & 0xFF)

    def reset(self) -> None:
        self._control = 0

    def state(self) -> dict[str, Any]:
        return {"control": self._control}

    def restore(self, state: dict[str, Any]) -> None:
        self._control = state["control"]
