"""Event delivery in protected mode; the other modes and escalation are in files of their own."""

from __future__ import annotations

import struct

import pytest

from delivery_outcomes import delivered, failed, raised
from event_delivery_tables import (
    ABSENT_CODE,
    ABSENT_DATA,
    BEYOND,
    CODE16,
    CODE32,
    CONFORMING32,
    DATA16,
    DATA32,
    DPL3,
    GDT,
    HANDLER,
    IDT,
    INTERRUPT16,
    INTERRUPT32,
    KERNEL_STACK,
    LDT,
    READ_ONLY,
    RING1_CODE,
    SMALL_CODE,
    SMALL_STACK,
    TASK,
    TRAP32,
    TSS,
    USER_CODE32,
    USER_DATA32,
    USER_STACK,
    gate32,
    protected,
    tables,
    tss32,
    words,
)
from kvmpy.x86.entry_rules import violations
from kvmpy.x86.event_delivery import Delivered, DeliveryFailure, Event, LinearFault, deliver
from kvmpy.x86.page_walk import Access
from kvmpy.x86.registers import DescriptorTable, Segment

GP, NP, SS, TS, PF = 13, 11, 12, 10, 14


# Protected mode, same privilege.


def test_a_32_bit_gate_pushes_eflags_cs_and_eip() -> None:
    memory = tables()
    gate32(memory, 0x20)
    result = delivered(memory, protected(), Event.external_interrupt(0x20))
    assert words(memory, KERNEL_STACK - 12, 3, 4) == [0x1234, CODE32, 0x202]
    assert result.state.regs.rsp == KERNEL_STACK - 12
    assert result.state.regs.rip == HANDLER
    assert result.gate == f"IDT gate 0x20 at {IDT + 0x100:#x}"


def test_a_fault_pushes_its_error_code_last_and_sets_rf_in_the_image() -> None:
    memory = tables()
    gate32(memory, GP)
    result = delivered(memory, protected(), Event.exception(GP, 0x48))
    assert words(memory, KERNEL_STACK - 16, 4, 4) == [0x48, 0x1234, CODE32, 0x1_0202]
    assert result.frame[0] == ("error code", 0x48)


def test_a_16_bit_gate_pushes_words() -> None:
    memory = tables()
    gate32(memory, GP, selector=CODE16, offset=0x400, access=INTERRUPT16)
    result = delivered(memory, protected(), Event.exception(GP, 0x48))
    assert words(memory, KERNEL_STACK - 8, 4, 2) == [0x48, 0x1234, CODE32, 0x202]
    assert result.state.regs.rip == 0x400


def test_a_16_bit_stack_pushes_by_sp_and_keeps_the_rest_of_esp() -> None:
    memory = tables()
    gate32(memory, 5)
    state = protected()
    state.sregs.ss = Segment(DATA16, 0, 0xFFFF, type=3)
    state.regs.rsp = 0xABCD_9000
    result = delivered(memory, state, Event.exception(5))
    assert result.state.regs.rsp == 0xABCD_8FF4
    assert words(memory, 0x8FF4, 1, 4) == [0x1234]


@pytest.mark.parametrize(("access", "rflags"), [(INTERRUPT32, 0x2), (TRAP32, 0x202)])
def test_an_interrupt_gate_clears_if_and_a_trap_gate_does_not(access: int, rflags: int) -> None:
    memory = tables()
    gate32(memory, 5, access=access)
    state = protected()
    state.regs.rflags = 0x1_4302  # RF, NT, IF and TF
    assert delivered(memory, state, Event.exception(5)).state.regs.rflags == rflags


def test_a_page_fault_sets_cr2() -> None:
    memory = tables()
    gate32(memory, PF)
    assert delivered(memory, protected(), Event.page_fault(0xDEAD_B000, 2)).state.sregs.cr2 == 0xDEAD_B000


def test_a_handler_segment_in_the_ldt_is_found() -> None:
    memory = tables()
    memory.write(LDT + 8, struct.pack("<Q", 0x00CF_9B00_0000_FFFF))
    gate32(memory, 5, selector=0x0C)
    state = protected()
    state.sregs.ldt = Segment(0xA8, LDT, 0xF, type=2, s=0)
    assert delivered(memory, state, Event.exception(5)).state.sregs.cs.selector == 0x0C


