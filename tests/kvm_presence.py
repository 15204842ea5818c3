"""Whether this machine can run guests, found out by creating a VM.

Independent of kvmpy on purpose: a bug in the library must not turn into a skip.
"""

import ctypes
import functools
import os

KVM_GET_API_VERSION = 0xAE00  # _IO(KVMIO, 0x00), <linux/kvm.h>
KVM_CREATE_VM = 0xAE01  # _IO(KVMIO, 0x01)
KVM_API_VERSION = 12


def required() -> bool:
    """Whether KVMPY_REQUIRE_KVM=1 asks that nothing be skipped for want of KVM or of a tool."""
    return os.environ.get("KVMPY_REQUIRE_KVM", "") not in ("", "0")


@functools.cache
def problem(device: str = "/dev/kvm") -> str | None:
    """Why guests cannot run here, or None when a VM was created (and destroyed again)."""
    try:
        system = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"{device} cannot be opened: {error.strerror}"
    ioctl = ctypes.CDLL(None, use_errno=True).ioctl
    ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)
    ioctl.restype = ctypes.c_int
    try:
        version = ioctl(system, KVM_GET_API_VERSION, 0)
        if version < 0:
            return f"{device} is no KVM device: KVM_GET_API_VERSION says {os.strerror(ctypes.get_errno())}"
        if version != KVM_API_VERSION:
            return f"{device} speaks KVM API version {version}, not {KVM_API_VERSION}"
        machine = ioctl(system, KVM_CREATE_VM, 0)
        if machine < 0:
            return f"{device} creates no VM: KVM_CREATE_VM says {os.strerror(ctypes.get_errno())}"
        os.close(machine)
        return None
    finally:
        os.close(system)
