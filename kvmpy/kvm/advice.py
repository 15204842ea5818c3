"""What to do about a refused ioctl, for the causes that are known (KVM API document, and what its users ran into)."""

import errno
import os

__all__ = ["advice_for", "advice_for_open"]

_BY_IOCTL = {
    ("KVM_CREATE_VM", errno.ENOMEM): "the host is out of memory, or of VM slots: close VMs that are no longer used",
    ("KVM_CREATE_VM", errno.EBUSY): "another hypervisor holds the processor's virtualization (VirtualBox, VMware?)",
    ("KVM_CREATE_VM", errno.EINVAL): "this host's KVM does not know that type of VM; 0 always works",
    ("KVM_CREATE_VCPU", errno.EEXIST): "the VM has a vCPU with this id already",
    ("KVM_CREATE_VCPU", errno.EINVAL): "the vCPU id is too high: Kvm().max_vcpu_id says where ids end",
    ("KVM_CREATE_IRQCHIP", errno.EEXIST): "the VM has an interrupt controller already",
    ("KVM_CREATE_IRQCHIP", errno.EINVAL): "the interrupt controller must be created before the first vCPU",
    ("KVM_CREATE_PIT2", errno.EEXIST): "the VM has a PIT already",
    ("KVM_CREATE_PIT2", errno.ENOENT): "the PIT needs the in-kernel interrupt controller: create_irqchip() first",
    ("KVM_SET_USER_MEMORY_REGION", errno.EEXIST): "the range overlaps another memory slot",
    ("KVM_SET_USER_MEMORY_REGION", errno.EINVAL): (
        "addresses and sizes must be multiples of 4 KiB, a slot has less than 8 TiB and lies inside the guest's "
        "physical address width, and its size and host address cannot change"
    ),
    ("KVM_SET_SREGS", errno.EINVAL): (
        "the segments or control registers contradict each other; kvmpy.x86.entry_rules.violations(state) found no "
        "rule that is known to be broken"
    ),
    ("KVM_SET_CPUID2", errno.EINVAL): "CPUID must be set before the vCPU runs for the first time",
    ("KVM_SET_CPUID2", errno.E2BIG): "the table has more than KVM_MAX_CPUID_ENTRIES (256) entries",
    ("KVM_RUN", errno.ENOSPC): "the VM has no memory at all: add_ram() first",
    ("KVM_RUN", errno.EFAULT): (
        "the guest touched memory that this process cannot: a file that was truncated, or a mapping without the right "
        "protection"
    ),
    ("KVM_RUN", errno.EINVAL): "the registers that were set contradict each other, or the vCPU's CPUID was never set",
    ("KVM_RUN", errno.EIO): "the VM belongs to another process: KVM ties it to the one that created it",
    ("KVM_IRQ_LINE", errno.ENXIO): "there is no in-kernel interrupt controller: create_irqchip() before the vCPUs",
    ("KVM_IRQFD", errno.EINVAL): "there is no in-kernel interrupt controller, or no such GSI",
    ("KVM_IOEVENTFD", errno.EEXIST): "there is an ioeventfd at this address already",
    ("KVM_IOEVENTFD", errno.ENOSPC): "the bus has no room for more (1,000 devices)",
    ("KVM_GET_DIRTY_LOG", errno.ENOENT): "the slot does not log dirty pages: set_dirty_logging() first",
    ("KVM_GET_DIRTY_LOG", errno.ENXIO): "with a dirty ring there is no dirty log: read the ring",
    ("KVM_INTERRUPT", errno.ENXIO): "with an in-kernel interrupt controller, raise its lines instead",
    ("KVM_INTERRUPT", errno.EEXIST): "an interrupt is queued already",
    ("KVM_GET_LAPIC", errno.EINVAL): "the vCPU has no local APIC: create_irqchip() before create_vcpu()",
    ("KVM_SET_LAPIC", errno.EINVAL): "the vCPU has no local APIC: create_irqchip() before create_vcpu()",
}

_BY_ERRNO = {
    errno.ENOTTY: "this host's KVM does not have this ioctl",
    errno.EMFILE: "this process has too many open files; see `ulimit -n`",
    errno.ENFILE: "the host has too many open files",
    errno.EIO: "the VM is dead, or belongs to another process",
    errno.EBADF: "the file descriptor is not one of KVM's",
}


def advice_for(ioctl: str, number: int) -> str:
    """One line on what caused errno `number` of `ioctl`, or "" where the cause is not known."""
    return _BY_IOCTL.get((ioctl, number)) or _BY_ERRNO.get(number, "")


def advice_for_open(path: str, number: int) -> str:
    """Why /dev/kvm cannot be opened and what to do."""
    if number in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        if not os.path.exists("/sys/module/kvm"):
            return (
                "the kernel's kvm module is not loaded. On a PC: switch VT-x or AMD-V on in the firmware, then "
                "`modprobe kvm_intel` or `kvm_amd`. In a VM: its host must offer nested virtualization. "
                f"In a container: pass the device in (docker run --device {path})"
            )
        return (
            f"the kvm module is loaded but {path} is not there; in a container, pass it in (docker run --device {path})"
        )
    if number in (errno.EACCES, errno.EPERM):
        return (
            f"this user may not open {path}. Join its group (`sudo usermod -aG kvm $USER`, then log in again), or in "
            'CI add the udev rule KERNEL=="kvm", GROUP="kvm", MODE="0666", OPTIONS+="static_node=kvm" and trigger it. '
            "`kvmpy doctor` says more"
        )
    if number == errno.EBUSY:
        return "another hypervisor holds the processor's virtualization"
    return "`kvmpy doctor` says more"
