"""The debugger of a machine: what happens when the guest reaches a point, steps, and who is told when it stops.

It looks at exits in the vCPU's own thread, before anybody else (`VcpuRunner.inspector`). A breakpoint that the guest
has just reached is passed by one single step without it; of several processors only that one runs meanwhile, when the
breakpoint is in memory, where the others would miss it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvmpy import exits
from kvmpy.abi.flags import KVM_MP_STATE_HALTED
from kvmpy.debug.breakpoint import Breakpoint, Point, Stop, StopKind, Watchpoint
from kvmpy.debug.points import Points
from kvmpy.debug.program_counter import linear_pc
from kvmpy.debug.vcpu_debugging import VcpuDebugging
from kvmpy.errors import UsageError
from kvmpy.machine.outcome import End, Outcome

if TYPE_CHECKING:
    from kvmpy._exit import Exit
    from kvmpy.kvm import Vcpu
    from kvmpy.machine import Machine
    from kvmpy.machine.vcpu_runner import VcpuRunner

__all__ = ["Debugger"]

_BREAKPOINT = 3
_HLT = b"\xf4"
_PREFIXES = b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3"
_STEP = 1 << 14
"""DR6.BS: a single step ended (SDM vol. 3, 18.2.3)."""


class Debugger(Points):
    """Breakpoints and watchpoints of one machine; made by `Machine.debugger`.

    They are set while no vCPU runs: before the run, in a handler, or within `machine.paused()`.
    """

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._runners = machine.runners
        self._control = self._runners[0].control
        self._listener: Callable[[Stop], None] | None = None
        self._stopped_since: float | None = None
        for runner in self._runners:
            runner.inspector = self
        self._control.end_listeners.append(self._run_ended)

    # In the vCPU's thread

    def before_entry(self, runner: VcpuRunner) -> None:
        """The vCPU is about to enter the guest: have it pass the breakpoint that it stands at."""
        vcpu = self._vcpus[runner.vcpu]
        if vcpu.accessed:
            vcpu.accessed = False
            pc = linear_pc(runner.vcpu)
            if pc != vcpu.step_from:  # not in the midst of a string instruction
                self._stepped(vcpu, pc)
        passed, vcpu.passed = vcpu.passed, None
        if passed is not None and passed == linear_pc(runner.vcpu) and self._breakpoints_at(runner.vcpu, passed):
            physical = self._patched(runner.vcpu, passed)
            if physical is not None:
                if not self._control.begin_alone(runner.vcpu):
                    vcpu.passed = passed
                    return
                vcpu.passed = None  # if it was set anew meanwhile, it is this one
                if self._patched(runner.vcpu, linear_pc(runner.vcpu)) == physical:
                    self._software.lift(physical)
                    vcpu.lifted = physical
                else:  # removed, or the guest was sent elsewhere, while this vCPU waited for its turn
                    self._control.end_alone(runner.vcpu)
                    passed = None
            vcpu.over = passed
        vcpu.apply()
        if vcpu.stepping:
            vcpu.step_from = linear_pc(runner.vcpu)

    def _stepped(self, vcpu: VcpuDebugging, pc: int) -> None:
        """One instruction is done, and the guest is at `pc`."""
        if vcpu.over is not None:
            self._passed(vcpu)
        if vcpu.steps:
            vcpu.steps -= 1
            if not vcpu.steps:
                self._stop(Stop(StopKind.STEP, vcpu.vcpu.id, pc))

    def _passed(self, vcpu: VcpuDebugging) -> None:
        """The step past a breakpoint is over, or the guest went elsewhere."""
        vcpu.over = None
        if vcpu.lifted is not None:
            self._software.lower(vcpu.lifted)
            vcpu.lifted = None
            self._control.end_alone(vcpu.vcpu)

    def inspect(self, runner: VcpuRunner, event: Exit) -> bool:
        """Look at an exit; True when it was a breakpoint's, a watchpoint's or a step's."""
        vcpu = self._vcpus[runner.vcpu]
        match event:
            case exits.Debug(exception=1, dr6=dr6):
                return self._debug_exception(vcpu, dr6)
            case exits.Debug(exception=3) | exits.InternalError(suberror=1) if self._software:
                pc = linear_pc(runner.vcpu)
                physical = self._patched(runner.vcpu, pc)
                if physical is not None and physical != vcpu.lifted:  # or KVM gave up on the instruction itself
                    self._reached(vcpu, pc, self._breakpoints_at(runner.vcpu, pc))
                    return True
                if isinstance(event, exits.Debug):  # the guest's own INT3 (KVM API, section 4.87)
                    runner.vcpu.inject_exception(_BREAKPOINT)
                    return True
        return False

    def hold(self, runner: VcpuRunner, event: Exit) -> bool:
        """Have the guest stand before a bad end, for whoever is attached."""
        vcpu = self._vcpus[runner.vcpu]
        if self._listener is not None and type(event) not in runner.exit_handlers:
            outcome = runner.outcome_of(event)
            if outcome is not None and not outcome.ok:
                vcpu.end = event
                self._stop(Stop(StopKind.ENDED, runner.vcpu.id, linear_pc(runner.vcpu), outcome=outcome))
                return True
        return False

    def _debug_exception(self, vcpu: VcpuDebugging, dr6: int) -> bool:
        pc = linear_pc(vcpu.vcpu)
        stepped = bool(dr6 & _STEP) and vcpu.stepping
        if stepped and pc == vcpu.step_from and self._is_locked(vcpu.vcpu, pc):
            return True  # KVM's emulator lost the memory to another processor, and the instruction begins anew
        vcpu.accessed = False
        if vcpu.over is not None:
            self._passed(vcpu)
        data = [vcpu.registers[register] for register in vcpu.debug.hit(dr6) if register.kind != "execute"]
        points: list[Point] = [*data]
        if not stepped or data:
            points += [point for point in self._breakpoints_at(vcpu.vcpu, pc) if point.hardware]
        if not points and not stepped:
            return False  # the guest's own, or another user's of the debug registers
        if points:
            self._reached(vcpu, pc, points)
        if stepped:
            if self._has_halted(vcpu, pc):
                return self._halt(vcpu)
            self._stepped(vcpu, pc)
        return True

    def _is_locked(self, vcpu: Vcpu, pc: int) -> bool:
        """Whether the instruction at `pc` has a LOCK prefix, or is XCHG, which locks by itself."""
        try:
            code = self.read_memory(vcpu, pc, min(15, 0x1000 - pc % 0x1000))
        except UsageError:
            return False
        opcode = code.lstrip(_PREFIXES)
        if vcpu.sregs.cs.l and opcode[:1] and opcode[0] >> 4 == 4:  # REX
            opcode = opcode[1:]
        return 0xF0 in code[: len(code) - len(opcode)] or opcode[:1] in (b"\x86", b"\x87")

    def _has_halted(self, vcpu: VcpuDebugging, pc: int) -> bool:
        """Whether the step that ended at `pc` was that of a HLT."""
        if vcpu.step_from is None or pc != vcpu.step_from + 1:
            return False
        try:
            return self.read_memory(vcpu.vcpu, vcpu.step_from, 1) == _HLT
        except UsageError:
            return False

    def _halt(self, vcpu: VcpuDebugging) -> bool:
        """Where KVM's emulator executes HLT, the step takes the place of the exit, or of the sleep: do as HLT does."""
        if not vcpu.vcpu.vm.irqchip:
            return vcpu.runner.handle(exits.Hlt()) or True
        vcpu.vcpu.set_mp_state(KVM_MP_STATE_HALTED)  # an interrupt that waits already ends it at once
        self._stepped(vcpu, linear_pc(vcpu.vcpu))
        return True

    def _reached(self, vcpu: VcpuDebugging, pc: int, points: Sequence[Point]) -> None:
        """The guest is at these points: ask their conditions, call their handlers, stop if one says so."""
        vcpu.passed = pc
        for point in list(points):
            if not point.active or (point.condition is not None and not point.condition(vcpu.vcpu)):
                continue
            point.hits += 1
            if isinstance(point, Breakpoint) and point.temporary:
                point.remove()
            kind = StopKind.BREAKPOINT if isinstance(point, Breakpoint) else StopKind.WATCHPOINT
            if point.handler is None:
                self._stop(Stop(kind, vcpu.vcpu.id, pc, point))
            elif (outcome := point.handler(vcpu.vcpu, point)) is not None:
                self._control.finish(outcome)

    def _watched_access(self, point: Watchpoint) -> None:
        """A device handler saw the guest access a watched page: look at it when the instruction is complete."""
        here = threading.get_ident()
        runner = next((r for r in self._runners if self._control.thread_of(r.vcpu) == here), self._runners[0])
        runner.post(lambda: self._reached(self._vcpus[runner.vcpu], linear_pc(runner.vcpu), [point]))

    def plan_steps(self, vcpu: Vcpu, count: int) -> None:
        """Have the next run of a vCPU end after `count` instructions; 0: not so."""
        state = self._vcpus[vcpu]
        state.steps = count
        if not count:
            state.apply()

    # Stops

    def attach(self, listener: Callable[[Stop], None]) -> None:
        """Have stops told to `listener` instead of ending the run; all vCPUs then stand until `resume` or `step`.

        The listener is called in whichever thread notices the stop and must be quick. Also an end that is not ok stops
        first, so that the place can be looked at. Raises UsageError when somebody is attached already.
        """
        if self._listener is not None:
            raise UsageError("a debugger is attached to this machine already")
        self._listener = listener

    def detach(self) -> None:
        """End `attach`; a guest that stands goes on."""
        self._listener = None
        self.resume()

    @property
    def standing(self) -> bool:
        """Whether the guest stands before whoever is attached."""
        return self._stopped_since is not None

    def interrupt(self, timeout: float | None = None) -> bool:
        """Have all vCPUs stand, and wait for it. False: a handler of one did not return within `timeout` seconds."""
        self._hold()
        if not self._control.wait_until_all_stand(timeout):
            return False
        for vcpu in self._vcpus.values():
            if vcpu.over is not None:
                # It was about to pass a breakpoint, alone: it begins anew when it goes on, which may not be first.
                vcpu.passed = vcpu.over
                self._passed(vcpu)
        return True

    def resume(self, *, stepping: Vcpu | None = None) -> None:
        """Let all vCPUs go on; the one that is `stepping` stops them again after one instruction."""
        with self._control.changing():
            since, self._stopped_since = self._stopped_since, None
            if since is None:
                return
            for vcpu in self._vcpus.values():
                vcpu.steps = int(vcpu.vcpu is stepping)
                self._post_end(vcpu)
            self._control.resume(self, forgive=time.monotonic() - since)

    def step(self, vcpu: Vcpu, count: int = 1) -> None:
        """Have one vCPU, which stands, execute `count` instructions (0: go on), the others stand; the stop is told."""
        state = self._vcpus[vcpu]
        if not self.standing:
            raise UsageError("a step needs a guest that stands: interrupt() it first")
        state.steps = count
        self._post_end(state)
        self._control.let_one_run(vcpu, self)

    def _post_end(self, vcpu: VcpuDebugging) -> None:
        if vcpu.end is not None:
            vcpu.runner.post(lambda: self._end(vcpu))

    def _end(self, vcpu: VcpuDebugging) -> None:
        event, vcpu.end = vcpu.end, None
        if event is not None:  # else the run was ended otherwise before it went on
            vcpu.runner.handle(event)

    def _hold(self) -> None:
        with self._control.changing():
            if self._stopped_since is None:
                self._stopped_since = time.monotonic()
                self._control.ask_to_stand(self)
            else:
                self._control.let_none_run()

    def _stop(self, stop: Stop) -> None:
        listener = self._listener
        vcpu = self._vcpus[self.machine.vcpus[stop.vcpu]]
        vcpu.steps = 0
        vcpu.stopped_at = stop.address
        if listener is None:
            if stop.kind is StopKind.STEP:
                self._control.finish(Outcome(End.STOPPED, f"stepped to {stop.address:#x}", vcpu=stop.vcpu))
            else:
                name = stop.point.name if stop.point is not None else ""
                message = f"{name}, vCPU {stop.vcpu} at {stop.address:#x}"
                self._control.finish(Outcome(End.BREAKPOINT, message, vcpu=stop.vcpu))
            return
        self._hold()
        listener(stop)

    def _run_ended(self, outcome: Outcome) -> None:
        for vcpu in self._vcpus.values():
            vcpu.end = None
        if self._listener is not None:
            self._listener(Stop(StopKind.ENDED, outcome.vcpu or 0, outcome=outcome))
