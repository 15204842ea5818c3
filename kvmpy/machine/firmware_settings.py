"""What a PC's firmware has set in the processors by the time it starts a kernel.

KVM's processors are as after a reset (SDM vol. 3, table 10-1). A kernel expects more:

* Memory types: all is cached write-back but video memory and the addresses of devices below 4 GiB (SDM vol. 3, "Memory
  Type Range Registers (MTRRs)"). Linux leaves the page attribute table alone when the MTRRs are off.
* The boot processor's local APIC lets interrupts of the PICs through, and NMIs: "virtual wire mode" (MultiProcessor
  Specification 1.4, 3.6.2.2). The others are reset by INIT anyway when the kernel starts them.
* Fast string operations are on (SDM vol. 4, IA32_MISC_ENABLE). On AMD's processors, which have no such switch, the TSC
  counts at the rate of P-state 0, whatever the state (APM vol. 2, HWCR.TscFreqSel); Linux calls all else a bug.

The page attribute table and the APIC base have their usual values from the reset on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpy.errors import KvmError
from kvmpy.x86.msrs import Msr, mtrr_variable

if TYPE_CHECKING:
    from collections.abc import Collection

    from kvmpy.kvm import Vcpu, Vm
    from kvmpy.x86.cpuid import CpuidTable

__all__ = ["mtrr_values", "set_as_firmware"]

_FOUR_GIB = 1 << 32
_DEVICES = 0xC000_0000
"""The 1 GiB below 4 GiB is for devices."""

_UNCACHED, _WRITE_BACK = 0, 6
_ENABLED, _FIXED_ENABLED, _VALID = 1 << 11, 1 << 10, 1 << 11
_HAS_FIXED, _COUNT = 1 << 8, 0xFF
_FAST_STRINGS = 1
_TSC_FREQ_SEL = 1 << 24

_SPURIOUS, _LINT0, _LINT1 = 0xF0, 0x350, 0x360
_SOFTWARE_ENABLED, _VECTOR = 1 << 8, 0xFF
_EXT_INT, _NMI = 7 << 8, 4 << 8  # delivery modes, not masked


def set_as_firmware(vm: Vm, kept: Collection[int] = ()) -> None:
    """Set the processors of `vm` so; MSRs whose numbers are in `kept` stay as they are."""
    first, *_ = vm.vcpus
    for vcpu in vm.vcpus:
        values = [(number, value) for number, value in _msrs(vcpu) if number not in kept]
        vcpu.set_msrs_until_refused(values)
    if vm.irqchip:
        _set_virtual_wire_mode(first)


def mtrr_values(capabilities: int, address_bits: int) -> list[tuple[int, int]]:
    """The MTRRs of a PC, for a processor with these IA32_MTRRCAP and physical addresses of so many bits."""
    values: list[tuple[int, int]] = []
    enabled = _ENABLED
    if capabilities & _HAS_FIXED:
        enabled |= _FIXED_ENABLED
        cached, uncached = _WRITE_BACK * 0x0101_0101_0101_0101, _UNCACHED
        values += [(Msr.MTRR_FIX64K_00000, cached), (Msr.MTRR_FIX16K_80000, cached), (Msr.MTRR_FIX16K_A0000, uncached)]
        # The ROM area is RAM here, with the tables that the kernel reads.
        values += [(number, cached) for number in range(Msr.MTRR_FIX4K_C0000, Msr.MTRR_FIX4K_F8000 + 1)]
    if capabilities & _COUNT:
        mask = (1 << address_bits) - (_FOUR_GIB - _DEVICES)
        values += [(mtrr_variable(0, "base"), _DEVICES | _UNCACHED), (mtrr_variable(0, "mask"), mask | _VALID)]
    values.append((Msr.MTRR_DEF_TYPE, enabled | _WRITE_BACK))
    return values


def _msrs(vcpu: Vcpu) -> list[tuple[int, int]]:
    table = vcpu.get_cpuid()
    values: list[tuple[int, int]] = []
    try:
        values += mtrr_values(vcpu.get_msr(Msr.MTRR_CAP), _address_bits(table))
        enable = vcpu.get_msr(Msr.MISC_ENABLE)
        if not enable & _FAST_STRINGS:
            values.append((Msr.MISC_ENABLE, enable | _FAST_STRINGS))
        if table.vendor in ("AuthenticAMD", "HygonGenuine"):  # the last one, which KVM refuses before Linux 6.8
            values.append((Msr.HWCR, vcpu.get_msr(Msr.HWCR) | _TSC_FREQ_SEL))
    except KvmError:  # a KVM without these registers
        pass
    return values


def _address_bits(table: CpuidTable) -> int:
    """How wide physical addresses are: CPUID 0x80000008, EAX bits 7:0; 36 without that leaf (SDM vol. 3, 4.1.4)."""
    sizes = table.find(0x8000_0008)
    return sizes.eax & 0xFF if sizes is not None and sizes.eax & 0xFF else 36


def _set_virtual_wire_mode(vcpu: Vcpu) -> None:
    lapic = vcpu.get_lapic()
    registers = memoryview(lapic).cast("B").cast("I")
    registers[_SPURIOUS // 4] |= _SOFTWARE_ENABLED | _VECTOR
    registers[_LINT0 // 4] = _EXT_INT
    registers[_LINT1 // 4] = _NMI
    vcpu.set_lapic(lapic)
