"""What the gdb server needs of the machine that it serves, and what a machine reports to it.

`kvmpy.debug.gdb.machine_target` is a real machine behind this interface. Threads are vCPUs, numbered from 1; addresses
are linear (virtual) ones of the thread that is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Protocol

from kvmpy.debug.gdb.architecture import Architecture
from kvmpy.errors import KvmpyError

__all__ = ["GdbTarget", "Point", "Reason", "Report", "RunEnded", "Signal", "TargetError", "ThreadStopped"]


class Signal(IntEnum):
    """gdb's own numbers of signals (include/gdb/signals.def), which stop replies carry."""

    NONE = 0
    INT = 2
    ILL = 4
    TRAP = 5
    ABRT = 6
    KILL = 9
    SEGV = 11
    ALRM = 14
    TERM = 15


class TargetError(KvmpyError):
    """The target cannot do what gdb asks; the message says why."""


class Point(IntEnum):
    """Kinds of breakpoints and watchpoints: the number in the packets Z and z (gdb manual, appendix E.2)."""

    SOFTWARE = 0
    HARDWARE = 1
    WRITE = 2
    READ = 3
    ACCESS = 4


class Reason(Enum):
    """Why a thread stopped, where gdb has a word for it in the stop reply (gdb manual, appendix E.3)."""

    OTHER = ""
    SOFTWARE_BREAKPOINT = "swbreak"
    HARDWARE_BREAKPOINT = "hwbreak"
    WRITE_WATCHPOINT = "watch"
    READ_WATCHPOINT = "rwatch"
    ACCESS_WATCHPOINT = "awatch"


@dataclass(frozen=True, slots=True)
class ThreadStopped:
    """A thread stopped, and all others stand, too.

    `address` is that of the data, for a watchpoint. `message` is for the user, who sees it on gdb's console.
    """

    thread: int
    signal: Signal = Signal.TRAP
    reason: Reason = Reason.OTHER
    address: int | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class RunEnded:
    """The guest is gone: `code` when it ended by itself, `signal` when it was ended."""

    code: int = 0
    signal: Signal | None = None
    message: str = ""


Report = ThreadStopped | RunEnded


class GdbTarget(Protocol):
    """A machine with threads. All methods are called in the server's thread, none may block for ever.

    Those that cannot do what is asked raise TargetError, or another KvmpyError.
    """

    def connect(self, report: Callable[[Report], None]) -> ThreadStopped:
        """A gdb is there: have all threads stand, and say why. `report` is called from any thread, later, with what
        ends a `resume`: once for each, but when `disconnect` comes before; a RunEnded may come at any time."""
        ...

    def disconnect(self) -> None:
        """gdb is gone: remove all points and let the guest go on. Nothing is reported any more."""
        ...

    def kill(self) -> None:
        """End the run; nothing is reported for it."""
        ...

    def wait_until_standing(self) -> None:
        """A stop was reported: return when all threads stand, or cannot be waited for any longer."""
        ...

    # While all threads stand

    def threads(self) -> Sequence[int]:
        """The ids of all threads, from 1 on."""
        ...

    def thread_name(self, thread: int) -> str: ...

    def thread_state(self, thread: int) -> str:
        """What the thread is about, in a word or a few: "halted"."""
        ...

    def architecture(self) -> Architecture:
        """What fits the mode that the guest is in."""
        ...

    def has_avx(self) -> bool: ...

    def read_registers(self, thread: int, names: Sequence[str]) -> Sequence[int | None]:
        """Registers by their source names (`kvmpy.debug.gdb.registers`), as unsigned numbers; None: not available."""
        ...

    def write_registers(self, thread: int, values: Mapping[str, int]) -> None:
        """Set registers: all of them, or none when it raises."""
        ...

    def read_memory(self, thread: int, address: int, length: int) -> bytes:
        """At most `length` bytes, as many as there are; raises when there is none. Breakpoints do not show."""
        ...

    def write_memory(self, thread: int, address: int, data: bytes) -> None: ...

    def insert(self, point: Point, address: int, length: int) -> None:
        """Have the guest stop at an address. What is there already may be inserted again, with no effect."""
        ...

    def remove(self, point: Point, address: int, length: int) -> None:
        """Undo `insert`. Nothing happens when it is not there."""
        ...

    def has_breakpoint(self, address: int) -> bool:
        """Whether a thread that gets to `address` would stop there."""
        ...

    def monitor(self, thread: int, command: str) -> str:
        """What gdb's `monitor` command prints."""
        ...

    # Going on

    def resume(self, running: Sequence[int], stepping: int | None) -> None:
        """Let the threads of `running` go on, and `stepping`, which is not among them, execute one instruction."""
        ...

    def interrupt(self) -> None:
        """Have the present `resume` end soon, by a report with Signal.INT unless something else comes first."""
        ...
