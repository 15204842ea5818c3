"""Mistakes with descriptors, selectors and segments (SDM vol. 3, chapters 3 and 5)."""

from __future__ import annotations

from kvmpy.debug.crash_report.case import Case
from kvmpy.debug.crash_report.findings.finding import Rule, Suspicion, by_cause, cause, remark, sentence
from kvmpy.debug.crash_report.first_event import Cause, read_linear
from kvmpy.x86.descriptors import decode_segment
from kvmpy.x86.flags import Cr0, Rflags

__all__ = ["RULES", "is_real_mode_segment"]

_DATA_SEGMENTS = ("ds", "es", "ss", "fs", "gs")


def is_real_mode_segment(case: Case, name: str) -> bool:
    """Whether a segment register in protected mode still holds what real mode put there: base = selector * 16."""
    sregs = case.sregs
    if not sregs.cr0 & Cr0.PE or case.regs.rflags & Rflags.VM:
        return False
    segment = case.execution.segment(name)
    if segment.unusable or segment.base != segment.selector << 4 or segment.limit != 0xFFFF or segment.db:
        return False
    if not segment.selector & 0xFFFC:
        return True  # a null selector that works was never loaded in this mode
    data = read_linear(case.memory, case.state, sregs.gdt.base + (segment.selector & 0xFFF8), 8)
    if len(data) < 8 or (segment.selector | 7) > sregs.gdt.limit:
        return True
    described = decode_segment(data)
    return (described.base, described.limit) != (segment.base, segment.limit)


def _gdt_not_loaded(case: Case) -> Suspicion | None:
    candidate = case.blamed(
        Cause.SELECTOR_BEYOND_LIMIT,
        Cause.DESCRIPTOR_EMPTY,
        Cause.DESCRIPTOR_TYPE,
        Cause.DESCRIPTOR_NOT_PRESENT,
        Cause.DESCRIPTOR_PRIVILEGE,
    )
    if candidate is None:
        return None
    gdt, entry = case.sregs.gdt, case.evidence.entry_state
    if gdt.base or gdt.limit not in (0, 0xFFFF) or (entry is not None and entry.sregs.gdt != gdt):
        return None
    return cause(
        f"GDTR is still base {gdt.base:#x}, limit {gdt.limit:#x}, as at the start: LGDT was never executed. "
        + sentence(candidate.text)
    )


def _data_segment_not_reloaded(case: Case) -> Suspicion | None:
    stale = [name for name in _DATA_SEGMENTS if is_real_mode_segment(case, name)]
    if not stale or is_real_mode_segment(case, "cs"):
        return None
    candidate = case.blamed(Cause.SEGMENT_LIMIT)
    names = ", ".join(name.upper() for name in stale)
    first = case.execution.segment(stale[0])
    what = (
        f"{names} still {'holds' if len(stale) == 1 else 'hold'} what real mode loaded (base {first.base:#x}, limit "
        "0xffff)"
    )
    if candidate is not None and candidate.values.get("limit") == 0xFFFF:
        return cause(f"{what}. {sentence(candidate.text)}")
    if not {"ds", "es", "ss"} & set(stale):
        return None  # few guests need FS and GS
    return remark(f"{what} although the processor is in protected mode")


