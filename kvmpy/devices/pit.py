"""The interval timer Intel 8254 (data sheet 231164) and the speaker port 0x61, for VMs without KVM's own.

KVM_CREATE_PIT2 with KVM_PIT_SPEAKER_DUMMY puts both into the kernel; then this module is not wanted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from kvmpy.devices.device import NULL_LINE, Board, Device, Region, Timer

__all__ = ["FREQUENCY", "Pit8254"]

FREQUENCY = 1_193_182  # Hz
SECOND = 1_000_000_000  # ns

CONTROL = 3
SPEAKER = 0x21  # port 0x61, counted from 0x40

LSB, MSB, BOTH = 1, 2, 3


class _Counter:
    """One counter. Time is in ticks of its clock. A mode number is 0 to 5 (6 and 7 are 2 and 3)."""

    FIELDS = (
        "access", "bcd", "gate", "held", "latch", "loaded", "mode", "msb_next_read", "msb_next_write", "next_reload",
        "owed", "reload", "seen", "start", "status", "switch_at", "write_lsb",
    )  # fmt: skip
    __slots__ = FIELDS

    def __init__(self) -> None:
        self.mode = 3
        self.access = BOTH
        self.bcd = False
        self.gate = True
        self.loaded = False  # a count has come since the control word (in modes 1 and 5: and a trigger)
        self.reload = 0x10000
        self.start = 0  # when the counter held `reload`
        self.held: int | None = None  # ticks already counted, while the gate of modes 0 and 4 stops it
        self.next_reload = 0  # written while modes 2 and 3 run; it takes effect at `switch_at`
        self.switch_at = 0
        self.latch: list[int] = []  # latched count bytes, still to be read
        self.status: int | None = None
        self.msb_next_read = False
        self.msb_next_write = False
        self.write_lsb = 0
        self.seen = 0  # rising edges of OUT since `start` that poll() has delivered
        self.owed = 0  # rising edges before `start` that it has not

    def control(self, word: int) -> None:
        """A control word sets the mode; the counter waits for a count."""
        mode = word >> 1 & 7
        self.mode = mode - 4 if mode > 5 else mode
        self.access = word >> 4 & 3
        self.bcd = bool(word & 1)
        self.loaded = False
        self.held = None
        self.next_reload = 0
        self.latch, self.status = [], None
        self.msb_next_read = self.msb_next_write = False
        self.seen = self.owed = 0

    def settle(self, now: int) -> None:
        """Let a new count take effect, if its time has come."""
        if self.next_reload and now >= self.switch_at:
            self.owed += (self.switch_at - self.start) // self.reload - self.seen
            self.seen = 0
            self.reload, self.start, self.next_reload = self.next_reload, self.switch_at, 0

    def load(self, now: int, count: int) -> None:
        """A whole count has been written."""
        if self.bcd:
            count = sum((count >> 4 * digit & 0xF) * 10**digit for digit in range(4))
        count = count or (10_000 if self.bcd else 0x10000)
        if self.mode in (2, 3) and self.loaded:
            if self.gate:
                # Data sheet: the present period is finished first (in mode 3 the half period: not done here).
                self.next_reload = count
                self.switch_at = self.start + ((now - self.start) // self.reload + 1) * self.reload
                return
        elif self.mode in (1, 5):
            self.next_reload = count  # loaded by the next trigger
            self.switch_at = 1 << 63
            return
        self.reload, self.start, self.loaded = count, now, True
        self.seen = 0
        self.held = None if self.gate or self.mode not in (0, 4) else 0

    def set_gate(self, now: int, gate: bool) -> None:
        if gate == self.gate:
            return
        self.settle(now)
        self.gate = gate
        if self.mode in (0, 4):  # the gate stops counting
            if not gate:
                self.held = now - self.start
            elif self.held is not None:
                self.start, self.held = now - self.held, None
        elif gate:  # it starts the count afresh, or triggers
            if self.next_reload:
                self.reload, self.next_reload = self.next_reload, 0
                self.loaded = True
            self.start, self.seen = now, 0

    def elapsed(self, now: int) -> int:
        return max(0, now - self.start) if self.held is None else self.held

    def out(self, now: int) -> bool:
        """The level of the OUT pin."""
        if not self.loaded:
            return self.mode != 0
        elapsed = self.elapsed(now)
        if self.mode in (0, 1):
            return elapsed >= self.reload
        if self.mode in (4, 5):
            return elapsed != self.reload
        if not self.gate:
            return True
        elapsed %= self.reload
        return elapsed < (self.reload + 1) // 2 if self.mode == 3 else elapsed != self.reload - 1

    def edges(self, now: int) -> int:
        """How many rising edges OUT has had since `start`."""
        if not self.loaded or (self.mode in (2, 3) and not self.gate):
            return 0
        elapsed = self.elapsed(now)
        if self.mode in (2, 3):
            return elapsed // self.reload
        return int(elapsed >= self.reload + (self.mode >= 4))

    def next_edge(self, now: int) -> int | None:
        """The tick of the next rising edge of OUT, None if there is none to come."""
        if not self.loaded or self.held is not None or (self.mode in (2, 3) and not self.gate):
            return None
        if self.mode in (2, 3):
            return self.start + (self.elapsed(now) // self.reload + 1) * self.reload
        edge = self.start + self.reload + (self.mode >= 4)
        return edge if edge > now else None

    def count(self, now: int) -> int:
        """The counting element, as 16 bits in the counter's format."""
        if not self.loaded:
            return 0
        elapsed = self.elapsed(now)
        if self.mode == 3:
            value = self.reload - 2 * elapsed % self.reload if self.gate else self.reload
        elif self.mode == 2:
            value = self.reload - elapsed % self.reload if self.gate else self.reload
        else:
            value = self.reload - elapsed  # goes on below zero, from 0xFFFF or 9999
        if not self.bcd:
            return value & 0xFFFF
        value %= 10_000
        return sum(value // 10**digit % 10 << 4 * digit for digit in range(4))

    def bytes_of(self, count: int) -> list[int]:
        """The bytes that reads of `count` give, by the access mode."""
        return [part for part, bit in ((count & 0xFF, LSB), (count >> 8, MSB)) if self.access & bit]


class Pit8254(Device):
    """Counters at ports 0x40 to 0x42, control at 0x43, and port 0x61: gate of counter 2, speaker bit, its output.

    Counts follow from `now()` (monotonic, in nanoseconds). Counter 0 interrupts through `poll()`, which the board's
    timer calls, and which says when to call again; several ticks missed are one interrupt (the rest are counted as
    `tick_lost`), each a pulse, as the PC's edge-triggered controller wants it.
    """

    name = "PIT 8254"

    def __init__(self, irq: int = 0, *, now: Callable[[], int] = time.monotonic_ns) -> None:
        super().__init__()
        self.irq = irq
        self._now = now
        self._lock = threading.Lock()
        self._timer: Timer | None = None
        self._power_on()

    def attach(self, board: Board) -> None:
        super().attach(board)
        if self.line is not NULL_LINE:
            self._timer = board.timer(self._set_timer)

    def _power_on(self) -> None:
        self._counters = [_Counter() for _ in range(3)]
        self._counters[2].gate = False
        self._speaker = False

    def regions(self) -> tuple[Region, ...]:
        return (
            Region("port", 0x40, 4, self.name, self.read, self.write, width=1),
            Region("port", 0x61, 1, f"{self.name}, port 0x61", self.read, self.write, base=SPEAKER, width=1),
        )

    @property
    def speaker(self) -> bool:
        """Is counter 2 connected to the speaker?"""
        return self._speaker

    def _ticks(self) -> int:
        return self._now() * FREQUENCY // SECOND

    def poll(self) -> int | None:
        """Deliver the ticks of counter 0 that are due. The `now()` at which to call again; None: none is to come."""
        with self._lock:
            now = self._ticks()
            counter = self._counters[0]
            counter.settle(now)
            edges = counter.edges(now)
            due = counter.owed + max(0, edges - counter.seen)
            counter.owed, counter.seen = 0, edges
            upcoming = counter.next_edge(now)
            if counter.next_reload and upcoming is not None:
                upcoming = min(upcoming, counter.switch_at)
        if due > 0:
            self.counters["tick_lost"] += due - 1
            self.line.raise_line()
            self.line.lower_line()
        return None if upcoming is None else -(-upcoming * SECOND // FREQUENCY)

    def _set_timer(self) -> None:
        """Deliver what is due, and have the timer come back for the next tick."""
        if self._timer is None:
            return
        upcoming = self.poll()
        if upcoming is None:
            self._timer.stop()
        else:
            self._timer.start(time.monotonic() + max(upcoming - self._now(), 0) / SECOND)

    # --- the guest's side -------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        with self._lock:
            now = self._ticks()
            if offset == SPEAKER:
                counter = self._counters[2]
                counter.settle(now)
                refresh = now // 18 & 1  # toggles with each memory refresh, every 15 us; old programs time by it
                return counter.gate | self._speaker << 1 | refresh << 4 | counter.out(now) << 5
            if not 0 <= offset < CONTROL:
                return 0xFF  # the control word cannot be read back
            counter = self._counters[offset]
            counter.settle(now)
            if counter.status is not None:
                value, counter.status = counter.status, None
                return value
            if counter.latch:
                return counter.latch.pop(0)
            parts = counter.bytes_of(counter.count(now))
            if len(parts) == 1:
                return parts[0]
            counter.msb_next_read = not counter.msb_next_read
            return parts[not counter.msb_next_read]

    def write(self, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        with self._lock:
            now = self._ticks()
            for counter in self._counters:
                counter.settle(now)
            if offset == SPEAKER:
                self._speaker = bool(value & 2)
                self._counters[2].set_gate(now, bool(value & 1))
            elif offset == CONTROL:
                self._control(now, value)
            elif 0 <= offset < CONTROL:
                self._write_count(now, self._counters[offset], value)
        if offset in (0, CONTROL):  # counter 0
            self._set_timer()

    def _control(self, now: int, word: int) -> None:
        select = word >> 6
        if select == 3:  # read-back command
            for number, counter in enumerate(self._counters):
                if word & 2 << number:
                    if not word & 0x20:
                        self._latch(now, counter)
                    if not word & 0x10 and counter.status is None:
                        null_count = not counter.loaded or bool(counter.next_reload)
                        setting = counter.access << 4 | counter.mode << 1 | counter.bcd
                        counter.status = counter.out(now) << 7 | null_count << 6 | setting
        elif not word & 0x30:  # counter latch command
            self._latch(now, self._counters[select])
        else:
            self._counters[select].control(word)

    def _latch(self, now: int, counter: _Counter) -> None:
        if not counter.latch:  # a second latch before the first is read out is ignored
            counter.latch = counter.bytes_of(counter.count(now))
            counter.msb_next_read = False

    def _write_count(self, now: int, counter: _Counter, value: int) -> None:
        if counter.access == LSB:
            counter.load(now, value)
        elif counter.access == MSB:
            counter.load(now, value << 8)
        elif counter.msb_next_write:
            counter.msb_next_write = False
            counter.load(now, value << 8 | counter.write_lsb)
        else:
            counter.msb_next_write = True
            counter.write_lsb = value
            if counter.mode == 0:
                counter.loaded = False  # the first byte stops the count

    # --- life -------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        with self._lock:
            self._power_on()
        self._set_timer()

    def state(self) -> dict[str, Any]:
        """Every counter, with its times as distances to `now()`, which may start elsewhere where it is restored."""
        with self._lock:
            now = self._ticks()
            counters = []
            for counter in self._counters:
                fields = {field: getattr(counter, field) for field in _Counter.FIELDS}
                fields["latch"] = list(counter.latch)
                fields["start"] = counter.start - now
                fields["switch_at"] = counter.switch_at - now
                counters.append(fields)
            return {"counters": counters, "speaker": self._speaker}

    def restore(self, state: dict[str, Any]) -> None:
        with self._lock:
            now = self._ticks()
            for counter, fields in zip(self._counters, state["counters"], strict=True):
                for field in _Counter.FIELDS:
                    setattr(counter, field, fields[field])
                counter.latch = list(fields["latch"])
                counter.start = fields["start"] + now
                counter.switch_at = fields["switch_at"] + now
            self._speaker = state["speaker"]
        self._set_timer()
