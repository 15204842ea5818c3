"""What CPUID answers in a machine's guest."""

import errno

from kvmpy.abi.structs import kvm_cpuid2, sized
from kvmpy.errors import KvmError
from kvmpy.kvm import Kvm, Vcpu

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmpy.x86.cpuid import CpuidTable

__all__ = ["set_cpuid"]

_EXTENDED_TOPOLOGY = (0xB, 0x1F)


def set_cpuid(vcpu: Vcpu, table: "CpuidTable | None") -> None:
    """Give a vCPU `table`, or all that the host supports, with the vCPU's own APIC id in the leaves that carry it.

    Leaf 1, EBX[31:24], and EDX of leaves 0xB and 0x1F (SDM vol. 2, CPUID).
    """
    if table is not None:
        from kvmpy.kvm.cpuid import to_struct

        raw = to_struct(table)
    else:
        raw = _supported(vcpu.vm.kvm)
    for entry in raw.entries[: raw.nent]:
        if entry.function == 1:
            entry.ebx = entry.ebx & 0x00FF_FFFF | (vcpu.id & 0xFF) << 24
        elif entry.function in _EXTENDED_TOPOLOGY:
            entry.edx = vcpu.id
    vcpu.ioctl("KVM_SET_CPUID2", raw)


def _supported(kvm: Kvm) -> "kvm_cpuid2":
    """KVM_GET_SUPPORTED_CPUID in the kernel's own form: converting a hundred entries twice costs a small guest 1 ms."""
    room = 128
    while True:
        table = sized(kvm_cpuid2, room)(nent=room)
        try:
            kvm.ioctl("KVM_GET_SUPPORTED_CPUID", table)
        except KvmError as error:
            if error.errno != errno.E2BIG or room > 1 << 14:
                raise
            room *= 2
            continue
        return table
