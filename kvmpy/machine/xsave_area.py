"""The XSAVE area of one vCPU, got and set in a buffer that is made once: what instructions in software work on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpy.abi.capabilities import Cap
from kvmpy.abi.structs import kvm_xcrs, kvm_xsave, sized
from kvmpy.machine.xsave_layout import xsave_layout

if TYPE_CHECKING:
    from kvmpy.kvm import Vcpu

__all__ = ["XsaveArea"]

_MXCSR_MASK, _XSTATE_BV = 28, 512
_SIZE = 0x1000
"""Bytes of struct kvm_xsave; what has more needs KVM_GET_XSAVE2 (KVM API, section 4.134)."""


class XsaveArea:
    """`data` is the area: what `load` got, and `store` gives back. See `Vcpu.get_xsave` for what it holds."""

    __slots__ = ("_get_xcrs", "_xcrs", "components", "data", "load", "store")

    def __init__(self, vcpu: Vcpu) -> None:
        size = max(vcpu.vm.check_extension(Cap.XSAVE2), _SIZE)
        structure = sized(kvm_xsave, (size - _SIZE) // 4)() if size > _SIZE else kvm_xsave()
        self.data = memoryview(structure).cast("B")
        self.load = vcpu.prepared("KVM_GET_XSAVE2" if size > _SIZE else "KVM_GET_XSAVE", structure)
        self.store = vcpu.prepared("KVM_SET_XSAVE", structure)
        self.components = 3 | sum(1 << component for component in xsave_layout())
        """All components of the area, as bits of XSTATE_BV."""
        self._xcrs = kvm_xcrs()
        self._get_xcrs = vcpu.prepared("KVM_GET_XCRS", self._xcrs)

    def clear(self) -> bool:
        """Put all components in their initial state, instead of `load`. False: not before the first `load`.

        What is no component, the mask of MXCSR, is only known from that.
        """
        if not any(self.data[_MXCSR_MASK : _MXCSR_MASK + 4]):
            return False
        self.data[_XSTATE_BV : _XSTATE_BV + 8] = bytes(8)
        return True

    def xcr0(self) -> int:
        """XCR0: the components that the guest has enabled."""
        self._get_xcrs()
        return int(self._xcrs.xcrs[0].value) if self._xcrs.nr_xcrs else 3
