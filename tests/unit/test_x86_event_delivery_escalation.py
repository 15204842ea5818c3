"""From a failed delivery to the double fault and the triple fault (SDM vol. 3, 6.15, tables 6-4 and 6-5)."""

from __future__ import annotations

import struct

import pytest

from entry_rule_breaks import Bytes
from event_delivery_tables import (
    DATA32,
    IDT,
    KERNEL_STACK,
    TASK,
    TSS,
    gate32,
    gate64,
    identity,
    long,
    protected,
    tables,
    words,
)
from kvmpy.x86 import modes
from kvmpy.x86.event_delivery import Delivered, Event, OutcomeKind, deliver_with_escalation, escalates_to_double_fault
from kvmpy.x86.registers import CpuState, DescriptorTable

DE, DB, UD, DF, TS, NP, SS, GP, PF, MC, CP = 0, 1, 6, 8, 10, 11, 12, 13, 14, 18, 21


def vectors(steps: tuple[object, ...]) -> list[int]:
    return [step.event.vector for step in steps]  # type: ignore[attr-defined]


BENIGN = [
    Event.exception(DB),
    Event.exception(UD),
    Event.exception(MC),
    Event.software_interrupt(GP),
    Event.software_interrupt(PF),
    Event.external_interrupt(GP),
    Event.nmi(),
    Event.int3(),
]
CONTRIBUTORY = [Event.exception(vector) for vector in (DE, TS, NP, SS, GP, CP)]
PAGE_FAULTS = [Event.page_fault(0, 0), Event.exception(20)]


@pytest.mark.parametrize("first", BENIGN, ids=str)
@pytest.mark.parametrize("second", [*CONTRIBUTORY, *PAGE_FAULTS, Event.exception(UD)], ids=str)
def test_after_a_benign_event_the_second_is_delivered_itself(first: Event, second: Event) -> None:
    assert not escalates_to_double_fault(first, second)


@pytest.mark.parametrize("first", CONTRIBUTORY, ids=str)
def test_a_contributory_exception_escalates_with_a_contributory_one_only(first: Event) -> None:
    assert all(escalates_to_double_fault(first, second) for second in CONTRIBUTORY)
    assert not any(escalates_to_double_fault(first, second) for second in (*PAGE_FAULTS, *BENIGN))


@pytest.mark.parametrize("first", PAGE_FAULTS, ids=str)
def test_a_page_fault_escalates_with_contributory_exceptions_and_page_faults(first: Event) -> None:
    assert all(escalates_to_double_fault(first, second) for second in (*CONTRIBUTORY, *PAGE_FAULTS))
    assert not any(escalates_to_double_fault(first, second) for second in BENIGN)


def test_an_event_with_a_good_gate_takes_one_step() -> None:
    memory = tables()
    gate32(memory, UD)
    outcome = deliver_with_escalation(memory, protected(), Event.exception(UD))
    assert outcome.kind is OutcomeKind.DELIVERED
    assert outcome.state is not None
    assert vectors(outcome.steps) == [UD]
    assert outcome.remarks == ()


def test_an_interrupt_without_a_gate_becomes_gp_that_returns_to_the_interrupted_instruction() -> None:
    memory = tables()
    gate32(memory, GP)
    outcome = deliver_with_escalation(memory, protected(), Event.software_interrupt(0x80))
    assert outcome.kind is OutcomeKind.DELIVERED
    assert vectors(outcome.steps) == [0x80, GP]
    assert words(memory, KERNEL_STACK - 16, 2, 4) == [0x402, 0x1234]


def test_a_fault_without_a_gate_becomes_a_double_fault_with_error_code_0() -> None:
    memory = tables()
    gate64(memory, DF)
    outcome = deliver_with_escalation(memory, long(), Event.page_fault(0xB000, 2), translate=identity)
    assert outcome.kind is OutcomeKind.DELIVERED
    assert vectors(outcome.steps) == [PF, DF]
    assert outcome.remarks == ("#GP (error code 0x73) during the delivery of #PF: double fault",)
    last = outcome.steps[-1]
    assert isinstance(last, Delivered)
    assert last.frame[0] == ("error code", 0)


