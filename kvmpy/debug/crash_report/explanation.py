"""How an event led to the shutdown: its delivery tried again in Python, on a copy of registers and memory."""

from __future__ import annotations

from kvmpy._value import frozen
from kvmpy.debug.crash_report.evidence import Evidence, RecordedException
from kvmpy.debug.crash_report.first_event import (
    Candidate,
    Execution,
    instruction_candidates,
    interrupt_candidates,
    recorded_candidate,
)
from kvmpy.x86.event_delivery import DeliveryFailure, Outcome, OutcomeKind, deliver_with_escalation
from kvmpy.x86.event_delivery.event import PAGE_FAULT

__all__ = ["Explanation", "best_explanation", "explanations"]


@frozen
class Explanation:
    """A candidate for the first event and what becomes of it.

    `agrees` says that what KVM recorded of the exception, or CR2, agrees with it.
    """

    candidate: Candidate
    outcome: Outcome
    agrees: bool = False

    @property
    def shuts_down(self) -> bool:
        """The delivery ends in a triple fault."""
        return self.outcome.kind is OutcomeKind.SHUTDOWN

    @property
    def handled(self) -> bool:
        """A handler is entered: then this event is not what ended the guest."""
        return self.outcome.kind is OutcomeKind.DELIVERED

    @property
    def first_failure(self) -> DeliveryFailure | None:
        """Why the first event did not reach its handler."""
        step = self.outcome.steps[0]
        return step if isinstance(step, DeliveryFailure) else None


def explanations(evidence: Evidence, execution: Execution) -> tuple[Explanation, ...]:
    """Every candidate, replayed; those of the instruction first. None when the registers are lost."""
    if evidence.registers_lost:
        return ()
    candidates = instruction_candidates(execution, evidence.exits)
    recorded = evidence.recorded
    if not any(candidate.certain for candidate in candidates):
        vectors = evidence.controllers.vectors if evidence.controllers is not None else ()
        candidates += interrupt_candidates(execution, vectors)
        if recorded is not None and not any(_agrees(candidate, recorded) for candidate in candidates):
            cr2 = evidence.state.sregs.cr2
            candidates.append(recorded_candidate(recorded.vector, recorded.error_code, cr2=cr2))
    return tuple(_replay(evidence, candidate) for candidate in candidates)


def _replay(evidence: Evidence, candidate: Candidate) -> Explanation:
    outcome = deliver_with_escalation(evidence.memory.fork(), evidence.state, candidate.event)
    agrees = evidence.recorded is not None and _agrees(candidate, evidence.recorded)
    if candidate.event.vector == PAGE_FAULT and candidate.event.address == evidence.state.sregs.cr2:
        agrees = True
    return Explanation(candidate, outcome, agrees)


def _agrees(candidate: Candidate, recorded: RecordedException) -> bool:
    """Whether KVM's record is this event. The I/D bit of page faults, which hosts set differently, does not count."""
    event = candidate.event
    if event.vector != recorded.vector:
        return False
    return recorded.error_code is None or (event.error_code or 0) & ~0x10 == recorded.error_code & ~0x10


def best_explanation(found: tuple[Explanation, ...], *, shutdown: bool) -> Explanation | None:
    """The one that fits best, None when none does. In a shutdown, one whose handler is entered does not fit."""
    fitting = [explanation for explanation in found if not (shutdown and explanation.handled)]
    if not fitting:
        return None
    return max(fitting, key=lambda one: (one.shuts_down, one.candidate.certain, one.agrees, -found.index(one)))
