"""Mistakes with the IDT, its gates and handlers (SDM vol. 3, chapter 6)."""

from __future__ import annotations

from kvmpy.debug.crash_report.case import Case
from kvmpy.debug.crash_report.explanation import Explanation
from kvmpy.debug.crash_report.findings.finding import Rule, Suspicion, by_cause, cause, contributes
from kvmpy.debug.crash_report.first_event import Cause, read_linear
from kvmpy.debug.crash_report.first_event.memory_faults import is_canonical
from kvmpy.x86.descriptors import decode_segment
from kvmpy.x86.event_delivery.event import exception_name
from kvmpy.x86.flags import Cr0
from kvmpy.x86.gates import Gate
from kvmpy.x86.register_text import segment_type_text
from kvmpy.x86.registers import Segment

__all__ = ["RULES", "code_segment_of", "gate_bytes", "gate_of", "undelivered"]

_ASKED_FOR = (Cause.SOFTWARE_INTERRUPT, Cause.BREAKPOINT, Cause.INTERRUPT)
_IRET = 0xCF


def undelivered(case: Case) -> Explanation | None:
    """The first event, when its own delivery failed in protected or long mode."""
    first = case.first
    if first is None or first.first_failure is None or not case.sregs.cr0 & Cr0.PE:
        return None
    return first


def gate_bytes(case: Case, vector: int) -> bytes:
    """The gate as it stands in memory, whatever the limit says; fewer bytes where memory ends."""
    size = 16 if case.execution.long_mode else 8
    return read_linear(case.memory, case.state, case.sregs.idt.base + vector * size, size)


def gate_of(case: Case, vector: int) -> Gate | None:
    """The gate, when there is one of a type that the mode has."""
    data = gate_bytes(case, vector)
    long_mode = case.execution.long_mode
    return Gate.decode(data, long_mode=long_mode) if len(data) == (16 if long_mode else 8) else None


def code_segment_of(case: Case, gate: Gate) -> Segment | None:
    """The descriptor that a gate's selector picks from the GDT, when it can be read."""
    gdt = case.sregs.gdt
    if gate.selector & 0xFFFC == 0 or gate.selector & 4 or gate.selector | 7 > gdt.limit:
        return None
    data = read_linear(case.memory, case.state, gdt.base + (gate.selector & 0xFFF8), 8)
    return decode_segment(data, gate.selector) if len(data) == 8 else None


def _wanted(case: Case, first: Explanation) -> bool:
    """Whether the guest meant the event to be handled: it asked for it, or it comes from a program in ring 3."""
    return first.candidate.cause in _ASKED_FOR or case.execution.cpl == 3


def _weigh(wanted: bool, text: str) -> Suspicion:
    return cause(text) if wanted else contributes(text)


def _name(vector: int) -> str:
    return exception_name(vector) if vector < 32 else f"interrupt {vector:#04x}"


def _never_loaded(case: Case) -> bool:
    """IDTR is empty, or still as it was in real mode or at the start."""
    idt, entry = case.sregs.idt, case.evidence.entry_state
    if idt.limit == 0:
        return True
    unchanged = entry is None or entry.sregs.idt == idt
    return idt.base == 0 and idt.limit in (0x3FF, 0xFFFF) and unchanged


def _idt_not_loaded(case: Case) -> Suspicion | None:
    first = undelivered(case)
    if first is None or not _never_loaded(case):
        return None
    idt = case.sregs.idt
    text = f"IDTR has base {idt.base:#x} and limit {idt.limit:#x}: no exception or interrupt can be delivered"
    return _weigh(_wanted(case, first), text)


def _idt_limit(case: Case) -> Suspicion | None:
    first = undelivered(case)
    if first is None or _never_loaded(case):
        return None
    vector, idt = first.candidate.event.vector, case.sregs.idt
    size = 16 if case.execution.long_mode else 8
    if vector * size + size - 1 <= idt.limit:
        return None
    gate = gate_of(case, vector)
    there = gate is not None and gate.present and gate.offset
    text = (
        f"the IDT limit {idt.limit:#x} ends after vector {(idt.limit + 1) // size - 1:#x}; {_name(vector)} needs "
        f"{vector * size + size - 1:#x}"
    )
    if there:
        return cause(f"{text}. A gate for it is in memory behind the limit")
    return _weigh(_wanted(case, first), text[:1].upper() + text[1:])


def _gate_not_present(case: Case) -> Suspicion | None:
    found = _gate_within_limit(case)
    if found is None:
        return None
    first, vector, data = found
    gate = gate_of(case, vector)
    if any(data) and (gate is None or gate.present):
        return None
    if gate is None:
        text = f"The gate of {_name(vector)} is empty (all zero): no handler was ever installed"
        return _weigh(_wanted(case, first), text)
    return cause(f"The gate of {_name(vector)} names a handler at {case.describe(gate.offset)}, but its P bit is 0")


