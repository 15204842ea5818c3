"""What KVM_SET_SREGS refuses with EINVAL (Linux arch/x86/kvm/x86.c; regs.c in newer kernels).

The ioctl checks little: CR0, CR4, the long-mode bits, CR3 in long mode and the APIC base. Segments, descriptor
tables, CR2, CR8 (a bad value is dropped) and the pending interrupt are taken as they come. KVM_SET_REGS refuses
nothing; it sets RFLAGS bit 1 itself. Everything else waits for the processor's own checks at VM entry.
"""

from __future__ import annotations

from collections.abc import Callable

from kvmpy.x86.entry_rules.rule import KVM, EntryState, Rule
from kvmpy.x86.flags import Cr0, Cr4, Efer

__all__ = ["KVM_RULES"]

SREGS = "Linux arch/x86/kvm/x86.c, kvm_is_valid_sregs"
CR0 = "Linux arch/x86/kvm/x86.c, kvm_is_valid_cr0"
CR4 = "Linux arch/x86/kvm/x86.c, kvm_is_valid_cr4"
EFER = "Linux arch/x86/kvm/x86.c, kvm_valid_efer (newer kernels only; older ones leave it to the processor)"
APIC = "Linux arch/x86/kvm/lapic.c, kvm_apic_set_base"

APIC_EXTD = 1 << 10
APIC_ENABLE = 1 << 11
APIC_RESERVED = 0x2FF  # bits 0 to 7 and 9; bit 8 is BSP
LAM_CR3 = 3 << 61


def _rule(name: str, source: str, requirement: str, shows: str, holds: Callable[[EntryState], bool]) -> Rule:
    return Rule(f"kvm.{name}", KVM, source, requirement, tuple(shows.split()), holds)


def cr3_without_lam(entry: EntryState) -> int:
    """CR3 without the two bits that switch linear-address masking on, on processors that have them."""
    return entry.sregs.cr3 & ~LAM_CR3 if entry.limits.lam else entry.sregs.cr3


KVM_RULES = (
    _rule("cr0.high", CR0, "bits 63:32 of CR0 must be 0", "cr0",
          lambda e: e.sregs.cr0 >> 32 == 0),
    _rule("cr0.nw", CR0, "CR0.NW needs CR0.CD", "cr0",
          lambda e: e.cr0(Cr0.CD) or not e.cr0(Cr0.NW)),
    _rule("cr0.pg", CR0, "CR0.PG (paging) needs CR0.PE (protected mode)", "cr0",
          lambda e: e.cr0(Cr0.PE) or not e.cr0(Cr0.PG)),
    _rule("cr4.bits", CR4, "CR4 may only have bits whose feature both KVM and the guest's CPUID (KVM_SET_CPUID2) have",
          "cr4", lambda e: e.sregs.cr4 & ~e.limits.cr4 == 0),
    _rule("long_mode.pae", SREGS, "long mode (EFER.LME with CR0.PG) needs CR4.PAE", "efer cr0 cr4",
          lambda e: e.cr4(Cr4.PAE) or not e.long_mode_enabled),
    _rule("long_mode.lma", SREGS, "long mode (EFER.LME with CR0.PG) needs EFER.LMA", "efer cr0",
          lambda e: e.efer(Efer.LMA) or not e.long_mode_enabled),
    _rule("long_mode.cr3", SREGS, "in long mode CR3 must not reach beyond the guest's physical addresses", "cr3",
          lambda e: not (e.long_mode_enabled and e.beyond_physical(cr3_without_lam(e)))),
    _rule("efer.lma", SREGS, "EFER.LMA must be 0 unless EFER.LME and CR0.PG are 1", "efer cr0",
          lambda e: e.long_mode_enabled or not e.efer(Efer.LMA)),
    _rule("cs.l", SREGS, "a 64-bit code segment needs EFER.LME and CR0.PG", "cs.l efer cr0",
          lambda e: e.long_mode_enabled or not e.sregs.cs.l),
    _rule("efer.bits", EFER, "EFER may only have bits whose feature the guest's CPUID has", "efer",
          lambda e: e.sregs.efer & ~e.limits.efer == 0),
    _rule("apic_base.reserved", APIC, "bits 7:0, 9 and those beyond the physical address width must be 0", "apic_base",
          lambda e: not (e.sregs.apic_base & APIC_RESERVED or e.beyond_physical(e.sregs.apic_base))),
    _rule("apic_base.mode", APIC, "x2APIC mode (bit 10) needs the APIC enabled (bit 11)", "apic_base",
          lambda e: not e.sregs.apic_base & APIC_EXTD or bool(e.sregs.apic_base & APIC_ENABLE)),
    _rule("apic_base.x2apic", APIC, "x2APIC mode (bit 10) needs CPUID 1 ECX[21] in the guest's CPUID", "apic_base",
          lambda e: not e.sregs.apic_base & APIC_EXTD or e.limits.x2apic),
)  # fmt: skip
"""In the order in which the kernel looks at them."""
