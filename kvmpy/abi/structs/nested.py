# ruff: noqa: N801  these classes carry the kernel's names
"""State of a guest that is itself a hypervisor (KVM_GET_NESTED_STATE, 4.114)."""

from ctypes import Union, c_uint8, c_uint16, c_uint32, c_uint64

from kvmpy.abi.structs import Structure

__all__ = [
    "kvm_nested_state",
    "kvm_svm_nested_state_data",
    "kvm_svm_nested_state_hdr",
    "kvm_vmx_nested_state_data",
    "kvm_vmx_nested_state_hdr",
]


class kvm_vmx_nested_state_data(Structure):
    """The VMCS that the guest runs its guest with, and its shadow; follows the header in the VMX format (4.114)."""

    _fields_ = [("vmcs12", c_uint8 * 0x1000), ("shadow_vmcs12", c_uint8 * 0x1000)]


class _smm(Structure):
    _fields_ = [("flags", c_uint16)]


class kvm_vmx_nested_state_hdr(Structure):
    """Guest-physical addresses of the VMXON region and current VMCS, all ones when there is none (4.114)."""

    _fields_ = [
        ("vmxon_pa", c_uint64),
        ("vmcs12_pa", c_uint64),
        ("smm", _smm),
        ("pad", c_uint16),
        ("flags", c_uint32),
        ("preemption_timer_deadline", c_uint64),
    ]


class kvm_svm_nested_state_data(Structure):
    """The VMCB that the guest runs its guest with; follows the header in the SVM format (4.114)."""

    _fields_ = [("vmcb12", c_uint8 * 0x1000)]


class kvm_svm_nested_state_hdr(Structure):
    """Guest-physical address of the current VMCB (4.114)."""

    _fields_ = [("vmcb_pa", c_uint64)]


class _hdr(Union):
    _fields_ = [("vmx", kvm_vmx_nested_state_hdr), ("svm", kvm_svm_nested_state_hdr), ("pad", c_uint8 * 120)]


class kvm_nested_state(Structure):
    """`size` bytes in all: this header of 128, then a kvm_vmx_ or kvm_svm_nested_state_data in `data` (4.114)."""

    _fields_ = [("flags", c_uint16), ("format", c_uint16), ("size", c_uint32), ("hdr", _hdr)]
    _flexible_ = ("data", c_uint8)
