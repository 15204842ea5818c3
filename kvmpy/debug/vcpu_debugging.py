"""What a debugger keeps of one vCPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpy.machine.guest_debug import DebugRegister, GuestDebug

if TYPE_CHECKING:
    from kvmpy._exit import Exit
    from kvmpy.debug.breakpoint import Point
    from kvmpy.machine.vcpu_runner import VcpuRunner

__all__ = ["VcpuDebugging"]


class VcpuDebugging:
    """Debug registers, steps, and the breakpoint that one vCPU is at."""

    def __init__(self, runner: VcpuRunner) -> None:
        self.runner = runner
        self.vcpu = runner.vcpu
        self.debug: GuestDebug = runner.debug
        self.registers: dict[DebugRegister, Point] = {}
        self.steps = 0
        """Instructions that are still to be stepped."""
        self.passed: int | None = None
        """The linear address of the breakpoint that was reached last: the next entry has to pass it."""
        self.over: int | None = None
        """The one that the present single step passes."""
        self.lifted: int | None = None
        """Where, guest-physical, a software breakpoint is lifted for that."""
        self.stepping = False
        """Whether the debugger has the present instruction stepped."""
        self.step_from: int | None = None
        """The linear address of the instruction that is being stepped."""
        self.stopped_at: int | None = None
        """Where a step or a point stopped the guest last."""
        self.accessed = False
        """Whether an instruction that is stepped accessed a device, or was done in software."""
        self.end: Exit | None = None
        """The exit that will end the run when the guest is resumed."""

    def apply(self) -> None:
        """Tell KVM what is to stop the vCPU from its next entry on."""
        self.stepping = stepping = self.steps > 0 or self.over is not None
        if stepping:
            self.debug.step(self, past=self.over)
        else:
            self.debug.run(self)
        # KVM reports no step of an instruction that leaves the guest by itself, such as OUT: it has to be noticed.
        self.runner.loop.tell_accesses(self._access if stepping else None)
        self.debug.apply()

    def _access(self) -> None:
        self.accessed = True
        self.vcpu.kick()  # back at once: the next KVM_RUN only completes this instruction
