"""What can be said about a host's KVM without running a guest: device, permission, module, processor, capabilities."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path

from kvmpy.abi.capabilities import Cap
from kvmpy.kvm import Kvm

__all__ = [
    "CAPABILITIES",
    "DeviceFile",
    "Module",
    "Processor",
    "capabilities",
    "device_file",
    "limits",
    "module",
    "processor",
]

CAPABILITIES: dict[Cap, str] = {
    Cap.USER_MEMORY: "guest memory that this process owns (needed)",
    Cap.IMMEDIATE_EXIT: "stopping a vCPU without losing a kick (needed)",
    Cap.SYNC_REGS: "registers without ioctls: faster exits",
    Cap.IRQCHIP: "PICs, IOAPIC and local APICs in the kernel",
    Cap.SPLIT_IRQCHIP: "only local APICs in the kernel",
    Cap.PIT2: "a PC's timer in the kernel",
    Cap.SET_TSS_ADDR: "real mode on older Intel processors",
    Cap.READONLY_MEM: "ROM",
    Cap.IRQFD: "interrupts by eventfd",
    Cap.IOEVENTFD: "writes by the guest that signal an eventfd instead of exiting",
    Cap.COALESCED_MMIO: "memory writes by the guest that are queued instead of exiting",
    Cap.COALESCED_PIO: "the same for ports",
    Cap.SIGNAL_MSI: "message-signalled interrupts",
    Cap.IRQ_ROUTING: "which interrupt goes where; routes",
    Cap.VCPU_EVENTS: "reading and injecting exceptions and interrupts",
    Cap.XSAVE: "saving FPU and vector registers",
    Cap.XSAVE2: "the same with features that need more than 4 KiB (AMX); bytes",
    Cap.XCRS: "XCR0",
    Cap.DEBUGREGS: "debug registers",
    Cap.SET_GUEST_DEBUG: "single steps and breakpoints",
    Cap.SREGS2: "system registers with the PAE pointers",
    Cap.X86_USER_SPACE_MSR: "exits for MSRs",
    Cap.X86_MSR_FILTER: "choosing which MSRs exit",
    Cap.MANUAL_DIRTY_LOG_PROTECT2: "dirty pages: read and re-arm separately",
    Cap.DIRTY_LOG_RING: "dirty pages in a ring; bytes",
    Cap.ADJUST_CLOCK: "setting the guest's clock after a pause",
    Cap.TSC_CONTROL: "a guest TSC of another frequency",
    Cap.TSC_DEADLINE_TIMER: "the local APIC's deadline timer",
    Cap.X86_DISABLE_EXITS: "HLT, PAUSE and MWAIT without exits",
    Cap.EXIT_ON_EMULATION_FAILURE: "details when KVM cannot emulate an instruction",
    Cap.X86_TRIPLE_FAULT_EVENT: "injecting a triple fault",
    Cap.X86_BUS_LOCK_EXIT: "noticing split locks",
    Cap.X86_NOTIFY_VMEXIT: "noticing a guest that blocks the processor",
    Cap.X86_SMM: "system management mode",
    Cap.NESTED_STATE: "saving a guest that runs guests; bytes",
    Cap.HYPERV: "Hyper-V's interface for Windows guests",
    Cap.MEMORY_FAULT_INFO: "which address failed when KVM_RUN fails with EFAULT",
    Cap.GUEST_MEMFD: "memory that only the guest can map",
    Cap.BINARY_STATS_FD: "KVM's own statistics",
}
"""The capabilities that matter here, and what each is for."""

_VENDORS = {
    "kvm_intel": "VT-x",
    "kvm_amd": "AMD-V",
    "kvm_pvm": "pagetable VM, without VT-x or AMD-V: ring 0 of a guest runs in software",
}


@dataclass(frozen=True, slots=True)
class DeviceFile:
    """/dev/kvm as a file. `may_open` is what access(2) says for this process."""

    path: str
    exists: bool
    owner: str = ""
    group: str = ""
    mode: str = ""
    may_open: bool = False
    in_group: bool = False


@dataclass(frozen=True, slots=True)
class Module:
    """The kernel's KVM modules: `vendor` is that of the processor, "" when none is loaded."""

    kvm: bool
    vendor: str
    description: str
    nested: bool | None
    """Whether guests may run guests, None when the module does not say."""


@dataclass(frozen=True, slots=True)
class Processor:
    """The host's processor as /proc/cpuinfo has it. `hypervisor`: the host itself is a virtual machine."""

    vendor: str
    model: str
    virtualization: str
    hypervisor: bool


def device_file(path: str = "/dev/kvm") -> DeviceFile:
    """Who owns the device, and whether this process may open it."""
    try:
        status = os.stat(path)
    except OSError:
        return DeviceFile(path, exists=False)
    return DeviceFile(
        path,
        exists=True,
        owner=_user(status.st_uid),
        group=_group(status.st_gid),
        mode=f"{stat.S_IMODE(status.st_mode):04o}",
        may_open=os.access(path, os.R_OK | os.W_OK),
        in_group=status.st_gid in (os.getegid(), *os.getgroups()),
    )


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def module(root: Path = Path("/sys/module")) -> Module:
    """Which KVM modules are there (also those built into the kernel)."""
    loaded = sorted(path.name for path in root.glob("kvm_*"))
    vendor = next((name for name in loaded if name in _VENDORS), loaded[0] if loaded else "")
    nested = _read(root / vendor / "parameters" / "nested") if vendor else ""
    return Module(
        kvm=(root / "kvm").exists(),
        vendor=vendor,
        description=_VENDORS.get(vendor, ""),
        nested=nested in ("1", "Y") if nested else None,
    )


def processor(path: Path = Path("/proc/cpuinfo")) -> Processor:
    """The first processor in /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in _read(path).splitlines():
        name, colon, value = line.partition(":")
        if not colon:
            break  # an empty line ends the first processor
        fields[name.strip()] = value.strip()
    flags = fields.get("flags", "").split()
    virtualization = "VT-x" if "vmx" in flags else "AMD-V" if "svm" in flags else ""
    return Processor(fields.get("vendor_id", ""), fields.get("model name", ""), virtualization, "hypervisor" in flags)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def capabilities(kvm: Kvm) -> dict[str, int]:
    """What KVM_CHECK_EXTENSION answers for each of `CAPABILITIES`."""
    return {capability.name: kvm.check_extension(capability) for capability in CAPABILITIES}


def limits(kvm: Kvm) -> dict[str, int]:
    """How much of everything a VM may have."""
    return {
        "vcpus": kvm.max_vcpus,
        "recommended_vcpus": kvm.check_extension(Cap.NR_VCPUS),
        "vcpu_ids": kvm.max_vcpu_id,
        "memory_slots": kvm.check_extension(Cap.NR_MEMSLOTS),
        "msrs": len(kvm.msr_indices()),
    }
