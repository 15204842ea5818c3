"""The report as a page of text."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmpy.debug.crash_report.findings import Finding
    from kvmpy.debug.crash_report.report import CrashReport

__all__ = ["page"]

_WIDTH = 110


def page(report: CrashReport) -> str:
    """All of it, the most important first."""
    parts = [report.summary, f"({report.mode})", ""]
    for finding in report.findings:
        parts += [*_finding(finding), ""]
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


def _finding(finding: Finding) -> list[str]:
    heading = finding.weight.heading
    lines = [f"{heading[:1].upper()}{heading[1:]}: {finding.title} [{finding.id}]"]
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
