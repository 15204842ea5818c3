"""What older headers name and kernels no longer do: ioctls that answer ENOTTY, and their numbers.

Here so that a trace of an old program can be read, and so that the comparison with an old header is complete. Structs
are in `kvmpy.abi.structs` like all others. Linux 6.4's header has dropped KVM_SET_MEMORY_REGION and
KVM_SET_MEMORY_ALIAS, 6.8's tracing, KVM_DEBUG_GUEST and device assignment, 6.9's the numbers of device assignment.
"""

from kvmpy.abi.ioctls import NONE, READ, SYSTEM, VCPU, VM, WRITE, Ioctl

__all__ = ["WITHDRAWN_IOCTLS"]

# fmt: off
_TABLE = (
    Ioctl("KVM_TRACE_ENABLE",          WRITE, 0x06, "kvm_user_trace_setup", 8, SYSTEM),
    Ioctl("KVM_TRACE_PAUSE",           NONE,  0x07, None, 0, SYSTEM),
    Ioctl("KVM_TRACE_DISABLE",         NONE,  0x08, None, 0, SYSTEM),
    Ioctl("KVM_SET_MEMORY_REGION",     WRITE, 0x40, "kvm_memory_region", 24, VM),
    Ioctl("KVM_SET_MEMORY_ALIAS",      WRITE, 0x43, "kvm_memory_alias", 32, VM),
    Ioctl("KVM_ASSIGN_PCI_DEVICE",     READ,  0x69, "kvm_assigned_pci_dev", 64, VM),
    Ioctl("KVM_ASSIGN_IRQ",            READ,  0x70, "kvm_assigned_irq", 64, VM),
    Ioctl("KVM_ASSIGN_DEV_IRQ",        WRITE, 0x70, "kvm_assigned_irq", 64, VM, "ASSIGN_DEV_IRQ"),
    Ioctl("KVM_DEASSIGN_PCI_DEVICE",   WRITE, 0x72, "kvm_assigned_pci_dev", 64, VM),
    Ioctl("KVM_ASSIGN_SET_MSIX_NR",    WRITE, 0x73, "kvm_assigned_msix_nr", 8, VM),
    Ioctl("KVM_ASSIGN_SET_MSIX_ENTRY", WRITE, 0x74, "kvm_assigned_msix_entry", 16, VM),
    Ioctl("KVM_DEASSIGN_DEV_IRQ",      WRITE, 0x75, "kvm_assigned_irq", 64, VM, "ASSIGN_DEV_IRQ"),
    Ioctl("KVM_ASSIGN_SET_INTX_MASK",  WRITE, 0xA4, "kvm_assigned_pci_dev", 64, VM, "PCI_2_3"),
    Ioctl("KVM_DEBUG_GUEST",           WRITE, 0x87, "kvm_debug_guest", 80, VCPU),
)
# fmt: on

WITHDRAWN_IOCTLS: "dict[str, Ioctl]" = {ioctl.name: ioctl for ioctl in _TABLE}
"""All of them by name."""

# KVM_ASSIGN_PCI_DEVICE: flags
KVM_DEV_ASSIGN_ENABLE_IOMMU = 1 << 0
KVM_DEV_ASSIGN_PCI_2_3 = 1 << 1
KVM_DEV_ASSIGN_MASK_INTX = 1 << 2

# KVM_ASSIGN_DEV_IRQ: flags
KVM_DEV_IRQ_HOST_INTX = 1 << 0
KVM_DEV_IRQ_HOST_MSI = 1 << 1
KVM_DEV_IRQ_HOST_MSIX = 1 << 2
KVM_DEV_IRQ_HOST_MASK = 0x00FF
KVM_DEV_IRQ_GUEST_INTX = 1 << 8
KVM_DEV_IRQ_GUEST_MSI = 1 << 9
KVM_DEV_IRQ_GUEST_MSIX = 1 << 10
KVM_DEV_IRQ_GUEST_MASK = 0xFF00
KVM_MAX_MSIX_PER_DEV = 256

# Cap.X86_DISABLE_EXITS: all bits of its time; ask the capability instead
KVM_X86_DISABLE_VALID_EXITS = 0xF

# Trace records
KVM_TRC_SHIFT = 16
KVM_TRC_ENTRYEXIT = 1 << 16
KVM_TRC_HANDLER = 1 << 17
KVM_TRC_VMENTRY = KVM_TRC_ENTRYEXIT + 0x01
KVM_TRC_VMEXIT = KVM_TRC_ENTRYEXIT + 0x02
KVM_TRC_PAGE_FAULT = KVM_TRC_HANDLER + 0x01
KVM_TRC_INJ_VIRQ = KVM_TRC_HANDLER + 0x02
KVM_TRC_REDELIVER_EVT = KVM_TRC_HANDLER + 0x03
KVM_TRC_PEND_INTR = KVM_TRC_HANDLER + 0x04
KVM_TRC_IO_READ = KVM_TRC_HANDLER + 0x05
KVM_TRC_IO_WRITE = KVM_TRC_HANDLER + 0x06
KVM_TRC_CR_READ = KVM_TRC_HANDLER + 0x07
KVM_TRC_CR_WRITE = KVM_TRC_HANDLER + 0x08
KVM_TRC_DR_READ = KVM_TRC_HANDLER + 0x09
KVM_TRC_DR_WRITE = KVM_TRC_HANDLER + 0x0A
KVM_TRC_MSR_READ = KVM_TRC_HANDLER + 0x0B
KVM_TRC_MSR_WRITE = KVM_TRC_HANDLER + 0x0C
KVM_TRC_CPUID = KVM_TRC_HANDLER + 0x0D
KVM_TRC_INTR = KVM_TRC_HANDLER + 0x0E
KVM_TRC_NMI = KVM_TRC_HANDLER + 0x0F
KVM_TRC_VMMCALL = KVM_TRC_HANDLER + 0x10
KVM_TRC_HLT = KVM_TRC_HANDLER + 0x11
KVM_TRC_CLTS = KVM_TRC_HANDLER + 0x12
KVM_TRC_LMSW = KVM_TRC_HANDLER + 0x13
KVM_TRC_APIC_ACCESS = KVM_TRC_HANDLER + 0x14
KVM_TRC_TDP_FAULT = KVM_TRC_HANDLER + 0x15
KVM_TRC_GTLB_WRITE = KVM_TRC_HANDLER + 0x16
KVM_TRC_STLB_WRITE = KVM_TRC_HANDLER + 0x17
KVM_TRC_STLB_INVAL = KVM_TRC_HANDLER + 0x18
KVM_TRC_PPC_INSTR = KVM_TRC_HANDLER + 0x19
KVM_TRC_HEAD_SIZE = 12
KVM_TRC_CYCLE_SIZE = 8
KVM_TRC_EXTRA_MAX = 7
