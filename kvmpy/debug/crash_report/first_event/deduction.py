"""What may have begun the end: KVM reports a shutdown, but not the exception that led to it.

It is deduced from the instruction at RIP: what it would raise in the present state, checked in the processor's order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvmpy.debug.crash_report.first_event.candidate import Candidate, Cause
from kvmpy.debug.crash_report.first_event.execution import Execution
from kvmpy.debug.crash_report.first_event.instruction_faults import (
    completed_software_event,
    divide_fault,
    privilege_fault,
    software_event,
    undefined_fault,
    unit_fault,
)
from kvmpy.debug.crash_report.first_event.memory_access import memory_accesses
from kvmpy.debug.crash_report.first_event.memory_faults import access_fault, fetch_fault
from kvmpy.debug.crash_report.first_event.register_faults import branch_fault, register_fault
from kvmpy.debug.crash_report.first_event.selector_faults import (
    far_transfer_fault,
    segment_load_fault,
    system_selector_fault,
)
from kvmpy.errors import UsageError
from kvmpy.x86.event_delivery import Event
from kvmpy.x86.flags import Rflags

__all__ = ["instruction_candidates", "interrupt_candidates", "recorded_candidate"]


def instruction_candidates(execution: Execution, exits: Sequence[object] = ()) -> list[Candidate]:
    """What the instruction raises, in the processor's order. An instruction raises one exception: the first certain
    one ends the list. `exits` are the last ones: they show whether the instruction before RIP was completed by kvmpy.
    """
    completed = completed_software_event(execution, exits)
    if completed is not None:
        return [completed]
    found: list[Candidate] = []
    for candidate in _faults(execution):
        found.append(candidate)
        if candidate.certain:
            break
    return found


def _faults(execution: Execution) -> Iterator[Candidate]:
    fetch = fetch_fault(execution)
    if fetch is not None:
        yield fetch
        return
    for check in (undefined_fault, unit_fault, privilege_fault):
        if (fault := check(execution)) is not None:
            yield fault
    if execution.decoded is not None:
        for access in memory_accesses(execution, execution.decoded):
            if (fault := access_fault(execution, access)) is not None:
                yield fault
                break
    for check in (
        divide_fault,
        segment_load_fault,
        far_transfer_fault,
        system_selector_fault,
        register_fault,
        branch_fault,
    ):
        if (fault := check(execution)) is not None:
            yield fault
    yield from software_event(execution)


def interrupt_candidates(execution: Execution, vectors: Sequence[int]) -> list[Candidate]:
    """Interrupts that were on their way, when the processor takes them. No instruction causes them."""
    if not execution.regs.rflags & Rflags.IF:
        return []
    return [
        Candidate(
            Event.external_interrupt(vector),
            Cause.INTERRUPT,
            f"interrupt {vector:#04x} was being delivered or waiting, and interrupts are on",
            False,
            {"vector": vector},
        )
        for vector in vectors
    ]


def recorded_candidate(vector: int, error_code: int | None, *, cr2: int) -> Candidate:
    """The last exception that KVM itself raised, which it still remembers; it may be an older one."""
    event = Event.page_fault(cr2, error_code or 0) if vector == 14 else _exception(vector, error_code)
    return Candidate(event, Cause.RECORDED, "KVM remembers it as the last exception that it raised", False)


def _exception(vector: int, error_code: int | None) -> Event:
    try:
        return Event.exception(vector, error_code)
    except UsageError:  # real mode records no error codes, and KVM may keep an older one
        return Event.exception(vector)
