"""Mistakes with the TSS and the stacks in it (SDM vol. 3, chapter 7 and 6.14.4)."""

from __future__ import annotations

from kvmpy.debug.crash_report.case import Case
from kvmpy.debug.crash_report.findings.finding import Rule, Suspicion, by_cause, cause, remark
from kvmpy.debug.crash_report.findings.interrupts import code_segment_of, gate_of, undelivered
from kvmpy.debug.crash_report.findings.stacks import stack_fault
from kvmpy.debug.crash_report.first_event import Cause, read_linear

__all__ = ["RULES", "stack_slot"]

_BYTES64, _BYTES32, _BYTES16 = 8, 6, 4


def stack_slot(case: Case) -> tuple[str, int, int] | None:
    """(name, offset, bytes) of the stack in the TSS that the first event's handler needs; None: it needs none."""
    first = undelivered(case)
    if first is None:
        return None
    gate = gate_of(case, first.candidate.event.vector)
    if gate is None or not gate.present:
        return None
    if gate.ist:
        return f"IST{gate.ist}", 0x1C + 8 * gate.ist, _BYTES64
    code = code_segment_of(case, gate)
    if code is None or code.type & 4 or code.dpl >= case.execution.cpl:
        return None
    ring = code.dpl
    if case.execution.long_mode:
        return f"RSP{ring}", 4 + 8 * ring, _BYTES64
    if case.sregs.tr.type in (1, 3):
        return f"SS{ring}:SP{ring}", 2 + 4 * ring, _BYTES16
    return f"SS{ring}:ESP{ring}", 4 + 8 * ring, _BYTES32


def _tss_missing(case: Case) -> Suspicion | None:
    slot, tr = stack_slot(case), case.sregs.tr
    if slot is None:
        return None
    if tr.unusable or not tr.selector & 0xFFFC:
        return cause(f"TR is null: LTR was never executed, and the handler needs {slot[0]} of the TSS")
    if tr.base == 0 and not any(read_linear(case.memory, case.state, 0, 0x68)):
        return cause(
            f"TR ({tr.selector:#06x}) has base 0, where there are only zeros: no TSS was set up, and the handler needs "
            f"{slot[0]}"
        )
    return None


def _tss_too_small(case: Case) -> Suspicion | None:
    slot, tr = stack_slot(case), case.sregs.tr
    if slot is None or tr.unusable:
        return None
    name, offset, size = slot
    if offset + size - 1 <= tr.limit:
        return None
    return cause(f"{name} ends at offset {offset + size - 1:#x} of the TSS, whose limit is {tr.limit:#x}")


def _tss_stack(case: Case) -> Suspicion | None:
    slot, tr = stack_slot(case), case.sregs.tr
    if slot is None or tr.unusable or slot[1] + slot[2] - 1 > tr.limit:
        return None
    name, offset, size = slot
    data = read_linear(case.memory, case.state, tr.base + offset, size)
    if len(data) < size:
        return cause(f"The TSS at {tr.base:#x} is not in memory, and the handler needs {name}")
    pointer = int.from_bytes(data[: size - 2 if size != _BYTES64 else 8], "little")
    if case.execution.bits != 64 and size != _BYTES64:
        return None  # SS is in play: the chain of events says what is wrong
    if pointer == 0:
        return cause(f"{name} in the TSS at {tr.base:#x} is 0")
    if not case.in_memory(pointer - 8 & 0xFFFF_FFFF_FFFF_FFFF):
        walked = case.walk(pointer - 8)
        why = str(walked.failure) if walked.failure is not None else "there is no memory"
        return cause(f"{name} in the TSS at {tr.base:#x} is {case.describe(pointer)}, and below it: {why}")
    return None


def _stack_segment_of_tss(case: Case) -> Suspicion | None:
    slot, first = stack_slot(case), undelivered(case)
    if slot is None or first is None or slot[2] == _BYTES64 or first.first_failure is None:
        return None
    reason = first.first_failure.reason
    return cause(f"{slot[0]} cannot be loaded: {reason}") if reason.startswith("ss") else None


def _no_double_fault_stack(case: Case) -> Suspicion | None:
    first = undelivered(case)
    if first is None or not first.shuts_down or not case.execution.long_mode or stack_fault(case) is None:
        return None
    gate = gate_of(case, 8)
    if gate is None or not gate.present or gate.ist:
        return None
    return remark("The gate of #DF names no interrupt stack (IST), so the bad stack stopped its handler, too")


RULES = (
    Rule(
        "tss-missing",
        "There is no TSS",
        "An interrupt or exception that goes to a more privileged ring takes its stack from the TSS that TR points to.",
        "SDM vol. 3, 6.12.1 and 7.2",
        "Build a TSS of 0x68 bytes with RSP0 (ESP0 and SS0), put a descriptor of type 0x89 into the GDT, and execute "
        "LTR before the first program of ring 3 runs.",
        _tss_missing,
    ),
    Rule(
        "tss-too-small",
        "The TSS is too small",
        "The stack pointer for the handler's ring, or its IST, must lie within the TSS limit, else #TS.",
        "SDM vol. 3, 7.2.1 and 6.14.4",
        "Give the TSS descriptor a limit of at least 0x67.",
        _tss_too_small,
    ),
    Rule(
        "tss-stack",
        "The stack in the TSS cannot be used",
        "The processor pushes the frame of an inner handler to the address in RSP0 (ESP0) or the IST, which must be "
        "mapped and writable.",
        "SDM vol. 3, 6.12.1 and 6.14.4",
        "Write the top of a mapped kernel stack into the TSS (offset 4 for RSP0 and ESP0, 8 for SS0).",
        _tss_stack,
    ),
    Rule(
        "tss-stack-segment",
        "The stack segment in the TSS cannot be loaded",
        "SS0 in a 32-bit TSS must be a selector of a writable data segment of ring 0, with RPL 0.",
        "SDM vol. 3, 6.12.1",
        "Write the selector of your kernel's data segment, 0x10 for instance, to offset 8 of the TSS.",
        _stack_segment_of_tss,
    ),
    Rule(
        "tss-busy",
        "LTR of a TSS that is busy",
        "LTR takes an available TSS (type 9) and marks it busy (11); a busy one raises #GP(selector).",
        "SDM vol. 2, LTR",
        "Execute LTR once for each TSS; every processor needs one of its own.",
        by_cause(Cause.TSS_BUSY),
    ),
    Rule(
        "double-fault-stack",
        "The double fault handler runs on the stack that is broken",
        "A gate with an IST number switches to a known good stack.",
        "SDM vol. 3, 6.14.5",
        "Give #DF an IST entry of the TSS with a stack of its own: it can then report what happened.",
        _no_double_fault_stack,
    ),
)
