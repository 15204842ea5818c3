"""Event delivery in long mode: 16-byte gates, interrupt stacks, canonical addresses, real page tables."""

from __future__ import annotations

import struct

import pytest

from entry_rule_breaks import Bytes
from event_delivery_tables import (
    ABSENT_CODE64,
    BEYOND,
    CODE32,
    CODE64,
    CODE64_AND_32,
    CONFORMING64,
    DATA32,
    DPL3,
    IDT,
    INTERRUPT16,
    INTERRUPT32,
    IST_STACK,
    KERNEL_STACK,
    TASK,
    TRAP32,
    TSS,
    USER_CODE64,
    USER_DATA32,
    USER_STACK,
    gate64,
    identity,
    long,
    tables,
    words,
)
from kvmpy.x86.entry_rules import violations
from kvmpy.x86.event_delivery import Delivered, DeliveryFailure, Event, deliver
from kvmpy.x86.registers import CpuState, DescriptorTable

GP, NP, SS, TS, PF = 13, 11, 12, 10, 14


def delivered(memory: Bytes, state: CpuState, event: Event) -> Delivered:
    result = deliver(memory, state, event, translate=identity)
    assert isinstance(result, Delivered), str(result)
    return result


def failed(memory: Bytes, state: CpuState, event: Event) -> DeliveryFailure:
    before = bytes(memory.data)
    result = deliver(memory, state, event, translate=identity)
    assert isinstance(result, DeliveryFailure), str(result)
    assert memory.data == before
    return result


def raised(memory: Bytes, state: CpuState, event: Event) -> tuple[int, int | None]:
    failure = failed(memory, state, event)
    assert failure.raises is not None
    return failure.raises.vector, failure.raises.error_code


def test_the_frame_always_has_ss_and_rsp_and_is_aligned_to_16_bytes() -> None:
    memory = tables()
    gate64(memory, 0x20)
    state = long()
    state.regs.rsp = KERNEL_STACK - 3
    result = delivered(memory, state, Event.external_interrupt(0x20))
    frame = [0x1234, CODE64, 0x202, KERNEL_STACK - 3, DATA32]
    assert result.frame_address == KERNEL_STACK - 0x10 - 40
    assert words(memory, result.frame_address, 5, 8) == frame
    assert [value for _, value in result.frame] == frame
    assert result.state.sregs.ss == state.sregs.ss
    assert result.state.regs.rflags == 2


def test_an_error_code_is_the_lowest_quadword() -> None:
    memory = tables()
    gate64(memory, GP)
    result = delivered(memory, long(), Event.exception(GP, 0x48))
    assert words(memory, KERNEL_STACK - 48, 6, 8) == [0x48, 0x1234, CODE64, 0x1_0202, KERNEL_STACK, DATA32]
    assert result.state.regs.rsp == KERNEL_STACK - 48


def test_a_trap_gate_leaves_interrupts_enabled() -> None:
    memory = tables()
    gate64(memory, 5, access=TRAP32)
    assert delivered(memory, long(), Event.exception(5)).state.regs.rflags == 0x202


def test_the_handler_starts_without_trap_nested_task_and_resume_flags() -> None:
    memory = tables()
    gate64(memory, 5)
    state = long()
    state.regs.rflags = 0x5_4302  # AC, RF, NT, IF and TF
    assert delivered(memory, state, Event.exception(5)).state.regs.rflags == 0x4_0002


def test_a_handler_above_4_gib_is_reached() -> None:
    memory = tables()
    gate64(memory, 5, offset=0xFFFF_FFFF_8010_1234)
    assert delivered(memory, long(), Event.exception(5)).state.regs.rip == 0xFFFF_FFFF_8010_1234


def test_from_ring_3_the_stack_is_rsp0_and_ss_becomes_null() -> None:
    memory = tables()
    gate64(memory, 0x80, access=INTERRUPT32 | DPL3)
    memory.write(TSS + 4, struct.pack("<Q", KERNEL_STACK))
    result = delivered(memory, long(ring=3), Event.software_interrupt(0x80))
    frame = [0x1236, USER_CODE64 | 3, 0x202, USER_STACK, USER_DATA32 | 3]
    assert words(memory, KERNEL_STACK - 40, 5, 8) == frame
    sregs = result.state.sregs
    assert (sregs.cs.selector, sregs.ss.selector, sregs.ss.dpl, sregs.ss.unusable) == (CODE64, 0, 0, 1)
    assert violations(result.state) == []


