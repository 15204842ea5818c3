# ruff: noqa: N801  these classes carry the kernel's names
"""What concerns the VM or any descriptor: capabilities, clock, devices, performance counters, statistics."""

from ctypes import c_char, c_int16, c_int32, c_uint8, c_uint16, c_uint32, c_uint64

from kvmpy.abi.structs import Structure

__all__ = [
    "kvm_clock_data",
    "kvm_create_device",
    "kvm_device_attr",
    "kvm_enable_cap",
    "kvm_pmu_event_filter",
    "kvm_stats_desc",
    "kvm_stats_header",
    "kvm_vfio_spapr_tce",
]


class kvm_enable_cap(Structure):
    """Turns on capability number `cap` with up to four arguments (KVM_ENABLE_CAP, 4.37)."""

    _fields_ = [("cap", c_uint32), ("flags", c_uint32), ("args", c_uint64 * 4), ("pad", c_uint8 * 64)]


class kvm_clock_data(Structure):
    """kvmclock in ns, and the host's clocks of the same instant when KVM_CLOCK_* in `flags` say so (4.29)."""

    _fields_ = [
        ("clock", c_uint64),
        ("flags", c_uint32),
        ("pad0", c_uint32),
        ("realtime", c_uint64),
        ("host_tsc", c_uint64),
        ("pad", c_uint32 * 4),
    ]


class kvm_create_device(Structure):
    """Creates a device of KVM_DEV_TYPE_*; its descriptor comes back in `fd` (KVM_CREATE_DEVICE, 4.79)."""

    _fields_ = [("type", c_uint32), ("fd", c_uint32), ("flags", c_uint32)]


class kvm_device_attr(Structure):
    """Attribute `attr` of `group`, its value at the address `addr` (KVM_SET_DEVICE_ATTR, 4.80)."""

    _fields_ = [("flags", c_uint32), ("group", c_uint32), ("attr", c_uint64), ("addr", c_uint64)]


class kvm_vfio_spapr_tce(Structure):
    """Argument of KVM_DEV_VFIO_GROUP_SET_SPAPR_TCE (virt/kvm/devices/vfio.rst); not for x86."""

    _fields_ = [("groupfd", c_int32), ("tablefd", c_int32)]


class kvm_pmu_event_filter(Structure):
    """Which `events` the guest's performance counters may count (KVM_SET_PMU_EVENT_FILTER, 4.120)."""

    _fields_ = [
        ("action", c_uint32),
        ("nevents", c_uint32),
        ("fixed_counter_bitmap", c_uint32),
        ("flags", c_uint32),
        ("pad", c_uint32 * 4),
    ]
    _flexible_ = ("events", c_uint64)


class kvm_stats_header(Structure):
    """Start of what a statistics descriptor reads as; offsets in bytes from there (KVM_GET_STATS_FD, 4.133)."""

    _fields_ = [
        ("flags", c_uint32),
        ("name_size", c_uint32),
        ("num_desc", c_uint32),
        ("id_offset", c_uint32),
        ("desc_offset", c_uint32),
        ("data_offset", c_uint32),
    ]


class kvm_stats_desc(Structure):
    """One statistic: `size` values of 8 bytes at `offset`, in units of base**exponent (4.133).

    `name` is as long as kvm_stats_header.name_size says, filled up with NUL.
    """

    _fields_ = [
        ("flags", c_uint32),
        ("exponent", c_int16),
        ("size", c_uint16),
        ("offset", c_uint32),
        ("bucket_size", c_uint32),
    ]
    _flexible_ = ("name", c_char)
