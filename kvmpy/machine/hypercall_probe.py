"""Whether a hypercall of a guest's kernel comes back on this host: found by a guest that makes one.

Where ring 0 runs in KVM's instruction emulator, VMCALL and VMMCALL may stay in the kernel until a signal comes. A guest
that CPUID asks to wake, interrupt and yield to processors by hypercalls would stop there for good.
"""

from kvmpy import exits
from kvmpy.kvm import Kvm
from kvmpy.kvm.first_exit import first_exit

__all__ = ["hypercalls_return"]

_CODE = {False: b"\x0f\x01\xc1\xf4", True: b"\x0f\x01\xd9\xf4"}  # vmcall; hlt and vmmcall; hlt
_ADDRESS, _TABLES, _STACK, _RAM = 0x1000, 0x1_0000, 0x3000, 0x4_0000
_UNKNOWN = 0x7FFF_FFFF
_ENOSYS = -1000 & (1 << 64) - 1
"""What KVM answers to a number that it does not know (Documentation/virt/kvm/x86/hypercalls.rst)."""
_SECONDS = 0.02
"""What comes back does so in microseconds. A wrong "no" on a busy host costs a guest some speed, nothing else."""

_answers: dict[bool, bool] = {}


def hypercalls_return(kvm: Kvm, of_amd: bool) -> bool:
    """Whether VMMCALL (on AMD's processors) or VMCALL returns to ring 0. Tried once in a process."""
    if of_amd not in _answers:
        with kvm.create_vm() as vm:
            vm.add_ram(0, size=_RAM)
            vm.memory.write(_ADDRESS, _CODE[of_amd])
            vcpu = vm.create_vcpu()
            vcpu.set_cpuid(kvm.supported_cpuid())
            vcpu.set_long_mode(_ADDRESS, tables=_TABLES, stack=_STACK)
            vcpu.regs.rax = _UNKNOWN
            ended = first_exit(vcpu, _SECONDS)
            _answers[of_amd] = isinstance(ended, exits.Hlt) and vcpu.regs.rax == _ENOSYS
    return _answers[of_amd]
