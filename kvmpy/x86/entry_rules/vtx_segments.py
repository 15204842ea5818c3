"""The VM-entry checks on segment registers (SDM vol. 3, 27.3.1.2), in the manual's order.

"Usable" is what KVM makes of a segment: neither `unusable` nor P=0 (vmx.c, vmx_segment_access_rights). Without
unrestricted guest KVM does not enter with a bad state at all: it emulates until the state is valid (module parameter
emulate_invalid_guest_state), or, in real mode, rewrites the segments for virtual-8086 mode (vmx.c, fix_rmode_seg). So
these rules bite on hardware with unrestricted guest, which is nearly all that is in use.
"""

from __future__ import annotations

from collections.abc import Callable

from kvmpy.x86.entry_rules.rule import VTX, EntryState, OutOfReach, Rule
from kvmpy.x86.flags import Cr0
from kvmpy.x86.registers import Segment

__all__ = ["VTX_SEGMENT_OUT_OF_REACH", "VTX_SEGMENT_RULES"]

SOURCE = "SDM vol. 3, 27.3.1.2 Checks on Guest Segment Registers"
ACCESSED = "with unrestricted guest it sets the accessed bit of every segment but LDTR (vmx.c, __vmx_set_segment)"

CODE_AND_DATA = ("cs", "ss", "ds", "es", "fs", "gs")
DATA = ("ds", "es", "fs", "gs")

TYPE_DATA_RW = 3
TYPE_CODE_ACCESSED = (9, 11, 13, 15)
TYPE_NONCONFORMING = (9, 11)
TYPE_CONFORMING = (13, 15)
TYPE_LDT = 2
TYPE_TSS16_BUSY = 3
TYPE_TSS_BUSY = 11
RIGHTS_VIRTUAL_8086 = 0xF3  # present, DPL 3, read/write, accessed, expand up


def _rule(
    name: str, requirement: str, shows: str, holds: Callable[[EntryState], bool], *, kvm_repairs: str = ""
) -> Rule:
    return Rule(f"vtx.{name}", VTX, SOURCE, requirement, tuple(shows.split()), holds, kvm_repairs)


def _each(
    registers: tuple[str, ...],
    name: str,
    requirement: str,
    fields: str,
    holds: Callable[[EntryState, Segment], bool],
    *,
    applies: Callable[[EntryState, str], bool],
    kvm_repairs: str = "",
) -> tuple[Rule, ...]:
    """The same sentence for several registers: one rule each."""

    def one(register: str) -> Rule:
        return _rule(
            f"{register}.{name}",
            requirement,
            " ".join(f"{register}.{field}" for field in fields.split()),
            lambda entry: not applies(entry, register) or holds(entry, entry.segment(register)),
            kvm_repairs=kvm_repairs,
        )

    return tuple(one(register) for register in registers)


# When a sentence applies to a register.


def _always(entry: EntryState, register: str) -> bool:
    return True


def _usable(entry: EntryState, register: str) -> bool:
    return entry.usable(register)


def _virtual_8086(entry: EntryState, register: str) -> bool:
    return entry.virtual_8086


def _not_virtual_8086(entry: EntryState, register: str) -> bool:
    """CS is judged even when it is marked unusable; the others only when usable."""
    return not entry.virtual_8086 and (register == "cs" or entry.usable(register))


def _granularity_low(entry: EntryState, segment: Segment) -> bool:
    return segment.limit & 0xFFF == 0xFFF or not segment.g


def _granularity_high(entry: EntryState, segment: Segment) -> bool:
    return segment.limit >> 20 == 0 or bool(segment.g)


def _rights(segment: Segment) -> int:
    """The access-rights field as KVM writes it, bits 15:0 and 16 (SDM vol. 3, table 25-2)."""
    return (
        (segment.type & 15)
        | (segment.s & 1) << 4
        | (segment.dpl & 3) << 5
        | (segment.present & 1) << 7
        | (segment.avl & 1) << 12
        | (segment.l & 1) << 13
        | (segment.db & 1) << 14
        | (segment.g & 1) << 15
        | (segment.unusable & 1) << 16
    )


