"""The report: what happened, why, and everything that one would look at next."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from kvmpy._value import field, frozen
from kvmpy.debug.crash_report.capture import gather, gather_vcpu
from kvmpy.debug.crash_report.case import Case
from kvmpy.debug.crash_report.evidence import Evidence
from kvmpy.debug.crash_report.findings import Finding, judge
from kvmpy.debug.crash_report.sections import Section, build_sections
from kvmpy.debug.crash_report.summary import mode_of, summarize
from kvmpy.x86.registers import CpuState

if TYPE_CHECKING:
    from kvmpy._exit import Exit
    from kvmpy.debug.symbols import LineTable, SymbolTable
    from kvmpy.kvm import Vcpu
    from kvmpy.machine import Machine, Outcome
    from kvmpy.machine.recent_exits import DeviceAccess

__all__ = ["CrashReport"]

FORMAT = 1
"""The version of what `as_data` gives."""


@frozen
class CrashReport:
    """How a guest ended and why: `print(report)` is a page of text, in a notebook the report shows itself.

    `summary` says in a sentence what happened. `findings` are the mistakes that were recognized, the most likely cause
    first, each with the rule that it breaks and what to do; `cause` is the first of them. `state` are the registers.
    `sections` are the parts of the page: events, code, registers, stack, page walks, tables, exits, devices, consoles.
    `unavailable` says for what is missing why. A report is a value: it does not change when the machine goes on.
    """

    summary: str
    end: str
    message: str
    vcpu: int
    mode: str
    state: CpuState
    registers_lost: bool
    findings: tuple[Finding, ...] = ()
    sections: tuple[Section, ...] = ()
    unavailable: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def capture(
        cls,
        machine: Machine,
        outcome: Outcome | None = None,
        *,
        symbols: SymbolTable | None = None,
        lines: LineTable | None = None,
        exits: tuple[DeviceAccess | Exit, ...] | None = None,
    ) -> CrashReport:
        """Look at a machine after its run has ended with `outcome`, or as it stands now.

        A machine that runs is paused meanwhile. `symbols` and `lines` replace those of the image, `exits` those that
        the machine has kept. Nothing in the guest is changed. What cannot be had is in `unavailable`; it raises
        UsageError only for a machine that is closed, or that runs and waits for the handler that calls this.
        """
        with _standing(machine):
            return cls.of(gather(machine, outcome, symbols=symbols, lines=lines, exits=exits))

    @classmethod
    def of_vcpu(cls, vcpu: Vcpu, event: Exit | None = None, *, symbols: SymbolTable | None = None) -> CrashReport:
        """The report about a bare vCPU that has come out of the guest with `event`, without a machine around it.

        It knows less: not what was loaded, which devices there are, or which exits came before. Raises ClosedError for
        a vCPU that is closed, VcpuBusyError while another thread runs it.
        """
        return cls.of(gather_vcpu(vcpu, event, symbols))

    @classmethod
    def of(cls, evidence: Evidence) -> CrashReport:
        """The report about what was taken before."""
        case = Case(evidence)
        unavailable = dict(evidence.unavailable)
        try:
            summary = summarize(case)
        except Exception as error:  # a report never raises: the state may be anything
            summary = f"{evidence.end}: {evidence.message}"
            unavailable["summary"] = f"{type(error).__name__}: {error}"
        try:
            mode = mode_of(case)
        except Exception as error:
            mode = f"vCPU {evidence.vcpu}"
            unavailable["mode"] = f"{type(error).__name__}: {error}"
        findings, failed = judge(case)
        unavailable.update((f"finding {name}", why) for name, why in failed.items())
        return cls(
            summary=summary,
            end=evidence.end,
            message=evidence.message,
            vcpu=evidence.vcpu,
            mode=mode,
            state=evidence.state.copy(),
            registers_lost=evidence.registers_lost,
            findings=findings,
            sections=build_sections(case),
            unavailable=unavailable,
        )

    @property
    def cause(self) -> Finding | None:
        """The most likely cause, when one was found."""
        return self.findings[0] if self.findings else None

    def section(self, name: str) -> Section | None:
        """A part of the page by its name ("events", "code", "registers" ...); None when it had nothing to say."""
        return next((section for section in self.sections if section.name == name), None)

    def __str__(self) -> str:
        from kvmpy.debug.crash_report.text import page

        return page(self)

    def __repr__(self) -> str:
        return f"<CrashReport {self.summary}>"

    def _repr_html_(self) -> str:
        from kvmpy.debug.crash_report.html import fragment

        return fragment(self)

    def as_data(self) -> dict[str, Any]:
        """The whole report as plain data (dicts, lists, strings, numbers) for JSON. Addresses are numbers."""
        return {
            "format": FORMAT,
            "summary": self.summary,
            "end": self.end,
            "message": self.message,
            "vcpu": self.vcpu,
            "mode": self.mode,
            "registers_lost": self.registers_lost,
            "findings": [finding.as_data() for finding in self.findings],
            "sections": {
                section.name: {"title": section.title, "data": section.data, "unavailable": section.unavailable}
                for section in self.sections
            },
            "unavailable": dict(self.unavailable),
        }


def _standing(machine: Machine) -> AbstractContextManager[object]:
    """While the machine cannot go on."""
    return machine.paused() if machine.running else nullcontext()