# Protected mode, to an inner ring.


def test_a_more_privileged_handler_gets_the_stack_of_the_tss() -> None:
    memory = tables()
    gate32(memory, 0x80, access=INTERRUPT32 | DPL3)
    tss32(memory)
    result = delivered(memory, protected(ring=3), Event.software_interrupt(0x80))
    frame = [0x1236, USER_CODE32 | 3, 0x202, USER_STACK, USER_DATA32 | 3]
    assert words(memory, KERNEL_STACK - 20, 5, 4) == frame
    sregs = result.state.sregs
    assert (sregs.cs.selector, sregs.ss.selector, sregs.ss.dpl, result.state.regs.rsp) == (
        CODE32,
        DATA32,
        0,
        KERNEL_STACK - 20,
    )


def test_the_stack_of_a_16_bit_tss_is_used() -> None:
    memory = tables()
    gate32(memory, 5)
    memory.write(TSS + 2, struct.pack("<HH", 0x8800, DATA32))
    state = protected(ring=3)
    state.sregs.tr = state.sregs.tr.replace(type=3, limit=0x2B)
    assert delivered(memory, state, Event.exception(5)).state.regs.rsp == 0x8800 - 20


def test_a_conforming_handler_runs_with_the_privilege_of_its_caller() -> None:
    memory = tables()
    gate32(memory, 5, selector=CONFORMING32)
    result = delivered(memory, protected(ring=3), Event.exception(5))
    assert result.state.sregs.cs.selector == CONFORMING32 | 3
    assert result.state.regs.rsp == USER_STACK - 12


def test_a_state_after_delivery_keeps_the_entry_rules() -> None:
    memory = tables()
    gate32(memory, 5)
    tss32(memory)
    assert violations(delivered(memory, protected(ring=3), Event.exception(5)).state) == []


# Protected mode, every way to fail at the gate.


@pytest.mark.parametrize(
    ("event", "error_code"),
    [
        (Event.software_interrupt(0x30), 0x182),
        (Event.external_interrupt(0x30), 0x183),
        (Event.exception(5), 0x2B),
        (Event.int3(), 0x1A),
        (Event.into(), 0x22),
        (Event.nmi(), 0x13),
    ],
)
def test_a_gate_beyond_the_idt_limit_is_gp_with_ext_only_for_hardware_events(event: Event, error_code: int) -> None:
    state = protected()
    state.sregs.idt = DescriptorTable(IDT, 7)
    assert raised(tables(), state, event) == (GP, error_code)


def test_a_gate_must_lie_wholly_within_the_limit() -> None:
    memory = tables()
    gate32(memory, 5)
    state = protected()
    state.sregs.idt = DescriptorTable(IDT, 5 * 8 + 6)
    failure = failed(memory, state, Event.exception(5))
    assert failure.reason == "the gate ends at offset 0x2f, beyond the IDT limit 0x2e"
    state.sregs.idt = DescriptorTable(IDT, 5 * 8 + 7)
    delivered(memory, state, Event.exception(5))


@pytest.mark.parametrize("access", [0x00, 0x80, 0x8C, 0x84, 0x89, 0x9E, 0x93])
def test_what_is_no_interrupt_or_trap_gate_is_gp(access: int) -> None:
    memory = tables()
    gate32(memory, 5, access=access)
    failure = failed(memory, protected(), Event.exception(5))
    assert failure.raises == Event.exception(GP, 0x2B)
    assert f"access byte {access:#04x}" in failure.reason


def test_a_gate_that_is_not_present_is_np() -> None:
    memory = tables()
    gate32(memory, PF, access=INTERRUPT32 & 0x7F)
    failure = failed(memory, protected(), Event.page_fault(0, 2))
    assert failure.raises == Event.exception(NP, 0x73)
    assert str(failure) == (
        f"#PF (error code 0x2, address 0x0) through IDT gate 0x0e at {IDT + 0x70:#x}: not present; "
        "raises #NP (error code 0x73)"
    )


