"""Ioctls that are looked up once and called often, and the XSAVE area that instructions in software work on."""

from __future__ import annotations

import pytest

from bare_guest import guest
from kvmpy import ClosedError, UsageError
from kvmpy.abi.structs import kvm_xcrs, kvm_xsave
from kvmpy.machine.xsave_area import XsaveArea

pytestmark = pytest.mark.kvm

XMM, XSTATE_BV = 160, 512


def test_each_call_fills_the_same_structure_anew() -> None:
    with guest("hlt", 64) as vcpu:
        xsave = kvm_xsave()
        get = vcpu.prepared("KVM_GET_XSAVE", xsave)
        for value in (1, 2):
            area = bytearray(vcpu.get_xsave())
            area[XSTATE_BV] |= 3
            area[XMM] = value
            vcpu.set_xsave(bytes(area))
            get()
            assert bytes(xsave)[XMM] == value


def test_what_is_prepared_is_checked_as_by_ioctl_and_dies_with_the_vcpu() -> None:
    with guest("hlt", 64) as vcpu:
        with pytest.raises(UsageError):
            vcpu.prepared("KVM_GET_XSAVE", kvm_xcrs())
        with pytest.raises(UsageError):
            vcpu.prepared("KVM_CREATE_VM", 0)
        get = vcpu.prepared("KVM_GET_XCRS", kvm_xcrs())
    with pytest.raises(ClosedError):
        get()


def test_vector_registers_travel_without_the_general_ones() -> None:
    """Registers that wait to be written stay so while the XSAVE area is got and set."""
    with guest("hlt", 64) as vcpu:
        area = XsaveArea(vcpu)
        vcpu.regs.rbx = 0x1234
        vcpu.sregs.cr2 = 0x5678
        area.load()
        area.data[XSTATE_BV] |= 3
        area.data[XMM : XMM + 16] = b"0123456789abcdef"
        area.store()
        vcpu.regs.rcx = 0x9ABC
        assert vcpu.get_xsave()[XMM : XMM + 16] == b"0123456789abcdef"
        assert (vcpu.regs.rbx, vcpu.regs.rcx, vcpu.sregs.cr2) == (0x1234, 0x9ABC, 0x5678)
        vcpu.run(timeout=5)
        assert (vcpu.regs.rbx, vcpu.regs.rcx, vcpu.sregs.cr2) == (0x1234, 0x9ABC, 0x5678)
        assert area.xcr0() & 1
