"""Crash reports: what happened to a guest, the most likely cause with the rule it breaks, and the evidence.

`CrashReport.capture(machine, outcome)` makes one; `Machine` does so by itself when asked to. `replay` runs a guest
again by single steps, for hosts where KVM throws the registers of a triple fault away.
"""

from __future__ import annotations

from kvmpy.debug.crash_report.findings import RULES, Finding, Rule, Weight
from kvmpy.debug.crash_report.replay import replay
from kvmpy.debug.crash_report.report import CrashReport

__all__ = ["RULES", "CrashReport", "Finding", "Rule", "Weight", "replay"]