def _gate_within_limit(case: Case) -> tuple[Explanation, int, bytes] | None:
    first = undelivered(case)
    if first is None or _never_loaded(case):
        return None
    vector = first.candidate.event.vector
    data = gate_bytes(case, vector)
    size = 16 if case.execution.long_mode else 8
    if len(data) < size or vector * size + size - 1 > case.sregs.idt.limit:
        return None
    return first, vector, data


def _gate_type(case: Case) -> Suspicion | None:
    found = _gate_within_limit(case)
    if found is None:
        return None
    _, vector, data = found
    gate = gate_of(case, vector)
    if not any(data) or (gate is not None and gate.kind != "call"):
        return None
    text = f"The gate of {_name(vector)} has access byte {data[5]:#04x}, which is no interrupt or trap gate"
    text += _eight_byte_gates(case, vector)
    return cause(text)


def _eight_byte_gates(case: Case, vector: int) -> str:
    """A hint for a table of the wrong form; nothing when it does not look like that."""
    if not case.execution.long_mode:
        return ""
    data = read_linear(case.memory, case.state, case.sregs.idt.base + 8 * vector, 8)
    gate = Gate.decode(data) if len(data) == 8 else None
    if gate is None or not gate.present or not gate.offset:
        return ""
    return "; the table seems to have gates of 8 bytes, as in protected mode, and not of 16"


def _gate_handler(case: Case) -> Suspicion | None:
    found = _gate_within_limit(case)
    gate = gate_of(case, found[1]) if found is not None else None
    if found is None or gate is None or not gate.present or gate.kind not in ("interrupt", "trap"):
        return None
    what = f"The gate of {_name(found[1])} names a handler at {case.describe(gate.offset)}"
    if case.execution.long_mode:
        if is_canonical(case.execution, gate.offset):
            return None
        return cause(f"{what}, which is not canonical{_eight_byte_gates(case, found[1])}")
    code = code_segment_of(case, gate)
    if code is None or gate.offset <= code.limit:
        return None
    return cause(f"{what}, beyond the limit {code.limit:#x} of its segment")


def _gate_selector(case: Case) -> Suspicion | None:
    found = _gate_within_limit(case)
    gate = gate_of(case, found[1]) if found is not None else None
    if found is None or gate is None or not gate.present or gate.kind not in ("interrupt", "trap"):
        return None
    name, selector = _name(found[1]), gate.selector
    what = f"The gate of {name} has code selector {selector:#06x}"
    if selector & 0xFFFC == 0:
        return cause(f"{what}, which is null")
    if selector & 4:
        return None
    gdt = case.sregs.gdt
    if selector | 7 > gdt.limit:
        return cause(f"{what}, which is beyond the GDT limit {gdt.limit:#x}")
    code = code_segment_of(case, gate)
    if code is None:
        return None
    if not (code.s and code.type & 8):
        return cause(f"{what}, which picks no code segment, but: {segment_type_text(code)}")
    if code.dpl > case.execution.cpl:
        return cause(f"{what}, whose DPL {code.dpl} is less privileged than CPL {case.execution.cpl}")
    if case.execution.long_mode and (not code.l or code.db):
        return cause(f"{what}, which is not 64-bit code (L={code.l}, D={code.db}); handlers in long mode are")
    if not code.present:
        return cause(f"{what}, which picks a segment that is not present")
    return None


def _gate_privilege(case: Case) -> Suspicion | None:
    found = _gate_within_limit(case)
    gate = gate_of(case, found[1]) if found is not None else None
    if found is None or gate is None or not found[0].candidate.event.software or gate.dpl >= case.execution.cpl:
        return None
    return cause(
        f"The gate of {_name(found[1])} has DPL {gate.dpl}, and the instruction is in ring {case.execution.cpl}"
    )