def test_an_empty_idt_ends_in_a_triple_fault_with_its_whole_chain() -> None:
    state = protected()
    state.sregs.idt = DescriptorTable(IDT, 0)
    outcome = deliver_with_escalation(tables(), state, Event.exception(UD))
    assert outcome.kind is OutcomeKind.SHUTDOWN
    assert outcome.state is None
    assert vectors(outcome.steps) == [UD, GP, DF]
    assert str(outcome).splitlines() == [
        "#UD through IDT gate 0x06 at 0x2030: the gate ends at offset 0x37, beyond the IDT limit 0x0; "
        "raises #GP (error code 0x33)",
        "  #GP (error code 0x33) is delivered instead",
        "#GP (error code 0x33) through IDT gate 0x0d at 0x2068: the gate ends at offset 0x6f, beyond the IDT limit "
        "0x0; raises #GP (error code 0x6b)",
        "  #GP (error code 0x6b) during the delivery of #GP: double fault",
        "#DF (error code 0x0) through IDT gate 0x08 at 0x2040: the gate ends at offset 0x47, beyond the IDT limit 0x0; "
        "raises #GP (error code 0x43)",
        "  #GP (error code 0x43) during the delivery of #DF: triple fault, shutdown",
    ]


def test_an_empty_real_mode_idt_ends_in_a_triple_fault_too() -> None:
    state = modes.real_mode(0x7C00)
    state.sregs.idt = DescriptorTable(0, 0)
    outcome = deliver_with_escalation(Bytes(), state, Event.software_interrupt(0x10))
    assert outcome.kind is OutcomeKind.SHUTDOWN
    assert vectors(outcome.steps) == [0x10, GP, DF]


def with_a_missing_stack() -> tuple[Bytes, CpuState]:
    """Long mode with pages 0x1000 to 0xafff mapped and RSP at 0xc000, whose page is not; ist1 is good."""
    memory = tables()
    for page in range(0x1000, 0xB000, 0x1000):
        memory.write(0xE000 + 8 * (page >> 12), struct.pack("<Q", page | 3))
    for table, below in ((0xB000, 0xC000), (0xC000, 0xD000), (0xD000, 0xE000)):
        memory.write(table, struct.pack("<Q", below | 3))
    memory.write(TSS + 0x24, struct.pack("<Q", 0xA000))
    state = long()
    state.sregs.cr3 = 0xB000
    state.regs.rsp = 0xC000
    return memory, state


def test_a_page_fault_while_a_contributory_exception_is_delivered_is_delivered_and_sets_cr2() -> None:
    memory, state = with_a_missing_stack()
    gate64(memory, GP)
    gate64(memory, PF, ist=1)
    outcome = deliver_with_escalation(memory, state, Event.exception(GP))
    assert outcome.kind is OutcomeKind.DELIVERED
    assert vectors(outcome.steps) == [GP, PF]
    assert outcome.state is not None
    assert outcome.state.sregs.cr2 == 0xBFF8
    assert state.sregs.cr2 == 0


def test_two_page_faults_are_a_double_fault_and_cr2_has_the_second_address() -> None:
    memory, state = with_a_missing_stack()
    gate64(memory, PF)
    gate64(memory, DF, ist=1)
    outcome = deliver_with_escalation(memory, state, Event.page_fault(0x1234_5000, 2))
    assert vectors(outcome.steps) == [PF, DF]
    assert outcome.state is not None
    assert outcome.state.sregs.cr2 == 0xBFF8


def test_a_missing_stack_for_the_double_fault_is_a_triple_fault() -> None:
    memory, state = with_a_missing_stack()
    gate64(memory, PF)
    gate64(memory, DF)
    outcome = deliver_with_escalation(memory, state, Event.page_fault(0x1234_5000, 2))
    assert outcome.kind is OutcomeKind.SHUTDOWN
    assert outcome.remarks[-1].startswith("#PF (error code 0x2, address 0xbff8) during the delivery of #DF")


def test_a_page_fault_that_escalates_has_set_cr2_before() -> None:
    memory = tables()
    gate32(memory, DF)
    gate32(memory, PF, selector=DATA32)
    outcome = deliver_with_escalation(memory, protected(), Event.page_fault(0x1234_5000, 2))
    assert vectors(outcome.steps) == [PF, DF]
    assert outcome.state is not None
    assert outcome.state.sregs.cr2 == 0x1234_5000
    assert outcome.remarks == (f"#GP (error code {DATA32 | 1:#x}) during the delivery of #PF: double fault",)


def test_what_is_not_modelled_ends_the_chain_undetermined() -> None:
    memory = tables()
    gate32(memory, DF, selector=0xA0, access=TASK)
    outcome = deliver_with_escalation(memory, protected(), Event.exception(GP))
    assert outcome.kind is OutcomeKind.UNDETERMINED
    assert outcome.state is None
    assert vectors(outcome.steps) == [GP, DF]
