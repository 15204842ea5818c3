"""The VM-entry checks on control registers, descriptor tables, RIP, RFLAGS and PDPTEs.

SDM vol. 3, 27.3.1 "Checks on the Guest State Area": sections 27.3.1.1, .3, .4 and .6, in the manual's order. Section .2
is `vtx_segments`; section .5 (activity, interruptibility, VMCS link pointer) concerns fields that only KVM writes.
"""

from __future__ import annotations

from collections.abc import Callable

from kvmpy.errors import GuestMemoryError
from kvmpy.x86.entry_rules.kvm_set_sregs import cr3_without_lam
from kvmpy.x86.entry_rules.rule import VTX, EntryState, OutOfReach, Rule
from kvmpy.x86.flags import Cr0, Cr4, Efer, Rflags

__all__ = ["VTX_REGISTER_OUT_OF_REACH", "VTX_REGISTER_RULES"]

CONTROL = "SDM vol. 3, 27.3.1.1 Checks on Guest Control Registers, Debug Registers, and MSRs"
TABLES = "SDM vol. 3, 27.3.1.3 Checks on Guest Descriptor-Table Registers"
RIP_RFLAGS = "SDM vol. 3, 27.3.1.4 Checks on Guest RIP, RFLAGS, and SSP"
NON_REGISTER = "SDM vol. 3, 27.3.1.5 Checks on Guest Non-Register State"
PDPTE = "SDM vol. 3, 27.3.1.6 Checks on Guest Page-Directory-Pointer-Table Entries"

EFER_INTEL = int(Efer.SCE | Efer.LME | Efer.LMA | Efer.NXE)
RFLAGS_RESERVED = 0xFFFF_FFFF_FFC0_8028  # bits 63:22, 15, 5 and 3
PDPTE_RESERVED = 0x1E6  # bits 2:1 and 8:5
PRESENT = 1


def _rule(
    name: str, source: str, requirement: str, shows: str, holds: Callable[[EntryState], bool], *, kvm_repairs: str = ""
) -> Rule:
    return Rule(f"vtx.{name}", VTX, source, requirement, tuple(shows.split()), holds, kvm_repairs)


def _rip_fits(entry: EntryState) -> bool:
    if not (entry.ia32e and entry.sregs.cs.l):
        return entry.regs.rip >> 32 == 0
    # Bit N-1 may differ from those above it: VM entry does not demand a canonical RIP, the first fetch will.
    bits = entry.limits.linear_address_bits
    return entry.regs.rip >> bits in (0, (1 << 64 - bits) - 1)


def _pdptes_fit(entry: EntryState) -> bool:
    """Without `memory`, or with a table outside RAM, there is nothing to judge."""
    if entry.memory is None or not entry.pae_paging:
        return True
    try:
        table = entry.memory.read(entry.sregs.cr3 & 0xFFFF_FFE0, 4 * 8)
    except GuestMemoryError:
        return True
    entries = (int.from_bytes(table[at : at + 8], "little") for at in range(0, 4 * 8, 8))
    return not any(one & PRESENT and (one & PDPTE_RESERVED or entry.beyond_physical(one)) for one in entries)


VTX_REGISTER_RULES = (
    # 27.3.1.1
    _rule("cr0.high", CONTROL, "bits 63:32 of CR0 are not supported", "cr0",
          lambda e: e.sregs.cr0 >> 32 == 0),
    _rule("cr0.pg", CONTROL, "CR0.PG needs CR0.PE", "cr0",
          lambda e: e.cr0(Cr0.PE) or not e.cr0(Cr0.PG)),
    _rule("cr4.bits", CONTROL, "CR4 may only have bits that the processor supports in VMX operation", "cr4",
          lambda e: e.sregs.cr4 & ~e.limits.cr4 == 0),
    _rule("cr4.cet", CONTROL, "CR4.CET needs CR0.WP", "cr4 cr0",
          lambda e: e.cr0(Cr0.WP) or not e.cr4(Cr4.CET)),
    _rule("ia32e.pg", CONTROL, "an IA-32e mode guest (EFER.LMA) needs CR0.PG", "efer cr0",
          lambda e: e.cr0(Cr0.PG) or not e.ia32e),
    _rule("ia32e.pae", CONTROL, "an IA-32e mode guest (EFER.LMA) needs CR4.PAE", "efer cr4",
          lambda e: e.cr4(Cr4.PAE) or not e.ia32e),
    _rule("cr4.pcide", CONTROL, "CR4.PCIDE must be 0 outside IA-32e mode (EFER.LMA)", "cr4 efer",
          lambda e: e.ia32e or not e.cr4(Cr4.PCIDE)),
    _rule("cr3.width", CONTROL, "CR3 must not reach beyond the processor's physical address width", "cr3",
          lambda e: not e.beyond_physical(cr3_without_lam(e))),
    _rule("efer.reserved", CONTROL, "only SCE, LME, LMA and NXE of EFER may be 1", "efer",
          lambda e: e.sregs.efer & ~(EFER_INTEL & e.limits.efer) == 0),
    _rule("efer.lme", CONTROL, "with CR0.PG, EFER.LME must equal EFER.LMA", "efer cr0",
          lambda e: not e.cr0(Cr0.PG) or e.efer(Efer.LME) == e.efer(Efer.LMA)),
    # 27.3.1.3
    _rule("gdtr.base", TABLES, "the base of the GDT must be canonical", "gdt.base",
          lambda e: e.canonical(e.sregs.gdt.base)),
    _rule("idtr.base", TABLES, "the base of the IDT must be canonical", "idt.base",
          lambda e: e.canonical(e.sregs.idt.base)),
    # 27.3.1.4
    _rule("rip", RIP_RFLAGS,
          "bits 63:32 of RIP must be 0 outside 64-bit code; in it the bits beyond the linear address's must be equal",
          "rip cs.l efer", _rip_fits),
    _rule("rflags.reserved", RIP_RFLAGS, "bits 63:22, 15, 5 and 3 of RFLAGS must be 0", "rflags",
          lambda e: e.regs.rflags & RFLAGS_RESERVED == 0),
    _rule("rflags.fixed1", RIP_RFLAGS, "bit 1 of RFLAGS must be 1", "rflags",
          lambda e: bool(e.regs.rflags & Rflags.FIXED1),
          kvm_repairs="KVM_SET_REGS sets the bit"),
    _rule("rflags.vm", RIP_RFLAGS, "RFLAGS.VM must be 0 in IA-32e mode and in real mode", "rflags efer cr0",
          lambda e: not e.virtual_8086 or (e.cr0(Cr0.PE) and not e.ia32e)),
    _rule("rflags.if", RIP_RFLAGS, "RFLAGS.IF must be 1 when an external interrupt is injected", "rflags interrupt",
          lambda e: e.sregs.interrupt is None or bool(e.regs.rflags & Rflags.IF)),
    # 27.3.1.6
    _rule("pdpte", PDPTE, "a present PDPTE must have bits 2:1, 8:5 and those beyond the physical address width 0",
          "cr3 cr4 cr0",
          _pdptes_fit,
          kvm_repairs="KVM_SET_SREGS does not load a faulty table and keeps the PDPTEs it had (x86.c, load_pdptrs)"),
)  # fmt: skip

