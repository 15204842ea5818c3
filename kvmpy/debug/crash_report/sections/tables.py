"""The tables that play a part: gates, vectors, the GDT in short, the TSS."""

from __future__ import annotations

from kvmpy.debug.crash_report.case import Case
from kvmpy.debug.crash_report.findings.interrupts import gate_bytes, gate_of
from kvmpy.debug.crash_report.findings.task_state import stack_slot
from kvmpy.debug.crash_report.first_event import Cause, read_linear
from kvmpy.debug.crash_report.sections.section import Contents, SectionBuilder
from kvmpy.x86.descriptors import Gdt
from kvmpy.x86.event_delivery.event import exception_name
from kvmpy.x86.flags import Cr0
from kvmpy.x86.gates import Gate
from kvmpy.x86.register_text import segment_type_text
from kvmpy.x86.task_state import TSS_SIZE, Tss32, Tss64

__all__ = ["TABLES"]

_MOST_DESCRIPTORS = 16
_SELECTOR_CAUSES = frozenset(
    (
        Cause.SELECTOR_NULL,
        Cause.SELECTOR_BEYOND_LIMIT,
        Cause.DESCRIPTOR_EMPTY,
        Cause.DESCRIPTOR_TYPE,
        Cause.DESCRIPTOR_PRIVILEGE,
        Cause.DESCRIPTOR_NOT_PRESENT,
        Cause.DESCRIPTOR_L_AND_D,
        Cause.TSS_BUSY,
        Cause.SEGMENT_LIMIT,
        Cause.SEGMENT_NULL,
    )
)


def _fill(case: Case, contents: Contents) -> None:
    contents.data = {}
    vectors = []
    if case.first is not None:
        vectors = list(dict.fromkeys(step.event.vector for step in case.first.outcome.steps))
    if vectors and case.sregs.cr0 & Cr0.PE:
        _gates(case, contents, vectors)
    elif vectors or not case.sregs.cr0 & Cr0.PE:
        _vectors(case, contents, vectors)
    involved = case.first is not None and case.first.candidate.cause in _SELECTOR_CAUSES
    if case.sregs.cr0 & Cr0.PE and (involved or vectors):
        _gdt(case, contents)
    if stack_slot(case) is not None:
        _tss(case, contents)


def _gates(case: Case, contents: Contents, vectors: list[int]) -> None:
    idt = case.sregs.idt
    contents.heading(f"IDT at {idt.base:#x}, limit {idt.limit:#x}:")
    contents.data["gates"] = []
    size = 16 if case.execution.long_mode else 8
    for vector in vectors:
        place = idt.base + size * vector
        data = gate_bytes(case, vector)
        outside = size * vector + size - 1 > idt.limit
        text = _gate_text(case, gate_of(case, vector), data) + (" (beyond the limit)" if outside else "")
        contents.indented([f"{vector:#04x} {_name(vector):<4} at {place:#x}: {data.hex(' ')}", f"     {text}"])
        contents.data["gates"].append({"vector": vector, "address": place, "bytes": data.hex(), "text": text})


def _name(vector: int) -> str:
    return exception_name(vector) if vector < 32 else ""


def _gate_text(case: Case, gate: Gate | None, data: bytes) -> str:
    if not data:
        return "cannot be read"
    if not any(data):
        return "empty"
    if gate is None:
        return f"no gate of this mode (access byte {data[5] if len(data) > 5 else 0:#04x})"
    present = "" if gate.present else ", not present"
    ist = f", IST {gate.ist}" if gate.ist else ""
    where = f"{gate.selector:#06x}:{case.describe(gate.offset)}"
    return f"{gate.bits}-bit {gate.kind} gate to {where}, DPL {gate.dpl}{ist}{present}"


def _vectors(case: Case, contents: Contents, vectors: list[int]) -> None:
    """The vector table of real mode, as far as it says something."""
    base = case.sregs.idt.base
    table = read_linear(case.memory, case.state, base, 0x400)
    entries = [int.from_bytes(table[at : at + 4], "little") for at in range(0, len(table) - 3, 4)]
    filled = [(vector, entry) for vector, entry in enumerate(entries) if entry]
    contents.heading(f"Interrupt vector table at {base:#x}: {len(filled)} of {len(entries)} entries are not 0000:0000")
    shown = [(vector, entries[vector]) for vector in vectors if vector < len(entries)]
    shown += [pair for pair in filled if pair[0] not in vectors][: max(0, 8 - len(shown))]
    for vector, entry in shown:
        contents.indented([f"{vector:#04x} {_name(vector):<4} {entry >> 16:04x}:{entry & 0xFFFF:04x}"])
    contents.data["vectors"] = [{"vector": vector, "segment": e >> 16, "offset": e & 0xFFFF} for vector, e in shown]


def _gdt(case: Case, contents: Contents) -> None:
    gdt = case.sregs.gdt
    length = min(gdt.limit + 1, 8 * _MOST_DESCRIPTORS)
    data = read_linear(case.memory, case.state, gdt.base, length)
    contents.heading(f"GDT at {gdt.base:#x}, limit {gdt.limit:#x}:")
    contents.data["gdt"] = []
    if len(data) < length:
        contents.indented([f"only {len(data):#x} bytes of it can be read"])
    for selector, entry in Gdt.decode(data, long_mode=case.execution.long_mode):
        if entry is None:
            text = "empty"
        elif isinstance(entry, Gate):
            text = f"{entry.kind} gate to {entry.selector:#06x}:{entry.offset:#x}, DPL {entry.dpl}"
        else:
            width = ("64 bits" if entry.l else "32 bits" if entry.db else "16 bits") if entry.s else ""
            words = [segment_type_text(entry), width, f"DPL {entry.dpl}", "" if entry.present else "not present"]
            text = f"base {entry.base:#010x} limit {entry.limit:#010x} {', '.join(word for word in words if word)}"
        contents.indented([f"{selector:#06x} {text}"])
        contents.data["gdt"].append({"selector": selector, "text": text})


def _tss(case: Case, contents: Contents) -> None:
    tr = case.sregs.tr
    contents.heading(f"TSS at {tr.base:#x}, limit {tr.limit:#x} (TR {tr.selector:#06x}):")
    data = read_linear(case.memory, case.state, tr.base, TSS_SIZE)
    if len(data) < TSS_SIZE:
        contents.indented(["cannot be read"])
        return
    fields: dict[str, int] = {}
    if case.execution.long_mode:
        wide = Tss64.decode(data)
        fields = {name: getattr(wide, name) for name in ("rsp0", "rsp1", "rsp2", "ist1", "ist2", "ist3")}
    else:
        narrow = Tss32.decode(data)
        fields = {name: getattr(narrow, name) for name in ("ss0", "esp0", "ss1", "esp1", "ss2", "esp2")}
    contents.indented([" ".join(f"{name}={value:#x}" for name, value in fields.items())])
    contents.data["tss"] = {"base": tr.base, "limit": tr.limit, **fields}


TABLES = SectionBuilder("tables", "Tables", _fill)
