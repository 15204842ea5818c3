"""What a test needs from its computer, KVM or a tool: found out honestly, and skipped or failed for in one place."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, NoReturn

import pytest

if TYPE_CHECKING:
    from typing import Any

__all__ = ["VARIABLE", "is_required", "kvm_problem", "require_kvm", "skip_or_fail"]

VARIABLE = "KVMPY_REQUIRE_KVM"
"""This environment variable, when it is neither empty nor 0, does what --require-kvm does."""

KVM_GET_API_VERSION = 0xAE00  # _IO(KVMIO, 0x00), <linux/kvm.h>
KVM_CREATE_VM = 0xAE01  # _IO(KVMIO, 0x01)
KVM_API_VERSION = 12


@functools.cache
def kvm_problem(device: str = "/dev/kvm") -> str | None:
    """Why guests cannot run here and what to do, or None when a VM was created (and destroyed again).

    Found out with ioctls of its own, not with the library's: a bug there must not turn into a skip.
    """
    try:
        system = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        from kvmpy.kvm.advice import advice_for_open

        return _advised(
            f"{device} cannot be opened: {error.strerror}",
            advice_for_open(device, error.errno or 0),
        )
    import ctypes

    ioctl: Any = ctypes.CDLL(None, use_errno=True).ioctl
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
            from kvmpy.kvm.advice import advice_for

            number = ctypes.get_errno()
            return _advised(
                f"{device} creates no VM: KVM_CREATE_VM says {os.strerror(number)}", advice_for("KVM_CREATE_VM", number)
            )
        os.close(machine)
        return None
    finally:
        os.close(system)


def _advised(problem: str, advice: str) -> str:
    return f"{problem}: {advice}" if advice else problem


def is_required(config: pytest.Config | None = None) -> bool:
    """Whether nothing may be skipped for want of KVM or of a tool: by --require-kvm, or by KVMPY_REQUIRE_KVM=1."""
    if os.environ.get(VARIABLE, "") not in ("", "0"):
        return True
    return config is not None and bool(config.getoption("require_kvm", default=False))


def skip_or_fail(reason: str, config: pytest.Config | None = None) -> NoReturn:
    """Skip this test, or, called while a module is imported, all of the module; fail where all must run."""
    __tracebackhide__ = True
    if is_required(config):
        pytest.fail(f"KVM and tools are required here ({VARIABLE} or --require-kvm), but: {reason}", pytrace=False)
    pytest.skip(reason, allow_module_level=True)


def require_kvm(config: pytest.Config) -> None:
    """Skip or fail this test unless guests can run."""
    __tracebackhide__ = True
    if problem := kvm_problem():
        skip_or_fail(problem, config)
