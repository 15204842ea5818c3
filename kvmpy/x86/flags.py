"""Control registers and flags, bit by bit, with the manual's names (SDM vol. 3, 2.5; APM vol. 2, 3.1)."""

from enum import IntFlag

__all__ = ["Cr0", "Cr4", "Dr6", "Dr7", "Efer", "Rflags"]


class Rflags(IntFlag):
    """RFLAGS (SDM vol. 1, 3.4.3). Bit 1 always reads as one."""

    CF = 1 << 0
    FIXED1 = 1 << 1
    PF = 1 << 2
    AF = 1 << 4
    ZF = 1 << 6
    SF = 1 << 7
    TF = 1 << 8
    IF = 1 << 9
    DF = 1 << 10
    OF = 1 << 11
    IOPL0 = 1 << 12
    IOPL1 = 1 << 13
    NT = 1 << 14
    RF = 1 << 16
    VM = 1 << 17
    AC = 1 << 18
    VIF = 1 << 19
    VIP = 1 << 20
    ID = 1 << 21


class Cr0(IntFlag):
    """CR0: operating mode (SDM vol. 3, 2.5)."""

    PE = 1 << 0
    MP = 1 << 1
    EM = 1 << 2
    TS = 1 << 3
    ET = 1 << 4
    NE = 1 << 5
    WP = 1 << 16
    AM = 1 << 18
    NW = 1 << 29
    CD = 1 << 30
    PG = 1 << 31


class Cr4(IntFlag):
    """CR4: architectural extensions (SDM vol. 3, 2.5)."""

    VME = 1 << 0
    PVI = 1 << 1
    TSD = 1 << 2
    DE = 1 << 3
    PSE = 1 << 4
    PAE = 1 << 5
    MCE = 1 << 6
    PGE = 1 << 7
    PCE = 1 << 8
    OSFXSR = 1 << 9
    OSXMMEXCPT = 1 << 10
    UMIP = 1 << 11
    LA57 = 1 << 12
    VMXE = 1 << 13
    SMXE = 1 << 14
    FSGSBASE = 1 << 16
    PCIDE = 1 << 17
    OSXSAVE = 1 << 18
    KL = 1 << 19
    SMEP = 1 << 20
    SMAP = 1 << 21
    PKE = 1 << 22
    CET = 1 << 23
    PKS = 1 << 24
    UINTR = 1 << 25
    LAM_SUP = 1 << 28


class Efer(IntFlag):
    """IA32_EFER, MSR 0xC0000080 (SDM vol. 3, 2.2.1; APM vol. 2, 3.1.7)."""

    SCE = 1 << 0
    LME = 1 << 8
    LMA = 1 << 10
    NXE = 1 << 11
    SVME = 1 << 12
    LMSLE = 1 << 13
    FFXSR = 1 << 14
    TCE = 1 << 15
    AUTOIBRS = 1 << 21


class Dr6(IntFlag):
    """DR6: what a debug exception was for (SDM vol. 3, 17.2.3). RTM and bus lock are active low."""

    B0 = 1 << 0
    B1 = 1 << 1
    B2 = 1 << 2
    B3 = 1 << 3
    BLD = 1 << 11
    BD = 1 << 13
    BS = 1 << 14
    BT = 1 << 15
    RTM = 1 << 16


class Dr7(IntFlag):
    """DR7: debug control (SDM vol. 3, 17.2.4). The R/W and LEN fields from bit 16 on are numbers, not flags."""

    L0 = 1 << 0
    G0 = 1 << 1
    L1 = 1 << 2
    G1 = 1 << 3
    L2 = 1 << 4
    G2 = 1 << 5
    L3 = 1 << 6
    G3 = 1 << 7
    LE = 1 << 8
    GE = 1 << 9
    FIXED1 = 1 << 10
    RTM = 1 << 11
    GD = 1 << 13
