"""What a finding is, and the rule that makes it."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any

from kvmpy._value import frozen
from kvmpy.debug.crash_report.case import Case
from kvmpy.debug.crash_report.first_event import Cause

__all__ = [
    "Finding",
    "Rule",
    "Suspicion",
    "Weight",
    "by_cause",
    "cause",
    "contributes",
    "possible",
    "remark",
    "sentence",
]


class Weight(IntEnum):
    """How much a finding explains; the lowest comes first in a report."""

    CAUSE = 0
    """Explains the end by itself."""
    CONTRIBUTES = 1
    """Explains a part: why an exception became a shutdown, for instance."""
    POSSIBLE = 2
    """Would explain the end, but is not proved by the state."""
    REMARK = 3
    """Is odd, and need not have to do with the end."""

    @property
    def heading(self) -> str:
        """For a reader."""
        return ("Most likely cause", "It contributed", "Possible cause", "Worth a look")[self]


@frozen
class Suspicion:
    """What a check found: how much it weighs, and a sentence with the values that decide."""

    weight: Weight
    text: str


def cause(text: str) -> Suspicion:
    return Suspicion(Weight.CAUSE, text)


def contributes(text: str) -> Suspicion:
    return Suspicion(Weight.CONTRIBUTES, text)


def possible(text: str) -> Suspicion:
    return Suspicion(Weight.POSSIBLE, text)


def remark(text: str) -> Suspicion:
    return Suspicion(Weight.REMARK, text)


def by_cause(*causes: Cause) -> Callable[[Case], Suspicion | None]:
    """The check whether the first event has one of these causes; only possible where the state does not prove it."""

    def check(case: Case) -> Suspicion | None:
        candidate = case.blamed(*causes)
        if candidate is None:
            return None
        return cause(sentence(candidate.text)) if candidate.certain else possible(sentence(candidate.text))

    return check


def sentence(text: str) -> str:
    """With a capital letter."""
    return text[:1].upper() + text[1:]


@frozen
class Finding:
    """A mistake that was found: `id` names it ("idt-not-loaded"), `text` says what is so here, `rule` which rule that
    breaks, `source` where it is written, `remedy` what to do."""

    id: str
    weight: Weight
    title: str
    text: str
    rule: str
    source: str
    remedy: str

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "id": self.id,
            "weight": self.weight.name.lower(),
            "title": self.title,
            "text": self.text,
            "rule": self.rule,
            "source": self.source,
            "remedy": self.remedy,
        }


@frozen
class Rule:
    """A classic mistake: what it is called, what the manuals say, what to do, and how to recognize it."""

    id: str
    title: str
    rule: str
    source: str
    remedy: str
    check: Callable[[Case], Suspicion | None]

    def judge(self, case: Case) -> Finding | None:
        """The finding, when the case shows the mistake."""
        suspicion = self.check(case)
        if suspicion is None:
            return None
        return Finding(self.id, suspicion.weight, self.title, suspicion.text, self.rule, self.source, self.remedy)
