"""What a rule about the entry state is, and what it says when it is broken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from kvmpy.x86.flags import Cr0, Cr4, Efer, Rflags
from kvmpy.x86.paging import PhysicalMemory
from kvmpy.x86.registers import CpuState, Registers, Segment, SystemRegisters

__all__ = [
    "AMDV",
    "KVM",
    "KVM_CR4",
    "KVM_EFER",
    "VTX",
    "EntryState",
    "OutOfReach",
    "ProcessorLimits",
    "Rule",
    "RuleSet",
    "Violation",
]


class RuleSet(Enum):
    """Who refuses the state: the ioctl, or the processor at VM entry."""

    KVM = "KVM_SET_SREGS"
    VTX = "VT-x"
    AMDV = "AMD-V"


KVM = RuleSet.KVM
VTX = RuleSet.VTX
AMDV = RuleSet.AMDV

KVM_CR4 = int(
    Cr4.VME | Cr4.PVI | Cr4.TSD | Cr4.DE | Cr4.PSE | Cr4.PAE | Cr4.MCE | Cr4.PGE | Cr4.PCE | Cr4.OSFXSR
    | Cr4.OSXMMEXCPT | Cr4.UMIP | Cr4.LA57 | Cr4.VMXE | Cr4.FSGSBASE | Cr4.PCIDE | Cr4.OSXSAVE | Cr4.SMEP
    | Cr4.SMAP | Cr4.PKE | Cr4.CET | Cr4.LAM_SUP
)  # fmt: skip
"""The CR4 bits that some KVM lets some guest set (Linux arch/x86/include/asm/kvm_host.h, CR4_RESERVED_BITS)."""

KVM_EFER = int(
    Efer.SCE | Efer.LME | Efer.LMA | Efer.NXE | Efer.SVME | Efer.LMSLE | Efer.FFXSR | Efer.TCE | Efer.AUTOIBRS
)
"""The EFER bits that some KVM lets some guest set (Linux arch/x86/kvm/x86.c, efer_reserved_bits)."""


@dataclass(frozen=True, slots=True)
class ProcessorLimits:
    """What the virtual processor (its CPUID) and the real one below it can do.

    The defaults accuse nobody wrongly: they grant whatever any processor that KVM runs on may have. Only
    `linear_address_bits` is the usual 48; give 57 where the real processor has LA57 (VM entry judges canonical
    addresses by the processor's width, not by CR4.LA57). A vCPU that was never given a CPUID has 36 physical address
    bits and only the oldest CR4 bits.

    physical_address_bits   MAXPHYADDR, CPUID 0x80000008 EAX[7:0]
    linear_address_bits     CPUID 0x80000008 EAX[15:8]
    cr4, efer               the bits of CR4 and EFER that may be 1
    x2apic                  CPUID 1 ECX[21]
    long_mode               CPUID 0x80000001 EDX[29]
    lam                     CPUID 7.1 EAX[26]: CR3 bits 61 and 62 are allowed
    unrestricted_guest      the VM-execution control that lets VT-x run real mode; all processors since 2010 have it
    """

    physical_address_bits: int = 52
    linear_address_bits: int = 48
    cr4: int = KVM_CR4
    efer: int = KVM_EFER
    x2apic: bool = True
    long_mode: bool = True
    lam: bool = True
    unrestricted_guest: bool = True

    def __post_init__(self) -> None:
        # The complement of a flag value has only the bits with a name: as such, unknown bits would pass all rules.
        object.__setattr__(self, "cr4", int(self.cr4))
        object.__setattr__(self, "efer", int(self.efer))


@dataclass(frozen=True, slots=True)
class EntryState:
    """One state under judgement, with the manual's names for the situations it may be in."""

    regs: Registers
    sregs: SystemRegisters
    limits: ProcessorLimits
    memory: PhysicalMemory | None = None

    def segment(self, name: str) -> Segment:
        segment: Segment = getattr(self.sregs, name)
        return segment

    def usable(self, name: str) -> bool:
        """KVM marks a segment unusable when it is told so and when P is 0 (vmx.c, vmx_segment_access_rights)."""
        segment = self.segment(name)
        return not segment.unusable and bool(segment.present)

    def cr0(self, bit: Cr0) -> bool:
        return bool(self.sregs.cr0 & bit)

    def cr4(self, bit: Cr4) -> bool:
        return bool(self.sregs.cr4 & bit)

    def efer(self, bit: Efer) -> bool:
        return bool(self.sregs.efer & bit)

    @property
    def unrestricted(self) -> bool:
        return self.limits.unrestricted_guest

    @property
    def ia32e(self) -> bool:
        """The "IA-32e mode guest" VM-entry control, which KVM sets exactly when EFER.LMA is 1 (vmx.c, vmx_set_efer)."""
        return self.efer(Efer.LMA)

    @property
    def virtual_8086(self) -> bool:
        return bool(self.regs.rflags & Rflags.VM)

    @property
    def long_mode_enabled(self) -> bool:
        """EFER.LME and CR0.PG: paging is the long mode's, whatever EFER.LMA claims."""
        return self.efer(Efer.LME) and self.cr0(Cr0.PG)

    @property
    def pae_paging(self) -> bool:
        return self.cr0(Cr0.PG) and self.cr4(Cr4.PAE) and not self.ia32e

    def canonical(self, address: int) -> bool:
        """Bits 63 down to the highest implemented one are all equal."""
        top = address >> self.limits.linear_address_bits - 1
        return top in (0, (1 << 65 - self.limits.linear_address_bits) - 1)

    def beyond_physical(self, address: int) -> int:
        """The bits of `address` from MAXPHYADDR up to 63."""
        return address >> self.limits.physical_address_bits << self.limits.physical_address_bits

    def show(self, path: str) -> str:
        """`cs.type` -> "CS.type=0xb"; a plain register name -> "CR0=0x60000010"."""
        first, _, field = path.partition(".")
        owner = self.regs if hasattr(self.regs, first) else self.sregs
        value = getattr(owner, first)
        name = first.upper()
        if field:
            value = getattr(value, field)
            name += f".{field}"
        return f"{name}={value:#x}" if isinstance(value, int) else f"{name}={value}"


@dataclass(frozen=True, slots=True)
class Rule:
    """One sentence of a manual.

    `requirement` is the sentence, `shows` the registers that decide (paths such as `cs.type`), `holds` the test.
    `kvm_repairs` says how KVM puts the matter right before the processor sees it, where it does: such a violation is
    reported, but is not what an entry failed of.
    """

    id: str
    set: RuleSet
    source: str
    requirement: str
    shows: tuple[str, ...]
    holds: Callable[[EntryState], bool]
    kvm_repairs: str = ""

    def judge(self, entry: EntryState) -> Violation | None:
        if self.holds(entry):
            return None
        values = ", ".join(entry.show(path) for path in self.shows)
        return Violation(self.id, self.set, f"{values}: {self.requirement}", self.source, self.kvm_repairs)


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken rule: its id ("vtx.cs.type"), its set, the actual values with what is required, and the source."""

    rule: str
    set: RuleSet
    message: str
    source: str
    kvm_repairs: str = ""

    def __str__(self) -> str:
        repaired = f"; KVM repairs it: {self.kvm_repairs}" if self.kvm_repairs else ""
        return f"{self.rule}: {self.message} [{self.source}]{repaired}"


@dataclass(frozen=True, slots=True)
class OutOfReach:
    """A check of a manual that no CpuState can break, and why."""

    set: RuleSet
    field: str
    source: str
    why: str


def entry_state(state: CpuState, limits: ProcessorLimits, memory: PhysicalMemory | None) -> EntryState:
    return EntryState(state.regs, state.sregs, limits, memory)
