"""Where this host's processor keeps the components of an XSAVE area: CPUID leaf 0xD, as a guest sees it."""

from __future__ import annotations

import functools

from kvmpy.exits import IoOut
from kvmpy.kvm import Kvm
from kvmpy.kvm.first_exit import first_exit

__all__ = ["xsave_layout"]

_CODE, _TABLES, _STACK = 0x1000, 0x1_0000, 0x3000
_COMPONENTS = range(2, 20)
_SECONDS = 10.0


@functools.cache
def xsave_layout() -> dict[int, tuple[int, int, bool]]:
    """Component -> (offset, size, aligned in the compacted format), for those that the processor has.

    Asked by a guest in ring 3, whose CPUID is the processor's own also where KVM answers ring 0 from its table.
    """
    layout = {}
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=0x4_0000)
        vm.memory.write(_CODE, b"\x0f\xa2\xe6\x10")  # cpuid; out 0x10, al
        vcpu = vm.create_vcpu()
        vcpu.set_cpuid(kvm.supported_cpuid())
        for component in _COMPONENTS:
            vcpu.set_long_mode(_CODE, tables=_TABLES, stack=_STACK, ring=3)
            vcpu.regs.rax, vcpu.regs.rcx = 0xD, component
            if not isinstance(first_exit(vcpu, _SECONDS), IoOut):
                continue
            size, offset, flags = vcpu.regs.rax, vcpu.regs.rbx, vcpu.regs.rcx
            if size and not flags & 1:  # bit 0: a supervisor component, which is in no standard area
                layout[component] = (offset, size, bool(flags & 2))
    return layout
