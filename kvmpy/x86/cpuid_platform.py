"""What CPUID says about the platform around a machine's processors: clocks, local APIC, the services of KVM.

Sources: SDM vol. 2, CPUID, leaves 1, 7, 0x15 and 0x16; Documentation/virt/kvm/x86/cpuid.rst; KVM API, section 4.46.
Leaf 0x40000010, the hypervisor's word about frequencies, is VMware's; KVM guests read it too.
"""

from kvmpy.x86.cpuid_leaves import EAX, EBX, ECX, EDX, CpuidLeaves

__all__ = [
    "HYPERCALL_FEATURES", "describe_clocks", "has_hypercall_features", "hide_hypercall_features", "set_local_apic",
]  # fmt: skip

HYPERCALL_FEATURES = 1 << 7 | 1 << 11 | 1 << 13
"""KVM_FEATURE_PV_UNHALT, PV_SEND_IPI, PV_SCHED_YIELD: by these a guest wakes, interrupts and yields to other
processors with hypercalls."""

_HYPERVISOR, _FEATURES, _FREQUENCIES = 0x4000_0000, 0x4000_0001, 0x4000_0010
_KVM_SIGNATURE = [0x4B4D_564B, 0x564B_4D56, 0x4D]  # "KVMKVMKVM"

_PRESENT = 1 << 31  # leaf 1, ECX: there is a hypervisor
_X2APIC, _TSC_DEADLINE, _OSXSAVE = 1 << 21, 1 << 24, 1 << 27
_APIC = 1 << 9
_OSPKE = 1 << 4
_INVARIANT_TSC = 1 << 8
_NEED_LOCAL_APIC = 1 << 6 | 1 << 7 | 1 << 11 | 1 << 14 | 1 << 15
"""KVM_FEATURE_PV_EOI, PV_UNHALT, PV_SEND_IPI, ASYNC_PF_INT, MSI_EXT_DEST_ID."""
_MHZ = 1000  # kHz


def set_local_apic(leaves: CpuidLeaves, present: bool, tsc_deadline: bool) -> None:
    """Tell of the local APIC, or of none; `tsc_deadline`: KVM's has that mode of its timer.

    What follows CR4 is cleared too (OSXSAVE, OSPKE): KVM fills it in whenever the guest asks.
    """
    first, seventh, features = leaves.get(1), leaves.get(7), leaves.get(_FEATURES)
    if first is not None:
        first[ECX] &= ~_OSXSAVE
        if not present:
            first[ECX] &= ~(_X2APIC | _TSC_DEADLINE)
            first[EDX] &= ~_APIC
        elif tsc_deadline:  # before Linux 6.14 it is not in the host's table, as it needs a local APIC inside KVM
            first[ECX] |= _TSC_DEADLINE
    if seventh is not None:
        seventh[ECX] &= ~_OSPKE
    if features is not None and not present:
        features[EAX] &= ~_NEED_LOCAL_APIC


def has_hypercall_features(leaves: CpuidLeaves) -> bool:
    """Whether a guest is asked to make hypercalls."""
    features = leaves.get(_FEATURES)
    return features is not None and bool(features[EAX] & HYPERCALL_FEATURES)


def hide_hypercall_features(leaves: CpuidLeaves) -> None:
    """Do not ask for hypercalls."""
    features = leaves.get(_FEATURES)
    if features is not None:
        features[EAX] &= ~HYPERCALL_FEATURES


def describe_clocks(leaves: CpuidLeaves, tsc_khz: int, apic_khz: int) -> None:
    """Say how fast the TSC and the timer of the local APIC count, in kHz, so that a guest need not measure it.

    Only where the TSC keeps its rate (CPUID 0x80000007, EDX bit 8). An Intel processor that has leaf 0x15 says it
    there: TSC = crystal (ECX, Hz) * EBX / EAX, and the crystal also drives the local APIC's timer.
    """
    power, first, base = leaves.get(0x8000_0007), leaves.get(1), leaves.get(_HYPERVISOR)
    if not tsc_khz or power is None or not power[EDX] & _INVARIANT_TSC:
        return
    if base is not None and base[EBX : EDX + 1] == _KVM_SIGNATURE and first is not None and first[ECX] & _PRESENT:
        base[EAX] = max(base[EAX], _FREQUENCIES)
        leaves.put(_FREQUENCIES, None, tsc_khz, apic_khz, 0, 0)
    if leaves.of_amd or not apic_khz:
        return
    if leaves.highest(0) >= 0x15:
        leaves.put(0x15, None, apic_khz, tsc_khz, apic_khz * 1000, 0)
    if leaves.highest(0) >= 0x16:
        leaves.put(0x16, None, tsc_khz // _MHZ, tsc_khz // _MHZ, 100, 0)
