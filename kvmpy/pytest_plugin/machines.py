"""The fixture `kvm_machine`: machines with consoles and an exit port, whose runs end with the test's time."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from kvmpy.devices import DebugConsole, DebugExit, Uart16550
from kvmpy.errors import GuestFailed
from kvmpy.machine import End, Machine, Outcome

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from kvmpy.pytest_plugin.guests import Guests

__all__ = ["HISTORY", "FixtureMachine", "KvmMachine"]

HISTORY = 1 << 20
"""Bytes of output that are kept. Kernels talk a lot, and TAP output of which the beginning is lost is worth little."""


class _ExitPort(DebugExit):
    """A debug-exit port that remembers what the guest wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.written: int | None = None

    def write(self, offset: int, size: int, value: int) -> None:
        self.written = value
        super().write(offset, size, value)


class FixtureMachine(Machine):
    """A machine with a serial port, a debug console (port 0xE9) and a debug-exit port (0xF4).

    No run outlives the deadline of the test: one that has no earlier timeout of its own fails the test then.
    """

    def __init__(self, guests: Guests, memory: int = 16 << 20, vcpus: int = 1, **options: Any) -> None:
        super().__init__(memory, vcpus, **options)
        self._deadline = guests.deadline
        self._cut = False
        self.last_outcome: Outcome | None = None
        """How the last run ended, or None."""
        try:
            self.console = self.add(Uart16550(history=HISTORY))
            """COM1: port 0x3F8, IRQ 4."""
            self.debug_console = self.add(DebugConsole(history=HISTORY))
            """Port 0xE9."""
            self._exit_port = self.add(_ExitPort())
        except BaseException:
            self.close()
            raise

    @property
    def exit_code(self) -> int | None:
        """What the guest wrote to port 0xF4 to end its last run, or None when it ended otherwise.

        The code in an outcome is QEMU's, (value << 1) | 1; here it is the value.
        """
        if self.last_outcome is None or self.last_outcome.end is not End.EXITED:
            return None
        return self._exit_port.written if self._exit_port.written is not None else self.last_outcome.code

    def run(self, timeout: float | None = None, *, check: bool = False) -> Outcome:
        """As `Machine.run`; fails the test at its deadline."""
        __tracebackhide__ = True
        return self._ended(super().run(self._limit(timeout)), check)

    def start(self, timeout: float | None = None) -> None:
        """As `Machine.start`; at the test's deadline the run ends, and `wait` fails the test."""
        __tracebackhide__ = True
        super().start(self._limit(timeout))

    def wait(self, timeout: float | None = None, *, check: bool = False) -> Outcome:
        """As `Machine.wait`; fails the test at its deadline."""
        __tracebackhide__ = True
        return self._ended(super().wait(timeout), check)

    def stop(self) -> Outcome:
        """As `Machine.stop`."""
        self.last_outcome = super().stop()
        return self.last_outcome

    async def run_async(self, timeout: float | None = None, *, check: bool = False) -> Outcome:
        """As `Machine.run_async`; fails the test at its deadline."""
        __tracebackhide__ = True
        return self._ended(await super().run_async(self._limit(timeout)), check)

    def _limit(self, timeout: float | None) -> float | None:
        __tracebackhide__ = True
        self.last_outcome = None
        self._exit_port.written = None
        limit, self._cut = self._deadline.shorten(timeout)
        return limit

    def _ended(self, outcome: Outcome, check: bool) -> Outcome:
        __tracebackhide__ = True
        self.last_outcome = outcome
        if self._cut and outcome.end is End.TIMEOUT:
            self._deadline.fail()
        if check and not outcome.ok:
            raise GuestFailed(outcome)
        return outcome


class KvmMachine:
    """Makes machines for one test, and closes them at its end."""

    def __init__(self, guests: Guests) -> None:
        self._guests = guests
        self._machines = ExitStack()

    def __call__(self, memory: int = 16 << 20, vcpus: int = 1, **options: Any) -> FixtureMachine:
        """A machine. `memory` in bytes; `options` are those of `kvmpy.Machine`: `irqchip`, `cpu`, `kvm`."""
        machine = self._machines.enter_context(FixtureMachine(self._guests, memory, vcpus, **options))
        self._guests.add_machine(machine)
        return machine

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._machines.close()
