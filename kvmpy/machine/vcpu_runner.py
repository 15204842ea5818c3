"""What happens on one vCPU's thread around the run loop: ticks, deadlines, pauses, and the exits that end a run."""

import errno
import threading
import time
from collections import deque

from kvmpy import exits
from kvmpy._exit import Answered, Exit
from kvmpy.kvm.kick import HEARTBEAT, Unblocked
from kvmpy.kvm.vcpu import Vcpu
from kvmpy.machine.outcome import End, Outcome
from kvmpy.machine.run_control import RunControl
from kvmpy.machine.run_loop import RunLoop
from kvmpy.x86.registers import CpuState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from kvmpy.machine.bus import Bus
    from kvmpy.machine.direct_execution.execution import DirectExecution
    from kvmpy.machine.emulated_processor import InstructionCompletion
    from kvmpy.machine.guest_debug import GuestDebug
    from kvmpy.machine.observed_loop import Observer
    from kvmpy.machine.ring3_entry import Ring3Entry

    ExitHandler = Callable[[Vcpu, Exit], Outcome | None]

    class Inspector(Protocol):
        """A debugger, as a runner sees it."""

        def before_entry(self, runner: "VcpuRunner") -> None:
            """The vCPU's thread is about to enter the guest, at the beginning of a run or after standing."""

        def inspect(self, runner: "VcpuRunner", event: Exit) -> bool:
            """Look at an exit that is not a device's before anybody else does. True: it is the debugger's."""

        def hold(self, runner: "VcpuRunner", event: Exit) -> bool:
            """Look at one that is left, before the user's handlers do. True: the guest stands for the debugger."""

    Guard = Callable[[Callable[..., Any]], Callable[..., Any]]

__all__ = ["VcpuRunner"]

_FIRST_TICK = 0.002
"""Seconds. Each tick comes after twice the time, up to HEARTBEAT: a guest of a millisecond ends at once."""

_EFER, _SYSCALL_ENABLE = 0xC000_0080, 1
_MP_UNINITIALIZED, _MP_INIT_RECEIVED, _MP_HALTED = 1, 2, 3  # KVM_MP_STATE_*


