# ruff: noqa: N801  these classes carry the kernel's names
"""struct kvm_run, which the vCPU's descriptor maps, with every kind of exit (KVM API, section 5).

Code that is on the path of every exit reads it through memoryviews at the offsets of `kvmpy.abi.run_layout` instead.
"""

from ctypes import Union, c_uint8, c_uint16, c_uint32, c_uint64

from kvmpy.abi.structs import Structure
from kvmpy.abi.structs.registers import kvm_sync_regs

__all__ = ["kvm_debug_exit_arch", "kvm_hyperv_exit", "kvm_run", "kvm_xen_exit"]


class kvm_debug_exit_arch(Structure):
    """Where and why the guest stopped: vector 1 or 3, linear address, DR6 and DR7 (KVM_EXIT_DEBUG, section 5)."""

    _fields_ = [("exception", c_uint32), ("pad", c_uint32), ("pc", c_uint64), ("dr6", c_uint64), ("dr7", c_uint64)]


class _hyperv_synic(Structure):
    _fields_ = [
        ("msr", c_uint32),
        ("pad2", c_uint32),
        ("control", c_uint64),
        ("evt_page", c_uint64),
        ("msg_page", c_uint64),
    ]


class _hyperv_hcall(Structure):
    _fields_ = [("input", c_uint64), ("result", c_uint64), ("params", c_uint64 * 2)]


class _hyperv_syndbg(Structure):
    _fields_ = [
        ("msr", c_uint32),
        ("pad2", c_uint32),
        ("control", c_uint64),
        ("status", c_uint64),
        ("send_page", c_uint64),
        ("recv_page", c_uint64),
        ("pending_page", c_uint64),
    ]


class _hyperv_u(Union):
    _fields_ = [("synic", _hyperv_synic), ("hcall", _hyperv_hcall), ("syndbg", _hyperv_syndbg)]


class kvm_hyperv_exit(Structure):
    """A Hyper-V guest's request; `type` is KVM_EXIT_HYPERV_SYNIC, _HCALL or _SYNDBG (section 5)."""

    _fields_ = [("type", c_uint32), ("pad1", c_uint32), ("u", _hyperv_u)]


class _xen_hcall(Structure):
    _fields_ = [
        ("longmode", c_uint32),
        ("cpl", c_uint32),
        ("input", c_uint64),
        ("result", c_uint64),
        ("params", c_uint64 * 6),
    ]


class _xen_u(Union):
    _fields_ = [("hcall", _xen_hcall)]


class kvm_xen_exit(Structure):
    """A Xen guest's hypercall; `type` is KVM_EXIT_XEN_HCALL (section 5)."""

    _fields_ = [("type", c_uint32), ("_pad0", c_uint32), ("u", _xen_u)]


# The members of the union, in the kernel's order. Tail padding that C adds is spelled out.


class _hw(Structure):
    _fields_ = [("hardware_exit_reason", c_uint64)]


class _fail_entry(Structure):
    _fields_ = [("hardware_entry_failure_reason", c_uint64), ("cpu", c_uint32), ("_pad0", c_uint32)]


class _ex(Structure):
    _fields_ = [("exception", c_uint32), ("error_code", c_uint32)]


class _io(Structure):
    _fields_ = [
        ("direction", c_uint8),
        ("size", c_uint8),
        ("port", c_uint16),
        ("count", c_uint32),
        ("data_offset", c_uint64),
    ]


class _debug(Structure):
    _fields_ = [("arch", kvm_debug_exit_arch)]


class _mmio(Structure):
    _fields_ = [
        ("phys_addr", c_uint64),
        ("data", c_uint8 * 8),
        ("len", c_uint32),
        ("is_write", c_uint8),
        ("_pad0", c_uint8 * 3),
    ]


class _hypercall_u(Union):
    _fields_ = [("longmode", c_uint32), ("flags", c_uint64)]


class _hypercall(Structure):
    _anonymous_ = ("_u",)
    _fields_ = [("nr", c_uint64), ("args", c_uint64 * 6), ("ret", c_uint64), ("_u", _hypercall_u)]


class _tpr_access(Structure):
    _fields_ = [("rip", c_uint64), ("is_write", c_uint32), ("pad", c_uint32)]


class _s390_sieic(Structure):
    _fields_ = [("icptcode", c_uint8), ("_pad0", c_uint8), ("ipa", c_uint16), ("ipb", c_uint32)]


class _s390_ucontrol(Structure):
    _fields_ = [("trans_exc_code", c_uint64), ("pgm_code", c_uint32), ("_pad0", c_uint32)]


class _dcr(Structure):
    _fields_ = [("dcrn", c_uint32), ("data", c_uint32), ("is_write", c_uint8), ("_pad0", c_uint8 * 3)]


class _internal(Structure):
    _fields_ = [("suberror", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16)]


class _emulation_failure(Structure):
    _fields_ = [
        ("suberror", c_uint32),
        ("ndata", c_uint32),
        ("flags", c_uint64),
        ("insn_size", c_uint8),
        ("insn_bytes", c_uint8 * 15),
    ]


class _osi(Structure):
    _fields_ = [("gprs", c_uint64 * 32)]


class _papr_hcall(Structure):
    _fields_ = [("nr", c_uint64), ("ret", c_uint64), ("args", c_uint64 * 9)]


class _s390_tsch(Structure):
    _fields_ = [
        ("subchannel_id", c_uint16),
        ("subchannel_nr", c_uint16),
        ("io_int_parm", c_uint32),
        ("io_int_word", c_uint32),
        ("ipb", c_uint32),
        ("dequeued", c_uint8),
        ("_pad0", c_uint8 * 3),
    ]