def _cs_type(entry: EntryState) -> bool:
    """The accessed bit is a sentence of its own here, as KVM repairs that and nothing else."""
    accessed = entry.sregs.cs.type | 1
    return entry.virtual_8086 or accessed in TYPE_CODE_ACCESSED or (entry.unrestricted and accessed == TYPE_DATA_RW)


def _cs_dpl(entry: EntryState) -> bool:
    cs, ss = entry.sregs.cs, entry.sregs.ss
    accessed = cs.type | 1
    if entry.virtual_8086:
        return True
    if accessed == TYPE_DATA_RW:
        return cs.dpl == 0
    if accessed in TYPE_NONCONFORMING:
        return cs.dpl == ss.dpl
    return accessed not in TYPE_CONFORMING or cs.dpl <= ss.dpl


def _ss_dpl_zero(entry: EntryState) -> bool:
    real_like = not entry.cr0(Cr0.PE) or entry.sregs.cs.type | 1 == TYPE_DATA_RW
    return entry.virtual_8086 or not real_like or entry.sregs.ss.dpl == 0


def _data_dpl(entry: EntryState, segment: Segment) -> bool:
    return entry.unrestricted or segment.type > 11 or segment.dpl >= segment.selector & 3


SELECTORS = (
    _rule("tr.ti", "the TI flag (bit 2) of TR's selector must be 0", "tr.selector",
          lambda e: not e.sregs.tr.selector & 4),
    _rule("ldt.ti", "the TI flag (bit 2) of a usable LDTR's selector must be 0", "ldt.selector",
          lambda e: not e.usable("ldt") or not e.sregs.ldt.selector & 4),
    _rule("ss.rpl", "without unrestricted guest the RPL of SS must equal the RPL of CS", "ss.selector cs.selector",
          lambda e: e.virtual_8086 or e.unrestricted or (e.sregs.ss.selector ^ e.sregs.cs.selector) & 3 == 0),
)  # fmt: skip

BASES = (
    *_each(CODE_AND_DATA, "v8086_base", "in virtual-8086 mode the base must be the selector times 16", "base selector",
           lambda e, s: s.base == s.selector << 4, applies=_virtual_8086),
    *_each(("tr", "fs", "gs"), "base", "the base must be canonical", "base",
           lambda e, s: e.canonical(s.base), applies=_always),
    *_each(("ldt",), "base", "the base of a usable LDTR must be canonical", "base",
           lambda e, s: e.canonical(s.base), applies=_usable),
    *_each(("cs",), "base", "bits 63:32 of the base must be 0", "base",
           lambda e, s: s.base >> 32 == 0, applies=_always),
    *_each(("ss", "ds", "es"), "base", "bits 63:32 of the base of a usable segment must be 0", "base",
           lambda e, s: s.base >> 32 == 0, applies=_usable),
)  # fmt: skip

LIMITS = _each(CODE_AND_DATA, "v8086_limit", "in virtual-8086 mode the limit must be 0xffff", "limit",
               lambda e, s: s.limit == 0xFFFF, applies=_virtual_8086)  # fmt: skip

