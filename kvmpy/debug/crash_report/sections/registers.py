"""Registers with decoded flags, segments and tables; what is odd about them is marked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvmpy.debug.crash_report.case import Case
from kvmpy.debug.crash_report.sections.section import Contents, SectionBuilder
from kvmpy.x86.flags import Cr0, Cr4, Efer, Rflags
from kvmpy.x86.register_text import general_registers_text, system_registers_text
from kvmpy.x86.registers import GENERAL_REGISTERS, SEGMENT_REGISTERS

__all__ = ["REGISTERS", "remarkable"]


def _fill(case: Case, contents: Contents) -> None:
    notes: dict[str, list[str]] = {}
    for name, text in remarkable(case):
        notes.setdefault(name, []).append(text)
    if case.evidence.registers_lost:
        contents.add("KVM has reset the processor; these are the registers that the guest started with:", mark=True)
    text = f"{general_registers_text(case.regs)}\n{system_registers_text(case.sregs)}"
    for line in text.split("\n"):
        about = notes.get(line.split(" ", 1)[0], [])
        contents.add(f"{line}  <- {'; '.join(about)}" if about else line, mark=bool(about))
    contents.data = _data(case)
    contents.data["remarks"] = [{"register": name, "text": note} for name, found in notes.items() for note in found]


def _data(case: Case) -> dict[str, Any]:
    sregs = case.sregs
    segments = {}
    for name in SEGMENT_REGISTERS:
        segment = getattr(sregs, name)
        segments[name] = {field: getattr(segment, field) for field in segment.__slots__}
    return {
        "general": {name: getattr(case.regs, name) for name in GENERAL_REGISTERS},
        "control": {name: getattr(sregs, name) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")},
        "segments": segments,
        "tables": {name: {"base": table.base, "limit": table.limit} for name, table in _tables(case)},
        "interrupt": sregs.interrupt,
    }


def _tables(case: Case) -> tuple[tuple[str, Any], ...]:
    return ("gdt", case.sregs.gdt), ("idt", case.sregs.idt)


def remarkable(case: Case) -> Iterator[tuple[str, str]]:
    """(register, what is odd about it): combinations that are wrong, or that beginners do not expect."""
    regs, sregs = case.regs, case.sregs
    cr0, cr4, efer, cs = sregs.cr0, sregs.cr4, sregs.efer, sregs.cs
    protected = bool(cr0 & Cr0.PE)
    if cr0 & Cr0.PG and not protected:
        yield "cr0", "PG without PE"
    if efer & Efer.LME and cr0 & Cr0.PG and not efer & Efer.LMA:
        yield "efer", "LME and paging, but not LMA"
    if efer & Efer.LMA and not cr4 & Cr4.PAE:
        yield "cr4", "long mode without PAE"
    if efer & Efer.LME and not efer & Efer.LMA:
        yield "efer", "long mode is prepared (LME), not active (LMA)"
    if cs.l and not efer & Efer.LMA:
        yield "cs", "L=1 (64-bit code) with EFER.LMA=0"
    if cs.l and cs.db:
        yield "cs", "L=1 with D=1 is reserved"
    if efer & Efer.LMA and not cs.l:
        yield "cs", "compatibility mode: not 64-bit code"
    if protected and not regs.rflags & Rflags.VM and cs.selector & 3 != sregs.ss.dpl:
        yield "cs", f"RPL {cs.selector & 3}, while SS says ring {sregs.ss.dpl}"
    if protected and (not cs.s or not cs.type & 8):
        yield "cs", "not a code segment"
    for name, table in _tables(case):
        if protected and table.limit == 0:
            yield name, "empty"
        elif protected and table.base == 0 and table.limit in (0x3FF, 0xFFFF):
            yield name, "as in real mode: never loaded"
    yield from _flag_remarks(case)


def _flag_remarks(case: Case) -> Iterator[tuple[str, str]]:
    rflags, cr0 = case.regs.rflags, case.sregs.cr0
    if not rflags & Rflags.IF and case.timed_out:
        yield "rflags", "interrupts are off (IF=0)"
    if rflags & Rflags.TF:
        yield "rflags", "single stepping (TF=1)"
    if rflags & Rflags.NT:
        yield "rflags", "NT=1: IRET would switch tasks"
    if rflags & Rflags.DF:
        yield "rflags", "string instructions go downwards (DF=1)"
    if not rflags & Rflags.FIXED1:
        yield "rflags", "bit 1 is never 0"
    if cr0 & Cr0.PG and not cr0 & Cr0.WP:
        yield "cr0", "WP=0: ring 0 may write to read-only pages"
    if case.execution.bits == 64 and case.regs.rsp % 8:
        yield "rsp", "not a multiple of 8"


REGISTERS = SectionBuilder("registers", "Registers", _fill)
