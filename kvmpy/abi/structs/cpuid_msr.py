# ruff: noqa: N801  these classes carry the kernel's names
"""Tables of CPUID leaves and of model-specific registers."""

from ctypes import c_uint8, c_uint32, c_uint64

from kvmpy.abi.structs import Structure

__all__ = [
    "kvm_cpuid",
    "kvm_cpuid2",
    "kvm_cpuid_entry",
    "kvm_cpuid_entry2",
    "kvm_msr_entry",
    "kvm_msr_filter",
    "kvm_msr_filter_range",
    "kvm_msr_list",
    "kvm_msrs",
]


class kvm_cpuid_entry(Structure):
    """One leaf without sub-leaves (KVM_SET_CPUID, 4.20)."""

    _fields_ = [
        ("function", c_uint32),
        ("eax", c_uint32),
        ("ebx", c_uint32),
        ("ecx", c_uint32),
        ("edx", c_uint32),
        ("padding", c_uint32),
    ]


class kvm_cpuid(Structure):
    """`nent` leaves in `entries` (KVM_SET_CPUID, 4.20); superseded by kvm_cpuid2."""

    _fields_ = [("nent", c_uint32), ("padding", c_uint32)]
    _flexible_ = ("entries", kvm_cpuid_entry)


class kvm_cpuid_entry2(Structure):
    """One leaf and sub-leaf (`function`, `index`); `flags` are KVM_CPUID_FLAG_* (4.46)."""

    _fields_ = [
        ("function", c_uint32),
        ("index", c_uint32),
        ("flags", c_uint32),
        ("eax", c_uint32),
        ("ebx", c_uint32),
        ("ecx", c_uint32),
        ("edx", c_uint32),
        ("padding", c_uint32 * 3),
    ]


class kvm_cpuid2(Structure):
    """`nent` leaves in `entries`; E2BIG when the kernel has more to say (KVM_GET_SUPPORTED_CPUID, 4.46)."""

    _fields_ = [("nent", c_uint32), ("padding", c_uint32)]
    _flexible_ = ("entries", kvm_cpuid_entry2)


class kvm_msr_entry(Structure):
    """One MSR and its value (KVM_GET_MSRS, 4.18)."""

    _fields_ = [("index", c_uint32), ("reserved", c_uint32), ("data", c_uint64)]


class kvm_msrs(Structure):
    """`nmsrs` MSRs in `entries`; the ioctl answers how many it did before the first it refused (4.18)."""

    _fields_ = [("nmsrs", c_uint32), ("pad", c_uint32)]
    _flexible_ = ("entries", kvm_msr_entry)


class kvm_msr_list(Structure):
    """`nmsrs` MSR numbers in `indices`; E2BIG and the right `nmsrs` when too short (KVM_GET_MSR_INDEX_LIST, 4.3)."""

    _fields_ = [("nmsrs", c_uint32)]
    _flexible_ = ("indices", c_uint32)


class kvm_msr_filter_range(Structure):
    """`nmsrs` MSRs from `base` on; `bitmap` is the address of one bit per MSR, 1 allows what `flags` names (4.97)."""

    _fields_ = [
        ("flags", c_uint32),
        ("nmsrs", c_uint32),
        ("base", c_uint32),
        ("_pad0", c_uint32),
        ("bitmap", c_uint64),
    ]


class kvm_msr_filter(Structure):
    """Which MSRs the guest reaches without leaving KVM (KVM_X86_SET_MSR_FILTER, 4.97)."""

    _fields_ = [("flags", c_uint32), ("_pad0", c_uint8 * 4), ("ranges", kvm_msr_filter_range * 16)]