def test_a_software_interrupt_needs_a_gate_of_its_privilege() -> None:
    memory = tables()
    gate32(memory, 0x80)
    tss32(memory)
    assert raised(memory, protected(ring=3), Event.software_interrupt(0x80)) == (GP, 0x402)
    delivered(memory, protected(ring=3), Event.external_interrupt(0x80))


def test_int3_is_subject_to_the_gates_privilege_too() -> None:
    memory = tables()
    gate32(memory, 3)
    tss32(memory)
    assert raised(memory, protected(ring=3), Event.int3()) == (GP, 0x1A)


def test_the_privilege_of_a_gate_is_checked_before_its_presence() -> None:
    memory = tables()
    gate32(memory, 0x80, access=INTERRUPT32 & 0x7F)
    assert raised(memory, protected(ring=3), Event.software_interrupt(0x80)) == (GP, 0x402)


def test_a_task_gate_is_reported_as_not_modelled() -> None:
    memory = tables()
    gate32(memory, 8, selector=0xA0, access=TASK)
    failure = failed(memory, protected(), Event.exception(8))
    assert failure.raises is None
    assert "task gate to the TSS 0xa0" in failure.reason


# Protected mode, every way to fail at the code segment.


@pytest.mark.parametrize(
    ("selector", "vector", "error_code"),
    [
        (0, GP, 0x01),
        (3, GP, 0x01),
        (BEYOND, GP, BEYOND | 1),
        (DATA32, GP, DATA32 | 1),
        (ABSENT_CODE, NP, ABSENT_CODE | 1),
        (USER_CODE32 | 3, GP, USER_CODE32 | 1),
        (0x0C, GP, 0x0D),
    ],
    ids=["null", "null-rpl3", "beyond-gdt", "data", "not-present", "less-privileged", "no-ldt"],
)
def test_a_bad_code_segment_of_the_handler(selector: int, vector: int, error_code: int) -> None:
    memory = tables()
    gate32(memory, 5, selector=selector)
    assert raised(memory, protected(), Event.exception(5)) == (vector, error_code)


def test_errors_about_the_code_segment_of_a_software_interrupt_have_no_ext() -> None:
    memory = tables()
    gate32(memory, 0x80, selector=DATA32)
    assert raised(memory, protected(), Event.software_interrupt(0x80)) == (GP, DATA32)
    gate32(memory, 0x80, selector=0)
    assert raised(memory, protected(), Event.software_interrupt(0x80)) == (GP, 0)


def test_a_selector_beyond_the_ldt_is_gp() -> None:
    memory = tables()
    gate32(memory, 5, selector=0x14)
    state = protected()
    state.sregs.ldt = Segment(0xA8, LDT, 0xF, type=2, s=0)
    failure = failed(memory, state, Event.exception(5))
    assert failure.raises == Event.exception(GP, 0x15)
    assert "beyond the LDT limit 0xf" in failure.reason


def test_a_code_descriptor_must_lie_wholly_within_the_gdt() -> None:
    memory = tables()
    gate32(memory, 5)
    state = protected()
    state.sregs.gdt = DescriptorTable(GDT, CODE32 + 6)
    assert raised(memory, state, Event.exception(5)) == (GP, CODE32 | 1)
    state.sregs.gdt = DescriptorTable(GDT, CODE32 + 7)
    delivered(memory, state, Event.exception(5))


def test_a_handler_beyond_the_limit_of_its_segment_is_gp() -> None:
    memory = tables()
    gate32(memory, 5, selector=SMALL_CODE, offset=0x1000)
    assert raised(memory, protected(), Event.exception(5)) == (GP, 1)
    gate32(memory, 5, selector=SMALL_CODE, offset=0xFFF)
    delivered(memory, protected(), Event.exception(5))


# Protected mode, every way to fail at the stack.


@pytest.mark.parametrize(
    ("ss", "vector", "error_code"),
    [
        (0, TS, 1),
        (DATA32 | 1, TS, DATA32 | 1),
        (BEYOND, TS, BEYOND | 1),
        (USER_DATA32, TS, USER_DATA32 | 1),
        (READ_ONLY, TS, READ_ONLY | 1),
        (CODE32, TS, CODE32 | 1),
        (ABSENT_DATA, SS, ABSENT_DATA | 1),
        (SMALL_STACK, SS, SMALL_STACK | 1),
    ],
    ids=["null", "rpl", "beyond-gdt", "dpl", "read-only", "code", "not-present", "too-small"],
)
def test_a_bad_stack_segment_in_the_tss(ss: int, vector: int, error_code: int) -> None:
    memory = tables()
    gate32(memory, 5)
    tss32(memory, esp=8, ss=ss)
    assert raised(memory, protected(ring=3), Event.exception(5)) == (vector, error_code)


