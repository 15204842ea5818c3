"""What the number in KVM_EXIT_FAIL_ENTRY means (KVM API, section 5, hardware_entry_failure_reason)."""

from __future__ import annotations

from dataclasses import dataclass

from kvmpy.x86.entry_rules.rule import AMDV, VTX, RuleSet

__all__ = ["EntryFailure", "decode_entry_failure"]

VMX_FAILED_ENTRY = 1 << 31

BASIC_EXIT_REASONS = {
    33: "invalid guest state: a check of SDM vol. 3, 27.3.1 failed",
    34: "MSR loading: an entry of the VM-entry MSR-load area was refused (SDM vol. 3, 27.4)",
    41: "machine-check event during VM entry (SDM vol. 3, 27.9)",
}
"""Basic exit reasons of failed VM entries (SDM vol. 3, 27.8)."""

VM_INSTRUCTION_ERRORS = {
    4: "VMLAUNCH with a VMCS that is not clear",
    5: "VMRESUME with a VMCS that was not launched",
    6: "VMRESUME after VMXOFF",
    7: "VM entry with invalid control fields",
    8: "VM entry with invalid host-state fields",
    26: "VM entry with events blocked by MOV SS",
}
"""VM-instruction error numbers of VMLAUNCH and VMRESUME (SDM vol. 3, 31.4)."""

SVM_EXIT_CODES = {
    -1: "VMEXIT_INVALID: a consistency check of VMRUN failed (APM vol. 2, 15.5.1)",
    -2: "VMEXIT_BUSY: the VMSA was in use",
    -3: "VMEXIT_IDLE_REQUIRED: the sibling thread was not idle",
    -4: "VMEXIT_INVALID_PMC: invalid performance-counter state",
}
"""Negative exit codes of VMRUN (APM vol. 2, appendix C)."""


@dataclass(frozen=True, slots=True)
class EntryFailure:
    """`reason` as the kernel gave it, its meaning as `text`, and the `set` of rules to look at.

    `set` is None where no guest state is to blame.
    """

    reason: int
    set: RuleSet | None
    text: str

    def __str__(self) -> str:
        return f"hardware_entry_failure_reason {self.reason:#x}: {self.text}"


def decode_entry_failure(reason: int) -> EntryFailure:
    """Tell VT-x and AMD-V apart by the number itself, and say what it means.

    VT-x gives an exit reason with bit 31 set, or a small VM-instruction error number; AMD-V a negative exit code, which
    older kernels hand out cut to 32 bits.
    """
    for code, text in SVM_EXIT_CODES.items():
        if reason in (code, code & 0xFFFF_FFFF, code & 0xFFFF_FFFF_FFFF_FFFF):
            return EntryFailure(reason, AMDV if code == -1 else None, f"AMD-V, {text}")
    if reason & VMX_FAILED_ENTRY and reason >> 32 == 0:
        basic = reason & 0xFFFF
        meaning = BASIC_EXIT_REASONS.get(basic, "not a reason that the manual gives for failed entries")
        return EntryFailure(
            reason, VTX if basic == 33 else None, f"VT-x, VM entry failed, basic exit reason {basic}: {meaning}"
        )
    if reason in VM_INSTRUCTION_ERRORS:
        meaning = VM_INSTRUCTION_ERRORS[reason]
        return EntryFailure(
            reason, None, f"VT-x, VM-instruction error {reason}: {meaning}; KVM's own doing, not the guest state's"
        )
    return EntryFailure(reason, None, "unknown to VT-x and AMD-V")
