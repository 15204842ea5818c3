# ruff: noqa: N801  these classes carry the kernel's names
"""What KVM offers to guests that believe they run on Xen or on Hyper-V."""

from ctypes import Union, c_int32, c_uint8, c_uint16, c_uint32, c_uint64

from kvmpy.abi.structs import Structure

__all__ = ["kvm_hyperv_eventfd", "kvm_xen_hvm_attr", "kvm_xen_hvm_config", "kvm_xen_vcpu_attr"]


class kvm_hyperv_eventfd(Structure):
    """An eventfd that the guest's SIGNAL_EVENT hypercall signals (KVM_HYPERV_EVENTFD, 4.113)."""

    _fields_ = [("conn_id", c_uint32), ("fd", c_int32), ("flags", c_uint32), ("padding", c_uint32 * 3)]


class kvm_xen_hvm_config(Structure):
    """The MSR through which a guest asks for hypercall pages, and where those come from (KVM_XEN_HVM_CONFIG, 4.28)."""

    _fields_ = [
        ("flags", c_uint32),
        ("msr", c_uint32),
        ("blob_addr_32", c_uint64),
        ("blob_addr_64", c_uint64),
        ("blob_size_32", c_uint8),
        ("blob_size_64", c_uint8),
        ("pad2", c_uint8 * 30),
    ]


class _shared_info(Union):
    _fields_ = [("gfn", c_uint64), ("hva", c_uint64)]


class _deliver_port(Structure):
    _fields_ = [("port", c_uint32), ("vcpu", c_uint32), ("priority", c_uint32)]


class _deliver_eventfd(Structure):
    _fields_ = [("port", c_uint32), ("fd", c_int32)]


class _deliver(Union):
    _fields_ = [("port", _deliver_port), ("eventfd", _deliver_eventfd), ("padding", c_uint32 * 4)]


class _evtchn(Structure):
    _fields_ = [("send_port", c_uint32), ("type", c_uint32), ("flags", c_uint32), ("deliver", _deliver)]


class _hvm_attr_u(Union):
    _fields_ = [
        ("long_mode", c_uint8),
        ("vector", c_uint8),
        ("runstate_update_flag", c_uint8),
        ("shared_info", _shared_info),
        ("evtchn", _evtchn),
        ("xen_version", c_uint32),
        ("pad", c_uint64 * 8),
    ]


class kvm_xen_hvm_attr(Structure):
    """One attribute of the VM, KVM_XEN_ATTR_TYPE_* (KVM_XEN_HVM_SET_ATTR, 4.126)."""

    _fields_ = [("type", c_uint16), ("pad", c_uint16 * 3), ("u", _hvm_attr_u)]


class _runstate(Structure):
    _fields_ = [
        ("state", c_uint64),
        ("state_entry_time", c_uint64),
        ("time_running", c_uint64),
        ("time_runnable", c_uint64),
        ("time_blocked", c_uint64),
        ("time_offline", c_uint64),
    ]


class _timer(Structure):
    _fields_ = [("port", c_uint32), ("priority", c_uint32), ("expires_ns", c_uint64)]


class _vcpu_attr_u(Union):
    _fields_ = [
        ("gpa", c_uint64),
        ("hva", c_uint64),
        ("pad", c_uint64 * 8),
        ("runstate", _runstate),
        ("vcpu_id", c_uint32),
        ("timer", _timer),
        ("vector", c_uint8),
    ]


class kvm_xen_vcpu_attr(Structure):
    """One attribute of a vCPU, KVM_XEN_VCPU_ATTR_TYPE_* (KVM_XEN_VCPU_SET_ATTR, 4.128)."""

    _fields_ = [("type", c_uint16), ("pad", c_uint16 * 3), ("u", _vcpu_attr_u)]
