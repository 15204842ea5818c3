"""Numbers of model-specific registers (SDM vol. 4, chapter 2; APM vol. 2, appendix A; KVM: virt/kvm/x86/msr.rst).

Names are the manual's without "IA32_". Machine-check banks and variable MTRRs come in numbered groups, for which there
are functions.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Literal

from kvmpy.errors import UsageError

__all__ = ["Msr", "machine_check_bank", "msr_name", "mtrr_variable"]


class Msr(IntEnum):
    """Architectural, AMD and KVM registers by number."""

    P5_MC_ADDR = 0x0
    P5_MC_TYPE = 0x1
    TSC = 0x10
    PLATFORM_ID = 0x17
    APIC_BASE = 0x1B
    FEATURE_CONTROL = 0x3A
    TSC_ADJUST = 0x3B
    SPEC_CTRL = 0x48
    PRED_CMD = 0x49
    BIOS_UPDT_TRIG = 0x79
    BIOS_SIGN_ID = 0x8B
    SMBASE = 0x9E
    PMC0 = 0xC1
    MPERF = 0xE7
    APERF = 0xE8
    MTRR_CAP = 0xFE
    ARCH_CAPABILITIES = 0x10A
    FLUSH_CMD = 0x10B
    TSX_CTRL = 0x122
    MISC_FEATURES_ENABLES = 0x140
    SYSENTER_CS = 0x174
    SYSENTER_ESP = 0x175
    SYSENTER_EIP = 0x176
    MCG_CAP = 0x179
    MCG_STATUS = 0x17A
    MCG_CTL = 0x17B
    PERFEVTSEL0 = 0x186
    PERF_STATUS = 0x198
    PERF_CTL = 0x199
    THERM_INTERRUPT = 0x19B
    THERM_STATUS = 0x19C
    MISC_ENABLE = 0x1A0
    ENERGY_PERF_BIAS = 0x1B0
    XFD = 0x1C4
    XFD_ERR = 0x1C5
    DEBUGCTL = 0x1D9
    LASTBRANCHFROMIP = 0x1DB
    LASTBRANCHTOIP = 0x1DC
    LASTINTFROMIP = 0x1DD
    LASTINTTOIP = 0x1DE
    MTRR_FIX64K_00000 = 0x250
    MTRR_FIX16K_80000 = 0x258
    MTRR_FIX16K_A0000 = 0x259
    MTRR_FIX4K_C0000 = 0x268
    MTRR_FIX4K_C8000 = 0x269
    MTRR_FIX4K_D0000 = 0x26A
    MTRR_FIX4K_D8000 = 0x26B
    MTRR_FIX4K_E0000 = 0x26C
    MTRR_FIX4K_E8000 = 0x26D
    MTRR_FIX4K_F0000 = 0x26E
    MTRR_FIX4K_F8000 = 0x26F
    PAT = 0x277
    MTRR_DEF_TYPE = 0x2FF
    PERF_CAPABILITIES = 0x345
    FIXED_CTR_CTRL = 0x38D
    PERF_GLOBAL_STATUS = 0x38E
    PERF_GLOBAL_CTRL = 0x38F
    PERF_GLOBAL_OVF_CTRL = 0x390
    VMX_BASIC = 0x480
    VMX_PINBASED_CTLS = 0x481
    VMX_PROCBASED_CTLS = 0x482
    VMX_EXIT_CTLS = 0x483
    VMX_ENTRY_CTLS = 0x484
    VMX_MISC = 0x485
    VMX_CR0_FIXED0 = 0x486
    VMX_CR0_FIXED1 = 0x487
    VMX_CR4_FIXED0 = 0x488
    VMX_CR4_FIXED1 = 0x489
    VMX_VMCS_ENUM = 0x48A
    VMX_PROCBASED_CTLS2 = 0x48B
    VMX_EPT_VPID_CAP = 0x48C
    VMX_TRUE_PINBASED_CTLS = 0x48D
    VMX_TRUE_PROCBASED_CTLS = 0x48E
    VMX_TRUE_EXIT_CTLS = 0x48F
    VMX_TRUE_ENTRY_CTLS = 0x490
    VMX_VMFUNC = 0x491
    DS_AREA = 0x600
    U_CET = 0x6A0
    S_CET = 0x6A2
    PL0_SSP = 0x6A4
    PL1_SSP = 0x6A5
    PL2_SSP = 0x6A6
    PL3_SSP = 0x6A7
    INTERRUPT_SSP_TABLE_ADDR = 0x6A8
    TSC_DEADLINE = 0x6E0
    X2APIC_APICID = 0x802
    X2APIC_VERSION = 0x803
    X2APIC_TPR = 0x808
    X2APIC_PPR = 0x80A
    X2APIC_EOI = 0x80B
    X2APIC_LDR = 0x80D
    X2APIC_SIVR = 0x80F
    X2APIC_ISR0 = 0x810
    X2APIC_TMR0 = 0x818
    X2APIC_IRR0 = 0x820
    X2APIC_ESR = 0x828
    X2APIC_LVT_CMCI = 0x82F
    X2APIC_ICR = 0x830
    X2APIC_LVT_TIMER = 0x832
    X2APIC_LVT_THERMAL = 0x833
    X2APIC_LVT_PMI = 0x834
    X2APIC_LVT_LINT0 = 0x835
    X2APIC_LVT_LINT1 = 0x836
    X2APIC_LVT_ERROR = 0x837
    X2APIC_INIT_COUNT = 0x838
    X2APIC_CUR_COUNT = 0x839
    X2APIC_DIV_CONF = 0x83E
    X2APIC_SELF_IPI = 0x83F
    XSS = 0xDA0

    # KVM's own (virt/kvm/x86/msr.rst); the first two are deprecated.
    KVM_WALL_CLOCK = 0x11
    KVM_SYSTEM_TIME = 0x12
    KVM_WALL_CLOCK_NEW = 0x4B56_4D00
    KVM_SYSTEM_TIME_NEW = 0x4B56_4D01
    KVM_ASYNC_PF_EN = 0x4B56_4D02
    KVM_STEAL_TIME = 0x4B56_4D03
    KVM_PV_EOI_EN = 0x4B56_4D04
    KVM_POLL_CONTROL = 0x4B56_4D05
    KVM_ASYNC_PF_INT = 0x4B56_4D06
    KVM_ASYNC_PF_ACK = 0x4B56_4D07
    KVM_MIGRATION_CONTROL = 0x4B56_4D08

    EFER = 0xC000_0080
    STAR = 0xC000_0081
    LSTAR = 0xC000_0082
    CSTAR = 0xC000_0083
    SFMASK = 0xC000_0084
    FS_BASE = 0xC000_0100
    GS_BASE = 0xC000_0101
    KERNEL_GS_BASE = 0xC000_0102
    TSC_AUX = 0xC000_0103

    # AMD
    TSC_RATIO = 0xC000_0104
    PERF_EVT_SEL0_K7 = 0xC001_0000
    PERF_CTR0_K7 = 0xC001_0004
    SYSCFG = 0xC001_0010
    HWCR = 0xC001_0015
    TOP_MEM = 0xC001_001A
    TOP_MEM2 = 0xC001_001D
    VM_CR = 0xC001_0114
    IGNNE = 0xC001_0115
    SMM_CTL = 0xC001_0116
    VM_HSAVE_PA = 0xC001_0117
    VIRT_SPEC_CTRL = 0xC001_011F
    DE_CFG = 0xC001_1029


def machine_check_bank(bank: int, register: Literal["ctl", "status", "addr", "misc"]) -> int:
    """The number of MCi_CTL, MCi_STATUS, MCi_ADDR or MCi_MISC of bank 0 to 31 (SDM vol. 3, 15.3.2)."""
    if not 0 <= bank <= 31:
        raise UsageError(f"a machine-check bank is 0 to 31, not {bank}")
    return 0x400 + 4 * bank + ("ctl", "status", "addr", "misc").index(register)


def mtrr_variable(number: int, register: Literal["base", "mask"]) -> int:
    """The number of MTRR_PHYSBASEn or MTRR_PHYSMASKn, n from 0 to 9 (SDM vol. 3, 11.11.2.3)."""
    if not 0 <= number <= 9:
        raise UsageError(f"a variable MTRR is 0 to 9, not {number}")
    return 0x200 + 2 * number + ("base", "mask").index(register)


def msr_name(number: int) -> str:
    """The name of a register for messages, or its number in hex: "EFER", "MC0_CTL", "0xc0011234"."""
    try:
        return Msr(number).name
    except ValueError:
        pass
    if 0x200 <= number < 0x214:
        return f"MTRR_PHYS{('BASE', 'MASK')[number & 1]}{number - 0x200 >> 1}"
    if 0x400 <= number < 0x480:
        return f"MC{number - 0x400 >> 2}_{('CTL', 'STATUS', 'ADDR', 'MISC')[number & 3]}"
    return hex(number)
