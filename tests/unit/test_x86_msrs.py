"""MSR numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvmpy.errors import UsageError
from kvmpy.x86.msrs import Msr, machine_check_bank, msr_name, mtrr_variable

KVM_HEADER = Path("/usr/include/x86_64-linux-gnu/asm/kvm_para.h")


@pytest.mark.parametrize(
    ("msr", "number"),
    [
        # SDM vol. 4, table 2-2.
        (Msr.TSC, 0x10),
        (Msr.APIC_BASE, 0x1B),
        (Msr.SYSENTER_CS, 0x174),
        (Msr.MISC_ENABLE, 0x1A0),
        (Msr.PAT, 0x277),
        (Msr.MTRR_DEF_TYPE, 0x2FF),
        (Msr.TSC_DEADLINE, 0x6E0),
        (Msr.X2APIC_ICR, 0x830),
        (Msr.X2APIC_SELF_IPI, 0x83F),
        (Msr.XSS, 0xDA0),
        (Msr.EFER, 0xC000_0080),
        (Msr.LSTAR, 0xC000_0082),
        (Msr.SFMASK, 0xC000_0084),
        (Msr.KERNEL_GS_BASE, 0xC000_0102),
        (Msr.TSC_AUX, 0xC000_0103),
    ],
)
def test_numbers_of_the_manual(msr: Msr, number: int) -> None:
    assert msr == number


def test_no_number_has_two_names() -> None:
    assert len(Msr.__members__) == len(set(Msr))


def test_x2apic_registers_follow_the_memory_mapped_ones() -> None:
    """SDM vol. 3, table 10-6: MSR 0x800 + offset / 16."""
    for msr, offset in (
        (Msr.X2APIC_APICID, 0x20),
        (Msr.X2APIC_EOI, 0xB0),
        (Msr.X2APIC_LVT_TIMER, 0x320),
        (Msr.X2APIC_DIV_CONF, 0x3E0),
    ):
        assert msr == 0x800 + offset // 16


@pytest.mark.skipif(not KVM_HEADER.is_file(), reason=f"no {KVM_HEADER}")
def test_kvms_own_numbers_agree_with_the_kernels_header() -> None:
    numbers = dict(re.findall(r"#define MSR_(KVM_\w+)\s+(0x[0-9a-f]+)", KVM_HEADER.read_text()))
    assert len(numbers) >= 9
    for name, number in numbers.items():
        assert Msr[name] == int(number, 16)


def test_numbered_groups() -> None:
    assert machine_check_bank(0, "ctl") == 0x400
    assert machine_check_bank(3, "misc") == 0x40F
    assert mtrr_variable(0, "base") == 0x200
    assert mtrr_variable(7, "mask") == 0x20F
    with pytest.raises(UsageError):
        machine_check_bank(32, "ctl")
    with pytest.raises(UsageError):
        mtrr_variable(10, "base")


def test_names_for_messages() -> None:
    assert msr_name(0xC000_0080) == "EFER"
    assert msr_name(machine_check_bank(5, "status")) == "MC5_STATUS"
    assert msr_name(mtrr_variable(2, "mask")) == "MTRR_PHYSMASK2"
    assert msr_name(0xC001_1234) == "0xc0011234"
