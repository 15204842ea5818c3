"""The real-time clock and CMOS memory of a PC (Motorola MC146818 data sheet), filled in as QEMU's firmware expects."""

from __future__ import annotations

import threading
import time

from kvmpy.devices.device import NULL_LINE, Device, Region

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvmpy.devices.device import Board, Timer

__all__ = ["Cmos", "RegisterA", "RegisterB", "RegisterC", "RegisterD"]

KiB = 1 << 10
MiB = 1 << 20

SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM, WEEKDAY, DAY, MONTH, YEAR = range(10)
A, B, C, D = range(10, 14)
CENTURY = 0x32
CLOCK_REGISTERS = (SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY)

UPDATE_WARNING = 244e-6  # UIP rises this many seconds before an update (data sheet: t_BUC)
DAY_SECONDS = 86_400
ANY = 0xC0  # an alarm register with both top bits set matches every value
LONGEST_SLEEP = 60.0
"""Seconds after which the clock is looked at again: somebody may have set the host's meanwhile."""


class RegisterA:
    """Update in progress, divider control, rate selection."""

    UIP = 1 << 7
    DV_RESET = 0x60  # both upper bits of DV: the divider is held in reset


class RegisterB:
    """Modes and interrupt enables."""

    DSE = 1 << 0
    HOURS_24 = 1 << 1
    BINARY = 1 << 2
    SQWE = 1 << 3
    UIE = 1 << 4
    AIE = 1 << 5
    PIE = 1 << 6
    SET = 1 << 7


class RegisterC:
    """Interrupt flags; a read clears them."""

    UF = 1 << 4
    AF = 1 << 5
    PF = 1 << 6
    IRQF = 1 << 7


class RegisterD:
    """Valid RAM and time: the battery is good."""

    VRT = 1 << 7


