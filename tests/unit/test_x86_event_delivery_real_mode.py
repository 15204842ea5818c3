"""Events, and their delivery in real mode through the interrupt vector table."""

from __future__ import annotations

import struct

import pytest

from delivery_outcomes import delivered, failed, raised
from entry_rule_breaks import Bytes
from event_delivery_tables import words
from kvmpy.errors import UsageError
from kvmpy.memory import GuestMemory, MemoryRegion
from kvmpy.x86 import modes
from kvmpy.x86.event_delivery import Event, EventKind
from kvmpy.x86.registers import CpuState, DescriptorTable

GP, SS = 13, 12


# Events.


def test_an_exception_that_has_an_error_code_gets_zero_when_none_is_given() -> None:
    assert Event.exception(GP).error_code == 0
    assert Event.exception(6).error_code is None


@pytest.mark.parametrize("vector", [0, 3, 6, 16])
def test_an_error_code_for_an_exception_without_one_is_refused(vector: int) -> None:
    with pytest.raises(UsageError, match="no error code"):
        Event.exception(vector, 4)


@pytest.mark.parametrize("vector", [-1, 32])
def test_exception_vectors_end_at_31(vector: int) -> None:
    with pytest.raises(UsageError):
        Event.exception(vector)


def test_interrupt_vectors_end_at_255() -> None:
    with pytest.raises(UsageError):
        Event.external_interrupt(256)


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (Event.page_fault(0x1000, 2), "#PF (error code 0x2, address 0x1000)"),
        (Event.software_interrupt(0x80), "int 0x80"),
        (Event.external_interrupt(0x20), "interrupt 0x20"),
        (Event.int3(), "#BP (int3)"),
        (Event.into(), "#OF (into)"),
        (Event.nmi(), "NMI"),
        (Event.exception(6), "#UD"),
        (Event.exception(31), "exception 0x1f"),
    ],
)
def test_events_print_as_the_manual_names_them(event: Event, text: str) -> None:
    assert str(event) == text


# Real mode.


def real(ip: int = 0x7C00) -> CpuState:
    state = modes.real_mode(segment=0x100, offset=ip, stack=0x9000)
    state.regs.rflags = 0x4_0302  # AC, IF and TF
    return state


def ivt(vector: int, segment: int, offset: int) -> Bytes:
    memory = Bytes(0x2_0000)
    memory.write(4 * vector, struct.pack("<HH", offset, segment))
    return memory


def test_real_mode_pushes_flags_cs_and_ip_and_enters_the_vector() -> None:
    memory = ivt(0x21, 0x0800, 0x0010)
    result = delivered(memory, real(0x20), Event.software_interrupt(0x21))
    assert words(memory, 0x8FFA, 3, 2) == [0x22, 0x100, 0x0302]
    assert result.frame == (("ip", 0x22), ("cs", 0x100), ("flags", 0x0302))
    assert result.frame_address == 0x8FFA
    assert (result.state.sregs.cs.selector, result.state.sregs.cs.base, result.state.regs.rip) == (0x800, 0x8000, 0x10)
    assert result.state.regs.rflags == 2
    assert result.gate == "IVT entry 0x21 at 0x84"


def test_what_is_pushed_onto_rom_is_lost() -> None:
    memory = GuestMemory()
    memory.add(MemoryRegion.anonymous(0, 0x8000))
    memory.add(MemoryRegion.anonymous(0x8000, 0x1000, read_only=True))
    memory.write(4 * 0x21, struct.pack("<HH", 0x10, 0x800))
    assert delivered(memory, real(0x20), Event.software_interrupt(0x21)).frame_address == 0x8FFA
    assert memory.read(0x8FFA, 6) == bytes(6)


def test_the_given_state_is_left_as_it_was() -> None:
    state = real(0x20)
    before = state.copy()
    delivered(ivt(0x21, 0x0800, 0x0010), state, Event.software_interrupt(0x21))
    assert state == before


@pytest.mark.parametrize(
    ("event", "ip"),
    [
        (Event.exception(0), 0x20),
        (Event.exception(GP, 0x18), 0x20),
        (Event.external_interrupt(8), 0x20),
        (Event.nmi(), 0x20),
        (Event.int3(), 0x21),
        (Event.into(), 0x21),
        (Event.software_interrupt(0x10, instruction_length=3), 0x23),
    ],
)
def test_the_pushed_ip_is_that_of_the_fault_or_that_after_the_software_interrupt(event: Event, ip: int) -> None:
    memory = ivt(event.vector, 0x0800, 0)
    delivered(memory, real(0x20), event)
    assert words(memory, 0x8FFA, 1, 2) == [ip]


def test_the_ivt_moves_with_the_idt_register() -> None:
    memory = Bytes()
    memory.write(0x3000 + 4 * 5, struct.pack("<HH", 0x44, 0x200))
    state = real()
    state.sregs.idt = DescriptorTable(0x3000, 0x3FF)
    assert delivered(memory, state, Event.exception(5)).state.regs.rip == 0x44


def test_an_ivt_entry_beyond_the_idt_limit_is_gp_without_an_error_code() -> None:
    state = real()
    state.sregs.idt = DescriptorTable(0, 0x86)
    failure = failed(ivt(0x21, 0, 0), state, Event.software_interrupt(0x21))
    assert failure.raises == Event(GP, EventKind.EXCEPTION)
    assert failure.reason == "the entry ends at offset 0x87, beyond the IDT limit 0x86"


def test_an_ivt_entry_that_ends_at_the_limit_is_used() -> None:
    state = real()
    state.sregs.idt = DescriptorTable(0, 0x87)
    delivered(ivt(0x21, 0, 0), state, Event.software_interrupt(0x21))


def test_the_real_mode_stack_wraps_at_64_kib() -> None:
    state = real()
    state.regs.rsp = 0x2
    memory = ivt(5, 0, 0x700)
    result = delivered(memory, state, Event.exception(5))
    assert result.state.regs.rsp == 0xFFFC
    assert words(memory, state.sregs.ss.base, 1, 2) == [0x0302]
    assert words(memory, state.sregs.ss.base + 0xFFFC, 2, 2) == [0x7C00, 0x100]


@pytest.mark.parametrize("sp", [1, 3, 5])
def test_a_push_across_the_end_of_the_real_mode_stack_is_ss(sp: int) -> None:
    state = real()
    state.regs.rsp = sp
    assert raised(ivt(5, 0, 0), state, Event.exception(5)) == (SS, None)


def test_a_handler_beyond_the_limit_of_cs_is_gp() -> None:
    state = real(0x20)
    state.sregs.cs = state.sregs.cs.replace(limit=0xFFF)
    assert raised(ivt(5, 0, 0x1000), state, Event.exception(5)) == (GP, None)


def test_a_table_outside_memory_is_not_guessed_at() -> None:
    state = real()
    state.sregs.idt = DescriptorTable(0x10_0000, 0x3FF)
    failure = failed(Bytes(), state, Event.exception(5))
    assert failure.raises is None
    assert "0x100014 is not in memory" in failure.reason