class _epr(Structure):
    _fields_ = [("epr", c_uint32)]


class _system_event_u(Union):
    _fields_ = [("flags", c_uint64), ("data", c_uint64 * 16)]


class _system_event(Structure):
    _anonymous_ = ("_u",)
    _fields_ = [("type", c_uint32), ("ndata", c_uint32), ("_u", _system_event_u)]


class _s390_stsi(Structure):
    _fields_ = [
        ("addr", c_uint64),
        ("ar", c_uint8),
        ("reserved", c_uint8),
        ("fc", c_uint8),
        ("sel1", c_uint8),
        ("sel2", c_uint16),
        ("_pad0", c_uint16),
    ]


class _eoi(Structure):
    _fields_ = [("vector", c_uint8)]


class _arm_nisv(Structure):
    _fields_ = [("esr_iss", c_uint64), ("fault_ipa", c_uint64)]


class _msr(Structure):
    _fields_ = [
        ("error", c_uint8),
        ("pad", c_uint8 * 7),
        ("reason", c_uint32),
        ("index", c_uint32),
        ("data", c_uint64),
    ]


class _riscv_sbi(Structure):
    _fields_ = [
        ("extension_id", c_uint64),
        ("function_id", c_uint64),
        ("args", c_uint64 * 6),
        ("ret", c_uint64 * 2),
    ]


class _riscv_csr(Structure):
    _fields_ = [("csr_num", c_uint64), ("new_value", c_uint64), ("write_mask", c_uint64), ("ret_value", c_uint64)]


class _notify(Structure):
    _fields_ = [("flags", c_uint32)]


class _memory_fault(Structure):
    _fields_ = [("flags", c_uint64), ("gpa", c_uint64), ("size", c_uint64)]


class _tdx_unknown(Structure):
    _fields_ = [("ret", c_uint64), ("data", c_uint64 * 5)]


class _tdx_get_quote(Structure):
    _fields_ = [("ret", c_uint64), ("gpa", c_uint64), ("size", c_uint64)]


class _tdx_get_tdvmcall_info(Structure):
    _fields_ = [
        ("ret", c_uint64),
        ("leaf", c_uint64),
        ("r11", c_uint64),
        ("r12", c_uint64),
        ("r13", c_uint64),
        ("r14", c_uint64),
    ]


class _tdx_setup_event_notify(Structure):
    _fields_ = [("ret", c_uint64), ("vector", c_uint64)]


class _tdx_u(Union):
    _fields_ = [
        ("unknown", _tdx_unknown),
        ("get_quote", _tdx_get_quote),
        ("get_tdvmcall_info", _tdx_get_tdvmcall_info),
        ("setup_event_notify", _tdx_setup_event_notify),
    ]


class _tdx(Structure):
    _anonymous_ = ("_u",)
    _fields_ = [("flags", c_uint64), ("nr", c_uint64), ("_u", _tdx_u)]


class _exit(Union):
    _fields_ = [
        ("hw", _hw),  # KVM_EXIT_UNKNOWN
        ("fail_entry", _fail_entry),
        ("ex", _ex),  # KVM_EXIT_EXCEPTION
        ("io", _io),
        ("debug", _debug),
        ("mmio", _mmio),
        ("iocsr_io", _mmio),  # KVM_EXIT_LOONGARCH_IOCSR, the same layout
        ("hypercall", _hypercall),
        ("tpr_access", _tpr_access),
        ("s390_sieic", _s390_sieic),
        ("s390_reset_flags", c_uint64),
        ("s390_ucontrol", _s390_ucontrol),
        ("dcr", _dcr),
        ("internal", _internal),  # KVM_EXIT_INTERNAL_ERROR
        ("emulation_failure", _emulation_failure),  # the same, suberror KVM_INTERNAL_ERROR_EMULATION
        ("osi", _osi),
        ("papr_hcall", _papr_hcall),
        ("s390_tsch", _s390_tsch),
        ("epr", _epr),
        ("system_event", _system_event),
        ("s390_stsi", _s390_stsi),
        ("eoi", _eoi),  # KVM_EXIT_IOAPIC_EOI
        ("hyperv", kvm_hyperv_exit),
        ("arm_nisv", _arm_nisv),
        ("msr", _msr),  # KVM_EXIT_X86_RDMSR and KVM_EXIT_X86_WRMSR
        ("xen", kvm_xen_exit),
        ("riscv_sbi", _riscv_sbi),
        ("riscv_csr", _riscv_csr),
        ("notify", _notify),
        ("memory_fault", _memory_fault),
        ("tdx", _tdx),
        ("padding", c_uint8 * 256),
    ]


class _s(Union):
    _fields_ = [("regs", kvm_sync_regs), ("padding", c_uint8 * 2048)]


class kvm_run(Structure):
    """The page that KVM_RUN and user space share (section 5).

    `exit_reason` (KVM_EXIT_*) says which member of the union holds. It is longer than this struct: the size to map is
    what KVM_GET_VCPU_MMAP_SIZE answers, and port data lie at `io.data_offset` from the start.
    """

    _anonymous_ = ("_exit",)
    _fields_ = [
        ("request_interrupt_window", c_uint8),
        ("immediate_exit", c_uint8),
        ("padding1", c_uint8 * 6),
        ("exit_reason", c_uint32),
        ("ready_for_interrupt_injection", c_uint8),
        ("if_flag", c_uint8),
        ("flags", c_uint16),
        ("cr8", c_uint64),
        ("apic_base", c_uint64),
        ("_exit", _exit),
        ("kvm_valid_regs", c_uint64),
        ("kvm_dirty_regs", c_uint64),
        ("s", _s),
    ]