VTX_REGISTER_OUT_OF_REACH = (
    OutOfReach(VTX, "CR0.NE", CONTROL,
               "must be 1; KVM sets it in the VMCS and shows the guest its own value (vmx.c, vmx_set_cr0)"),
    OutOfReach(VTX, "CR0.PE, CR0.PG without unrestricted guest", CONTROL,
               "must be 1; KVM sets both in the VMCS, runs real mode as virtual-8086 mode or emulates it, and a guest "
               "without paging over identity page tables (vmx.c, enter_rmode, vmx_set_cr0)"),
    OutOfReach(VTX, "CR4.VMXE", CONTROL,
               "must be 1; KVM sets it in the VMCS and hides it from the guest (vmx.c, vmx_set_cr4)"),
    OutOfReach(VTX, "CR0.CD, CR0.NW", CONTROL, "never checked; KVM clears both in the VMCS"),
    OutOfReach(VTX, "DR7[63:32]", CONTROL, "not in regs or sregs; KVM_SET_DEBUGREGS refuses such values with EINVAL"),
    OutOfReach(VTX, "IA32_DEBUGCTL, IA32_SYSENTER_ESP, IA32_SYSENTER_EIP, IA32_PERF_GLOBAL_CTRL, IA32_PAT, "
               "IA32_BNDCFGS, IA32_RTIT_CTL, IA32_LBR_CTL, IA32_PKRS, UINV", CONTROL,
               "not in regs or sregs; KVM_SET_MSRS refuses reserved bits or makes the addresses canonical"),
    OutOfReach(VTX, "IA32_S_CET, SSP, IA32_INTERRUPT_SSP_TABLE_ADDR", CONTROL,
               "not in regs or sregs; KVM_SET_MSRS checks them"),
    OutOfReach(VTX, "EFER.LMA against the \"IA-32e mode guest\" control", CONTROL,
               "KVM derives the control from EFER.LMA"),
    OutOfReach(VTX, "GDTR and IDTR limit, bits 31:16", TABLES, "struct kvm_dtable has 16 bits for the limit"),
    OutOfReach(VTX, "activity state", NON_REGISTER,
               "KVM enters with \"active\"; KVM_SET_MP_STATE stops the vCPU outside the guest"),
    OutOfReach(VTX, "interruptibility state", NON_REGISTER,
               "not in regs or sregs; KVM writes it from KVM_SET_VCPU_EVENTS (interrupt.shadow, nmi.masked)"),
    OutOfReach(VTX, "pending debug exceptions", NON_REGISTER, "only KVM writes the field"),
    OutOfReach(VTX, "VMCS link pointer", NON_REGISTER, "KVM sets it to all ones"),
    OutOfReach(VTX, "VM-execution, VM-entry and VM-exit controls", "SDM vol. 3, 27.2.1 Checks on VMX Controls",
               "KVM's own"),
    OutOfReach(VTX, "host state area", "SDM vol. 3, 27.2.2 to 27.2.4", "KVM's own"),
    OutOfReach(VTX, "MSR-load area", "SDM vol. 3, 27.4 Loading MSRs",
               "KVM fills it; a failure there is basic exit reason 34"),
)  # fmt: skip
