"""CPUID between the kernel's struct kvm_cpuid2 and `kvmpy.x86.cpuid.CpuidTable` (KVM API, sections 4.20 and 4.46)."""

import errno

from kvmpy.errors import KvmError
from kvmpy.kvm.descriptor import Descriptor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmpy.abi.structs import kvm_cpuid2
    from kvmpy.x86.cpuid import CpuidTable

__all__ = ["read_table", "to_struct"]

_FIRST_TRY = 128
_AT_MOST = 1 << 16


def read_table(descriptor: Descriptor, ioctl: str) -> "CpuidTable":
    """Ask for a table without knowing its length: KVM says E2BIG until there is room enough."""
    from kvmpy.abi.structs import kvm_cpuid2, sized
    from kvmpy.x86.cpuid import CpuidEntry, CpuidTable

    room = _FIRST_TRY
    while True:
        table = sized(kvm_cpuid2, room)(nent=room)
        try:
            descriptor.ioctl(ioctl, table)
        except KvmError as error:
            if error.errno != errno.E2BIG or room >= _AT_MOST:
                raise
            room *= 2
            continue
        return CpuidTable(
            CpuidEntry(entry.function, entry.index, entry.eax, entry.ebx, entry.ecx, entry.edx, flags=entry.flags)
            for entry in table.entries[: table.nent]
        )


def to_struct(table: "CpuidTable") -> "kvm_cpuid2":
    """The kernel's form of a table."""
    from kvmpy.abi.structs import kvm_cpuid2, sized

    entries = list(table)
    struct = sized(kvm_cpuid2, len(entries))(nent=len(entries))
    for slot, entry in zip(struct.entries, entries, strict=True):
        slot.function, slot.index, slot.flags = entry.function, entry.index, entry.flags
        slot.eax, slot.ebx, slot.ecx, slot.edx = entry.eax, entry.ebx, entry.ecx, entry.edx
    return struct
