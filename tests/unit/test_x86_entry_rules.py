"""Every entry rule is broken once, alone, from a state that keeps all of them."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entry_rule_breaks import BREAKS, GOOD_STATES, Break, Bytes, long, pae, protected, real, segment, sets
from kvmpy.errors import EntryRefusedError
from kvmpy.x86.entry_rules import AMDV, KVM, OUT_OF_REACH, RULES, VTX, ProcessorLimits, violations
from kvmpy.x86.flags import Cr0, Cr4, Efer
from kvmpy.x86.registers import CpuState, Segment


def ids(state: CpuState, **options: object) -> set[str]:
    return {violation.rule for violation in violations(state, **options)}  # type: ignore[arg-type]


@pytest.mark.parametrize("good", GOOD_STATES.values(), ids=GOOD_STATES.keys())
def test_a_good_state_breaks_no_rule_of_any_set(good: object) -> None:
    assert callable(good)
    assert violations(good()) == []


@pytest.mark.parametrize("case", BREAKS, ids=lambda case: case.rule)
def test_breaking_one_rule_reports_that_rule_of_its_set_and_no_other(case: Break) -> None:
    rule = next(rule for rule in RULES if rule.id == case.rule)
    assert violations(case.good(), processor=case.limits, memory=Bytes()) == []
    found = violations(case.broken, sets=(rule.set,), processor=case.limits, memory=case.memory)
    assert {violation.rule for violation in found} == {case.rule, *case.companions}


def test_every_rule_has_a_case_that_breaks_it() -> None:
    assert {rule.id for rule in RULES} == {case.rule for case in BREAKS}


def test_rule_ids_are_unique_and_begin_with_their_set() -> None:
    prefix = {KVM: "kvm.", VTX: "vtx.", AMDV: "amdv."}
    assert len({rule.id for rule in RULES}) == len(RULES)
    assert all(rule.id.startswith(prefix[rule.set]) for rule in RULES)


def test_every_rule_and_every_check_out_of_reach_names_its_source() -> None:
    beginnings = ("SDM vol. 3, 27.", "APM vol. 2, 15.", "Linux arch/x86/kvm/")
    assert all(rule.source.startswith(beginnings) for rule in RULES)
    assert all(check.source.startswith(beginnings) and check.why and check.field for check in OUT_OF_REACH)
    assert {check.set for check in OUT_OF_REACH} == {VTX, AMDV}


def test_only_the_wanted_sets_are_judged() -> None:
    state = real()
    state.sregs.cr0 |= 1 << 32
    assert ids(state) == {"kvm.cr0.high", "vtx.cr0.high", "amdv.cr0.high"}
    assert ids(state, sets=(AMDV,)) == {"amdv.cr0.high"}
    assert ids(state, sets=()) == set()


def test_a_violation_prints_its_rule_the_values_the_requirement_and_the_source() -> None:
    state = long()
    segment("tr", type=9)(state)
    (violation,) = violations(state)
    assert str(violation) == (
        "vtx.tr.type: TR.type=0x9, EFER=0xd00: the type of TR must be 11 (busy TSS), or 3 (busy 16-bit TSS) outside "
        "IA-32e mode [SDM vol. 3, 27.3.1.2 Checks on Guest Segment Registers]"
    )


def test_a_violation_that_kvm_repairs_says_so() -> None:
    state = long()
    segment("ds", type=2)(state)
    (violation,) = violations(state)
    assert violation.kvm_repairs
    assert "KVM repairs it" in str(violation)


def test_a_violation_cannot_be_changed() -> None:
    state = real()
    state.regs.rflags = 0
    (violation,) = violations(state)
    with pytest.raises(dataclasses.FrozenInstanceError):
        violation.rule = "other"  # type: ignore[misc]


def test_violations_fit_into_the_error_for_a_refused_entry() -> None:
    state = real()
    state.sregs.cr0 |= Cr0.PG
    error = EntryRefusedError("KVM_SET_SREGS", 22, violations(state, sets=(KVM,)))
    assert "kvm.cr0.pg: CR0=0x80000010" in str(error)


@pytest.mark.parametrize("register", ["ds", "es", "fs", "gs", "ss", "ldt"])
def test_an_unusable_segment_may_hold_nonsense(register: str) -> None:
    state = long()
    nonsense = Segment(0x48, 0, 0x1234_5000, type=0, s=1, present=1, g=0, unusable=1)
    setattr(state.sregs, register, nonsense)
    assert violations(state) == []


@pytest.mark.parametrize("register", ["ds", "es", "fs", "gs", "ss", "ldt"])
def test_a_segment_that_is_not_present_counts_as_unusable(register: str) -> None:
    state = long()
    setattr(state.sregs, register, Segment(0, 0, 0, type=0, s=0, present=0))
    assert violations(state) == []


@pytest.mark.parametrize("register", ["fs", "gs"])
def test_the_base_of_an_unusable_fs_or_gs_must_be_canonical_all_the_same(register: str) -> None:
    state = long()
    setattr(state.sregs, register, Segment(0, 1 << 60, 0, present=0, unusable=1))
    assert ids(state) == {f"vtx.{register}.base"}


def test_cs_is_judged_even_when_marked_unusable() -> None:
    state = long()
    segment("cs", unusable=1, s=0)(state)
    assert ids(state) == {"vtx.cs.s"}


def test_a_conforming_code_segment_may_have_a_lower_dpl_than_the_cpl() -> None:
    state = protected()
    segment("cs", type=15, dpl=0, selector=0x0B)(state)
    segment("ss", dpl=3, selector=0x13)(state)
    assert violations(state) == []


def test_rip_need_not_be_canonical_in_its_highest_implemented_bit() -> None:
    state = long()
    sets(rip=1 << 47)(state)
    assert violations(state) == []
    sets(rip=0xFFFF_0000_0000_0000)(state)
    assert violations(state) == []


def test_five_level_addresses_are_canonical_on_a_processor_with_57_bits() -> None:
    state = long()
    segment("fs", base=1 << 50)(state)
    assert ids(state) == {"vtx.fs.base"}
    assert violations(state, processor=ProcessorLimits(linear_address_bits=57)) == []


def test_lam_bits_of_cr3_are_allowed_where_the_processor_has_lam() -> None:
    state = long()
    state.sregs.cr3 |= 3 << 61
    assert violations(state) == []
    assert ids(state, sets=(KVM, VTX), processor=ProcessorLimits(lam=False)) == {"kvm.long_mode.cr3", "vtx.cr3.width"}


def test_limits_given_as_flags_forbid_bits_without_a_name_too() -> None:
    limits = ProcessorLimits(cr4=Cr4.PAE, efer=Efer.NXE)
    state = real()
    sets(cr4=1 << 63)(state)
    assert ids(state, sets=(KVM,), processor=limits) == {"kvm.cr4.bits"}
    sets(cr4=0, efer=1 << 1)(state)
    assert ids(state, sets=(KVM,), processor=limits) == {"kvm.efer.bits"}


def test_an_interrupt_may_be_injected_with_interrupts_enabled() -> None:
    state = real()
    sets(interrupt=0x20, rflags=0x202)(state)
    assert violations(state) == []


def test_svm_enable_in_efer_is_amds_alone() -> None:
    state = real()
    state.sregs.efer = int(Efer.SVME)
    assert ids(state) == {"vtx.efer.reserved"}


def test_pdptes_are_judged_only_with_memory_and_only_the_present_ones() -> None:
    state = pae()
    memory = Bytes()
    memory.write(0x2000, (0x1E6).to_bytes(8, "little"))
    assert violations(state, memory=memory) == []
    memory.write(0x2000, (0x1E7).to_bytes(8, "little"))
    assert ids(state, memory=memory) == {"vtx.pdpte"}
    assert violations(state) == []


def test_a_pdpte_table_outside_memory_is_no_broken_rule() -> None:
    state = pae()
    state.sregs.cr3 = 0xFFFF_FFE0
    assert violations(state, memory=Bytes()) == []


def test_the_physical_address_width_limits_pdptes() -> None:
    memory = Bytes()
    memory.write(0x2018, (1 << 40 | 1).to_bytes(8, "little"))
    assert violations(pae(), memory=memory) == []
    assert ids(pae(), memory=memory, processor=ProcessorLimits(physical_address_bits=40)) == {"vtx.pdpte"}


WORD = st.integers(0, (1 << 64) - 1)


@given(
    cr0=WORD, cr3=WORD, cr4=WORD, efer=WORD, apic_base=WORD, rip=WORD, rflags=WORD, base=WORD, type=st.integers(0, 15)
)
def test_any_register_values_can_be_judged_and_printed(base: int, type: int, **values: int) -> None:
    state = CpuState()
    sets(**values)(state)
    state.sregs.cs = Segment(0, base, base & 0xFFFF_FFFF, type=type)
    for violation in violations(state, memory=Bytes()):
        assert violation.rule in str(violation)
