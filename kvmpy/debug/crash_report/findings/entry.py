"""Ends that are no fault of an instruction: states that cannot be entered, registers that KVM has thrown away."""

from __future__ import annotations

from kvmpy.debug.crash_report.case import Case
from kvmpy.debug.crash_report.findings.finding import Rule, Suspicion, cause, possible

__all__ = ["RULES"]


def _entry_rule(case: Case) -> Suspicion | None:
    failure = case.entry_failed
    if failure is None:
        return None
    from kvmpy.x86.entry_rules import explain_entry_failure

    meaning, *broken = explain_entry_failure(failure.hardware_reason, case.state, memory=case.memory)
    return cause(f"{meaning}. {'; '.join(broken)}")


def _registers_lost(case: Case) -> Suspicion | None:
    if not case.evidence.registers_lost:
        return None
    return possible(
        "The registers are those after a reset, although the guest has run: this host's KVM resets the processor "
        "before it reports a shutdown. Which instruction it was cannot be seen any more"
    )


def _nothing_loaded(case: Case) -> Suspicion | None:
    state = case.state
    if state.regs.rip != 0xFFF0 or state.sregs.cs.base != 0xFFFF_0000 or not case.fetch_failed:
        return None
    return cause("The processor is at the reset vector 0xfffffff0, and there is no memory")


RULES = (
    Rule(
        "entry-rule",
        "The processor refused to enter the guest",
        "VT-x and AMD-V check the guest's state at every entry.",
        "SDM vol. 3, 26.3.1; APM vol. 2, 15.5.1",
        "Put the named registers right before the next run; `kvmpy.x86.modes` has states that pass.",
        _entry_rule,
    ),
    Rule(
        "nothing-loaded",
        "Nothing was loaded",
        "After reset a processor fetches its first instruction from 0xFFFFFFF0.",
        "SDM vol. 3, 9.1.4",
        "Load an image, or set a mode, before run(). A firmware image ends at 4 GiB.",
        _nothing_loaded,
    ),
    Rule(
        "registers-lost",
        "KVM has reset the processor",
        "On AMD-V, KVM does to a processor that shut down what a board does: INIT.",
        "Linux arch/x86/kvm/svm/svm.c, shutdown_interception",
        "Replay the guest by single steps: kvmpy.debug.crash_report.replay(make_machine) reports the state before the "
        "last instruction.",
        _registers_lost,
    ),
)