@pytest.mark.parametrize("ring", [0, 3])
@pytest.mark.parametrize("ist", [1, 7])
def test_an_interrupt_stack_is_used_from_any_ring(ring: int, ist: int) -> None:
    memory = tables()
    gate64(memory, 8, ist=ist)
    memory.write(TSS + 0x24 + 8 * (ist - 1), struct.pack("<Q", IST_STACK))
    result = delivered(memory, long(ring), Event.exception(8))
    assert result.state.regs.rsp == (IST_STACK & ~0xF) - 48


def test_a_conforming_handler_stays_in_ring_3_on_the_users_stack() -> None:
    memory = tables()
    gate64(memory, 5, selector=CONFORMING64)
    result = delivered(memory, long(ring=3), Event.exception(5))
    assert result.state.sregs.cs.selector == CONFORMING64 | 3
    assert result.state.regs.rsp == USER_STACK - 40


@pytest.mark.parametrize(
    ("event", "error_code"),
    [(Event.software_interrupt(0x30), 0x182), (Event.external_interrupt(0x30), 0x183)],
)
def test_a_gate_beyond_the_idt_limit_is_gp(event: Event, error_code: int) -> None:
    state = long()
    state.sregs.idt = DescriptorTable(IDT, 0x30 * 16 + 14)
    assert raised(tables(), state, event) == (GP, error_code)


@pytest.mark.parametrize("access", [0, 0x8C, INTERRUPT16, TASK, 0x9E])
def test_what_is_no_64_bit_interrupt_or_trap_gate_is_gp(access: int) -> None:
    memory = tables()
    gate64(memory, 5, access=access)
    assert raised(memory, long(), Event.exception(5)) == (GP, 0x2B)


def test_a_gate_that_is_not_present_is_np() -> None:
    memory = tables()
    gate64(memory, PF, access=INTERRUPT32 & 0x7F)
    assert raised(memory, long(), Event.page_fault(0, 0)) == (NP, 0x73)


def test_a_software_interrupt_needs_a_gate_of_its_privilege() -> None:
    memory = tables()
    gate64(memory, 0x80)
    assert raised(memory, long(ring=3), Event.software_interrupt(0x80)) == (GP, 0x402)


@pytest.mark.parametrize(
    ("selector", "vector", "error_code"),
    [
        (0, GP, 1),
        (BEYOND, GP, BEYOND | 1),
        (DATA32, GP, DATA32 | 1),
        (CODE32, GP, CODE32 | 1),
        (CODE64_AND_32, GP, CODE64_AND_32 | 1),
        (USER_CODE64, GP, USER_CODE64 | 1),
        (ABSENT_CODE64, NP, ABSENT_CODE64 | 1),
    ],
    ids=["null", "beyond-gdt", "data", "32-bit", "64-and-32-bit", "less-privileged", "not-present"],
)
def test_a_bad_code_segment_of_the_handler(selector: int, vector: int, error_code: int) -> None:
    memory = tables()
    gate64(memory, 5, selector=selector)
    assert raised(memory, long(), Event.exception(5)) == (vector, error_code)


@pytest.mark.parametrize(("ist", "limit"), [(0, 0x0A), (1, 0x2A), (7, 0x5A)])
def test_a_tss_too_small_for_the_stack_is_ts(ist: int, limit: int) -> None:
    memory = tables()
    gate64(memory, 5, ist=ist)
    state = long(ring=3)
    state.sregs.tr = state.sregs.tr.replace(limit=limit)
    failure = failed(memory, state, Event.exception(5))
    assert failure.raises == Event.exception(TS, 0xA1)
    state.sregs.tr = state.sregs.tr.replace(limit=limit + 1)
    memory.write(TSS, struct.pack("<13Q", *[KERNEL_STACK * 0x1_0000_0001] * 13))
    assert "TSS limit" not in str(deliver(memory, state, Event.exception(5), translate=identity))


def test_a_non_canonical_stack_of_the_tss_is_ss() -> None:
    memory = tables()
    gate64(memory, 5)
    memory.write(TSS + 4, struct.pack("<Q", 1 << 47))
    failure = failed(memory, long(ring=3), Event.exception(5))
    assert failure.raises == Event.exception(SS, 1)
    assert "rsp0 in the TSS, 0x800000000000, is not canonical" in failure.reason


