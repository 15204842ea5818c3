"""The same guest once more, by single steps: the registers before the last instruction, where KVM threw them away."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmpy._value import replace
from kvmpy.abi.flags import KVM_MP_STATE_HALTED
from kvmpy.debug.crash_report.capture import gather
from kvmpy.debug.crash_report.evidence import Step
from kvmpy.debug.crash_report.report import CrashReport
from kvmpy.debug.program_counter import linear_pc
from kvmpy.errors import UsageError
from kvmpy.exits import Debug, Hlt
from kvmpy.machine.outcome import End, Outcome

if TYPE_CHECKING:
    from kvmpy._exit import Exit
    from kvmpy.kvm import Vcpu
    from kvmpy.machine import Machine
    from kvmpy.machine.vcpu_runner import VcpuRunner
    from kvmpy.x86.registers import CpuState

    Until = int | str | Callable[[Vcpu], bool]

__all__ = ["replay"]

_STEP = 1 << 14
"""DR6.BS: a single step ended (SDM vol. 3, 18.2.3)."""
_HLT = 0xF4


def replay(
    make_machine: Callable[[], Machine],
    *,
    vcpu: int = 0,
    until: Until | None = None,
    steps: int = 1_000_000,
    timeout: float = 60.0,
    keep: int = 64,
) -> CrashReport:
    """Run a fresh machine by single steps up to its end, and report the state before the last instruction.

    `make_machine` gives a machine with the guest loaded, which is closed afterwards. The report shows the last `keep`
    instructions and what each changed. `until` ends the replay earlier: before the instruction at an address or symbol,
    or when a function of the vCPU answers True; `steps` and `timeout` (seconds) limit it in any case. Steps are those
    of the processor with place `vcpu`; others run as they do.

    A step costs some 50 us where KVM executes ring 0 in software. Interrupts come at other moments than at full speed.
    In ring 3 of such a host no step comes out: the guest gets them as #DB through its own IDT.

    Raises UsageError for limits that are not positive, and what making the machine raises.
    """
    if keep < 1 or steps < 1 or not timeout > 0:
        raise UsageError(f"a replay needs positive limits, not keep={keep!r}, steps={steps!r}, timeout={timeout!r}")
    with make_machine() as machine:
        recorder = _Recorder(machine, machine.runners[vcpu], until, steps, keep)
        recorder.begin()
        outcome = machine.run(timeout=timeout)
        recorder.end()
        evidence = gather(machine, outcome)
        if outcome.end is End.TRIPLE_FAULT and outcome.vcpu == recorder.vcpu.id:
            evidence = replace(evidence, state=recorder.last.copy(), registers_lost=False)
        return CrashReport.of(replace(evidence, steps=tuple(map(Step, recorder.states)), step_count=recorder.count))


class _Recorder:
    """Takes down the state after every step of one vCPU."""

    def __init__(self, machine: Machine, runner: VcpuRunner, until: Until | None, steps: int, keep: int) -> None:
        self.vcpu = runner.vcpu
        self.states: deque[CpuState] = deque([self.vcpu.cpu_state()], maxlen=keep)
        """Before each of the last instructions; the last one is that of the instruction to come."""
        self.count = 0
        self._runner = runner
        self._debug = runner.debug
        self._steps = steps
        self._until = machine.symbols.address_of(until) if isinstance(until, str) else until

    @property
    def last(self) -> CpuState:
        """The state before the instruction that is to come."""
        return self.states[-1]

    def begin(self) -> None:
        """Have the vCPU step from its first instruction on."""
        self._runner.exit_handlers[Debug] = self._stepped
        self._debug.traced = True
        self._debug.apply()

    def end(self) -> None:
        """Let it run again."""
        self._debug.traced = False
        self._debug.apply()

    def _stepped(self, vcpu: Vcpu, event: Exit) -> Outcome | None:
        """A Debug exit: note the state. What ends the replay is an outcome."""
        if not (isinstance(event, Debug) and event.dr6 & _STEP):
            return self._runner.outcome_of(event)
        halted = self._has_halted()
        self.states.append(vcpu.cpu_state())
        self.count += 1
        if halted:  # where KVM's emulator executes HLT, the step takes the place of the exit, or of the sleep
            if not vcpu.vm.irqchip:
                return self._runner.outcome_of(Hlt())
            vcpu.set_mp_state(KVM_MP_STATE_HALTED)
        if self._reached():
            return Outcome(End.STOPPED, f"the replay was to end at {vcpu.regs.rip:#x}", vcpu=vcpu.id)
        if self.count >= self._steps:
            return Outcome(End.STOPPED, f"the replay ended after {self.count} instructions", vcpu=vcpu.id)
        self._debug.apply()
        return None

    def _reached(self) -> bool:
        until = self._until
        if until is None:
            return False
        if isinstance(until, int):
            return linear_pc(self.vcpu) == until
        return callable(until) and until(self.vcpu)

    def _has_halted(self) -> bool:
        """Whether the instruction that was executed is HLT."""
        before = self.last
        if self.vcpu.regs.rip != before.regs.rip + 1:
            return False
        place = self.vcpu.walk(before.regs.rip + (0 if before.sregs.cs.l else before.sregs.cs.base)).physical
        region = self.vcpu.vm.memory.region_at(place) if place is not None else None
        return region is not None and place is not None and self.vcpu.vm.memory.read_u8(place) == _HLT
