"""A machine as the target of a gdb server: its debugger, registers, memory and ends as a `GdbTarget`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from kvmpy.debug.breakpoint import Breakpoint, Stop, StopKind, Watchpoint
from kvmpy.debug.gdb.architecture import Architecture, fitting_architecture
from kvmpy.debug.gdb.monitor import monitor
from kvmpy.debug.gdb.registers import RegisterAccess
from kvmpy.debug.gdb.target import Point, Reason, Report, RunEnded, Signal, TargetError, ThreadStopped
from kvmpy.errors import ClosedError, GuestMemoryError, KvmError, UsageError, VcpuBusyError
from kvmpy.machine.outcome import End, Outcome

if TYPE_CHECKING:
    from kvmpy.kvm import Vcpu
    from kvmpy.machine import Machine

__all__ = ["MachineTarget"]

_PATIENCE = 2.0
"""Seconds to wait for device handlers to return before a vCPU counts as not standing, and its registers as unknown."""

_PAGE = 0x1000

_WATCHED = 0x1_0000
"""Bytes that one watchpoint watches at most: each of its pages is looked up and taken from the guest."""

_SIGNALS = {
    End.TRIPLE_FAULT: Signal.SEGV,
    End.FAILED: Signal.ILL,
    End.PANIC: Signal.ABRT,
    End.TIMEOUT: Signal.ALRM,
    End.STOPPED: Signal.TERM,
}
"""Which signal tells of an end that is not ok."""

_REASONS = {
    Point.SOFTWARE: Reason.SOFTWARE_BREAKPOINT,
    Point.HARDWARE: Reason.HARDWARE_BREAKPOINT,
    Point.WRITE: Reason.WRITE_WATCHPOINT,
    Point.READ: Reason.READ_WATCHPOINT,
    Point.ACCESS: Reason.ACCESS_WATCHPOINT,
}

_MP_STATES = ("running", "waits for INIT", "waits for SIPI", "halted", "got SIPI")
"""By KVM_MP_STATE_*, as far as x86 has them (KVM API, section 4.38)."""


class MachineTarget:
    """Thread n is the vCPU with the id n - 1."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._debugger = machine.debugger
        self._foremost = 1
        """The thread that a Ctrl-C is told of."""
        self._held = False
        """Whether the guest stands and waits for a gdb."""
        self._points: dict[tuple[Point, int, int], Breakpoint | Watchpoint] = {}
        # Below: shared with the threads that report stops. Nothing of the machine is called with the lock held.
        self._lock = threading.Lock()
        self._report: Callable[[Report], None] | None = None
        self._awaited = False
        """Whether gdb waits for a stop."""
        self._kept: dict[int, Stop] = {}
        """Stops of threads that gdb has not been told of, because another one stopped at the same time."""
        self._ending: object = None
        """The exit because of which the guest stands, and which ends the run when it goes on."""

    # Coming and going

    def hold(self) -> None:
        """Have all vCPUs stand before any gdb is there: the next run begins by waiting for one."""
        self._debugger.attach(self._stopped)
        self._held = True
        self.wait_until_standing()

    def release(self) -> None:
        """End a `hold` for which no gdb came."""
        if self._held:
            self.disconnect()

    def connect(self, report: Callable[[Report], None]) -> ThreadStopped:
        """All vCPUs stand from here on; without a run under way, the next one begins by standing."""
        if not self._held:
            self._debugger.attach(self._stopped)
        self._held = False
        with self._lock:
            self._report, self._awaited, self._ending = report, False, None
            self._kept.clear()
        self.wait_until_standing()
        return ThreadStopped(1, Signal.TRAP)

    def disconnect(self) -> None:
        """Remove what gdb inserted, and let the guest go on."""
        self._held = False
        with self._lock:
            self._report = None
        with suppress(ClosedError):
            self.wait_until_standing()
            for key in list(self._points):
                self._remove(key)
        self._points.clear()
        with suppress(ClosedError):
            self._debugger.detach()

    def kill(self) -> None:
        """End the run as stopped."""
        run = self.machine.runners[0].control
        if run.running:
            with self._lock:
                self._report = None
            run.finish(Outcome(End.STOPPED, "killed by gdb"))
        self.disconnect()

    def wait_until_standing(self) -> None:
        """Not for ever: a device handler that does not return keeps its vCPU from standing."""
        self._debugger.interrupt(_PATIENCE)

    # In the threads that notice stops

    def _stopped(self, stop: Stop) -> None:
        """The debugger's listener."""
        with self._lock:
            report = self._report
            if report is None:
                return
            if self._has_ended(stop):
                self._awaited = False
                report(_end_of(stop.outcome or Outcome(End.STOPPED)))
            elif self._awaited:
                self._awaited = False
                report(self._told(stop))
            else:
                self._kept[stop.vcpu + 1] = stop

    def _has_ended(self, stop: Stop) -> bool:
        """Whether the run is over. A bad end is told twice: while the guest still stands there, and when it is gone."""
        if stop.kind is not StopKind.ENDED or stop.outcome is None:
            return False
        exit = stop.outcome.exit
        if exit is None or exit is self._ending or stop.outcome.ok or not self._debugger.standing:
            return True
        self._ending = exit
        return False

    def _told(self, stop: Stop) -> ThreadStopped:
        thread = stop.vcpu + 1
        if stop.outcome is not None:
            signal = _SIGNALS.get(stop.outcome.end, Signal.TRAP)
            return ThreadStopped(thread, signal, message=f"{stop.outcome}; the run ends when the guest goes on")
        for (point, address, _), mine in self._points.items():
            if mine is stop.point:
                where = address if isinstance(mine, Watchpoint) else None
                return ThreadStopped(thread, reason=_REASONS[point], address=where)
        # A step, or a breakpoint that somebody else has set: gdb would pass over one that it does not know.
        message = str(stop) if stop.point is not None else ""
        return ThreadStopped(thread, message=message)

    # Threads

    def threads(self) -> Sequence[int]:
        """From 1 on, in the order of the vCPUs."""
        return range(1, len(self.machine.vcpus) + 1)

    def thread_name(self, thread: int) -> str:
        """ "vCPU 0" for thread 1."""
        return f"vCPU {thread - 1}"

    def thread_state(self, thread: int) -> str:
        """What KVM says the vCPU does."""
        try:
            state = self._vcpu(thread).get_mp_state()
        except VcpuBusyError:
            return "in a device handler"
        except KvmError:  # without an in-kernel irqchip some kernels know no such state
            state = 0
        return _MP_STATES[state] if state < len(_MP_STATES) else f"MP state {state}"

    def _vcpu(self, thread: int) -> Vcpu:
        return self.machine.vcpus[thread - 1]

    def architecture(self) -> Architecture:
        """That of the first vCPU, which boots."""
        access = self._registers(1)
        try:
            return fitting_architecture(access.sregs, access.regs.rflags)
        except VcpuBusyError:
            return Architecture.X86_64  # which has room for the registers of all modes

    def has_avx(self) -> bool:
        """Whether the guest of the first vCPU has AVX state, or has enabled it."""
        try:
            if self._registers(1).xsave.has_avx:
                return True
            xcrs = self._vcpu(1).get_xcrs()
        except (KvmError, VcpuBusyError):
            return False
        return any(xcrs.xcrs[index].xcr == 0 and xcrs.xcrs[index].value & 4 for index in range(xcrs.nr_xcrs))

    # Registers and memory

    def _registers(self, thread: int) -> RegisterAccess:
        vcpu = self._vcpu(thread)
        return RegisterAccess(vcpu, lambda address, length: self._debugger.read_memory(vcpu, address, length))

    def read_registers(self, thread: int, names: Sequence[str]) -> Sequence[int | None]:
        """All unavailable while a device handler of this vCPU does not return."""
        try:
            return self._registers(thread).read(names)
        except VcpuBusyError:
            return [None] * len(names)

    def write_registers(self, thread: int, values: Mapping[str, int]) -> None:
        """Raises EntryRefusedError, naming the rule, for what KVM does not take."""
        self._registers(thread).write(values)

    def read_memory(self, thread: int, address: int, length: int) -> bytes:
        """Up to the first page that is not mapped or not memory."""
        vcpu, read = self._vcpu(thread), bytearray()
        while length:
            part = min(length, _PAGE - address % _PAGE)
            try:
                read += self._debugger.read_memory(vcpu, address, part)
            except (UsageError, GuestMemoryError):
                if not read:
                    raise
                break
            address, length = address + part, length - part
        return bytes(read)

    def write_memory(self, thread: int, address: int, data: bytes) -> None:
        """Also where the guest may not write."""
        self._debugger.write_memory(self._vcpu(thread), address, data)

    # Breakpoints and watchpoints

    def insert(self, point: Point, address: int, length: int) -> None:
        """A software breakpoint where memory is not mapped, or this host has none, becomes a hardware one."""
        key = (point, address, length)
        if key in self._points:
            return
        if point is Point.SOFTWARE:
            try:
                made: Breakpoint | Watchpoint = self._debugger.breakpoint(address, hardware=False)
            except VcpuBusyError:
                raise
            except UsageError:
                made = self._debugger.breakpoint(address, hardware=True)
        elif point is Point.HARDWARE:
            made = self._debugger.breakpoint(address, hardware=True)
        elif length > _WATCHED:
            raise TargetError(f"a watchpoint of {length:#x} bytes; at most {_WATCHED:#x} are watched")
        else:
            # The processor cannot watch reads alone; gdb itself leaves out accesses that changed the value.
            access = "write" if point is Point.WRITE else "access"
            made = self._debugger.watchpoint(address, length, access=access)
        with self._lock:
            self._points[key] = made

    def remove(self, point: Point, address: int, length: int) -> None:
        """gdb does so at every stop."""
        key = (point, address, length)
        if key in self._points:
            self._remove(key)

    def _remove(self, key: tuple[Point, int, int]) -> None:
        with self._lock:
            point = self._points.pop(key)
        try:
            point.remove()
        except VcpuBusyError:  # a handler does not return: the guest shall run past it, instead of ending there
            point.handler = _run_on

    def has_breakpoint(self, address: int) -> bool:
        """Of gdb's; those of others are not its business."""
        return any(at == address and isinstance(point, Breakpoint) for (_, at, _), point in self._points.items())

    def monitor(self, thread: int, command: str) -> str:
        """See `kvmpy.debug.gdb.monitor`."""
        return monitor(self.machine, self._vcpu(thread), command)

    # Going on

    def resume(self, running: Sequence[int], stepping: int | None) -> None:
        """All vCPUs go on, or one while the others stand; some of several are refused."""
        going = {*running, *((stepping,) if stepping is not None else ())}
        kept = self._stop_to_tell(going)
        with self._lock:
            report = self._report
            self._awaited = kept is None
        if report is None:
            return
        if kept is not None:
            report(self._told(kept))
            return
        vcpu = None if stepping is None else self._vcpu(stepping)
        self._foremost = stepping or min(going)
        if len(going) == len(self.machine.vcpus):
            self._debugger.resume(stepping=vcpu)
        elif len(going) == 1:
            self._debugger.step(self._vcpu(min(going)), 0 if vcpu is None else 1)
        else:
            with self._lock:
                self._awaited = False
            raise TargetError("all vCPUs go on, or one of them")

    def _stop_to_tell(self, going: set[int]) -> Stop | None:
        """A stop that gdb does not know of yet, of a thread that is to go on, if it still holds."""
        with self._lock:
            kept = [stop for thread, stop in self._kept.items() if thread in going]
            for stop in kept:
                del self._kept[stop.vcpu + 1]
        while kept:
            stop = kept.pop()
            still = stop.kind is not StopKind.BREAKPOINT or (
                self.has_breakpoint(stop.address) and self._registers(stop.vcpu + 1).pc == stop.address
            )
            if still and stop.kind is not StopKind.STEP:
                with self._lock:
                    self._kept.update((other.vcpu + 1, other) for other in kept)
                return stop
        return None

    def interrupt(self) -> None:
        """Returns when all vCPUs stand, or when a handler of one has not returned for a while."""
        self.wait_until_standing()
        with self._lock:
            report, awaited = self._report, self._awaited
            self._awaited = False
            if awaited and report is not None:
                report(ThreadStopped(self._foremost, Signal.INT))


def _run_on(vcpu: Vcpu, point: object) -> None:
    """The handler of a breakpoint that nobody wants any more."""


def _end_of(outcome: Outcome) -> RunEnded:
    if outcome.ok and outcome.end is not End.STOPPED:
        return RunEnded(0, message=str(outcome))
    if outcome.end is End.EXITED:
        return RunEnded((outcome.code or 0) & 0xFF or 1, message=str(outcome))
    return RunEnded(signal=_SIGNALS.get(outcome.end, Signal.TRAP), message=str(outcome))
