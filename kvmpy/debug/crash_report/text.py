"""The report as a page of text."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from kvmpy.debug.crash_report.findings.finding import Weight

if TYPE_CHECKING:
    from kvmpy.debug.crash_report.findings import Finding
    from kvmpy.debug.crash_report.report import CrashReport

__all__ = ["heading", "page"]

_WIDTH = 110


def page(report: CrashReport) -> str:
    """All of it, the most important first."""
    parts = [report.summary, f"({report.mode})", ""]
    for number, finding in enumerate(report.findings):
        parts += [*_finding(finding, heading(finding, number)), ""]
    if not report.findings:
        parts += ["No classic mistake was recognized.", ""]
    for section in report.sections:
        parts.append(f"--- {section.title} ".ljust(_WIDTH, "-"))
        parts += (line.text for line in section.lines)
        if section.unavailable:
            parts.append(f"not available: {section.unavailable}")
        parts.append("")
    if report.unavailable:
        parts.append("--- Not available ".ljust(_WIDTH, "-"))
        parts += (f"{what}: {why}" for what, why in report.unavailable.items())
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def heading(finding: Finding, number: int) -> str:
    """What stands before a finding. Only one can be the most likely cause; the next ones say the same in other words,
    or come from the same mistake."""
    return "Also true" if number and finding.weight is Weight.CAUSE else finding.weight.heading


def _finding(finding: Finding, title: str) -> list[str]:
    lines = [f"{title}: {finding.title} [{finding.id}]"]
    lines += _wrapped("", f"{finding.text.rstrip('.')}.")
    if finding.rule:
        lines += _wrapped("rule: ", f"{finding.rule} ({finding.source})")
    lines += _wrapped("do: ", finding.remedy)
    return lines


def _wrapped(label: str, text: str) -> list[str]:
    indent = "  " + " " * len(label)
    return textwrap.wrap(
        text, _WIDTH, initial_indent=f"  {label}", subsequent_indent=indent, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
