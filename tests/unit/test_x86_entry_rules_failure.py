"""The numbers of KVM_EXIT_FAIL_ENTRY in words."""

from __future__ import annotations

import pytest

from entry_rule_breaks import long, real, segment
from kvmpy.x86.entry_rules import AMDV, VTX, ProcessorLimits, RuleSet, decode_entry_failure, explain_entry_failure


@pytest.mark.parametrize(
    ("reason", "rules", "words"),
    [
        (0x8000_0021, VTX, "invalid guest state"),
        (0x8000_0022, None, "MSR loading"),
        (0x8000_0029, None, "machine-check"),
        (0x8000_0030, None, "not a reason that the manual gives"),
        (7, None, "invalid control fields"),
        (8, None, "invalid host-state"),
        (-1, AMDV, "VMEXIT_INVALID"),
        (0xFFFF_FFFF, AMDV, "VMEXIT_INVALID"),
        (0xFFFF_FFFF_FFFF_FFFF, AMDV, "VMEXIT_INVALID"),
        (0xFFFF_FFFE, None, "VMEXIT_BUSY"),
        (0x1234, None, "unknown"),
    ],
)
def test_a_failure_number_is_told_apart_by_vendor_and_put_into_words(
    reason: int, rules: RuleSet | None, words: str
) -> None:
    failure = decode_entry_failure(reason)
    assert failure.set is rules
    assert words in str(failure)
    assert f"{reason:#x}" in str(failure)


def test_invalid_guest_state_of_vtx_names_the_broken_vtx_rules() -> None:
    state = long()
    segment("tr", type=9)(state)
    state.sregs.efer |= 1 << 40
    lines = explain_entry_failure(0x8000_0021, state)
    assert "basic exit reason 33" in lines[0]
    assert [line.split(":")[0] for line in lines[1:]] == ["vtx.efer.reserved", "vtx.tr.type"]


def test_vmexit_invalid_names_the_broken_amd_rules() -> None:
    state = real()
    state.sregs.efer = 1 << 40
    lines = explain_entry_failure(0xFFFF_FFFF, state)
    assert [line.split(":")[0] for line in lines[1:]] == ["amdv.efer.mbz"]


def test_what_kvm_repairs_is_not_given_as_the_cause() -> None:
    state = long()
    segment("ds", type=2)(state)
    lines = explain_entry_failure(0x8000_0021, state)
    assert len(lines) == 2
    assert "a field that only KVM writes" in lines[1]


def test_other_failures_are_not_blamed_on_the_state() -> None:
    state = long()
    segment("tr", type=9)(state)
    assert len(explain_entry_failure(7, state)) == 1


def test_the_limits_of_the_processor_count_in_the_explanation() -> None:
    state = long()
    state.sregs.cr3 |= 1 << 46
    lines = explain_entry_failure(0x8000_0021, state, processor=ProcessorLimits(physical_address_bits=46))
    assert lines[1].startswith("vtx.cr3.width")
