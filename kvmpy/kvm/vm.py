"""A virtual machine: its vCPUs, and what does not belong to memory or interrupts (KVM API, chapter 4)."""

from _weakref import ref  # weakref itself costs 1 ms of `import kvmpy`

from kvmpy.abi.ioctls import IOCTLS
from kvmpy.errors import UsageError
from kvmpy.kvm.checked_struct import capability_number, filled
from kvmpy.kvm.vcpu import Vcpu
from kvmpy.kvm.vm_interrupts import VmInterrupts
from kvmpy.kvm.vm_memory import VmMemory
from kvmpy.kvm.vm_notification import VmNotification

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmpy.abi.capabilities import Cap
    from kvmpy.abi.structs.machine import kvm_clock_data
    from kvmpy.kvm.device_fd import DeviceFd
    from kvmpy.kvm.msr_filter import MsrFilterRange
    from kvmpy.kvm.statistics import Statistics
    from kvmpy.kvm.system import Kvm

__all__ = ["Vm"]

_CREATE_VCPU = IOCTLS["KVM_CREATE_VCPU"]
_CAP_SYNC_REGS = 74
_SYNC_X86_REGS_AND_SREGS = 3


class Vm(VmMemory, VmInterrupts, VmNotification):
    """A virtual machine; made by `Kvm.create_vm`. Closing it closes its vCPUs and devices.

    `memory` is its guest-physical memory, `vcpus` its processors in the order of their creation.
    """

    kind = "vm"

    vcpus: tuple[Vcpu, ...] = ()
    _devices: "tuple[ref[DeviceFd], ...]" = ()

    def __init__(self, fd: int, kvm: "Kvm", type: int = 0) -> None:
        super().__init__(fd)
        self.kvm = kvm
        self.type = type
        """KVM_X86_*_VM."""
        self._capabilities: dict[int, int] = {}

    def close(self) -> None:
        """Close the VM, its vCPUs and its in-kernel devices. Views of guest memory stay valid.

        Raises VcpuBusyError, and closes nothing, while another thread runs one of its vCPUs.
        """
        if not self._forked:
            for vcpu in self.vcpus:
                vcpu.check_idle()
        for vcpu in self.vcpus:
            vcpu.close()
        for reference in self._devices:
            device = reference()
            if device is not None:
                device.close()
        if self._fd >= 0:
            super().close()
            self.kvm.vms_closed += 1

    # Processors

    def create_vcpu(self, id: int | None = None, *, sync_regs: bool = True) -> Vcpu:
        """A new virtual processor (KVM_CREATE_VCPU, section 4.7); `id` is its APIC id, by default the next free one.

        Create interrupt controllers, and set the identity map address, before. `sync_regs=False` does without
        KVM_CAP_SYNC_REGS, for kernels that lack it and to measure what it gives. Raises UsageError for an id in use or
        out of range.
        """
        self._check_usable()
        if id is None:
            id = max(vcpu.id for vcpu in self.vcpus) + 1 if self.vcpus else 0
        elif self.vcpus and any(vcpu.id == id for vcpu in self.vcpus):
            raise UsageError(f"the VM has a vCPU with id {id} already")
        if not 0 <= id < 1 << 31 or (id and id >= self.kvm.max_vcpu_id):
            raise UsageError(f"vCPU id {id} is out of range: this host's KVM takes 0 to {self.kvm.max_vcpu_id - 1}")
        fd = self._call(_CREATE_VCPU, id)
        vcpu = Vcpu(fd, self, id, self.kvm.vcpu_mmap_size, sync_regs=sync_regs and self._syncs_registers())
        self.vcpus = (*self.vcpus, vcpu)
        return vcpu

    def _syncs_registers(self) -> bool:
        # Asked once for all ordinary VMs; of others some have no registers to show.
        synced = self.check_extension(_CAP_SYNC_REGS) if self.type else self.kvm.synced_registers
        return synced & _SYNC_X86_REGS_AND_SREGS == _SYNC_X86_REGS_AND_SREGS

    def set_boot_vcpu_id(self, id: int) -> None:
        """Which vCPU starts by itself (KVM_SET_BOOT_CPU_ID, section 4.41). Before the first vCPU is created."""
        self.ioctl("KVM_SET_BOOT_CPU_ID", id)

    # Capabilities

    def check_extension(self, capability: "Cap | int") -> int:
        """What this VM has of a capability (section 4.4). The answer is kept: it does not change."""
        self._check_usable()
        number = capability_number(capability)
        answer = self._capabilities.get(number)
        if answer is None:
            answer = self._capabilities[number] = self.ioctl("KVM_CHECK_EXTENSION", number)
        return answer

    def _has_capability(self, capability: int) -> int:
        return self.check_extension(capability)

    def enable_cap(self, capability: "Cap | int", *arguments: int, flags: int = 0) -> None:
        """Enable a capability for the whole VM (section 4.37; what the arguments mean is in chapter 7)."""
        from kvmpy.kvm.capability import enable_cap

        enable_cap(self, capability, arguments, flags)

    # Time

    def get_clock(self) -> "kvm_clock_data":
        """kvmclock: nanoseconds since the VM's start, with the flags that say what else is valid (section 4.29)."""
        from kvmpy.abi.structs import kvm_clock_data

        data = kvm_clock_data()
        self.ioctl("KVM_GET_CLOCK", data)
        return data

    def set_clock(self, nanoseconds: int) -> None:
        """Set kvmclock (section 4.30), as after a pause or a restore."""
        from kvmpy.abi.structs import kvm_clock_data

        self.ioctl("KVM_SET_CLOCK", filled(kvm_clock_data, clock=nanoseconds))

    def get_tsc_khz(self) -> int:
        """The TSC frequency in kHz of vCPUs to come (section 4.56)."""
        return self.ioctl("KVM_GET_TSC_KHZ")

    def set_tsc_khz(self, khz: int) -> None:
        """Set the TSC frequency of vCPUs that are created from now on (section 4.55)."""
        self.ioctl("KVM_SET_TSC_KHZ", khz)

    # MSRs in user space

    def exit_on_msrs(self, reasons: int) -> None:
        """Exit with `RdMsr` and `WrMsr` for KVM_MSR_EXIT_REASON_* `reasons` (KVM_CAP_X86_USER_SPACE_MSR, 7.21)."""
        from kvmpy.abi.capabilities import Cap

        self.enable_cap(Cap.X86_USER_SPACE_MSR, reasons)

    def set_msr_filter(self, ranges: "Iterable[MsrFilterRange]", *, default_allow: bool = True) -> None:
        """Which MSRs the guest may touch by itself (KVM_X86_SET_MSR_FILTER, 4.97); see `kvmpy.kvm.msr_filter`."""
        from kvmpy.kvm.msr_filter import to_struct

        filter, bitmaps = to_struct(ranges, default_allow)
        self.ioctl("KVM_X86_SET_MSR_FILTER", filter)
        del bitmaps  # the kernel has copied them

    # Devices in the kernel, statistics

    def create_device(self, type: int) -> "DeviceFd":
        """A device inside the kernel (KVM_CREATE_DEVICE, section 4.79); `type` is KVM_DEV_TYPE_*."""
        from kvmpy.abi.structs import kvm_create_device
        from kvmpy.kvm.device_fd import DeviceFd

        request = filled(kvm_create_device, type=type)
        self.ioctl("KVM_CREATE_DEVICE", request)
        device = DeviceFd(request.fd, type)
        self._devices = (*self._devices, ref(device))
        return device

    def statistics(self) -> "Statistics":
        """KVM's counters of this VM (KVM_GET_STATS_FD, section 4.133): close it after use."""
        from kvmpy.kvm.statistics import Statistics

        return Statistics(self.ioctl("KVM_GET_STATS_FD"))
