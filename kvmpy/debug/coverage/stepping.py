"""Coverage by single steps: every instruction that one vCPU executes.

A step must cost little, so it does not go the way of other exits: KVM_RUN is entered again right where it came back,
and nobody else sees the exit. What is noted is the pair of two instructions, and only a new pair is looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmpy.abi.flags import KVM_MP_STATE_HALTED
from kvmpy.debug.coverage.step_support import steps_go_on, steps_in_ring3
from kvmpy.debug.coverage.unreported import Departure, Passage, Unreported
from kvmpy.debug.program_counter import linear_pc
from kvmpy.kvm.run_page import EXIT_REASON, NO_EXIT, NOT_FROM_THE_GUEST

if TYPE_CHECKING:
    from kvmpy.debug.software_breakpoints import SoftwareBreakpoints
    from kvmpy.machine.vcpu_runner import VcpuRunner

__all__ = ["VcpuSteps"]

_REASON = EXIT_REASON // 4
_DEBUG, _HLT, _IRQ_WINDOW, _FAIL_ENTRY, _INTERNAL_ERROR = 4, 5, 7, 9, 17  # KVM_EXIT_*
_BEFORE_EXECUTION = (_DEBUG, _IRQ_WINDOW, _FAIL_ENTRY, *NOT_FROM_THE_GUEST)
"""Exits at which the instruction that was to come has not begun."""
_EXCEPTION, _DR6 = 32 // 4, 48 // 8
"""Indices in the run page of `debug.arch.exception` and `debug.arch.dr6`."""
_PC = 40 // 8
_DB = 1
_STEP, _STEP_ALONE = 1 << 14, 1 << 14 | 15
"""DR6.BS, and with it B0 to B3 (SDM vol. 3, 18.2.3)."""


class VcpuSteps:
    """Records the instructions of one vCPU from `begin` to `end`, while it stands both times.

    `breakpoints` are the machine's in guest memory.
    """

    def __init__(self, runner: VcpuRunner, breakpoints: SoftwareBreakpoints) -> None:
        self._vcpu = runner.vcpu
        self._debug = runner.debug
        self._unreported = Unreported(runner.vcpu, breakpoints)
        self._passed: dict[tuple[int, int], int] = {}
        """(address, address of the next instruction) -> how often, for what needs no look at each time."""
        self._looked_at: Counter[tuple[int, int]] = Counter()
        """The same for the others: HLT, IRETQ, and where steps end because the guest goes to ring 3."""
        self._passages: dict[tuple[int, int], Passage] = {}
        self._completed: Counter[int] = Counter()
        """Instructions after which no step came."""
        self._at = 0
        """The instruction that is to come."""
        self._departure: Departure | None = None
        """Where it goes if it is an IRETQ."""
        self._begun = self._perhaps = False
        """Whether that has begun, having caused an exit; whether somebody may perform it in KVM's place."""
        self._on = False
        self.unseen = 0
        """How often the guest went where steps do not come out."""

    def begin(self) -> None:
        """Have KVM_RUN of this vCPU go through here."""
        self._plain = self._vcpu.enter
        self._vcpu.enter = self._make_entry()
        self._step(True)

    def end(self) -> None:
        """Leave the vCPU as it was."""
        if self._vcpu.closed:
            return
        self._unreported.arrive()
        self._settle(linear_pc(self._vcpu))
        self._vcpu.enter = self._plain
        self._step(False)

    def _step(self, on: bool) -> None:
        if on != self._on:
            self._on = on
            self._debug.traced = on
            self._debug.apply()

    def _make_entry(self) -> Callable[[int, int, int], int]:
        """What stands for the ioctl KVM_RUN: it comes back with the next exit that is not a step."""
        enter, passed = self._plain, self._passed
        u32, u64 = self._vcpu.page.u32, self._vcpu.page.u64
        steps_in_ring3()  # looked up now, not when the guest runs
        ask = None if steps_go_on() else self._ask_again
        look = self._look

        def entry(fd: int, request: int, zero: int) -> int:
            at = self._before_entry()
            try:
                if ask is not None:
                    ask()
                answer = enter(fd, request, zero)
                if answer < 0:
                    return answer
                self._begun = self._perhaps = False
                alone = not self._debug.stepping
                while u32[_REASON] == _DEBUG and u64[_DR6] & _STEP_ALONE == _STEP and u32[_EXCEPTION] == _DB:
                    there = u64[_PC]
                    try:
                        passed[at, there] += 1
                    except KeyError:
                        look(at, there)
                    at = there
                    if not alone or u32[_REASON] != _DEBUG:
                        self._at = at
                        return 0
                    u32[_REASON] = NO_EXIT
                    if ask is not None:
                        ask()
                    answer = enter(fd, request, zero)
                    if answer < 0:
                        self._at = at
                        return answer
            except BaseException:  # a signal handler's, right after KVM_RUN or in the midst of a look
                self._break_off(at)
                raise
            self._at = at
            self._begun = self._on and u32[_REASON] not in (*_BEFORE_EXECUTION, _INTERNAL_ERROR)
            self._perhaps = self._on and u32[_REASON] == _INTERNAL_ERROR
            return answer

        return entry

    def _before_entry(self) -> int:
        """Where the vCPU is about to go on."""
        pc = linear_pc(self._vcpu)
        self._unreported.arrive()
        self._settle(pc)
        if not self._is_hidden():
            self._step(True)
            self._prepare(pc)
        elif self._on:
            self._leave_unseen()
        return pc

    def _prepare(self, pc: int) -> None:
        """The instruction at `pc` is executed next."""
        self._departure = self._unreported.departure(pc)
        if self._departure is not None and self._departure.to_ring3 and not steps_in_ring3():
            self._completed[pc] += 1
            self._leave_unseen()

    def _settle(self, pc: int) -> None:
        """The vCPU stands at `pc` after an exit: see to it that all is counted that is behind it."""
        if pc == self._at:
            return
        if self._begun or self._perhaps:
            self._completed[self._at] += 1
            self._completed.update(self._passage(self._at, pc, self._departure).between)
        self._begun = self._perhaps = False
        self._at = pc

    def _ask_again(self) -> None:
        if self._on:
            self._debug.apply()

    def _passage(self, at: int, there: int, departure: Departure | None) -> Passage:
        if departure is not None and departure.target is not None:
            return self._unreported.after_return(departure.target, there)
        pair = at, there
        if pair not in self._passages:
            self._passages[pair] = self._unreported.passage(at, there)
        return self._passages[pair]

    def _look(self, at: int, there: int) -> None:
        """A pair of instructions that is not in the table."""
        unreported = self._unreported
        unreported.arrive()
        departure, self._departure = self._departure, None
        passage = self._passage(at, there, departure)
        if departure is not None and departure.target is not None:  # it differs from time to time
            self._completed.update(passage.between)
        halted = unreported.halts(passage.last(at), there)
        if self._is_hidden():
            self._leave_unseen()
        else:
            self._prepare(there)
        if departure is None and self._departure is None and self._on and not halted and not unreported.is_return(at):
            self._passed[at, there] = 1
            return
        self._looked_at[at, there] += 1
        if halted and self._vcpu.vm.irqchip:
            # A KVM that runs the guest in its emulator has forgotten over the step that the processor halts.
            self._vcpu.set_mp_state(KVM_MP_STATE_HALTED)
        elif halted:
            self._vcpu.page.u32[_REASON] = _HLT  # the step took the place of this exit

    def _is_hidden(self) -> bool:
        """Whether the vCPU stands where steps do not come out."""
        return self._unreported.in_ring3 and not steps_in_ring3()

    def _leave_unseen(self) -> None:
        """Let the guest run until its next exit: a step in ring 3 would be a #DB for it."""
        self.unseen += 1
        self._step(False)

    def _break_off(self, at: int) -> None:
        """Keep the pending exit for the next run, unless it is a step, which nobody else would know."""
        page = self._vcpu.page
        reason = page.u32[_REASON]
        self._at, self._begun = at, reason not in _BEFORE_EXECUTION
        if reason == _DEBUG and page.u64[_DR6] & _STEP_ALONE == _STEP and page.u32[_EXCEPTION] == _DB:
            self._looked_at[at, page.u64[_PC]] += 1
            self._at = page.u64[_PC]
            page.u32[_REASON] = NO_EXIT

    # Results

    def counts(self) -> Counter[int]:
        """Linear address -> how often the instruction there was executed."""
        counts = Counter(dict(self._completed))  # copied in one step each: the vCPU may be running
        for passed in (dict(self._passed), dict(self._looked_at)):
            for pair, count in passed.items():
                passage = self._passages.get(pair, _PLAIN)
                if not passage.skipped:
                    counts[pair[0]] += count
                for address in passage.between:
                    counts[address] += count
        if self._begun:
            counts[self._at] += 1
        return counts

    def pairs(self) -> set[tuple[int, int]]:
        """(address, address of the next instruction) of all that was executed."""
        return {*dict(self._passed), *dict(self._looked_at)}

    @property
    def sizes(self) -> dict[int, int]:
        """Linear address -> size of the instruction there, where it is known."""
        return dict(self._unreported.sizes)


_PLAIN = Passage()
