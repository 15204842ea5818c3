"""What the plugin knows of one test: its deadline, its guests, and what a report says of them."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from kvmpy.machine.outcome import CRASHES

if TYPE_CHECKING:
    import pytest

    from kvmpy.devices import ConsoleOutput
    from kvmpy.kvm import Vcpu
    from kvmpy.pytest_plugin.deadline import Deadline
    from kvmpy.pytest_plugin.machines import FixtureMachine

__all__ = ["Guests"]

_TAIL = 16 << 10
"""Characters of a console that a report shows."""

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}
"""Control characters but tab and newline, as text: a report must not switch the colours of the terminal."""


class Guests:
    """The guests of one test."""

    def __init__(self, deadline: Deadline) -> None:
        self.deadline = deadline
        self.machines: list[FixtureMachine] = []
        self.vcpus: list[Vcpu] = []
        self.giving_sub_results = False
        """Reports that come now are about test points inside the guest."""
        self.failed_inside = False
        """Whether one of them failed."""

    def add_machine(self, machine: FixtureMachine) -> None:
        self.machines.append(machine)

    def add_vcpu(self, vcpu: Vcpu) -> None:
        self.vcpus.append(vcpu)

    def describe(self, report: pytest.TestReport) -> None:
        """Add sections to a report: the end of each console, and after a failure how the guests ended."""
        if self.giving_sub_results or (report.when != "call" and not report.failed):
            return
        failed = report.failed or self.failed_inside
        for number, machine in enumerate(self.machines, 1):
            which = f" of machine {number}" if len(self.machines) > 1 else ""
            if failed and machine.running:
                with suppress(Exception):
                    machine.stop()
            for name, console in (("console", machine.console), ("debug console", machine.debug_console)):
                if text := _tail(console):
                    report.sections.append((f"Captured kvm {name}{which}", text))
            if failed and report.when != "teardown":
                report.sections.append((f"kvm outcome{which}", _end(machine)))
        for vcpu in self.vcpus:
            if failed and not vcpu.closed:
                report.sections.append(("kvm vCPU", f"last exit: {vcpu.last_exit!r}\n{_registers(vcpu)}"))


def _tail(console: ConsoleOutput) -> str:
    text = console.text.replace("\r\n", "\n")
    lost = console.dropped + max(0, len(text) - _TAIL)
    text = text[-_TAIL:].translate(_CONTROLS).rstrip("\n")
    return f"[{lost} characters before]\n{text}" if lost else text


def _end(machine: FixtureMachine) -> str:
    """How the last run of the machine ended; after a crash with the report of why."""
    outcome = machine.last_outcome
    if outcome is None:
        return "the machine did not run to an end"
    if outcome.end not in CRASHES:
        return str(outcome)
    try:  # a report about a failure must not fail itself
        return str(outcome.report if outcome.report is not None else machine.crash_report(outcome))
    except Exception as error:
        return f"{outcome}\nno crash report: {error!r}\n{_registers(machine.vcpus[outcome.vcpu or 0])}"


def _registers(vcpu: Vcpu) -> str:
    try:
        return f"{vcpu.regs}\n{vcpu.sregs}"
    except Exception as error:
        return f"no registers: {error!r}"
