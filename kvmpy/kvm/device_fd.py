"""A device inside KVM, and the attribute ioctls of every descriptor that has them (KVM API, sections 4.79 to 4.81)."""

import ctypes

from kvmpy.errors import KvmError
from kvmpy.kvm.checked_struct import filled
from kvmpy.kvm.descriptor import Descriptor

__all__ = ["DeviceFd", "get_attribute", "has_attribute", "set_attribute"]


def set_attribute(descriptor: Descriptor, group: int, attribute: int, value: bytes | int = b"") -> None:
    """KVM_SET_DEVICE_ATTR: `value` is the bytes that the attribute's address points to; an int is passed as a u64."""
    from kvmpy.abi.structs import kvm_device_attr

    raw = value.to_bytes(8, "little") if isinstance(value, int) else value
    buffer = ctypes.create_string_buffer(raw, max(len(raw), 1))
    request = filled(kvm_device_attr, group=group, attr=attribute, addr=ctypes.addressof(buffer))
    descriptor.ioctl("KVM_SET_DEVICE_ATTR", request)


def get_attribute(descriptor: Descriptor, group: int, attribute: int, size: int = 8) -> bytes:
    """KVM_GET_DEVICE_ATTR: the attribute's `size` bytes."""
    from kvmpy.abi.structs import kvm_device_attr

    buffer = ctypes.create_string_buffer(size)
    request = filled(kvm_device_attr, group=group, attr=attribute, addr=ctypes.addressof(buffer))
    descriptor.ioctl("KVM_GET_DEVICE_ATTR", request)
    return buffer.raw


def has_attribute(descriptor: Descriptor, group: int, attribute: int) -> bool:
    """KVM_HAS_DEVICE_ATTR: whether the attribute can be set."""
    from kvmpy.abi.structs import kvm_device_attr

    try:
        descriptor.ioctl("KVM_HAS_DEVICE_ATTR", filled(kvm_device_attr, group=group, attr=attribute))
    except KvmError:
        return False
    return True


class DeviceFd(Descriptor):
    """What KVM_CREATE_DEVICE answers (section 4.79): a device that lives in the kernel, with attributes."""

    kind = "device"

    def __init__(self, fd: int, type: int) -> None:
        super().__init__(fd)
        self.type = type

    def set_attribute(self, group: int, attribute: int, value: bytes | int = b"") -> None:
        """Set an attribute; see the device's page below Documentation/virt/kvm/devices."""
        set_attribute(self, group, attribute, value)

    def get_attribute(self, group: int, attribute: int, size: int = 8) -> bytes:
        """Get an attribute of `size` bytes."""
        return get_attribute(self, group, attribute, size)

    def has_attribute(self, group: int, attribute: int) -> bool:
        """Whether the attribute exists."""
        return has_attribute(self, group, attribute)
