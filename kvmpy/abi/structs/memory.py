# ruff: noqa: N801  these classes carry the kernel's names
"""Guest memory beyond the plain slot: dirty pages, private memory, writes that the kernel queues."""

from ctypes import Union, c_uint8, c_uint32, c_uint64

from kvmpy.abi.structs import Structure
from kvmpy.abi.structs.machine_start import pio_or_pad

__all__ = [
    "kvm_clear_dirty_log",
    "kvm_coalesced_mmio",
    "kvm_coalesced_mmio_ring",
    "kvm_create_guest_memfd",
    "kvm_dirty_gfn",
    "kvm_dirty_log",
    "kvm_enc_region",
    "kvm_memory_attributes",
    "kvm_pre_fault_memory",
    "kvm_userspace_memory_region2",
]


class kvm_userspace_memory_region2(Structure):
    """A memory slot that may have a guest_memfd behind its private pages (KVM_SET_USER_MEMORY_REGION2, 4.140)."""

    _fields_ = [
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
        ("guest_memfd_offset", c_uint64),
        ("guest_memfd", c_uint32),
        ("pad1", c_uint32),
        ("pad2", c_uint64 * 14),
    ]


class kvm_memory_attributes(Structure):
    """Makes a range of guest-physical bytes private or shared (KVM_SET_MEMORY_ATTRIBUTES, 4.141)."""

    _fields_ = [("address", c_uint64), ("size", c_uint64), ("attributes", c_uint64), ("flags", c_uint64)]


class kvm_create_guest_memfd(Structure):
    """Size in bytes and GUEST_MEMFD_FLAG_* of a guest_memfd; the ioctl answers its descriptor (4.142)."""

    _fields_ = [("size", c_uint64), ("flags", c_uint64), ("reserved", c_uint64 * 6)]


class kvm_pre_fault_memory(Structure):
    """A guest-physical range to map now; the kernel advances `gpa` and `size` as it goes (4.143)."""

    _fields_ = [("gpa", c_uint64), ("size", c_uint64), ("flags", c_uint64), ("padding", c_uint64 * 5)]


class kvm_enc_region(Structure):
    """A range of the caller's memory that will hold encrypted pages (KVM_MEMORY_ENCRYPT_REG_REGION, 4.111)."""

    _fields_ = [("addr", c_uint64), ("size", c_uint64)]


class _bitmap(Union):
    _fields_ = [("dirty_bitmap", c_uint64), ("padding2", c_uint64)]


class kvm_dirty_log(Structure):
    """`dirty_bitmap` is the address of one bit per page of `slot` (KVM_GET_DIRTY_LOG, 4.8)."""

    _anonymous_ = ("_u",)
    _fields_ = [("slot", c_uint32), ("padding1", c_uint32), ("_u", _bitmap)]


class kvm_clear_dirty_log(Structure):
    """Pages to watch again: both limits are multiples of 64, or the end of the slot (KVM_CLEAR_DIRTY_LOG, 4.117)."""

    _anonymous_ = ("_u",)
    _fields_ = [("slot", c_uint32), ("num_pages", c_uint32), ("first_page", c_uint64), ("_u", _bitmap)]


class kvm_dirty_gfn(Structure):
    """One entry of a vCPU's dirty ring: page `offset` of `slot` (KVM_CAP_DIRTY_LOG_RING, section 8.29)."""

    _fields_ = [("flags", c_uint32), ("slot", c_uint32), ("offset", c_uint64)]


class kvm_coalesced_mmio(Structure):
    """One queued write of `len` bytes (4.116)."""

    _anonymous_ = ("_u",)
    _fields_ = [("phys_addr", c_uint64), ("len", c_uint32), ("_u", pio_or_pad), ("data", c_uint8 * 8)]


class kvm_coalesced_mmio_ring(Structure):
    """The page with the queue: the kernel writes at `last`, user space reads at `first` (4.116)."""

    _fields_ = [("first", c_uint32), ("last", c_uint32)]
    _flexible_ = ("coalesced_mmio", kvm_coalesced_mmio)
