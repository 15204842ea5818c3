"""What began the end, deduced from the instruction at RIP: KVM reports a shutdown, not the exception that led to it."""

from __future__ import annotations

from kvmpy.debug.crash_report.first_event.candidate import Candidate, Cause
from kvmpy.debug.crash_report.first_event.deduction import (
    instruction_candidates,
    interrupt_candidates,
    recorded_candidate,
)
from kvmpy.debug.crash_report.first_event.execution import Execution, read_linear

__all__ = [
    "Candidate",
    "Cause",
    "Execution",
    "instruction_candidates",
    "interrupt_candidates",
    "read_linear",
    "recorded_candidate",
]
