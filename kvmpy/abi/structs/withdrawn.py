# ruff: noqa: N801  these classes carry the kernel's names
"""Structs of ioctls that no kernel of today answers; see `kvmpy.abi.withdrawn`."""

from ctypes import c_uint16, c_uint32, c_uint64

from kvmpy.abi.structs import Structure

__all__ = [
    "kvm_assigned_irq",
    "kvm_assigned_msix_entry",
    "kvm_assigned_msix_nr",
    "kvm_assigned_pci_dev",
    "kvm_breakpoint",
    "kvm_debug_guest",
    "kvm_memory_alias",
    "kvm_memory_region",
    "kvm_user_trace_setup",
]


class kvm_memory_region(Structure):
    """A memory slot with memory of the kernel's choice (KVM_SET_MEMORY_REGION)."""

    _fields_ = [("slot", c_uint32), ("flags", c_uint32), ("guest_phys_addr", c_uint64), ("memory_size", c_uint64)]


class kvm_memory_alias(Structure):
    """A second guest-physical address of a range (KVM_SET_MEMORY_ALIAS)."""

    _fields_ = [
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("target_phys_addr", c_uint64),
    ]


class kvm_user_trace_setup(Structure):
    """Buffers for traces (KVM_TRACE_ENABLE)."""

    _fields_ = [("buf_size", c_uint32), ("buf_nr", c_uint32)]


class kvm_breakpoint(Structure):
    """One hardware breakpoint (in kvm_debug_guest)."""

    _fields_ = [("enabled", c_uint32), ("padding", c_uint32), ("address", c_uint64)]


class kvm_debug_guest(Structure):
    """Forerunner of kvm_guest_debug (KVM_DEBUG_GUEST)."""

    _fields_ = [
        ("enabled", c_uint32),
        ("pad", c_uint32),
        ("breakpoints", kvm_breakpoint * 4),
        ("singlestep", c_uint32),
        ("_pad0", c_uint32),
    ]


class kvm_assigned_pci_dev(Structure):
    """A PCI device to hand to the guest (KVM_ASSIGN_PCI_DEVICE); VFIO does it now."""

    _fields_ = [
        ("assigned_dev_id", c_uint32),
        ("busnr", c_uint32),
        ("devfn", c_uint32),
        ("flags", c_uint32),
        ("segnr", c_uint32),
        ("reserved", c_uint32 * 11),
    ]


class kvm_assigned_irq(Structure):
    """The interrupt of a device handed to the guest (KVM_ASSIGN_DEV_IRQ)."""

    _fields_ = [
        ("assigned_dev_id", c_uint32),
        ("host_irq", c_uint32),
        ("guest_irq", c_uint32),
        ("flags", c_uint32),
        ("reserved", c_uint32 * 12),
    ]


class kvm_assigned_msix_nr(Structure):
    """How many MSI-X vectors it has (KVM_ASSIGN_SET_MSIX_NR)."""

    _fields_ = [("assigned_dev_id", c_uint32), ("entry_nr", c_uint16), ("padding", c_uint16)]


class kvm_assigned_msix_entry(Structure):
    """One of those vectors (KVM_ASSIGN_SET_MSIX_ENTRY)."""

    _fields_ = [("assigned_dev_id", c_uint32), ("gsi", c_uint32), ("entry", c_uint16), ("padding", c_uint16 * 3)]
