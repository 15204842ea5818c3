"""Every KVM ioctl of x86 in one table, in order of the file descriptor it is meant for.

The table holds sizes as plain numbers so that importing it loads no struct: `Ioctl.argument_type` finds the class when
it is asked for. A test compares each number with the C compiler's and each size with the class.

Source: `<linux/kvm.h>`, the ioctl encoding of `<asm-generic/ioctl.h>`, and for descriptor and capability the KVM API
document, chapter 4, where each ioctl has its section.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ctypes import _CData

__all__ = [
    "DEVICE",
    "IOCTLS",
    "KVMIO",
    "KVM_GET_REGS",
    "KVM_GET_SREGS",
    "KVM_GET_VCPU_EVENTS",
    "KVM_RUN",
    "KVM_SET_REGS",
    "KVM_SET_SREGS",
    "KVM_SET_VCPU_EVENTS",
    "NONE",
    "READ",
    "SYSTEM",
    "VCPU",
    "VM",
    "WRITE",
    "Ioctl",
    "encode",
]

KVMIO = 0xAE
"""The ioctl type byte of all KVM ioctls."""

# Directions as user space sees them: _IOW passes data to the kernel, _IOR brings it back.
NONE = 0
WRITE = 1
READ = 2

# Kinds of file descriptors.
SYSTEM = "system"  # /dev/kvm itself
VM = "vm"  # what KVM_CREATE_VM answers
VCPU = "vcpu"  # what KVM_CREATE_VCPU answers
DEVICE = "device"  # what KVM_CREATE_DEVICE answers


def encode(direction: int, number: int, size: int) -> int:
    """The 32-bit request code: direction in bits 31:30, argument size in 29:16, type 15:8, number 7:0."""
    return direction << 30 | size << 16 | KVMIO << 8 | number


class Ioctl:
    """One ioctl of KVM.

    `name` is the kernel's; `number` the 32-bit request code; `direction` NONE, READ, WRITE or READ | WRITE as encoded
    (a few are encoded oddly, KVM_SET_IRQCHIP as READ for one, and stay so for ever); `nr` the low byte; `size` the
    encoded size in bytes, without a flexible array and 0 when direction is NONE.

    `argument` says what the third argument of ioctl() is: None for nothing (pass 0), "int" for the value itself, else
    the name of the C type that it points to: a struct or "__u64", "unsigned long".

    `descriptor` is the kind of file descriptor it belongs to, and `also` the other kinds that take it.
    `capability` is the `kvmpy.abi.capabilities.Cap` name that announces it, or None for what every KVM has.
    """

    __slots__ = ("also", "argument", "capability", "descriptor", "direction", "name", "nr", "number", "size")
    __match_args__ = ("name", "number")

    def __init__(
        self,
        name: str,
        direction: int,
        nr: int,
        argument: str | None,
        size: int,
        descriptor: str,
        capability: str | None = None,
        also: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.direction = direction
        self.nr = nr
        self.argument = argument
        self.size = size
        self.number = encode(direction, nr, size)
        self.descriptor = descriptor
        self.capability = capability
        self.also = also

    @property
    def argument_type(self) -> "type[_CData] | None":
        """The ctypes class that the argument points to; None when there is no argument or it is a plain value."""
        if self.argument is None or self.argument == "int":
            return None
        from kvmpy.abi.structs import struct

        return struct(self.argument)

    @property
    def descriptors(self) -> tuple[str, ...]:
        """All kinds of file descriptors that take this ioctl, the usual one first."""
        return (self.descriptor, *self.also)

    def __repr__(self) -> str:
        return f"<Ioctl {self.name} {self.number:#010x} on {'/'.join(self.descriptors)}>"


_BOTH = READ | WRITE
_ANY = (SYSTEM, VM, VCPU)

# fmt: off
_TABLE = (
    # /dev/kvm
    Ioctl("KVM_GET_API_VERSION",            NONE,  0x00, None, 0, SYSTEM),
    Ioctl("KVM_CREATE_VM",                  NONE,  0x01, "int", 0, SYSTEM),
    Ioctl("KVM_GET_MSR_INDEX_LIST",         _BOTH, 0x02, "kvm_msr_list", 4, SYSTEM),
    Ioctl("KVM_CHECK_EXTENSION",            NONE,  0x03, "int", 0, SYSTEM, also=(VM,)),  # CHECK_EXTENSION_VM
    Ioctl("KVM_GET_VCPU_MMAP_SIZE",         NONE,  0x04, None, 0, SYSTEM),
    Ioctl("KVM_GET_SUPPORTED_CPUID",        _BOTH, 0x05, "kvm_cpuid2", 8, SYSTEM, "EXT_CPUID"),
    Ioctl("KVM_GET_EMULATED_CPUID",         _BOTH, 0x09, "kvm_cpuid2", 8, SYSTEM, "EXT_EMUL_CPUID"),
    Ioctl("KVM_GET_MSR_FEATURE_INDEX_LIST", _BOTH, 0x0A, "kvm_msr_list", 4, SYSTEM, "GET_MSR_FEATURES"),
    # on a vCPU (HYPERV_CPUID) it is deprecated, and knows less
    Ioctl("KVM_GET_SUPPORTED_HV_CPUID",     _BOTH, 0xC1, "kvm_cpuid2", 8, SYSTEM, "SYS_HYPERV_CPUID", (VCPU,)),
    Ioctl("KVM_X86_GET_MCE_CAP_SUPPORTED",  READ,  0x9D, "__u64", 8, SYSTEM, "MCE"),

    # VM: vCPUs and memory
    Ioctl("KVM_CREATE_VCPU",                NONE,  0x41, "int", 0, VM),
    Ioctl("KVM_GET_DIRTY_LOG",              WRITE, 0x42, "kvm_dirty_log", 16, VM),
    Ioctl("KVM_SET_NR_MMU_PAGES",           NONE,  0x44, "int", 0, VM, "MMU_SHADOW_CACHE_CONTROL"),
    Ioctl("KVM_GET_NR_MMU_PAGES",           NONE,  0x45, None, 0, VM, "MMU_SHADOW_CACHE_CONTROL"),
    Ioctl("KVM_SET_USER_MEMORY_REGION",     WRITE, 0x46, "kvm_userspace_memory_region", 32, VM, "USER_MEMORY"),
    Ioctl("KVM_SET_TSS_ADDR",               NONE,  0x47, "int", 0, VM, "SET_TSS_ADDR"),
    Ioctl("KVM_SET_IDENTITY_MAP_ADDR",      WRITE, 0x48, "__u64", 8, VM, "SET_IDENTITY_MAP_ADDR"),
    Ioctl("KVM_SET_USER_MEMORY_REGION2",    WRITE, 0x49, "kvm_userspace_memory_region2", 160, VM, "USER_MEMORY2"),
    Ioctl("KVM_CLEAR_DIRTY_LOG",            _BOTH, 0xC0, "kvm_clear_dirty_log", 24, VM, "MANUAL_DIRTY_LOG_PROTECT2"),
    Ioctl("KVM_RESET_DIRTY_RINGS",          NONE,  0xC7, None, 0, VM, "DIRTY_LOG_RING"),
    Ioctl("KVM_SET_MEMORY_ATTRIBUTES",      WRITE, 0xD2, "kvm_memory_attributes", 32, VM, "MEMORY_ATTRIBUTES"),
    Ioctl("KVM_CREATE_GUEST_MEMFD",         _BOTH, 0xD4, "kvm_create_guest_memfd", 64, VM, "GUEST_MEMFD"),

    # VM: interrupt controllers and timers in the kernel
    Ioctl("KVM_CREATE_IRQCHIP",             NONE,  0x60, None, 0, VM, "IRQCHIP"),
    Ioctl("KVM_IRQ_LINE",                   WRITE, 0x61, "kvm_irq_level", 8, VM, "IRQCHIP"),
    Ioctl("KVM_GET_IRQCHIP",                _BOTH, 0x62, "kvm_irqchip", 520, VM, "IRQCHIP"),
    Ioctl("KVM_SET_IRQCHIP",                READ,  0x63, "kvm_irqchip", 520, VM, "IRQCHIP"),
    Ioctl("KVM_CREATE_PIT",                 NONE,  0x64, None, 0, VM, "PIT"),
    Ioctl("KVM_GET_PIT",                    _BOTH, 0x65, "kvm_pit_state", 72, VM, "PIT"),
    Ioctl("KVM_SET_PIT",                    READ,  0x66, "kvm_pit_state", 72, VM, "PIT"),
    Ioctl("KVM_IRQ_LINE_STATUS",            _BOTH, 0x67, "kvm_irq_level", 8, VM, "IRQ_INJECT_STATUS"),
    Ioctl("KVM_SET_GSI_ROUTING",            WRITE, 0x6A, "kvm_irq_routing", 8, VM, "IRQ_ROUTING"),
    Ioctl("KVM_REINJECT_CONTROL",           NONE,  0x71, "kvm_reinject_control", 0, VM, "REINJECT_CONTROL"),
    Ioctl("KVM_IRQFD",                      WRITE, 0x76, "kvm_irqfd", 32, VM, "IRQFD"),
    Ioctl("KVM_CREATE_PIT2",                WRITE, 0x77, "kvm_pit_config", 64, VM, "PIT2"),
    Ioctl("KVM_SET_BOOT_CPU_ID",            NONE,  0x78, "int", 0, VM, "SET_BOOT_CPU_ID"),
    Ioctl("KVM_GET_PIT2",                   READ,  0x9F, "kvm_pit_state2", 112, VM, "PIT_STATE2"),
    Ioctl("KVM_SET_PIT2",                   WRITE, 0xA0, "kvm_pit_state2", 112, VM, "PIT_STATE2"),
    Ioctl("KVM_SIGNAL_MSI",                 WRITE, 0xA5, "kvm_msi", 32, VM, "SIGNAL_MSI"),

    # VM: doorbells, clock, devices, the rest
    Ioctl("KVM_REGISTER_COALESCED_MMIO",    WRITE, 0x67, "kvm_coalesced_mmio_zone", 16, VM, "COALESCED_MMIO"),
    Ioctl("KVM_UNREGISTER_COALESCED_MMIO",  WRITE, 0x68, "kvm_coalesced_mmio_zone", 16, VM, "COALESCED_MMIO"),
    Ioctl("KVM_IOEVENTFD",                  WRITE, 0x79, "kvm_ioeventfd", 64, VM, "IOEVENTFD"),
    Ioctl("KVM_XEN_HVM_CONFIG",             WRITE, 0x7A, "kvm_xen_hvm_config", 56, VM, "XEN_HVM"),
    Ioctl("KVM_SET_CLOCK",                  WRITE, 0x7B, "kvm_clock_data", 48, VM, "ADJUST_CLOCK"),
    Ioctl("KVM_GET_CLOCK",                  READ,  0x7C, "kvm_clock_data", 48, VM, "ADJUST_CLOCK"),
    Ioctl("KVM_SET_PMU_EVENT_FILTER",       WRITE, 0xB2, "kvm_pmu_event_filter", 32, VM, "PMU_EVENT_FILTER"),
    Ioctl("KVM_MEMORY_ENCRYPT_OP",          _BOTH, 0xBA, "unsigned long", 8, VM, also=(VCPU,)),  # vCPU: TDX only
    Ioctl("KVM_MEMORY_ENCRYPT_REG_REGION",  READ,  0xBB, "kvm_enc_region", 16, VM),
    Ioctl("KVM_MEMORY_ENCRYPT_UNREG_REGION", READ, 0xBC, "kvm_enc_region", 16, VM),
    Ioctl("KVM_HYPERV_EVENTFD",             WRITE, 0xBD, "kvm_hyperv_eventfd", 24, VM, "HYPERV_EVENTFD"),
    Ioctl("KVM_X86_SET_MSR_FILTER",         WRITE, 0xC6, "kvm_msr_filter", 392, VM, "X86_MSR_FILTER"),
    Ioctl("KVM_XEN_HVM_GET_ATTR",           _BOTH, 0xC8, "kvm_xen_hvm_attr", 72, VM, "XEN_HVM"),
    Ioctl("KVM_XEN_HVM_SET_ATTR",           WRITE, 0xC9, "kvm_xen_hvm_attr", 72, VM, "XEN_HVM"),
    Ioctl("KVM_GET_STATS_FD",               NONE,  0xCE, None, 0, VM, "BINARY_STATS_FD", (VCPU,)),
    Ioctl("KVM_XEN_HVM_EVTCHN_SEND",        WRITE, 0xD0, "kvm_irq_routing_xen_evtchn", 12, VM, "XEN_HVM"),
    Ioctl("KVM_CREATE_DEVICE",              _BOTH, 0xE0, "kvm_create_device", 12, VM, "DEVICE_CTRL"),

    # device, and the attributes of the other descriptors (VM_, VCPU_, SYS_ATTRIBUTES)
    Ioctl("KVM_SET_DEVICE_ATTR",            WRITE, 0xE1, "kvm_device_attr", 24, DEVICE, "DEVICE_CTRL", (VM, VCPU)),
    Ioctl("KVM_GET_DEVICE_ATTR",            WRITE, 0xE2, "kvm_device_attr", 24, DEVICE, "DEVICE_CTRL", _ANY),
    Ioctl("KVM_HAS_DEVICE_ATTR",            WRITE, 0xE3, "kvm_device_attr", 24, DEVICE, "DEVICE_CTRL", _ANY),

    # vCPU: running it
    Ioctl("KVM_RUN",                        NONE,  0x80, None, 0, VCPU),
    Ioctl("KVM_INTERRUPT",                  WRITE, 0x86, "kvm_interrupt", 4, VCPU),
    Ioctl("KVM_SET_SIGNAL_MASK",            WRITE, 0x8B, "kvm_signal_mask", 4, VCPU),
    Ioctl("KVM_NMI",                        NONE,  0x9A, None, 0, VCPU, "USER_NMI"),
    Ioctl("KVM_SET_GUEST_DEBUG",            WRITE, 0x9B, "kvm_guest_debug", 72, VCPU, "SET_GUEST_DEBUG"),
    Ioctl("KVM_SMI",                        NONE,  0xB7, None, 0, VCPU, "X86_SMM"),
    Ioctl("KVM_PRE_FAULT_MEMORY",           _BOTH, 0xD5, "kvm_pre_fault_memory", 64, VCPU, "PRE_FAULT_MEMORY"),

    # vCPU: its state
    Ioctl("KVM_GET_REGS",                   READ,  0x81, "kvm_regs", 144, VCPU),
    Ioctl("KVM_SET_REGS",                   WRITE, 0x82, "kvm_regs", 144, VCPU),
    Ioctl("KVM_GET_SREGS",                  READ,  0x83, "kvm_sregs", 312, VCPU),
    Ioctl("KVM_SET_SREGS",                  WRITE, 0x84, "kvm_sregs", 312, VCPU),
    Ioctl("KVM_TRANSLATE",                  _BOTH, 0x85, "kvm_translation", 24, VCPU),
    Ioctl("KVM_GET_MSRS",                   _BOTH, 0x88, "kvm_msrs", 8, VCPU, None, (SYSTEM,)),  # system: feature MSRs
    Ioctl("KVM_SET_MSRS",                   WRITE, 0x89, "kvm_msrs", 8, VCPU),
    Ioctl("KVM_SET_CPUID",                  WRITE, 0x8A, "kvm_cpuid", 8, VCPU),
    Ioctl("KVM_GET_FPU",                    READ,  0x8C, "kvm_fpu", 416, VCPU),
    Ioctl("KVM_SET_FPU",                    WRITE, 0x8D, "kvm_fpu", 416, VCPU),
    Ioctl("KVM_GET_LAPIC",                  READ,  0x8E, "kvm_lapic_state", 0x400, VCPU, "IRQCHIP"),
    Ioctl("KVM_SET_LAPIC",                  WRITE, 0x8F, "kvm_lapic_state", 0x400, VCPU, "IRQCHIP"),
    Ioctl("KVM_SET_CPUID2",                 WRITE, 0x90, "kvm_cpuid2", 8, VCPU, "EXT_CPUID"),
    Ioctl("KVM_GET_CPUID2",                 _BOTH, 0x91, "kvm_cpuid2", 8, VCPU, "EXT_CPUID"),
    Ioctl("KVM_TPR_ACCESS_REPORTING",       _BOTH, 0x92, "kvm_tpr_access_ctl", 40, VCPU, "VAPIC"),
    Ioctl("KVM_SET_VAPIC_ADDR",             WRITE, 0x93, "kvm_vapic_addr", 8, VCPU, "VAPIC"),
    Ioctl("KVM_GET_MP_STATE",               READ,  0x98, "kvm_mp_state", 4, VCPU, "MP_STATE"),
    Ioctl("KVM_SET_MP_STATE",               WRITE, 0x99, "kvm_mp_state", 4, VCPU, "MP_STATE"),
    Ioctl("KVM_X86_SETUP_MCE",              WRITE, 0x9C, "__u64", 8, VCPU, "MCE"),
    Ioctl("KVM_X86_SET_MCE",                WRITE, 0x9E, "kvm_x86_mce", 64, VCPU, "MCE"),
    Ioctl("KVM_GET_VCPU_EVENTS",            READ,  0x9F, "kvm_vcpu_events", 64, VCPU, "VCPU_EVENTS"),
    Ioctl("KVM_SET_VCPU_EVENTS",            WRITE, 0xA0, "kvm_vcpu_events", 64, VCPU, "VCPU_EVENTS"),
    Ioctl("KVM_GET_DEBUGREGS",              READ,  0xA1, "kvm_debugregs", 128, VCPU, "DEBUGREGS"),
    Ioctl("KVM_SET_DEBUGREGS",              WRITE, 0xA2, "kvm_debugregs", 128, VCPU, "DEBUGREGS"),
    # these three also on the VM, where VM_TSC_CONTROL and ENABLE_CAP_VM announce them
    Ioctl("KVM_SET_TSC_KHZ",                NONE,  0xA2, "int", 0, VCPU, "TSC_CONTROL", (VM,)),
    Ioctl("KVM_GET_TSC_KHZ",                NONE,  0xA3, None, 0, VCPU, "GET_TSC_KHZ", (VM,)),
    Ioctl("KVM_ENABLE_CAP",                 WRITE, 0xA3, "kvm_enable_cap", 104, VCPU, "ENABLE_CAP", (VM,)),
    Ioctl("KVM_GET_XSAVE",                  READ,  0xA4, "kvm_xsave", 0x1000, VCPU, "XSAVE"),
    Ioctl("KVM_SET_XSAVE",                  WRITE, 0xA5, "kvm_xsave", 0x1000, VCPU, "XSAVE"),
    Ioctl("KVM_GET_XCRS",                   READ,  0xA6, "kvm_xcrs", 392, VCPU, "XCRS"),
    Ioctl("KVM_SET_XCRS",                   WRITE, 0xA7, "kvm_xcrs", 392, VCPU, "XCRS"),
    Ioctl("KVM_GET_ONE_REG",                WRITE, 0xAB, "kvm_one_reg", 16, VCPU, "ONE_REG"),
    Ioctl("KVM_SET_ONE_REG",                WRITE, 0xAC, "kvm_one_reg", 16, VCPU, "ONE_REG"),
    Ioctl("KVM_KVMCLOCK_CTRL",              NONE,  0xAD, None, 0, VCPU, "KVMCLOCK_CTRL"),
    Ioctl("KVM_GET_REG_LIST",               _BOTH, 0xB0, "kvm_reg_list", 8, VCPU, "ONE_REG"),
    Ioctl("KVM_GET_NESTED_STATE",           _BOTH, 0xBE, "kvm_nested_state", 128, VCPU, "NESTED_STATE"),
    Ioctl("KVM_SET_NESTED_STATE",           WRITE, 0xBF, "kvm_nested_state", 128, VCPU, "NESTED_STATE"),
    Ioctl("KVM_XEN_VCPU_GET_ATTR",          _BOTH, 0xCA, "kvm_xen_vcpu_attr", 72, VCPU, "XEN_HVM"),
    Ioctl("KVM_XEN_VCPU_SET_ATTR",          WRITE, 0xCB, "kvm_xen_vcpu_attr", 72, VCPU, "XEN_HVM"),
    Ioctl("KVM_GET_SREGS2",                 READ,  0xCC, "kvm_sregs2", 320, VCPU, "SREGS2"),
    Ioctl("KVM_SET_SREGS2",                 WRITE, 0xCD, "kvm_sregs2", 320, VCPU, "SREGS2"),
    Ioctl("KVM_GET_XSAVE2",                 READ,  0xCF, "kvm_xsave", 0x1000, VCPU, "XSAVE2"),
)
# fmt: on

IOCTLS: "dict[str, Ioctl]" = {ioctl.name: ioctl for ioctl in _TABLE}
"""All of them by name, in table order."""

# The ones on the path of every exit and every register access, as plain numbers.
KVM_RUN = IOCTLS["KVM_RUN"].number
KVM_GET_REGS = IOCTLS["KVM_GET_REGS"].number
KVM_SET_REGS = IOCTLS["KVM_SET_REGS"].number
KVM_GET_SREGS = IOCTLS["KVM_GET_SREGS"].number
KVM_SET_SREGS = IOCTLS["KVM_SET_SREGS"].number
KVM_GET_VCPU_EVENTS = IOCTLS["KVM_GET_VCPU_EVENTS"].number
KVM_SET_VCPU_EVENTS = IOCTLS["KVM_SET_VCPU_EVENTS"].number