@pytest.mark.parametrize(("type_", "limit"), [(11, 8), (3, 4)])
def test_a_tss_too_small_for_the_stack_is_ts_with_the_tss_selector(type_: int, limit: int) -> None:
    memory = tables()
    gate32(memory, 5)
    tss32(memory)
    state = protected(ring=3)
    state.sregs.tr = state.sregs.tr.replace(type=type_, limit=limit)
    failure = failed(memory, state, Event.exception(5))
    assert failure.raises == Event.exception(TS, 0xA1)
    assert f"beyond the TSS limit {limit:#x}" in failure.reason


def test_a_ring_1_handler_uses_the_stack_of_ring_1() -> None:
    memory = tables()
    gate32(memory, 5, selector=RING1_CODE)
    tss32(memory, ss=DATA32 | 1, ring=1)
    failure = failed(memory, protected(ring=3), Event.exception(5))
    assert failure.raises == Event.exception(TS, DATA32 | 1)
    assert "ss1 0x0011 in the TSS has DPL 0" in failure.reason


def test_a_full_stack_at_the_same_privilege_is_ss_without_a_selector() -> None:
    memory = tables()
    gate32(memory, 5)
    state = protected()
    state.sregs.ss = Segment(SMALL_STACK, 0, 7, type=3, db=1)
    state.regs.rsp = 8
    assert raised(memory, state, Event.exception(5)) == (SS, 1)


def test_an_expand_down_stack_ends_at_its_limit() -> None:
    memory = tables()
    gate32(memory, 5)
    state = protected()
    state.sregs.ss = Segment(DATA32, 0, 0x8000, type=7, db=1)
    state.regs.rsp = 0x800C
    assert raised(memory, state, Event.exception(5)) == (SS, 1)
    state.regs.rsp = 0x800D
    delivered(memory, state, Event.exception(5))


# Translation.


def test_a_page_fault_on_the_stack_becomes_a_page_fault_event() -> None:
    memory = tables()
    gate32(memory, 5)

    def translate(address: int, access: Access, *, user: bool, implicit: bool) -> int:
        if access is Access.WRITE:
            assert not implicit
            raise LinearFault(address, 2, "no stack page")
        assert implicit
        return address

    failure = deliver(memory, protected(), Event.exception(5), translate=translate)
    assert isinstance(failure, DeliveryFailure)
    assert failure.raises == Event.page_fault(KERNEL_STACK - 4, 2)
    assert failure.reason == "stack: no stack page"


def test_a_gate_across_two_pages_is_read_from_both() -> None:
    memory = tables()
    state = protected()
    state.sregs.idt = DescriptorTable(IDT - 5 * 8 - 4, 0x7FF)
    memory.write(IDT - 4, struct.pack("<HH", HANDLER, CODE32))
    memory.write(0x6000, struct.pack("<BBH", 0, INTERRUPT32, 0))

    def translate(address: int, access: Access, *, user: bool, implicit: bool) -> int:
        return address - IDT + 0x6000 if IDT <= address < IDT + 0x1000 else address

    result = deliver(memory, state, Event.exception(5), translate=translate)
    assert isinstance(result, Delivered)
    assert result.state.regs.rip == HANDLER


def test_addresses_wrap_at_4_gib_outside_long_mode() -> None:
    memory = tables()
    gate32(memory, 5)
    state = protected()
    state.sregs.gdt = DescriptorTable((GDT - 0x10) & 0xFFFF_FFFF, 0xFFFF)
    state.sregs.idt = DescriptorTable(0xFFFF_FFF0, 0x7FF)
    memory.write(5 * 8 - 0x10, struct.pack("<HHBBH", HANDLER, CODE32 + 0x10, 0, INTERRUPT32, 0))
    assert delivered(memory, state, Event.exception(5)).state.sregs.cs.selector == CODE32 + 0x10
