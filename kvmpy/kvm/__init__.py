"""The KVM API: one class per kind of file descriptor, and the only code that calls ioctl.

`Kvm` is /dev/kvm, `Vm` what it creates, `Vcpu` a processor in it, `DeviceFd` a device inside the kernel.
"""

from kvmpy.kvm.system import Kvm
from kvmpy.kvm.vcpu import Vcpu
from kvmpy.kvm.vm import Vm

__all__ = ["DeviceFd", "Kvm", "Vcpu", "Vm"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmpy.kvm.device_fd import DeviceFd
else:

    def __getattr__(name: str) -> object:
        if name == "DeviceFd":  # rarely needed: not on the path of `import kvmpy`
            from kvmpy.kvm.device_fd import DeviceFd

            return DeviceFd
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
