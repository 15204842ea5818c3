"""The classic mistakes, as rules that are judged on the captured state; one module for each subject.

A new mistake is a `Rule` in the module of its subject: an id, the rule of the manual that it breaks, what to do, and a
check. Within the same weight the order here decides: what explains more stands first.
"""

from __future__ import annotations

from collections.abc import Callable

from kvmpy.debug.crash_report.case import Case
from kvmpy.debug.crash_report.findings import (
    devices,
    entry,
    execution,
    halting,
    interrupts,
    modes,
    overwriting,
    paging,
    real_mode,
    segmentation,
    stacks,
    task_state,
)
from kvmpy.debug.crash_report.findings.finding import Finding, Rule, Weight

__all__ = ["RULES", "Finding", "Rule", "Weight", "judge"]

RULES: tuple[Rule, ...] = (
    *entry.RULES,
    *real_mode.RULES,
    *stacks.RULES,
    *overwriting.RULES,
    *modes.RULES,
    *task_state.RULES,
    *interrupts.RULES,
    *halting.RULES,
    *paging.RULES,
    *segmentation.RULES,
    *devices.RULES,
    *execution.RULES,
)
"""All rules, in the order in which findings of the same weight are shown."""


def judge(case: Case) -> tuple[tuple[Finding, ...], dict[str, str]]:
    """The findings, the weightiest first, and for rules that could not be judged why."""
    found: list[Finding] = []
    failed: dict[str, str] = {}
    for rule in RULES:
        try:
            finding = rule.judge(case)
        except Exception as error:  # one check must not spoil the report
            failed[rule.id] = f"{type(error).__name__}: {error}"
            continue
        if finding is not None:
            found.append(finding)
    return tuple(sorted(found, key=_order(found))), failed


def _order(found: list[Finding]) -> Callable[[Finding], int]:
    """By weight; but where nothing is proved, what is possible comes before what only contributed."""
    proved = any(finding.weight is Weight.CAUSE for finding in found)

    def place(finding: Finding) -> int:
        if not proved and finding.weight is Weight.POSSIBLE:
            return -1
        return finding.weight

    return place