class VcpuRunner:
    """Runs one vCPU of a machine in whichever thread calls `run`."""

    def __init__(self, vcpu: Vcpu, control: RunControl, ports: "Bus", mmio: "Bus", guard: "Guard") -> None:
        self.vcpu = vcpu
        self.control = control
        self.exit_handlers: dict[type[Exit], ExitHandler] = {}
        self.inspector: Inspector | None = None
        self.observer: Observer | None = None
        """Who is told of every exit; `observe` sets it."""
        self._observed_by: Observer | None = None
        self.repairs_ring3_entry = True
        """Whether SYSCALL and INT n of ring 3 are repaired where this host's KVM gets them wrong."""
        self.ring3_entry: Ring3Entry | None = None
        self.runs_ring_0_directly = False
        """Whether a guest that is long in ring 0 runs that in ring 3, where this host's KVM would emulate it. Only for
        one whose code lies in pages of its own: code runs from copies of its pages, and what devices write into a page
        of code would not be seen there. `Machine.load` sets it for Linux."""
        self.direct_execution: DirectExecution | None = None
        self.software_instructions = True
        self.completion: InstructionCompletion | None = None
        """What performs instructions that KVM gives up on, from the first one on."""
        self._debug: GuestDebug | None = None
        self._posted: deque[Callable[[], object]] = deque()
        self.loop = RunLoop(vcpu, ports, mmio, attend=self._attend, other=self._other, guard=guard)
        self._ports, self._mmio, self._guard = ports, mmio, guard
        self._tick = 0.0
        """Seconds between two ticks."""
        self._due = 0.0
        """When the next one comes, by time.monotonic()."""

    def run(self) -> None:
        """Run until the machine leaves its run; raises what a handler raised."""
        vcpu, control = self.vcpu, self.control
        try:
            if not control.enter(vcpu):
                return
            # A tick that is lost because the guest exits just then is not missed: another one comes after HEARTBEAT.
            # But the tick of a deadline must not have to wait for a guest whose handlers happen to be quick.
            with Unblocked(control.deadline is None):
                vcpu.claim()
                try:
                    self._run_claimed()
                finally:
                    vcpu.arm(0, 0)
                    vcpu.release()
        finally:
            control.leave(vcpu)

    def _run_claimed(self) -> None:
        vcpu = self.vcpu
        self._memory_may_have_changed()
        vcpu.page.runs[0] += 1
        if self.control.queuing and self.loop.queue is None:
            from kvmpy.kvm.coalesced_ring import CoalescedRing

            self.loop.queue = CoalescedRing(vcpu)
        self._tick = _FIRST_TICK
        self._due = time.monotonic() + _FIRST_TICK
        self._arm()
        if self.inspector is not None:
            self.inspector.before_entry(self)
        if not (vcpu.backlog and self._handle_backlog()):
            self._run_loop()

    @property
    def debug(self) -> "GuestDebug":
        """Debug registers and single steps of the vCPU."""
        if self._debug is None:
            from kvmpy.machine.guest_debug import GuestDebug

            self._debug = GuestDebug(self.vcpu)
        return self._debug

    def start_at(self, state: CpuState) -> None:
        """Have the next run begin in `state`; an exit that the last guest left, whose handler raised, is dropped."""
        if self.vcpu.page.runs[0]:
            self.vcpu.settle(lambda event: None)
            self.vcpu.forget_events()
        self.vcpu.set_cpu_state(state)

    def _run_loop(self) -> None:
        while True:
            self._observed_by = observer = self.observer
            if observer is None:
                self.loop.run()
            else:
                from kvmpy.machine.observed_loop import run_observed

                run_observed(self.loop, observer)
            if self.observer is observer or self.control.leaving:  # else it left only to come back by the other loop
                return

    def observe(self, observer: "Observer | None") -> None:
        """Have every exit told to `observer` from the next one on, or to nobody; from any thread."""
        self.observer = observer
        self.vcpu.kick()

    def post(self, call: "Callable[[], object]") -> None:
        """Have this vCPU's thread call something between two exits, before the guest goes on; from any thread."""
        self._posted.append(call)
        self.vcpu.kick()

    # Between exits

    def _attend(self, number: int) -> bool:
        """KVM_RUN came back with an errno. True: leave the loop."""
        leave = self._look_around(number)
        while number == errno.EINTR and not leave and self._run_directly():
            leave = self._look_around(number)
        return leave

    def _look_around(self, number: int) -> bool:
        vcpu, control = self.vcpu, self.control
        if number == errno.EINTR:
            kicked = vcpu.take_kick()
            if control.leaving:
                return True
            now = time.monotonic()
            ticked = not kicked or now >= self._due  # kicks, however many, do not put a tick off
            if control.deadline is not None and now >= control.deadline:
                place = f"vCPU {vcpu.id} is at rip {vcpu.regs.rip:#x}"
                message = f"the guest did not end within {control.timeout:g} seconds; {place}"
                control.finish(Outcome(End.TIMEOUT, message, vcpu=vcpu.id))
                return True
            if control.must_stand(vcpu):
                control.park(vcpu)
                self._memory_may_have_changed()
            elif ticked or control.counting:
                self._look_whether_idle()
            if self.repairs_ring3_entry and ticked and not control.leaving:
                self._look_after_ring3_entry()
            while self._posted and not control.leaving:
                self._posted.popleft()()
            if not control.leaving:
                if self.inspector is not None:
                    self.inspector.before_entry(self)
                if ticked:
                    self._tick = min(2 * self._tick, HEARTBEAT)
                    self._due = now + self._tick
                self._arm()  # also because another thread may have used the vCPU, and its timer, in a pause
            return control.leaving or self.observer is not self._observed_by
        if number == errno.EAGAIN:  # a processor that waited for INIT or SIPI got one: enter it again
            return control.leaving
        return self._other(vcpu.failed_run(number))

    def _arm(self) -> None:
        """Set the timer to the next tick, if one is needed, or to the deadline."""
        needs = []
        # Queued writes must not wait for an exit that may never come.
        ticks = self.vcpu.vm.irqchip or self.loop.queue is not None
        if ticks or threading.current_thread() is threading.main_thread():
            needs.append(max(self._due - time.monotonic(), 1e-6))
        if self.control.deadline is not None:
            needs.append(max(self.control.deadline - time.monotonic(), 1e-6))
        if needs:
            # The interval is a safety net: should a tick be consumed unseen, another one comes.
            self.vcpu.arm(min(needs), HEARTBEAT)

    def _look_whether_idle(self) -> None:
        """With an in-kernel irqchip `cli; hlt` never leaves KVM_RUN: notice when no processor can go on.

        Another processor could still wake one by an IPI, so all must wait for ever. An NMI that a device or the host
        may yet send does not count: the next run would receive it.
        """
        if self.vcpu.vm.irqchip and self.control.all_idle(self.vcpu, _waits_for_ever):
            self.control.finish(Outcome(End.HALTED, "halted with interrupts off", vcpu=self.vcpu.id))

    # Exits that somebody met by Vcpu.settle() between two runs

    def _handle_backlog(self) -> bool:
        """Handle exits that were left for the next run, oldest first. True: leave the run."""
        vcpu, leave = self.vcpu, False
        while vcpu.backlog and not leave:
            match vcpu.backlog[0]:
                case exits.IoOut(port=port, data=data, size=size):
                    for at in range(0, len(data), size):
                        self._guard(self._ports.write)(port, size, int.from_bytes(data[at : at + size], "little"))
                case exits.MmioWrite(address=address, data=data):
                    self._guard(self._mmio.write)(address, len(data), int.from_bytes(data, "little"))
                case event:
                    leave = self._other(event)
            vcpu.backlog = vcpu.backlog[1:]
        return leave

    # Exits other than port and memory accesses

    def _other(self, event: Exit) -> bool:
        """Handle an exit that no device does. True: leave the loop."""
        inspector = self.inspector
        if (
            (inspector is not None and inspector.inspect(self, event))
            or self._repair(event)
            or (inspector is not None and inspector.hold(self, event))
        ):
            if inspector is not None and not self.control.leaving:
                inspector.before_entry(self)
            return self.control.leaving
        return self.handle(event)

    def handle(self, event: Exit) -> bool:
        """Handle such an exit without a debugger: by a handler of the user's, or as the end of the run."""
        handler = self.exit_handlers.get(type(event))
        outcome = handler(self.vcpu, event) if handler is not None else self.outcome_of(event)
        if outcome is not None:
            self.control.finish(outcome)
        # The instruction whose answer KVM waits for is completed first; the kick of the end brings the vCPU out again.
        return self.control.leaving and not isinstance(event, Answered)

    def _repair(self, event: Exit) -> bool:
        """Do what KVM should have done: an entry of ring 0 from ring 3, or an instruction that it does not know."""
        if type(event) is exits.Debug:
            if self.ring3_entry is None or not self.ring3_entry.inspect(event):
                return False
            self._run_directly()
            return True
        return type(event) is exits.InternalError and self._complete(event)

    def _look_after_ring3_entry(self) -> None:
        """Once the guest has enabled SYSCALL: have it repaired, where it needs to be."""
        if self.ring3_entry is None:
            if not self.vcpu.get_msr(_EFER) & _SYSCALL_ENABLE:
                return
            from kvmpy.machine.ring3_entry import Ring3Entry, needs_repair

            if not needs_repair():
                self.repairs_ring3_entry = False
                return
            self.ring3_entry = Ring3Entry(self)
        self.ring3_entry.arm()

    def _run_directly(self) -> bool:
        """Go on in ring 0 at the processor's speed, where KVM would take its emulator. True: there was an EINTR."""
        direct = self.direct_execution
        if direct is None:
            if not self.runs_ring_0_directly or self._tick < HEARTBEAT:
                return False
            from kvmpy.machine.direct_execution import direct_execution

            direct = self.direct_execution = direct_execution(self)
            if direct is None:
                self.runs_ring_0_directly = False
                return False
        if self.inspector is not None or self.observer is not None or not self.runs_ring_0_directly:
            self._memory_may_have_changed()
            return False
        return direct.is_quicker() and direct.run()

    def _memory_may_have_changed(self) -> None:
        """By the host: in a pause, between two runs, or by a debugger that puts breakpoints into it."""
        if self.direct_execution is not None:
            self.direct_execution.forget()

    def _complete(self, event: exits.InternalError) -> bool:
        """Have an instruction that KVM could not emulate done in software, if it may be and is known."""
        if not self.software_instructions:
            return False
        if self.completion is None:
            from kvmpy.machine.emulated_processor import InstructionCompletion

            self.completion = InstructionCompletion(self.vcpu, self.control, self._mmio)
        done = self.completion.complete(event, self._debug)
        if done and self.loop.after_access is not None:
            self.loop.after_access()
        return done

    def outcome_of(self, event: Exit) -> Outcome | None:
        """The end of the run that an exit is which nobody handles, or None when it is none."""
        vcpu = self.vcpu
        match event:
            case exits.Hlt():
                return Outcome(End.HALTED, f"hlt, next rip {vcpu.regs.rip:#x}", exit=event, vcpu=vcpu.id)
            case exits.Shutdown():
                return Outcome(
                    End.TRIPLE_FAULT, f"vCPU {vcpu.id} shut down at rip {vcpu.regs.rip:#x}", exit=event, vcpu=vcpu.id
                )
            case exits.SystemEvent(type=type):
                end = {1: End.SHUTDOWN, 2: End.RESET, 3: End.PANIC}.get(type, End.FAILED)
                return Outcome(end, f"KVM_SYSTEM_EVENT {type}", exit=event, vcpu=vcpu.id)
            case exits.Interrupted() | exits.IrqWindowOpen():
                return None
            case exits.InternalError(suberror=1, instruction=instruction) if instruction:
                message = f"KVM cannot emulate the instruction at rip {vcpu.regs.rip:#x}: {instruction.hex(' ')} ..."
            case exits.InternalError(suberror=1) if _is_after_reset(vcpu):
                message = "there is no code at the reset vector, 0xfffffff0: load an image, or set a mode, before run()"
            case exits.InternalError():
                message = f"KVM internal error {event.name} at rip {vcpu.regs.rip:#x}, data {event.data}"
            case exits.FailEntry(hardware_reason=reason):
                rules = "".join(f"\n  - {rule}" for rule in vcpu.explain_entry_failure(event))
                message = f"the processor refused to enter the guest, reason {reason:#x}{rules}"
            case _:
                message = f"nobody handles {event!r}; Machine.on_exit can"
        return Outcome(End.FAILED, message, exit=event, vcpu=vcpu.id)


def _is_after_reset(vcpu: Vcpu) -> bool:
    """Whether nothing was executed since power-on (SDM vol. 3, "First Instruction Executed")."""
    return bool(vcpu.regs.rip == 0xFFF0 and vcpu.sregs.cs.base == 0xFFFF_0000)


def _waits_for_ever(vcpu: Vcpu) -> bool:
    """Whether a processor, out of the guest now, is halted with interrupts off or was never started."""
    state = vcpu.get_mp_state()  # INIT and SIPI that came meanwhile are in it
    if state in (_MP_UNINITIALIZED, _MP_INIT_RECEIVED):
        return True
    if state != _MP_HALTED or vcpu.page.if_flag:
        return False
    events = vcpu.get_events()
    return not (events.smi.pending or (events.nmi.pending and not events.nmi.masked))
