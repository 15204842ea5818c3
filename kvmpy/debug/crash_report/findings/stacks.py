"""Mistakes with the stack: where it is, where it grows to, what returns take from it."""

from __future__ import annotations

from kvmpy.debug.crash_report.case import Case
from kvmpy.debug.crash_report.findings.finding import Rule, Suspicion, cause, possible, remark, sentence
from kvmpy.debug.crash_report.findings.overwriting import overwritten_code, overwritten_entries
from kvmpy.debug.crash_report.first_event import Candidate, Cause
from kvmpy.x86.event_delivery import DeliveryFailure
from kvmpy.x86.flags import Cr0
from kvmpy.x86.page_walk import FailureKind

__all__ = ["RULES", "stack_fault"]

_NEAR = 0x200
"""Bytes around the stack pointer that pushes and pops of one instruction may touch."""
_FRAMES_LOOKED_AT = 64
"""Items of the stack."""
_REPEATED = 3
_RETURNS = (0xC2, 0xC3, 0xCA, 0xCB)


def stack_fault(case: Case) -> int | None:
    """The linear address near the stack pointer where a page fault happened, of the instruction or of delivery."""
    if case.first is None:
        return None
    events = [case.first.candidate.event]
    for step in case.first.outcome.steps:
        if isinstance(step, DeliveryFailure) and step.raises is not None:
            events.append(step.raises)
    for event in events:
        if event.vector == 14 and event.address is not None and -_NEAR <= event.address - case.stack <= _NEAR:
            return event.address
    return None


def _fault_in_handler(case: Case) -> Suspicion | None:
    """Frames on the stack that all return to the instruction that is to come: its fault is handled by its fault."""
    if not case.sregs.cr0 & Cr0.PE or not (case.shutdown or case.timed_out):
        return None
    size = 8 if case.execution.bits == 64 else 4
    items = case.execution.stack_items(_FRAMES_LOOKED_AT, size) or []
    frames = sum(
        1
        for index in range(len(items) - 2)
        if items[index] == case.regs.rip
        and items[index + 1] & 0xFFFF == case.sregs.cs.selector
        and items[index + 2] & 0x2A == 2
    )
    if frames < _REPEATED:
        return None
    return cause(
        f"{frames} interrupt frames near the stack pointer return to {case.describe(case.rip)}, the instruction that "
        "is to come: a handler faults, and is called again for that"
    )


def _stack_overflow(case: Case) -> Suspicion | None:
    """The stack pointer is in a page that is there, and the next push is not; or it grew over what it needs."""
    address = stack_fault(case)
    if address is not None:
        failure = case.walk(address).failure
        missing = failure is not None and failure.kind is FailureKind.NOT_PRESENT
        if missing and address < case.stack and case.physical(case.stack) is not None:
            return cause(
                f"The stack pointer {case.describe(case.stack)} has reached the end of its page; below, at "
                f"{address:#x}, nothing is mapped"
            )
    return _grown_over(case)


def _grown_over(case: Case) -> Suspicion | None:
    """Between the stack pointer of the start and the present one lies code, or a page table, that has changed."""
    entry = case.evidence.entry_state
    if entry is None or not entry.regs.rsp - case.regs.rsp > 0:
        return None
    low, high = case.stack, case.stack + (entry.regs.rsp - case.regs.rsp)
    if overwritten_code(case) and low <= case.rip < high:
        return cause(
            f"The stack, which began at {high:#x}, has grown down to {low:#x}, over the code at "
            f"{case.describe(case.rip)}"
        )
    for where, then, now in overwritten_entries(case):
        if low <= where < high:
            return cause(
                f"The stack, which began at {high:#x}, has grown down to {low:#x}, over the page-table entry at "
                f"{where:#x} ({then:#x} before, {now:#x} now)"
            )
    return None


def _stack_not_mapped(case: Case) -> Suspicion | None:
    address = stack_fault(case)
    if address is None or _stack_overflow(case) is not None:
        return None
    walked = case.walk(address)
    if walked.failure is None or walked.failure.kind is FailureKind.NOT_CANONICAL:
        return None
    return cause(f"The stack pointer is {case.describe(case.stack)}; at {address:#x}: {walked.failure}")