RULES = (
    Rule(
        "gdt-not-loaded",
        "No GDT was loaded",
        "In protected mode every selector picks a descriptor from the table that GDTR points to, so LGDT comes before "
        "the first segment register is loaded.",
        "SDM vol. 3, 3.5.1 and 9.8.1",
        "Execute LGDT with the 6 bytes limit and base (linear address) of your table, before or right after setting "
        "CR0.PE. In real mode mind DS: `lgdt [cs:pointer]`.",
        _gdt_not_loaded,
    ),
    Rule(
        "data-segment-not-reloaded",
        "A data segment still is the one of real mode",
        "Switching CR0.PE on changes no segment register: each keeps base and limit until it is loaded again.",
        "SDM vol. 3, 9.9.1",
        "After the far jump load DS, ES, SS (and FS, GS) with the selector of your data descriptor.",
        _data_segment_not_reloaded,
    ),
    Rule(
        "selector-beyond-limit",
        "A selector is beyond the end of the descriptor table",
        "A selector's index must lie within the limit of the GDT (LDT for selectors with bit 2 set), else "
        "#GP(selector).",
        "SDM vol. 3, 3.4.2 and 5.3",
        "Check the selector (index * 8 + RPL) and the limit in the LGDT operand: size of the table in bytes minus 1.",
        by_cause(Cause.SELECTOR_BEYOND_LIMIT),
    ),
    Rule(
        "descriptor-missing",
        "The GDT has no descriptor for a selector",
        "A selector must pick a descriptor of the right kind; an entry of zeros is none.",
        "SDM vol. 3, 3.4.5",
        "Fill this entry of the table, or use the selector of the entry that you meant (8, 16, 24 ...). Is GDTR's base "
        "the address of your table?",
        by_cause(Cause.DESCRIPTOR_EMPTY),
    ),
    Rule(
        "descriptor-type",
        "A selector picks a descriptor of the wrong kind",
        "CS takes code segments, SS writable data, DS to GS data or readable code, TR an available TSS.",
        "SDM vol. 3, 3.4.5.1 and 5.5",
        "Compare the access byte of the descriptor: 0x9A code, 0x92 data, 0x89 TSS (each for ring 0).",
        by_cause(Cause.DESCRIPTOR_TYPE),
    ),
    Rule(
        "selector-privilege",
        "A selector's privilege does not fit",
        "For data max(CPL, RPL) <= DPL; for SS CPL = RPL = DPL; a far jump keeps the CPL; a return never goes inward.",
        "SDM vol. 3, 5.5 to 5.8",
        "Use a descriptor of the right DPL and put the ring into the low two bits of the selector (0x08 for ring 0, "
        "0x1B for ring 3).",
        by_cause(Cause.DESCRIPTOR_PRIVILEGE),
    ),
    Rule(
        "segment-not-present",
        "A segment is marked not present",
        "Loading a descriptor with P=0 raises #NP(selector), #SS(selector) for SS.",
        "SDM vol. 3, 3.4.5 and 6.15",
        "Set bit 7 of the descriptor's access byte.",
        by_cause(Cause.DESCRIPTOR_NOT_PRESENT),
    ),
    Rule(
        "no-ldt",
        "A selector means the LDT, and there is none",
        "Bit 2 of a selector picks the LDT instead of the GDT.",
        "SDM vol. 3, 3.4.2",
        "Selectors of the GDT have bit 2 clear: index * 8 + RPL. Is the selector an index that was not multiplied by "
        "8?",
        by_cause(Cause.NO_LDT),
    ),
    Rule(
        "selector-null",
        "A null selector where a segment is needed",
        "CS, SS and TR cannot be loaded with a null selector (SS can in 64-bit mode, rings 0 to 2), and a data segment "
        "register that holds one cannot be used.",
        "SDM vol. 3, 3.4.2 and 5.4.1",
        "Load the segment register with a selector of a descriptor, for instance 0x10.",
        by_cause(Cause.SELECTOR_NULL, Cause.SEGMENT_NULL),
    ),
    Rule(
        "code-descriptor-l-and-d",
        "A code descriptor has both L and D set",
        "L=1 with D=1 is reserved: a 64-bit code segment has L=1 and D=0.",
        "SDM vol. 3, 5.2.1",
        "Clear D: the flags nibble of a 64-bit code descriptor is 0xA (G and L), 0xAF9A000000FFFF for instance.",
        by_cause(Cause.DESCRIPTOR_L_AND_D),
    ),
    Rule(
        "segment-limit",
        "An access goes beyond the limit of its segment",
        "Outside 64-bit mode an offset must be within the segment's limit, else #GP(0), or #SS(0) by SS.",
        "SDM vol. 3, 5.3",
        "Is the offset what you meant? Else give the descriptor a larger limit: 0xFFFFF with G=1 is all 4 GiB. In real "
        "mode no access may cross offset 0xFFFF.",
        by_cause(Cause.SEGMENT_LIMIT),
    ),
    Rule(
        "branch-beyond-segment",
        "A jump leaves its code segment",
        "The target of a jump, call or return must be within the limit of CS, else #GP(0).",
        "SDM vol. 3, 5.3; vol. 2, JMP, CALL, RET",
        "Is the target what you meant (a return address that was overwritten)? Else give the code descriptor a larger "
        "limit.",
        by_cause(Cause.TARGET_BEYOND_LIMIT),
    ),
    Rule(
        "segment-not-writable",
        "A segment does not allow the access",
        "Data is written through a writable data segment only; code segments are never writable in protected mode.",
        "SDM vol. 3, 5.5 and 3.4.5.1",
        "Use a data segment (DS) for data, also for data that lies between code.",
        by_cause(Cause.SEGMENT_NOT_WRITABLE, Cause.SEGMENT_NOT_READABLE),
    ),
)
