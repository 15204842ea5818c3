"""What VMRUN refuses with VMEXIT_INVALID (AMD APM vol. 2, 15.5.1, Canonicalization and Consistency Checks).

Far fewer checks than VT-x makes: nothing about segment types, limits, RIP or RFLAGS. Segment bases that are not
canonical are made so.
"""

from __future__ import annotations

from collections.abc import Callable

from kvmpy.x86.entry_rules.kvm_set_sregs import cr3_without_lam
from kvmpy.x86.entry_rules.rule import AMDV, EntryState, OutOfReach, Rule
from kvmpy.x86.flags import Cr0, Cr4, Efer

__all__ = ["AMDV_OUT_OF_REACH", "AMDV_RULES"]

VMRUN = "APM vol. 2, 15.5.1 Canonicalization and Consistency Checks"
CR4_NOT_AMD = int(Cr4.VMXE | Cr4.SMXE | Cr4.KL | Cr4.PKS | Cr4.UINTR | Cr4.LAM_SUP)
"""Intel's bits, which an AMD processor reserves (APM vol. 2, 3.1.3)."""


def _rule(
    name: str, requirement: str, shows: str, holds: Callable[[EntryState], bool], *, kvm_repairs: str = ""
) -> Rule:
    return Rule(f"amdv.{name}", AMDV, VMRUN, requirement, tuple(shows.split()), holds, kvm_repairs)


AMDV_RULES = (
    _rule("cr0.nw", "CR0.NW must be 0 while CR0.CD is 0", "cr0",
          lambda e: e.cr0(Cr0.CD) or not e.cr0(Cr0.NW),
          kvm_repairs="it clears CD and NW, unless KVM_X86_QUIRK_CD_NW_CLEARED is disabled (svm.c, svm_set_cr0)"),
    _rule("cr0.high", "bits 63:32 of CR0 must be 0", "cr0",
          lambda e: e.sregs.cr0 >> 32 == 0),
    _rule("cr3.mbz", "in long mode CR3 must not reach beyond the physical address width", "cr3",
          lambda e: not (e.long_mode_enabled and e.beyond_physical(cr3_without_lam(e)))),
    _rule("cr4.mbz", "reserved bits of CR4 must be 0", "cr4",
          lambda e: e.sregs.cr4 & ~(e.limits.cr4 & ~CR4_NOT_AMD) == 0),
    _rule("cr4.cet", "CR4.CET needs CR0.WP", "cr4 cr0",
          lambda e: e.cr0(Cr0.WP) or not e.cr4(Cr4.CET)),
    _rule("efer.mbz", "reserved bits of EFER must be 0", "efer",
          lambda e: e.sregs.efer & ~e.limits.efer == 0),
    _rule("efer.long_mode", "EFER.LMA and EFER.LME must be 0 on a processor without long mode", "efer",
          lambda e: e.limits.long_mode or not (e.efer(Efer.LMA) or e.efer(Efer.LME))),
    _rule("long_mode.pae", "EFER.LME with CR0.PG needs CR4.PAE", "efer cr0 cr4",
          lambda e: e.cr4(Cr4.PAE) or not e.long_mode_enabled),
    _rule("long_mode.pe", "EFER.LME with CR0.PG needs CR0.PE", "efer cr0",
          lambda e: e.cr0(Cr0.PE) or not e.long_mode_enabled),
    _rule("long_mode.cs", "in long mode a code segment cannot have both L and D", "cs.l cs.db efer cr0 cr4",
          lambda e: not (e.long_mode_enabled and e.cr4(Cr4.PAE) and e.sregs.cs.l and e.sregs.cs.db)),
)  # fmt: skip
"""In the manual's order."""

AMDV_OUT_OF_REACH = (
    OutOfReach(AMDV, "EFER.SVME", VMRUN, "KVM sets it in the VMCB whatever the guest's EFER says (svm_set_efer)"),
    OutOfReach(AMDV, "DR6[63:32], DR7[63:32]", VMRUN,
               "not in regs or sregs; KVM_SET_DEBUGREGS refuses such values with EINVAL"),
    OutOfReach(AMDV, "VMRUN intercept", VMRUN, "only KVM writes the intercepts; it always sets this one"),
    OutOfReach(AMDV, "MSR and I/O permission maps", VMRUN, "KVM allocates them"),
    OutOfReach(AMDV, "event injection (EVENTINJ)", "APM vol. 2, 15.20 Event Injection",
               "KVM fills it from events that it has checked; KVM_SET_VCPU_EVENTS refuses exceptions 2 and above 31"),
    OutOfReach(AMDV, "guest ASID", VMRUN, "KVM assigns it and never uses 0"),
    OutOfReach(AMDV, "TLB_CONTROL, AVIC and virtual-interrupt controls", VMRUN, "only KVM writes them"),
    OutOfReach(AMDV, "S_CET, U_CET, SSP", VMRUN, "not in regs or sregs; KVM_SET_MSRS refuses reserved bits"),
    OutOfReach(AMDV, "nCR3, G_PAT", "APM vol. 2, 15.25.4 Nested Paging and VMRUN/#VMEXIT",
               "nCR3 is KVM's own; KVM_SET_MSRS refuses bad PAT types"),
    OutOfReach(AMDV, "PDPEs of PAE paging", "APM vol. 2, 15.25.10 Legacy PAE Mode",
               "with nested paging they are read and judged when an address is translated, not at VMRUN"),
    OutOfReach(AMDV, "host state", VMRUN, "KVM's own"),
)  # fmt: skip