def _stack_outside_memory(case: Case) -> Suspicion | None:
    below = case.stack - 8 & 0xFFFF_FFFF_FFFF_FFFF
    physical = case.physical(below)
    if physical is None or case.evidence.registers_lost:
        return None
    if case.memory.contains(physical):
        if case.memory.read_only(physical) and (case.shutdown or case.delivery_failed or case.emulation_failed):
            return cause(f"The stack pointer {case.stack:#x} is in read-only memory: what is pushed is lost")
        return None
    text = f"The stack pointer {case.stack:#x} leads to physical {physical:#x}, where there is no memory"
    touched = any(
        access.kind == "mmio" and physical - 0x1000 <= access.address <= physical + 0x1000
        for access in case.evidence.unclaimed
    )
    if touched:
        return cause(f"{text}: what was pushed there is lost, and what is popped is all ones")
    if case.delivery_failed or case.shutdown:
        return cause(text)
    return remark(text)


def _misaligned_stack(case: Case) -> Suspicion | None:
    candidate = case.blamed(Cause.MISALIGNED)
    decoded = case.execution.decoded
    if candidate is None or decoded is None or decoded.memory is None:
        return None
    if decoded.memory.base not in (4, 5):  # RSP, RBP
        return None
    rsp = case.regs.rsp
    return cause(f"{sentence(candidate.text)}; RSP is {rsp:#x}, which is {rsp % 16} more than a multiple of 16")


def _return_to_garbage(case: Case) -> Suspicion | None:
    """A return took an address from the stack where no code is."""
    candidate = case.blamed(Cause.TARGET_NOT_CANONICAL, Cause.TARGET_BEYOND_LIMIT)
    decoded = case.execution.decoded
    if candidate is not None and decoded is not None and decoded.opcode in _RETURNS:
        return cause(f"The return at {case.describe(case.rip)} takes its target from {case.stack:#x}: {candidate.text}")
    if not (case.fetch_failed or _fetch_faulted(case)):
        return None
    size = case.execution.bits // 8
    popped = case.execution.stack_items(1, size, skip=-size)
    if popped is None or popped[0] != case.regs.rip:
        return None
    place = case.stack - size
    weigh = cause if popped[0] else possible  # there are zeros everywhere
    return weigh(
        f"RIP is {case.regs.rip:#x}, the value that stands at {place:#x}, just below the stack pointer: a return took "
        "it from there"
    )


def _fetch_faulted(case: Case) -> Candidate | None:
    first = case.first
    if first is None:
        return None
    candidate = first.candidate
    return candidate if candidate.values.get("fetch") else None


RULES = (
    Rule(
        "fault-in-handler",
        "A handler faults itself, again and again",
        "An exception in a handler is delivered as any other; when the handler of that is the same code, only the end "
        "of the stack ends it.",
        "SDM vol. 3, 6.5 and 6.15",
        "Look at the first exception (the oldest frame, highest on the stack), and at what the handler does at its "
        "start.",
        _fault_in_handler,
    ),
    Rule(
        "return-to-garbage",
        "A return went to an address that is none",
        "RET takes whatever stands on top of the stack for the address to go on at.",
        "SDM vol. 2, RET",
        "Look at the stack below: every push needs its pop, a buffer on the stack may have been overrun, and a "
        "function must not be left by RET that was entered without CALL.",
        _return_to_garbage,
    ),
    Rule(
        "stack-overflow",
        "The stack has overflowed",
        "The stack grows down, without any check but those of segment limits and page tables.",
        "SDM vol. 1, 6.2",
        "Give it more room, or end the recursion; a page that is not mapped below the stack turns the overflow into a "
        "#PF whose handler needs a stack of its own (IST).",
        _stack_overflow,
    ),
    Rule(
        "stack-not-mapped",
        "The stack is not mapped",
        "Pushes, calls and the delivery of exceptions write below the stack pointer through the page tables.",
        "SDM vol. 3, 6.12 and 4.7",
        "Set RSP to the top of mapped, writable memory before the first push, call or exception.",
        _stack_not_mapped,
    ),
    Rule(
        "stack-outside-memory",
        "The stack is where there is no memory",
        "A stack must be in RAM: an access to other addresses goes to a device, or to nobody.",
        "KVM API, chapter 5, KVM_EXIT_MMIO",
        "Set the stack pointer to the top of RAM that the machine has (the memory map is below), or give it more "
        "memory.",
        _stack_outside_memory,
    ),
    Rule(
        "stack-misaligned",
        "The stack is not aligned to 16 bytes",
        "MOVAPS and its like need addresses that are multiples of 16, else #GP(0). The System V ABI wants RSP to be so "
        "at every call, and compilers rely on it.",
        "SDM vol. 1, 10.4.1.1; System V ABI for AMD64, 3.2.2",
        "Align RSP to 16 before calling C code: at the first instruction of a function it is 8 more than a multiple of "
        "16.",
        _misaligned_stack,
    ),
)
