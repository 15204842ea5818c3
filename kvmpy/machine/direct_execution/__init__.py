"""Running ring 0 of the guest in ring 3 of the processor, for hosts whose KVM runs ring 0 by its instruction emulator.

Such a KVM takes a microsecond for an instruction of ring 0, and runs ring 3 at the processor's speed. So ring 0 is
deprivileged, as virtual machines were run before processors helped: the vCPU enters the guest's kernel code in ring 3,
with page tables that map what the guest's map for ring 0 (`memory`), code that was looked through (`code`), and
descriptor tables of our own (`ring_0`). What kernels do most is done in ring 3 by code that stands in for it
(`stand_ins`). What else only ring 0 may do faults; the handler in our IDT is an OUT, and the instruction is done here
(`instructions`), or by KVM's emulator in one single step. Interrupts come the same way and are delivered through the
guest's IDT.

Whatever is irregular goes back to KVM's emulator, for a step or until the next tick. See docs/direct-execution.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpy.errors import OverlapError

if TYPE_CHECKING:
    from kvmpy.machine.direct_execution.execution import DirectExecution
    from kvmpy.machine.vcpu_runner import VcpuRunner

__all__ = ["direct_execution"]


def direct_execution(runner: VcpuRunner) -> DirectExecution | None:
    """One for a vCPU, or None where there is no need of it or no way.

    It is for hosts whose KVM emulates ring 0, which are those that break SYSCALL; for machines with one processor,
    because nobody tells it when another one changes page tables; and it needs free guest-physical addresses.
    """
    from kvmpy.machine.ring3_entry import needs_repair

    vm = runner.vcpu.vm
    if len(vm.vcpus) > 1 or not vm.irqchip or not needs_repair():
        return None
    from kvmpy.machine.direct_execution.context import SIZE
    from kvmpy.machine.direct_execution.execution import DirectExecution
    from kvmpy.machine.direct_execution.world import AREA

    try:
        vm.memory.check_free(AREA, SIZE, "direct execution")
    except OverlapError:
        return None
    return DirectExecution(runner)
