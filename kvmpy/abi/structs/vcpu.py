# ruff: noqa: N801  these classes carry the kernel's names
"""The rest of a vCPU's state: FPU, extended state, local APIC, debugging, machine checks, single registers."""

from ctypes import c_uint8, c_uint16, c_uint32, c_uint64

from kvmpy.abi.structs import Structure
from kvmpy.abi.structs.registers import kvm_dtable, kvm_segment

__all__ = [
    "kvm_debugregs",
    "kvm_fpu",
    "kvm_guest_debug",
    "kvm_guest_debug_arch",
    "kvm_interrupt",
    "kvm_lapic_state",
    "kvm_one_reg",
    "kvm_reg_list",
    "kvm_signal_mask",
    "kvm_sregs2",
    "kvm_tpr_access_ctl",
    "kvm_translation",
    "kvm_vapic_addr",
    "kvm_x86_mce",
    "kvm_xcr",
    "kvm_xcrs",
    "kvm_xsave",
]


class kvm_sregs2(Structure):
    """kvm_sregs with the PAE page-directory pointers in place of the interrupt bitmap (KVM_GET_SREGS2, 4.131)."""

    _fields_ = [
        ("cs", kvm_segment), ("ds", kvm_segment), ("es", kvm_segment),
        ("fs", kvm_segment), ("gs", kvm_segment), ("ss", kvm_segment),
        ("tr", kvm_segment), ("ldt", kvm_segment),
        ("gdt", kvm_dtable), ("idt", kvm_dtable),
        ("cr0", c_uint64), ("cr2", c_uint64), ("cr3", c_uint64), ("cr4", c_uint64), ("cr8", c_uint64),
        ("efer", c_uint64),
        ("apic_base", c_uint64),
        ("flags", c_uint64),
        ("pdptrs", c_uint64 * 4),
    ]  # fmt: skip


class kvm_fpu(Structure):
    """x87 and SSE registers (KVM_GET_FPU, 4.22). `ftwx` is the tag byte of FXSAVE: one bit per register, 1 is valid."""

    _fields_ = [
        ("fpr", c_uint8 * 16 * 8),
        ("fcw", c_uint16),
        ("fsw", c_uint16),
        ("ftwx", c_uint8),
        ("pad1", c_uint8),
        ("last_opcode", c_uint16),
        ("last_ip", c_uint64),
        ("last_dp", c_uint64),
        ("xmm", c_uint8 * 16 * 16),
        ("mxcsr", c_uint32),
        ("pad2", c_uint32),
    ]


class kvm_xsave(Structure):
    """The XSAVE area, 4 KiB and, by KVM_GET_XSAVE2, more in `extra` (4.42, 4.134).

    Its real size in bytes is what KVM_CHECK_EXTENSION(XSAVE2) answers on the VM; components lie where the host's CPUID
    leaf 0xD puts them.
    """

    _fields_ = [("region", c_uint32 * 1024)]
    _flexible_ = ("extra", c_uint32)


class kvm_xcr(Structure):
    """One extended control register (4.44)."""

    _fields_ = [("xcr", c_uint32), ("reserved", c_uint32), ("value", c_uint64)]


class kvm_xcrs(Structure):
    """`nr_xcrs` extended control registers; so far there is only XCR0 (KVM_GET_XCRS, 4.44)."""

    _fields_ = [("nr_xcrs", c_uint32), ("flags", c_uint32), ("xcrs", kvm_xcr * 16), ("padding", c_uint64 * 16)]


class kvm_lapic_state(Structure):
    """The local APIC's register page, 0x400 bytes as the guest sees it (KVM_GET_LAPIC, 4.57)."""

    _fields_ = [("regs", c_uint8 * 0x400)]


class kvm_interrupt(Structure):
    """The vector to inject (KVM_INTERRUPT, 4.16)."""

    _fields_ = [("irq", c_uint32)]


class kvm_signal_mask(Structure):
    """Signals blocked while in KVM_RUN; `len` is 8, the size of the kernel's sigset in bytes (4.21)."""

    _fields_ = [("len", c_uint32)]
    _flexible_ = ("sigset", c_uint8)


class kvm_translation(Structure):
    """A linear address and what the vCPU's page tables make of it (KVM_TRANSLATE, 4.15)."""

    _fields_ = [
        ("linear_address", c_uint64),
        ("physical_address", c_uint64),
        ("valid", c_uint8),
        ("writeable", c_uint8),
        ("usermode", c_uint8),
        ("pad", c_uint8 * 5),
    ]


class kvm_debugregs(Structure):
    """DR0 to DR3, DR6, DR7 (KVM_GET_DEBUGREGS, 4.33). `flags` is 0."""

    _fields_ = [
        ("db", c_uint64 * 4),
        ("dr6", c_uint64),
        ("dr7", c_uint64),
        ("flags", c_uint64),
        ("reserved", c_uint64 * 9),
    ]


class kvm_guest_debug_arch(Structure):
    """The debug registers that the host sets for itself: 0 to 3 addresses, 7 control (4.87)."""

    _fields_ = [("debugreg", c_uint64 * 8)]


class kvm_guest_debug(Structure):
    """What of the guest's run ends in a KVM_EXIT_DEBUG: KVM_GUESTDBG_* (KVM_SET_GUEST_DEBUG, 4.87)."""

    _fields_ = [("control", c_uint32), ("pad", c_uint32), ("arch", kvm_guest_debug_arch)]


class kvm_tpr_access_ctl(Structure):
    """Turns KVM_EXIT_TPR_ACCESS on and off (KVM_TPR_ACCESS_REPORTING)."""

    _fields_ = [("enabled", c_uint32), ("flags", c_uint32), ("reserved", c_uint32 * 8)]


class kvm_vapic_addr(Structure):
    """Guest-physical address of the virtual APIC page (KVM_SET_VAPIC_ADDR)."""

    _fields_ = [("vapic_addr", c_uint64)]


class kvm_x86_mce(Structure):
    """A machine check to inject, in the terms of the bank's MSRs (KVM_X86_SET_MCE, 4.106)."""

    _fields_ = [
        ("status", c_uint64),
        ("addr", c_uint64),
        ("misc", c_uint64),
        ("mcg_status", c_uint64),
        ("bank", c_uint8),
        ("pad1", c_uint8 * 7),
        ("pad2", c_uint64 * 3),
    ]


class kvm_one_reg(Structure):
    """A register by id (KVM_REG_X86 | ...), the address of its value (KVM_GET_ONE_REG, 4.69; x86 since Linux 6.18)."""

    _fields_ = [("id", c_uint64), ("addr", c_uint64)]


class kvm_reg_list(Structure):
    """`n` register ids in `reg` (KVM_GET_REG_LIST, 4.84)."""

    _fields_ = [("n", c_uint64)]
    _flexible_ = ("reg", c_uint64)
