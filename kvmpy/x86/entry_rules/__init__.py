"""The rules that a vCPU state must keep to be accepted by KVM and entered by the processor.

Three sets, each a list that reads like its source: what KVM_SET_SREGS refuses with EINVAL (`KVM`), what VT-x refuses at
VM entry (`VTX`, SDM vol. 3, 27.3.1, seen by a user as KVM_EXIT_FAIL_ENTRY with 0x80000021), and what AMD-V refuses at
VMRUN (`AMDV`, APM vol. 2, 15.5.1, seen as FAIL_ENTRY with -1). `OUT_OF_REACH` lists the checks about fields that only
KVM writes.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvmpy.x86.entry_rules.amdv import AMDV_OUT_OF_REACH, AMDV_RULES
from kvmpy.x86.entry_rules.entry_failure import EntryFailure, decode_entry_failure
from kvmpy.x86.entry_rules.kvm_set_sregs import KVM_RULES
from kvmpy.x86.entry_rules.rule import (
    AMDV,
    KVM,
    KVM_CR4,
    KVM_EFER,
    VTX,
    OutOfReach,
    ProcessorLimits,
    Rule,
    RuleSet,
    Violation,
    entry_state,
)
from kvmpy.x86.entry_rules.vtx_registers import VTX_REGISTER_OUT_OF_REACH, VTX_REGISTER_RULES
from kvmpy.x86.entry_rules.vtx_segments import VTX_SEGMENT_OUT_OF_REACH, VTX_SEGMENT_RULES
from kvmpy.x86.paging import PhysicalMemory
from kvmpy.x86.registers import CpuState

__all__ = [
    "AMDV",
    "KVM",
    "KVM_CR4",
    "KVM_EFER",
    "OUT_OF_REACH",
    "RULES",
    "VTX",
    "EntryFailure",
    "OutOfReach",
    "ProcessorLimits",
    "Rule",
    "RuleSet",
    "Violation",
    "decode_entry_failure",
    "explain_entry_failure",
    "violations",
]

RULES: tuple[Rule, ...] = KVM_RULES + VTX_REGISTER_RULES + VTX_SEGMENT_RULES + AMDV_RULES
"""Every rule of the three sets."""

OUT_OF_REACH: tuple[OutOfReach, ...] = VTX_REGISTER_OUT_OF_REACH + VTX_SEGMENT_OUT_OF_REACH + AMDV_OUT_OF_REACH
"""The checks that no CpuState can break."""


def violations(
    state: CpuState,
    *,
    sets: Iterable[RuleSet] = (KVM, VTX, AMDV),
    processor: ProcessorLimits | None = None,
    memory: PhysicalMemory | None = None,
) -> list[Violation]:
    """The rules of `sets` that `state` breaks, in the order of the sources. An empty list: it may be entered.

    `processor` narrows what the processor can do (by default anything KVM offers anywhere). `memory` is needed to judge
    the PDPTEs of PAE paging; without it they are not looked at.
    """
    wanted = frozenset(sets)
    entry = entry_state(state, processor if processor is not None else ProcessorLimits(), memory)
    judged = (rule.judge(entry) for rule in RULES if rule.set in wanted)
    return [violation for violation in judged if violation is not None]


def explain_entry_failure(
    reason: int,
    state: CpuState,
    *,
    processor: ProcessorLimits | None = None,
    memory: PhysicalMemory | None = None,
) -> list[str]:
    """Lines for a report: what `reason` means, then the broken rules.

    `reason` is hardware_entry_failure_reason of KVM_EXIT_FAIL_ENTRY (KVM API, section 5).
    Rules whose breach KVM repairs before the processor looks are left out: they cannot be the cause.
    """
    failure = decode_entry_failure(reason)
    if failure.set is None:
        return [str(failure)]
    broken = violations(state, sets=(failure.set,), processor=processor, memory=memory)
    causes = [str(violation) for violation in broken if not violation.kvm_repairs]
    return [
        str(failure),
        *(causes or ["no rule about regs or sregs is broken: the cause lies in a field that only KVM writes"]),
    ]
