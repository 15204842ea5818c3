"""Delivery of exceptions and interrupts as the processor does it, in software.

`deliver` makes one attempt, through the IVT in real mode or the IDT in protected and long mode. When an attempt fails,
`deliver_with_escalation` goes on as the processor would, to the double fault and the triple fault, and keeps the chain
of reasons for a report.

Not modelled: task gates, INT n in virtual-8086 mode with CR4.VME, shadow stacks, FRED. Interrupt flags, shadows and NMI
blocking are the caller's business: an event given here is due.
"""

from __future__ import annotations

from kvmpy.x86.event_delivery.attempt import (
    Attempt,
    DeliveryFault,
    LinearFault,
    Translate,
    page_table_translation,
)
from kvmpy.x86.event_delivery.event import DOUBLE_FAULT, PAGE_FAULT, Event, EventKind, Severity, exception_name
from kvmpy.x86.event_delivery.long_mode import deliver_long
from kvmpy.x86.event_delivery.outcome import Delivered, DeliveryFailure, Outcome, OutcomeKind
from kvmpy.x86.event_delivery.protected_mode import deliver_protected
from kvmpy.x86.event_delivery.real_mode import deliver_real
from kvmpy.x86.paging import PhysicalMemory
from kvmpy.x86.registers import CpuState

__all__ = [
    "Delivered",
    "DeliveryFailure",
    "Event",
    "EventKind",
    "LinearFault",
    "Outcome",
    "OutcomeKind",
    "Severity",
    "Translate",
    "deliver",
    "deliver_with_escalation",
    "escalates_to_double_fault",
    "exception_name",
    "page_table_translation",
]


def deliver(
    memory: PhysicalMemory, state: CpuState, event: Event, *, translate: Translate | None = None
) -> Delivered | DeliveryFailure:
    """Deliver `event` to the processor in `state`: read its tables, push the frame, return the handler's state.

    `state` is not changed; `memory` is written only on success. `translate` maps linear to physical addresses, by
    default by the guest's page tables.
    """
    attempt = Attempt(memory, state, event, translate or page_table_translation(memory, state))
    try:
        if attempt.real_mode:
            delivered = deliver_real(attempt)
        elif attempt.long_mode:
            delivered = deliver_long(attempt)
        else:
            delivered = deliver_protected(attempt)
    except DeliveryFault as fault:
        return DeliveryFailure(event, attempt.gate, fault.reason, fault.raises)
    attempt.commit()
    if event.vector == PAGE_FAULT and event.kind is EventKind.EXCEPTION and event.address is not None:
        delivered.state.sregs.cr2 = event.address
    return delivered


def escalates_to_double_fault(first: Event, second: Event) -> bool:
    """Whether `second`, raised while `first` was delivered, becomes #DF (SDM vol. 3, table 6-5) instead of its own."""
    if first.severity is Severity.CONTRIBUTORY:
        return second.severity is Severity.CONTRIBUTORY
    if first.severity is Severity.PAGE_FAULT:
        return second.severity in (Severity.CONTRIBUTORY, Severity.PAGE_FAULT)
    return False


def deliver_with_escalation(
    memory: PhysicalMemory, state: CpuState, event: Event, *, translate: Translate | None = None
) -> Outcome:
    """Deliver `event`, and what its failure raises, until a handler is entered or the processor shuts down.

    Every exception on the way saves the registers of `state`: a failed attempt changes nothing but CR2.
    """
    current = state.copy()
    if event.address is not None:  # the processor loads CR2 when it finds the fault, before it looks for a handler
        current.sregs.cr2 = event.address
    steps: list[Delivered | DeliveryFailure] = []
    remarks: list[str] = []
    while True:
        step = deliver(memory, current, event, translate=translate)
        steps.append(step)
        if isinstance(step, Delivered):
            return Outcome(OutcomeKind.DELIVERED, tuple(steps), tuple(remarks))
        second = step.raises
        if second is None:
            return Outcome(OutcomeKind.UNDETERMINED, tuple(steps), tuple(remarks))
        if second.address is not None:
            current.sregs.cr2 = second.address
        if event.severity is Severity.DOUBLE_FAULT and second.severity is not Severity.BENIGN:
            remarks.append(f"{second} during the delivery of {exception_name(DOUBLE_FAULT)}: triple fault, shutdown")
            return Outcome(OutcomeKind.SHUTDOWN, tuple(steps), tuple(remarks))
        if escalates_to_double_fault(event, second):
            remarks.append(f"{second} during the delivery of {exception_name(event.vector)}: double fault")
            event = Event.exception(DOUBLE_FAULT)
        else:
            remarks.append(f"{second} is delivered instead")
            event = second
