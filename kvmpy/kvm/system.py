"""/dev/kvm: what the host offers, and where VMs come from (KVM API, sections 4.1 to 4.6)."""

import errno
import os

from kvmpy.abi.ioctls import IOCTLS
from kvmpy.errors import KvmError, KvmUnavailableError, KvmVersionError
from kvmpy.kvm.checked_struct import capability_number
from kvmpy.kvm.descriptor import Descriptor, raw_ioctl
from kvmpy.kvm.vm import Vm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmpy.abi.capabilities import Cap
    from kvmpy.x86.cpuid import CpuidTable

__all__ = ["Kvm"]

_API_VERSION = 12
_CREATE_VM, _CREATE_VCPU = IOCTLS["KVM_CREATE_VM"], IOCTLS["KVM_CREATE_VCPU"]
_CAP_SYNC_REGS = 74


class Kvm(Descriptor):
    """An open /dev/kvm.

    Sections are those of the kernel's KVM API document (Documentation/virt/kvm/api.rst), here and in `Vm` and `Vcpu`.

    Raises KvmUnavailableError, which says what to do, when it cannot be opened, and KvmVersionError when the kernel
    speaks another version of the API. VMs live on when it is closed.
    """

    kind = "system"
    vms_closed = 0
    """How many VMs of this descriptor were closed."""
    _idle_vm: "tuple[int, ...] | None" = None

    def __init__(self, path: str = "/dev/kvm") -> None:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            from kvmpy.kvm.advice import advice_for_open

            number = error.errno or 0
            raise KvmUnavailableError(f"open({path})", number, advice_for_open(path, number)) from None
        super().__init__(fd)
        try:
            version = self.ioctl("KVM_GET_API_VERSION")
        except KvmError as error:
            self.close()
            raise KvmUnavailableError(f"open({path})", error.errno or 0, f"{path} is not KVM's device") from None
        if version != _API_VERSION:
            self.close()
            raise KvmVersionError(
                "KVM_GET_API_VERSION", 0, f"the kernel speaks version {version}; kvmpy needs {_API_VERSION}"
            )
        # Asked once, and for all VMs to come, which may outlive this descriptor.
        self.vcpu_mmap_size = self.ioctl("KVM_GET_VCPU_MMAP_SIZE")
        self.synced_registers = self.check_extension(_CAP_SYNC_REGS)

    def close(self) -> None:
        """Close the file descriptor. VMs live on."""
        super().close()
        for fd in self._idle_vm or ():
            os.close(fd)
        self._idle_vm = ()

    def create_vm(self, type: int = 0) -> Vm:
        """A new, empty VM (KVM_CREATE_VM, section 4.2). `type` is KVM_X86_*_VM; 0 is the ordinary one.

        VMs that come and go are created by one and the same `Kvm` twice as fast as by one of their own.
        """
        while True:
            try:
                vm = Vm(self.ioctl("KVM_CREATE_VM", type) if type != 0 else self._call(_CREATE_VM), self, type)
                break
            except KvmError as error:
                if error.errno != errno.EINTR:  # any signal that comes meanwhile; its handler has been called
                    raise
        if self.vms_closed and self._idle_vm is None:
            self._keep_idle_vm()
        return vm

    def _keep_idle_vm(self) -> None:
        """Have a VM that does nothing until this descriptor is closed: the VM just made is not the first one.

        KVM patches its own code when a host's first vCPU comes and when the last one goes, and every processor waits
        for that; it takes as long as all the rest of a small VM's life. Where VMs come and go, it shall happen once.
        """
        self._idle_vm = ()  # a host that has no room for it does without
        vm: int = raw_ioctl(self._fd, _CREATE_VM.number, 0)
        if vm < 0:
            return
        vcpu: int = raw_ioctl(vm, _CREATE_VCPU.number, 0)
        if vcpu < 0:
            os.close(vm)
        else:
            self._idle_vm = vcpu, vm

    def check_extension(self, capability: "Cap | int") -> int:
        """What this host has of a capability: 0 is not there, more is a yes or a number (section 4.4).

        `capability` is one of `kvmpy.abi.capabilities.Cap`, such as `Cap.IRQCHIP`, or its number.
        """
        return self.ioctl("KVM_CHECK_EXTENSION", capability_number(capability))

    def _has_capability(self, capability: int) -> int:
        return self.check_extension(capability)

    @property
    def max_vcpus(self) -> int:
        """The most vCPUs that a VM can have (KVM_CAP_MAX_VCPUS)."""
        return self.check_extension(66) or self.check_extension(9) or 4

    @property
    def max_vcpu_id(self) -> int:
        """vCPU ids are below this (KVM_CAP_MAX_VCPU_ID)."""
        return self.check_extension(128) or self.max_vcpus

    def supported_cpuid(self) -> "CpuidTable":
        """The CPUID that this host and KVM can give a guest (KVM_GET_SUPPORTED_CPUID, section 4.46)."""
        from kvmpy.kvm.cpuid import read_table

        return read_table(self, "KVM_GET_SUPPORTED_CPUID")

    def emulated_cpuid(self) -> "CpuidTable":
        """Features that KVM emulates although the host lacks them (KVM_GET_EMULATED_CPUID, section 4.88)."""
        from kvmpy.kvm.cpuid import read_table

        return read_table(self, "KVM_GET_EMULATED_CPUID")

    def msr_indices(self) -> list[int]:
        """MSRs that a VM's state consists of (KVM_GET_MSR_INDEX_LIST, section 4.3)."""
        return self._msr_list("KVM_GET_MSR_INDEX_LIST")

    def feature_msr_indices(self) -> list[int]:
        """MSRs that describe the host (KVM_GET_MSR_FEATURE_INDEX_LIST, section 4.3)."""
        return self._msr_list("KVM_GET_MSR_FEATURE_INDEX_LIST")

    def feature_msr(self, index: int) -> int:
        """One of the MSRs in `feature_msr_indices` (KVM_GET_MSRS on /dev/kvm, section 4.18)."""
        from kvmpy.abi.structs import kvm_msrs, sized

        table = sized(kvm_msrs, 1)(nmsrs=1)
        table.entries[0].index = index
        if self.ioctl("KVM_GET_MSRS", table) != 1:
            raise KvmError("KVM_GET_MSRS", 22, f"{index:#x} is not one of feature_msr_indices()")
        return int(table.entries[0].data)

    def _msr_list(self, ioctl: str) -> list[int]:
        from kvmpy.abi.structs import kvm_msr_list, sized

        room = 256
        while True:
            table = sized(kvm_msr_list, room)(nmsrs=room)
            try:
                self.ioctl(ioctl, table)
                return list(table.indices[: table.nmsrs])
            except KvmError as error:
                if error.errno != errno.E2BIG or room > 1 << 16:
                    raise
                room = max(int(table.nmsrs), 2 * room)
