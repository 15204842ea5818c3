"""The chain of events: what was raised, which gate it was to go through, why it did not."""

from __future__ import annotations

from typing import Any

from kvmpy.debug.crash_report.case import Case
from kvmpy.debug.crash_report.explanation import Explanation
from kvmpy.debug.crash_report.findings.finding import sentence
from kvmpy.debug.crash_report.sections.section import Contents, SectionBuilder
from kvmpy.x86.event_delivery import Delivered
from kvmpy.x86.event_delivery.event import exception_name

__all__ = ["EVENTS"]


def _fill(case: Case, contents: Contents) -> None:
    found = case.explanations
    recorded = case.evidence.recorded
    if not (case.shutdown or found):
        return
    contents.data = {"candidates": [_data(one, one is case.first) for one in found]}
    if case.first is not None:
        _show(case.first, contents)
        others = [one for one in found if one is not case.first]
    else:
        others = list(found)
        contents.add(_nothing_fits(case))
    if others:
        contents.heading("Other events that were considered:")
        for one in others:
            ending = "its handler would have been entered" if one.handled else one.outcome.kind.value
            contents.indented([f"{one.candidate.event}: {one.candidate.text}; {ending}"])
    if recorded is not None:
        code = f" with error code {recorded.error_code:#x}" if recorded.error_code is not None else ""
        agrees = case.first is not None and case.first.agrees
        contents.heading(
            f"The last exception that KVM itself raised is {exception_name(recorded.vector)}{code}"
            + (", which agrees." if agrees else "; it may be an older one.")
        )


def _nothing_fits(case: Case) -> str:
    if case.evidence.registers_lost:
        return "KVM reset the processor, so the instruction is not known and its events cannot be deduced."
    if case.explanations:
        return (
            "None of the events that the instruction could have raised ends in a shutdown when its delivery is "
            "replayed. The processor may have used what is no longer in memory (its TLB, for instance)."
        )
    return "The instruction raises nothing in this state; an interrupt or NMI may have come."


def _show(one: Explanation, contents: Contents) -> None:
    sure = "" if one.candidate.certain else " (not certain)"
    contents.add(f"{one.candidate.event}{sure}: {sentence(one.candidate.text)}.", mark=True)
    remarks = one.outcome.remarks
    for index, step in enumerate(one.outcome.steps):
        number = f"{index + 1}. "
        if isinstance(step, Delivered):
            place = f"{step.state.sregs.cs.selector:#06x}:{step.state.regs.rip:#x}"
            contents.indented([f"{number}{step.event} through {step.gate}: the handler at {place} is entered"])
            continue
        contents.indented([f"{number}{step.event} through {step.gate} fails: {step.reason}"])
        if index < len(remarks):
            contents.indented([f"   {remarks[index]}"], mark=remarks[index].endswith("shutdown"))
        elif step.raises is None:
            contents.indented(["   what the processor does then is not followed further"])


def _data(one: Explanation, chosen: bool) -> dict[str, Any]:
    candidate = one.candidate
    return {
        "chosen": chosen,
        "event": str(candidate.event),
        "vector": candidate.event.vector,
        "error_code": candidate.event.error_code,
        "cause": str(candidate.cause),
        "text": candidate.text,
        "certain": candidate.certain,
        "values": dict(candidate.values),
        "ends_in": one.outcome.kind.value,
        "agrees_with_kvm": one.agrees,
        "steps": [
            {
                "event": str(step.event),
                "vector": step.event.vector,
                "gate": step.gate,
                "delivered": isinstance(step, Delivered),
                "reason": "" if isinstance(step, Delivered) else step.reason,
                "raises": None if isinstance(step, Delivered) or step.raises is None else str(step.raises),
            }
            for step in one.outcome.steps
        ],
    }


EVENTS = SectionBuilder("events", "What led to it", _fill)
