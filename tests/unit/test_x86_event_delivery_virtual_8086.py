"""Event delivery out of virtual-8086 mode, through the protected-mode IDT."""

from __future__ import annotations

import pytest

from delivery_outcomes import delivered, failed, raised
from event_delivery_tables import (
    CONFORMING32,
    DPL3,
    INTERRUPT32,
    KERNEL_STACK,
    RING1_CODE,
    gate32,
    tables,
    tss32,
    virtual_8086,
    words,
)
from kvmpy.x86.entry_rules import violations
from kvmpy.x86.event_delivery import Event

GP, NP, SS, TS, PF = 13, 11, 12, 10, 14


def test_from_virtual_8086_mode_the_data_segments_are_pushed_and_cleared() -> None:
    memory = tables()
    gate32(memory, GP)
    tss32(memory)
    result = delivered(memory, virtual_8086(), Event.exception(GP))
    frame = [0, 0x100, 0x600, 0x3_3202, 0x200, 0x601, 0x603, 0x602, 0x604, 0x605]
    assert words(memory, KERNEL_STACK - 40, 10, 4) == frame
    assert not result.state.regs.rflags & 1 << 17
    assert [getattr(result.state.sregs, name).selector for name in ("ds", "es", "fs", "gs")] == [0] * 4
    assert violations(result.state) == []


def test_int_n_in_virtual_8086_mode_needs_iopl_3() -> None:
    memory = tables()
    gate32(memory, 0x80, access=INTERRUPT32 | DPL3)
    tss32(memory)
    assert raised(memory, virtual_8086(iopl=0), Event.software_interrupt(0x80)) == (GP, 0)
    delivered(memory, virtual_8086(), Event.software_interrupt(0x80))


def test_int3_in_virtual_8086_mode_does_not_depend_on_iopl() -> None:
    memory = tables()
    gate32(memory, 3, access=INTERRUPT32 | DPL3)
    tss32(memory)
    delivered(memory, virtual_8086(iopl=0), Event.int3())


def test_int_n_with_virtual_8086_extensions_is_reported_as_not_modelled() -> None:
    state = virtual_8086()
    state.sregs.cr4 = 1
    assert failed(tables(), state, Event.software_interrupt(0x80)).raises is None


@pytest.mark.parametrize("selector", [CONFORMING32, RING1_CODE])
def test_a_handler_for_virtual_8086_mode_must_be_plain_ring_0_code(selector: int) -> None:
    memory = tables()
    gate32(memory, GP, selector=selector)
    assert raised(memory, virtual_8086(), Event.exception(GP)) == (GP, selector | 1)