def _error_code_not_popped(case: Case) -> Suspicion | None:
    """At IRET, the frame is one item further up than the stack pointer."""
    execution = case.execution
    decoded = execution.decoded
    first = case.first
    if decoded is None or decoded.opcode != _IRET or not execution.protected or first is None:
        return None
    items = execution.stack_items(4, decoded.operand_bits // 8)
    if items is None or items[0] > 0xFFFF:
        return None
    error_code, offset, selector, flags = items
    gate = Gate("interrupt", 0, selector & 0xFFFF)
    code = code_segment_of(case, gate) if selector <= 0xFFFF else None
    if code is None or not (code.s and code.type & 8) or not flags & 2 or flags & 0x28:
        return None
    return cause(
        f"IRET takes {error_code:#x} for the return address; the frame begins one item further up "
        f"({case.describe(offset)}, CS {selector:#x}, flags {flags:#x})"
    )


def _pic_not_remapped(case: Case) -> Suspicion | None:
    candidate = case.blamed(Cause.INTERRUPT)
    controllers = case.evidence.controllers
    if candidate is None or controllers is None or not case.sregs.cr0 & Cr0.PE:
        return None
    vector = candidate.event.vector
    for index, pic in enumerate(controllers.pics):
        if vector < 0x20 and pic.base <= vector < pic.base + 8:
            line = vector - pic.base + 8 * index
            return cause(
                f"IRQ {line} arrived as vector {vector:#04x}, which is {_name(vector)} in protected mode; the PIC's "
                f"base is {pic.base:#x}{'' if pic.initialized else ' (it was never initialized)'}"
            )
    return None


RULES = (
    Rule(
        "error-code-not-popped",
        "IRET finds the error code on top of its frame",
        "#DF, #TS, #NP, #SS, #GP, #PF and #AC push an error code, which the handler must remove before IRET.",
        "SDM vol. 3, 6.12.1 and 6.13",
        "Add 8 to RSP (4 to ESP) before IRET in handlers of vectors 8, 10 to 14 and 17.",
        _error_code_not_popped,
    ),
    Rule(
        "pic-not-remapped",
        "A hardware interrupt arrives as an exception vector",
        "The PIC's vectors (0 or 8 on) collide with the exceptions 0 to 31 of protected mode.",
        "SDM vol. 3, 6.2; Intel 8259A data sheet, ICW2",
        "Initialize both PICs with ICW1 to ICW4 and bases such as 0x20 and 0x28, or mask them (0xFF to ports 0x21 and "
        "0xA1), before STI.",
        _pic_not_remapped,
    ),
    Rule(
        "idt-not-loaded",
        "No IDT was loaded",
        "In protected and long mode events are delivered through the gates of the table that IDTR points to; real "
        "mode's table does not serve.",
        "SDM vol. 3, 6.10 and 9.8.1",
        "Build an IDT with a gate at least for #DF (8), #GP (13) and #PF (14) and load it with LIDT before anything "
        "can fault.",
        _idt_not_loaded,
    ),
    Rule(
        "idt-limit-too-small",
        "The IDT ends before the vector",
        "A vector whose gate is not wholly within the IDT limit raises #GP(vector * 8 + 2).",
        "SDM vol. 3, 6.10",
        "The limit in LIDT's operand is the size in bytes minus 1; a gate has 8 bytes in protected and 16 in long "
        "mode: 0x7FF or 0xFFF for all 256.",
        _idt_limit,
    ),
    Rule(
        "gate-not-present",
        "The vector has no handler",
        "A gate with P=0 raises #NP(vector * 8 + 2); one of zeros #GP.",
        "SDM vol. 3, 6.11",
        "Install a gate for the vector, with access byte 0x8E (interrupt gate, present, DPL 0).",
        _gate_not_present,
    ),
    Rule(
        "gate-type",
        "A gate has a type that cannot be used here",
        "The IDT takes interrupt gates (type 0xE), trap gates (0xF) and, outside long mode, task gates and 16-bit "
        "gates; in long mode each gate has 16 bytes.",
        "SDM vol. 3, 6.11 and 6.14.1",
        "Set the access byte to 0x8E, and check the layout of the table.",
        _gate_type,
    ),
    Rule(
        "gate-selector",
        "A gate's code selector is wrong",
        "A gate must name a present code segment of at most the current privilege level; in long mode a 64-bit one.",
        "SDM vol. 3, 6.12.1 and 6.14",
        "Put the selector of your kernel's code segment into the gate (bytes 2 and 3), 0x08 for instance.",
        _gate_selector,
    ),
    Rule(
        "gate-handler",
        "A gate's handler has an impossible address",
        "The offset in a gate must be within the code segment, in 64-bit mode canonical, else #GP(0).",
        "SDM vol. 3, 6.12.1.3 and 6.14; vol. 2, INT n",
        "The offset stands in three pieces in a gate: bytes 0 and 1, 6 and 7, and in long mode 8 to 11. In long mode "
        "each gate has 16 bytes.",
        _gate_handler,
    ),
    Rule(
        "gate-privilege",
        "Ring 3 may not use this gate by INT n",
        "INT n, INT3 and INTO need CPL <= DPL of the gate.",
        "SDM vol. 3, 6.12.1.1",
        "Give the gate DPL 3 (access byte 0xEE), if programs shall use it.",
        _gate_privilege,
    ),
    Rule(
        "nested-task-flag",
        "IRET with RFLAGS.NT set",
        "IRET with NT=1 returns to another task, which long mode does not have.",
        "SDM vol. 2, IRET; vol. 3, 7.4",
        "Clear NT (bit 14 of RFLAGS) at the start, for instance by PUSH 2, POPF.",
        by_cause(Cause.NESTED_TASK),
    ),
)