ACCESS_RIGHTS = (
    *_each(CODE_AND_DATA, "v8086_rights", "in virtual-8086 mode the access rights must be 0xf3",
           "type s dpl present avl l db g unusable",
           lambda e, s: _rights(s) == RIGHTS_VIRTUAL_8086, applies=_virtual_8086),
    *_each(CODE_AND_DATA, "accessed", "the type of CS and of a usable segment must have the accessed bit (bit 0)",
           "type",
           lambda e, s: bool(s.type & 1), applies=_not_virtual_8086, kvm_repairs=ACCESSED),
    _rule("cs.type", "the type must be code (9, 11, 13, 15), or read/write data (3) with unrestricted guest",
          "cs.type", _cs_type),
    *_each(("ss",), "type", "the type of a usable SS must be read/write data (3 or 7)", "type",
           lambda e, s: s.type | 1 in (3, 7), applies=_not_virtual_8086),
    *_each(DATA, "readable", "a code segment (type bit 3) must be readable (type bit 1)", "type",
           lambda e, s: not s.type & 8 or bool(s.type & 2), applies=_not_virtual_8086),
    *_each(CODE_AND_DATA, "s", "S must be 1 (code or data)", "s",
           lambda e, s: s.s == 1, applies=_not_virtual_8086),
    _rule("cs.dpl", "DPL must be 0 for type 3, SS.DPL for non-conforming code, at most SS.DPL for conforming code",
          "cs.dpl cs.type ss.dpl", _cs_dpl),
    _rule("ss.dpl_rpl", "without unrestricted guest SS.DPL must equal the RPL of SS", "ss.dpl ss.selector",
          lambda e: e.virtual_8086 or e.unrestricted or e.sregs.ss.dpl == e.sregs.ss.selector & 3),
    _rule("ss.dpl_zero", "SS.DPL must be 0 in real mode and when the type of CS is 3", "ss.dpl cs.type cr0",
          _ss_dpl_zero),
    *_each(DATA, "dpl",
           "without unrestricted guest the DPL of data and non-conforming code must not be below the RPL",
           "dpl type selector", _data_dpl, applies=_not_virtual_8086),
    *_each(("cs",), "present", "P must be 1", "present",
           lambda e, s: s.present == 1, applies=_not_virtual_8086),
    _rule("cs.db", "in IA-32e mode a 64-bit code segment (L) must have D/B 0", "cs.db cs.l efer",
          lambda e: e.virtual_8086 or not (e.ia32e and e.sregs.cs.l and e.sregs.cs.db)),
    *_each(CODE_AND_DATA, "g_low", "G must be 0 if any bit 11:0 of the limit is 0", "g limit",
           _granularity_low, applies=_not_virtual_8086),
    *_each(CODE_AND_DATA, "g_high", "G must be 1 if any bit 31:20 of the limit is 1", "g limit",
           _granularity_high, applies=_not_virtual_8086),
)  # fmt: skip

TR = (
    _rule("tr.type", "the type of TR must be 11 (busy TSS), or 3 (busy 16-bit TSS) outside IA-32e mode", "tr.type efer",
          lambda e: e.sregs.tr.type == TYPE_TSS_BUSY or (e.sregs.tr.type == TYPE_TSS16_BUSY and not e.ia32e)),
    _rule("tr.s", "S must be 0 (system)", "tr.s", lambda e: e.sregs.tr.s == 0),
    _rule("tr.present", "P must be 1", "tr.present", lambda e: e.sregs.tr.present == 1),
    *_each(("tr",), "g_low", "G must be 0 if any bit 11:0 of the limit is 0", "g limit",
           _granularity_low, applies=_always),
    *_each(("tr",), "g_high", "G must be 1 if any bit 31:20 of the limit is 1", "g limit",
           _granularity_high, applies=_always),
    _rule("tr.usable", "TR cannot be unusable (KVM marks it so when P is 0)", "tr.unusable tr.present",
          lambda e: e.usable("tr")),
)  # fmt: skip

LDTR = (
    *_each(("ldt",), "type", "the type of a usable LDTR must be 2 (LDT)", "type",
           lambda e, s: s.type == TYPE_LDT, applies=_usable),
    *_each(("ldt",), "s", "S must be 0 (system)", "s", lambda e, s: s.s == 0, applies=_usable),
    *_each(("ldt",), "g_low", "G must be 0 if any bit 11:0 of the limit is 0", "g limit",
           _granularity_low, applies=_usable),
    *_each(("ldt",), "g_high", "G must be 1 if any bit 31:20 of the limit is 1", "g limit",
           _granularity_high, applies=_usable),
)  # fmt: skip

VTX_SEGMENT_RULES = SELECTORS + BASES + LIMITS + ACCESS_RIGHTS + TR + LDTR

VTX_SEGMENT_OUT_OF_REACH = (
    OutOfReach(VTX, "P of a usable SS, DS, ES, FS, GS, LDTR", SOURCE, "KVM marks a segment with P=0 as unusable"),
    OutOfReach(VTX, "access rights, bits 11:8 and 31:17 (reserved)", SOURCE, "struct kvm_segment has no such fields"),
)
