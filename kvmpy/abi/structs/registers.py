# ruff: noqa: N801  these classes carry the kernel's names
"""The registers that every program touches, and the memory slot: what a first guest needs, and nothing more."""

from ctypes import c_uint8, c_uint16, c_uint32, c_uint64

from kvmpy.abi.structs import Structure

__all__ = [
    "kvm_dtable",
    "kvm_regs",
    "kvm_segment",
    "kvm_sregs",
    "kvm_sync_regs",
    "kvm_userspace_memory_region",
    "kvm_vcpu_events",
]


class kvm_regs(Structure):
    """General registers, RIP and RFLAGS (KVM_GET_REGS, 4.11)."""

    _fields_ = [
        ("rax", c_uint64), ("rbx", c_uint64), ("rcx", c_uint64), ("rdx", c_uint64),
        ("rsi", c_uint64), ("rdi", c_uint64), ("rsp", c_uint64), ("rbp", c_uint64),
        ("r8", c_uint64), ("r9", c_uint64), ("r10", c_uint64), ("r11", c_uint64),
        ("r12", c_uint64), ("r13", c_uint64), ("r14", c_uint64), ("r15", c_uint64),
        ("rip", c_uint64), ("rflags", c_uint64),
    ]  # fmt: skip


class kvm_segment(Structure):
    """One segment register with its hidden part (in kvm_sregs, 4.13). `limit` is in bytes, already scaled by `g`."""

    _fields_ = [
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        ("type", c_uint8),
        ("present", c_uint8),
        ("dpl", c_uint8),
        ("db", c_uint8),
        ("s", c_uint8),
        ("l", c_uint8),
        ("g", c_uint8),
        ("avl", c_uint8),
        ("unusable", c_uint8),
        ("padding", c_uint8),
    ]


class kvm_dtable(Structure):
    """GDTR or IDTR (in kvm_sregs, 4.13)."""

    _fields_ = [("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3)]


class kvm_sregs(Structure):
    """Segment, table, control registers, EFER and APIC base (KVM_GET_SREGS, 4.13).

    `interrupt_bitmap` has one bit per vector: the external interrupt that is queued for injection, at most one.
    """

    _fields_ = [
        ("cs", kvm_segment), ("ds", kvm_segment), ("es", kvm_segment),
        ("fs", kvm_segment), ("gs", kvm_segment), ("ss", kvm_segment),
        ("tr", kvm_segment), ("ldt", kvm_segment),
        ("gdt", kvm_dtable), ("idt", kvm_dtable),
        ("cr0", c_uint64), ("cr2", c_uint64), ("cr3", c_uint64), ("cr4", c_uint64), ("cr8", c_uint64),
        ("efer", c_uint64),
        ("apic_base", c_uint64),
        ("interrupt_bitmap", c_uint64 * 4),
    ]  # fmt: skip


class _exception(Structure):
    _fields_ = [
        ("injected", c_uint8),
        ("nr", c_uint8),
        ("has_error_code", c_uint8),
        ("pending", c_uint8),
        ("error_code", c_uint32),
    ]


class _interrupt(Structure):
    _fields_ = [("injected", c_uint8), ("nr", c_uint8), ("soft", c_uint8), ("shadow", c_uint8)]


class _nmi(Structure):
    _fields_ = [("injected", c_uint8), ("pending", c_uint8), ("masked", c_uint8), ("pad", c_uint8)]


class _smi(Structure):
    _fields_ = [("smm", c_uint8), ("pending", c_uint8), ("smm_inside_nmi", c_uint8), ("latched_init", c_uint8)]


class _triple_fault(Structure):
    _fields_ = [("pending", c_uint8)]


class kvm_vcpu_events(Structure):
    """Exceptions, interrupts, NMIs and SMIs that are pending or half delivered (KVM_GET_VCPU_EVENTS, 4.31).

    `flags` (KVM_VCPUEVENT_VALID_*) says which of the parts the kernel shall take over, or has filled in.
    """

    _fields_ = [
        ("exception", _exception),
        ("interrupt", _interrupt),
        ("nmi", _nmi),
        ("sipi_vector", c_uint32),
        ("flags", c_uint32),
        ("smi", _smi),
        ("triple_fault", _triple_fault),
        ("reserved", c_uint8 * 26),
        ("exception_has_payload", c_uint8),
        ("exception_payload", c_uint64),
    ]


class kvm_sync_regs(Structure):
    """Registers that KVM_RUN copies in and out through kvm_run.s (KVM_CAP_SYNC_REGS, section 6.12)."""

    _fields_ = [("regs", kvm_regs), ("sregs", kvm_sregs), ("events", kvm_vcpu_events)]


class kvm_userspace_memory_region(Structure):
    """A memory slot (KVM_SET_USER_MEMORY_REGION, 4.35). Sizes in bytes, all page-aligned; size 0 deletes the slot."""

    _fields_ = [
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    ]
