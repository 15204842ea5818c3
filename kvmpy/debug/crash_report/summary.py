"""The one sentence at the top: what happened."""

from __future__ import annotations

from kvmpy.debug.crash_report.case import Case
from kvmpy.debug.crash_report.explanation import Explanation
from kvmpy.debug.crash_report.sections import instruction_text
from kvmpy.x86.event_delivery import Event
from kvmpy.x86.event_delivery.event import DOUBLE_FAULT, exception_name
from kvmpy.x86.register_text import mode_text

__all__ = ["mode_of", "summarize"]


def summarize(case: Case) -> str:
    """What happened, in a sentence."""
    if case.evidence.registers_lost:
        return "Triple fault: the processor shut down, and KVM reset it before anybody could look."
    place = case.describe(case.blamed_instruction)
    text = _instruction(case)
    if case.shutdown:
        return f"Triple fault: the processor shut down at {place}{text}{_how(case.first)}."
    end = case.evidence.end[:1].upper() + case.evidence.end[1:]
    if case.timed_out:
        doing = "sleeping in HLT before" if case.halted else "running at"
        return f"{end}: the guest was {doing} {place}{'' if case.halted else text}."
    message = case.evidence.message.split("\n")[0].rstrip(". ")
    if case.halted:
        return f"{end}: the guest executed HLT before {place}."
    return f"{end} at {place}{text}" + (f": {message}" if message else "") + "."


def _instruction(case: Case) -> str:
    try:
        text = instruction_text(case)
    except Exception:
        return ""
    return f" (`{text}`)" if text else ""


def _how(first: Explanation | None) -> str:
    """The chain in short: "#GP, then #PF while it delivered #DF"."""
    if first is None:
        return ""
    steps = first.outcome.steps
    begun = _short(steps[0].event)
    if not first.shuts_down or len(steps) < 2:
        return f": {begun}"
    last = steps[-1]
    raised = getattr(last, "raises", None)
    end = f"{_short(raised)} while it delivered {_short(last.event)}" if raised is not None else _short(last.event)
    return f": {begun}, and at last {end}"


def _short(event: Event) -> str:
    if event.software or event.vector > 31 or event.kind.value != "exception":
        return str(event)
    code = f"({event.error_code:#x})" if event.error_code is not None and event.vector != DOUBLE_FAULT else ""
    return f"{exception_name(event.vector)}{code}"


def mode_of(case: Case) -> str:
    """The processor and its mode, for the line below."""
    return f"vCPU {case.evidence.vcpu}, {mode_text(case.sregs)}"