class Cmos(Device):
    """Index at port 0x70 (bit 7: NMI mask, kept and without effect), data at port 0x71, 128 bytes.

    The time is `now()` (seconds since 1970-01-01 UTC, as `time.time`), until the guest sets it; from then on it
    keeps the distance. The update, alarm and periodic flags are found when the guest reads register C, or by `poll()`:
    between two polls any number of events is one flag. For the interrupts that the guest has enabled the board's timer
    calls `poll()`; it counts milliseconds, so a periodic rate above 1 kHz comes at 1 kHz.

    `memory_below_4g` and `memory_above_4g` in bytes and `cpus` go where QEMU's firmware looks for them (0x15 to 0x18,
    0x30, 0x31, 0x34, 0x35, 0x5B to 0x5D, 0x5F). `boot_order`: up to three of "a" (floppy), "c" (disk), "d" (CD), "n"
    (network). `reset` leaves time and memory alone, as a battery does.
    """

    name = "CMOS"

    def __init__(
        self,
        port: int = 0x70,
        irq: int = 8,
        *,
        memory_below_4g: int = 0,
        memory_above_4g: int = 0,
        cpus: int = 1,
        boot_order: str = "cd",
        now: Callable[[], float] = time.time,
    ) -> None:
        super().__init__()
        if not 1 <= cpus <= 0x100:
            raise ValueError(f"cpus must be from 1 to 256 (the CMOS has one byte for it), not {cpus}")
        self.port = port
        self.irq = irq
        self._now = now
        self._lock = threading.Lock()
        self._timer: Timer | None = None
        self._index = 0
        self._level = False
        self._ram = bytearray(0x80)
        self._ram[A] = 0x26  # 32.768 kHz crystal, periodic rate 1024 Hz
        self._ram[B] = RegisterB.HOURS_24
        self._ram[D] = RegisterD.VRT
        self._describe(memory_below_4g, memory_above_4g, cpus, boot_order)
        start = int(now())
        utc = time.gmtime(start)
        # [second, minute, hour, weekday (Sunday is 1), day, month, year of the century, century] at `_since`
        self._clock = [
            utc.tm_sec, utc.tm_min, utc.tm_hour, (utc.tm_wday + 1) % 7 + 1,
            utc.tm_mday, utc.tm_mon, utc.tm_year % 100, utc.tm_year // 100,
        ]  # fmt: skip
        self._since = float(start)
        self._checked = now()  # up to when events have been looked for

    def _describe(self, below: int, above: int, cpus: int, boot_order: str) -> None:
        """Fill in the machine's description."""
        if not set(boot_order) <= set("acdn") or len(boot_order) > 3:
            raise ValueError(f"boot_order must be up to three of the letters a, c, d and n, not {boot_order!r}")
        extended = min(max(0, below - MiB) // KiB, 0xFFFF)
        beyond_16m = min(max(0, below - 16 * MiB) // (64 * KiB), 0xFFFF)
        self._put(0x15, min(below // KiB, 640), 2)
        self._put(0x17, extended, 2)
        self._put(0x30, extended, 2)
        self._put(0x34, beyond_16m, 2)
        self._put(0x5B, min(above // (64 * KiB), 0xFFFFFF), 3)
        self._ram[0x10] = 0x00  # no floppy drives
        self._ram[0x14] = 0x02  # equipment: a floating-point unit
        self._ram[0x5F] = cpus - 1
        boot = [{"a": 1, "c": 2, "d": 3, "n": 4}[device] for device in boot_order] + [0, 0, 0]
        self._ram[0x3D] = boot[0] | boot[1] << 4
        self._ram[0x38] = boot[2] << 4 | 1  # bit 0: do not check the floppy's signature
        checksum = sum(self._ram[0x10:0x2E])
        self._ram[0x2E], self._ram[0x2F] = checksum >> 8, checksum & 0xFF

    def _put(self, index: int, value: int, length: int) -> None:
        self._ram[index : index + length] = value.to_bytes(length, "little")

    def regions(self) -> tuple[Region, ...]:
        return (Region("port", self.port, 2, self.name, self.read, self.write, width=1),)

    def attach(self, board: Board) -> None:
        super().attach(board)
        if self.line is not NULL_LINE:
            self._timer = board.timer(self.poll)

    # --- the guest's side -------------------------------------------------------------------------------------------

    def write(self, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        if offset == 0:
            self._index = value & 0x7F
        elif offset == 1:
            with self._lock:
                self._write_register(self._index, value)
                self._set_timer()

    def read(self, offset: int, size: int) -> int:
        if offset != 1:
            return 0xFF  # the index cannot be read back
        with self._lock:
            return self._read_register(self._index)

    def _read_register(self, index: int) -> int:
        if index in CLOCK_REGISTERS:
            self._advance()
            return self._encode(index)
        if index == A:
            return self._ram[A] | (RegisterA.UIP if self._update_is_near() else 0)
        if index == C:
            self._look()
            flags = self._ram[C]
            self._ram[C] = 0
            self._drive()
            self._set_timer()
            return flags
        return self._ram[index]

    def _write_register(self, index: int, value: int) -> None:
        if index in CLOCK_REGISTERS:
            self._advance()
            self._decode(index, value)
        elif index in (A, B):
            self._look()
            self._advance()  # the old mode holds up to now
            if index == A:
                value &= 0x7F
            elif value & RegisterB.SET:
                value &= ~RegisterB.UIE
            stopped = not self._running()
            self._ram[index] = value
            if stopped and self._running():
                self._since = self._checked = self._now()
            self._drive()
        elif index in (C, D):
            self.counters["read_only_write"] += 1
        elif index in (SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM):
            self._look()
            self._ram[index] = value
        else:
            self._ram[index] = value

    # --- the clock --------------------------------------------------------------------------------------------------

    def _running(self) -> bool:
        return not self._ram[B] & RegisterB.SET and self._ram[A] & 0x60 != RegisterA.DV_RESET

    def _update_is_near(self) -> bool:
        return self._running() and 1 - (self._now() - self._since) % 1 <= UPDATE_WARNING

    def _advance(self) -> None:
        """Bring `_clock` up to the present second. A date that does not exist (half set) lasts until midnight."""
        if not self._running():
            return
        elapsed = int(self._now() - self._since)
        if elapsed <= 0:
            return
        self._since += elapsed
        second, minute, hour, weekday, day, month, year, century = self._clock
        days, rest = divmod(hour * 3600 + minute * 60 + second + elapsed, DAY_SECONDS)
        if days:
            import calendar  # with datetime, a millisecond that most guests do not need

            weekday = (weekday - 1 + days) % 7 + 1
            full_year = century * 100 + year
            if not 1 <= full_year <= 9000:  # beyond what a calendar can do, and it may be years later
                full_year = 2000 + year
            month = min(max(month, 1), 12)
            day = min(max(day, 1), calendar.monthrange(full_year, month)[1])
            ordinal = calendar.timegm((full_year, month, day, 0, 0, 0)) // DAY_SECONDS + days
            then = time.gmtime(ordinal * DAY_SECONDS)
            day, month, year, century = then.tm_mday, then.tm_mon, then.tm_year % 100, then.tm_year // 100
        self._clock = [rest % 60, rest // 60 % 60, rest // 3600, weekday, day, month, year, century]

    def _encode(self, index: int) -> int:
        """The register's value in the guest's format: BCD or binary, 12 or 24 hours."""
        value = self._clock[CLOCK_REGISTERS.index(index)]
        afternoon = 0
        if index == HOURS and not self._ram[B] & RegisterB.HOURS_24:
            afternoon = 0x80 if value >= 12 else 0
            value = (value - 1) % 12 + 1
        if not self._ram[B] & RegisterB.BINARY:
            value = (value // 10 % 10) << 4 | value % 10
        return value & 0xFF | afternoon

    def _plain(self, index: int, value: int) -> int:
        """The number that a register value means in the present format."""
        afternoon = False
        if index in (HOURS, HOURS_ALARM) and not self._ram[B] & RegisterB.HOURS_24:
            afternoon = bool(value & 0x80)
            value &= 0x7F
        if not self._ram[B] & RegisterB.BINARY:
            value = (value >> 4) * 10 + (value & 0x0F)
        if index in (HOURS, HOURS_ALARM) and not self._ram[B] & RegisterB.HOURS_24:
            value = value % 12 + 12 * afternoon
        return value

    def _decode(self, index: int, value: int) -> None:
        """Set the clock. A second, minute or hour that does not exist wraps, and is counted."""
        number = self._plain(index, value)
        limit = {SECONDS: 60, MINUTES: 60, HOURS: 24}.get(index, 0x100)
        if number >= limit:
            self.counters["invalid_time"] += 1
            number %= limit
        self._clock[CLOCK_REGISTERS.index(index)] = number

    # --- the interrupts ---------------------------------------------------------------------------------------------

    def poll(self) -> None:
        """Set the flags of all that has happened since the last poll, and drive the interrupt line."""
        with self._lock:
            self._look()
            self._set_timer()

    def _look(self) -> None:
        present, self._checked = self._now(), self._checked
        before, self._checked = self._checked, present
        if present <= before:
            return
        if self._ram[A] & 0x60 != RegisterA.DV_RESET and self._ram[A] & 0x0F:
            period = self._period()
            if present // period != before // period:
                self._ram[C] |= RegisterC.PF
        if self._running():
            first = int((before - self._since) // 1) + 1  # the updates in (before, present], counted from `_since`
            last = int((present - self._since) // 1)
            if last >= first:
                self._ram[C] |= RegisterC.UF
                if self._next_alarm(first, last) is not None:
                    self._ram[C] |= RegisterC.AF
        self._drive()

    def _period(self) -> float:
        """Seconds of the periodic rate (data sheet: rates 1 and 2 repeat 8 and 9 for a 32.768 kHz crystal)."""
        rate = self._ram[A] & 0x0F
        return float(1 << (rate + 6 if rate <= 2 else rate - 1)) / 32768

    def _set_timer(self) -> None:
        """Have `poll` called at the next event that would raise the line, if one may."""
        if self._timer is None:
            return
        enabled = self._ram[B] & 0x70
        moment = None if self._level or not enabled else self._next_event(enabled)
        if moment is None:
            self._timer.stop()
        else:
            self._timer.start(time.monotonic() + min(max(moment - self._now(), 0.0), LONGEST_SLEEP))

    def _next_event(self, enabled: int) -> float | None:
        """When the next of these events comes, by `now()`; all up to `_checked` have been seen."""
        moments = []
        if enabled & RegisterB.PIE and self._ram[A] & 0x60 != RegisterA.DV_RESET and self._ram[A] & 0x0F:
            period = self._period()
            moments.append((self._checked // period + 1) * period)
        if self._running():
            first = int((self._checked - self._since) // 1) + 1
            if enabled & RegisterB.UIE:
                moments.append(self._since + first)
            if enabled & RegisterB.AIE:
                alarm = self._next_alarm(first, first + DAY_SECONDS)
                if alarm is not None:
                    moments.append(self._since + alarm)
        return min(moments, default=None)

    def _next_alarm(self, first: int, last: int) -> int | None:
        """The first of the updates `first` to `last` (seconds after `_since`) that meets the alarm registers."""
        second, minute, hour = self._clock[:3]
        base = hour * 3600 + minute * 60 + second
        wanted = [
            None if self._ram[index] & ANY == ANY else self._plain(index, self._ram[index])
            for index in (HOURS_ALARM, MINUTES_ALARM, SECONDS_ALARM)
        ]
        moment = base + first
        end = base + min(last, first + DAY_SECONDS - 1)
        while moment <= end:
            of_day = moment % DAY_SECONDS
            for value, unit, count in zip(wanted, (3600, 60, 1), (24, 60, 60), strict=True):
                if value is not None and of_day // unit % count != value:
                    moment += unit - of_day % unit  # on to the next hour, minute or second
                    break
            else:
                return moment - base
        return None

    def _drive(self) -> None:
        enabled = self._ram[B] & self._ram[C] & 0x70  # each enable bit stands where its flag is
        self._ram[C] = self._ram[C] & 0x70 | (RegisterC.IRQF if enabled else 0)
        level = bool(enabled)
        if level != self._level:
            self._level = level
            if level:
                self.line.raise_line()
            else:
                self.line.lower_line()

    # --- life -------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """The RESET pin: interrupts off, flags cleared. Time, alarm and memory stay (data sheet, "RESET")."""
        with self._lock:
            self._look()
            self._ram[B] &= ~(RegisterB.PIE | RegisterB.AIE | RegisterB.UIE | RegisterB.SQWE)
            self._ram[C] = 0
            self._drive()
            self._set_timer()

    def state(self) -> dict[str, Any]:
        """All registers, and the clock as its distance to `now()`: time passes while a machine is saved."""
        with self._lock:
            return {
                "index": self._index, "ram": bytes(self._ram), "clock": list(self._clock),
                "since": self._since, "checked": self._checked,
            }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        with self._lock:
            self._index, self._ram, self._clock = state["index"], bytearray(state["ram"]), list(state["clock"])
            self._since, self._checked = state["since"], state["checked"]
            self._drive()
            self._set_timer()
