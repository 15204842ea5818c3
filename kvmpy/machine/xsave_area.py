"""The XSAVE area of one vCPU, got and set in a buffer that is made once: what instructions in software work on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpy.abi.capabilities import Cap
from kvmpy.abi.structs import kvm_xsave, sized

if TYPE_CHECKING:
    from kvmpy.kvm import Vcpu

__all__ = ["XsaveArea"]

_SIZE = 0x1000
"""Bytes of struct kvm_xsave; what has more needs KVM_GET_XSAVE2 (KVM API, section 4.134)."""


class XsaveArea:
    """`data` is the area, of `load` or to be stored by `store`. See `Vcpu.get_xsave` for what it holds."""

    __slots__ = ("_get", "_structure", "_vcpu", "data")

    def __init__(self, vcpu: Vcpu) -> None:
        size = max(vcpu.vm.check_extension(Cap.XSAVE2), _SIZE)
        self._vcpu = vcpu
        self._structure = sized(kvm_xsave, (size - _SIZE) // 4)() if size > _SIZE else kvm_xsave()
        self._get = "KVM_GET_XSAVE2" if size > _SIZE else "KVM_GET_XSAVE"
        self.data = memoryview(self._structure).cast("B")

    def load(self) -> None:
        """Get it from KVM."""
        self._vcpu.ioctl(self._get, self._structure)

    def store(self) -> None:
        """Give it to KVM."""
        self._vcpu.ioctl("KVM_SET_XSAVE", self._structure)
