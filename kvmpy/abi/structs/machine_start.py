# ruff: noqa: N801  these classes carry the kernel's names
"""What nearly every machine sets before it runs: apart, so that it need not build all that is beside them."""

from ctypes import Union, c_uint32, c_uint64

from kvmpy.abi.structs import Structure

__all__ = ["kvm_coalesced_mmio_zone", "kvm_mp_state", "kvm_pit_config", "pio_or_pad"]


class kvm_pit_config(Structure):
    """How to create the 8254: KVM_PIT_SPEAKER_DUMMY gives it port 0x61 too (KVM_CREATE_PIT2, 4.71)."""

    _fields_ = [("flags", c_uint32), ("pad", c_uint32 * 15)]


class kvm_mp_state(Structure):
    """Whether the vCPU runs, waits for INIT or SIPI, or is halted: KVM_MP_STATE_* (KVM_GET_MP_STATE, 4.38)."""

    _fields_ = [("mp_state", c_uint32)]


class pio_or_pad(Union):
    _fields_ = [("pad", c_uint32), ("pio", c_uint32)]


class kvm_coalesced_mmio_zone(Structure):
    """Addresses whose writes queue up instead of ending KVM_RUN; ports when `pio` is 1 (4.116)."""

    _anonymous_ = ("_u",)
    _fields_ = [("addr", c_uint64), ("size", c_uint32), ("_u", pio_or_pad)]