def test_a_non_canonical_present_stack_is_ss_without_ext_for_software_interrupts() -> None:
    memory = tables()
    gate64(memory, 0x80)
    state = long()
    state.regs.rsp = 1 << 60
    assert raised(memory, state, Event.software_interrupt(0x80)) == (SS, 0)


def test_a_non_canonical_handler_is_gp() -> None:
    memory = tables()
    gate64(memory, 5, offset=1 << 47)
    assert raised(memory, long(), Event.exception(5)) == (GP, 1)


def test_57_bit_addresses_are_canonical_with_la57() -> None:
    memory = tables()
    gate64(memory, 5, offset=1 << 47)
    state = long()
    state.sregs.cr4 |= 1 << 12
    assert delivered(memory, state, Event.exception(5)).state.regs.rip == 1 << 47


# With the guest's own page tables: identity, 4 KiB pages, PML4 at 0xb000.

PML4, PDPT, PD, PT = 0xB000, 0xC000, 0xD000, 0xE000


def paged(*, without: int | None = None, user_pages: bool = False) -> Bytes:
    memory = tables()
    for table, below in ((PML4, PDPT), (PDPT, PD), (PD, PT)):
        memory.write(table, struct.pack("<Q", below | 7))
    for page in range(16):
        flags = 0 if page << 12 == without else (7 if user_pages else 3)
        memory.write(PT + 8 * page, struct.pack("<Q", page << 12 | flags))
    return memory


def paged_state(ring: int = 0) -> CpuState:
    state = long(ring)
    state.sregs.cr3 = PML4
    return state


def test_by_default_the_guests_page_tables_translate() -> None:
    memory = paged()
    gate64(memory, 5)
    result = deliver(memory, paged_state(), Event.exception(5))
    assert isinstance(result, Delivered)
    assert words(memory, KERNEL_STACK - 40, 1, 8) == [0x1234]


@pytest.mark.parametrize(
    ("missing", "address", "error_code", "what"),
    [
        (0x2000, 0x2050, 0, "IDT gate 0x05: page fault at 0x2050: PTE not present"),
        (0x1000, 0x1028, 0, "GDT entry of code segment 0x0028: page fault at 0x1028: PTE not present"),
        (0x3000, 0x3004, 0, "rsp0 in the TSS: page fault at 0x3004: PTE not present"),
        (0x8000, KERNEL_STACK - 8, 2, "stack: page fault at 0x8ff8: PTE not present"),
    ],
    ids=["idt", "gdt", "tss", "stack"],
)
def test_a_missing_page_of_a_table_or_of_the_stack_is_a_supervisor_page_fault(
    missing: int, address: int, error_code: int, what: str
) -> None:
    memory = paged(without=missing)
    gate64(memory, 5)
    memory.write(TSS + 4, struct.pack("<Q", KERNEL_STACK))
    result = deliver(memory, paged_state(ring=3), Event.exception(5))
    assert isinstance(result, DeliveryFailure)
    assert result.raises == Event.page_fault(address, error_code)
    assert result.reason == what


def test_a_user_stack_of_a_ring_3_handler_is_a_user_access() -> None:
    memory = paged()
    gate64(memory, 5, selector=CONFORMING64)
    result = deliver(memory, paged_state(ring=3), Event.exception(5))
    assert isinstance(result, DeliveryFailure)
    assert result.raises == Event.page_fault(USER_STACK - 8, 7)


def test_tables_on_user_pages_fault_under_smap() -> None:
    memory = paged(user_pages=True)
    gate64(memory, 5)
    state = paged_state()
    assert isinstance(deliver(memory, state, Event.exception(5)), Delivered)
    state.sregs.cr4 |= 1 << 21
    result = deliver(memory, state, Event.exception(5))
    assert isinstance(result, DeliveryFailure)
    assert result.raises == Event.page_fault(0x2050, 1)


def test_a_non_canonical_table_is_gp() -> None:
    memory = paged()
    state = paged_state()
    state.sregs.idt = DescriptorTable(1 << 50, 0xFFF)
    result = deliver(memory, state, Event.exception(5))
    assert isinstance(result, DeliveryFailure)
    assert result.raises == Event.exception(GP, 1)
