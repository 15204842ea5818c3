"""Entry states without tables: register values by the manuals, and what each function refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvmpy
from kvmpy.errors import RegisterValueError, UsageError
from kvmpy.x86 import modes
from kvmpy.x86.flags import Cr0, Cr4, Efer
from kvmpy.x86.registers import SEGMENT_REGISTERS, CpuState, DescriptorTable


def linear_entry(state: CpuState) -> int:
    return state.sregs.cs.base + state.regs.rip


def linear_stack(state: CpuState) -> int:
    return state.sregs.ss.base + state.regs.rsp


def test_boot_sector_entry_is_flat_with_the_stack_below() -> None:
    state = modes.real_mode(entry=0x7C00)
    assert (state.sregs.cs.selector, state.regs.rip) == (0, 0x7C00)
    assert (state.sregs.ss.selector, state.regs.rsp) == (0, 0x7C00)
    assert state.sregs.ds.selector == state.sregs.es.selector == 0
    assert state.sregs.cr0 == Cr0.ET
    assert state.regs.rflags == 2


def test_real_mode_entry_above_64k_takes_the_segment_from_the_address() -> None:
    state = modes.real_mode(entry=0x1_2345)
    assert (state.sregs.cs.selector, state.sregs.cs.base, state.regs.rip) == (0x1234, 0x1_2340, 5)
    assert state.sregs.ds.selector == 0x1234


def test_real_mode_reaches_the_last_byte_of_ffff() -> None:
    state = modes.real_mode(entry=0x10_FFEF)
    assert (state.sregs.cs.selector, state.regs.rip) == (0xFFFF, 0xFFFF)


def test_real_mode_takes_segment_and_offset() -> None:
    state = modes.real_mode(segment=0xF000, offset=0xFFF0, data_segment=0x40, stack=0x9_FC00)
    assert (state.sregs.cs.selector, state.sregs.cs.base, state.regs.rip) == (0xF000, 0xF_0000, 0xFFF0)
    assert (state.sregs.ds.selector, state.sregs.ds.base) == (0x40, 0x400)
    assert linear_stack(state) + 0x1_0000 * (state.regs.rsp == 0) == 0x9_FC00


@given(st.integers(0, 0x10_FFEF))
def test_every_real_mode_entry_lands_on_its_address(entry: int) -> None:
    state = modes.real_mode(entry=entry)
    assert linear_entry(state) == entry
    assert 0 <= state.regs.rip <= 0xFFFF
    assert state.sregs.cs.base == state.sregs.cs.selector << 4


@given(st.integers(0, 0x10_FFF0))
def test_every_real_mode_stack_pushes_just_below_its_address(stack: int) -> None:
    state = modes.real_mode(stack=stack)
    first_push = state.sregs.ss.base + (state.regs.rsp - 2 & 0xFFFF)
    if stack >= 2:
        assert first_push == stack - 2
    assert 0 <= state.regs.rsp <= 0xFFFF


@pytest.mark.parametrize(
    "arguments",
    [
        {"entry": 0x10_FFF0},
        {"entry": -1},
        {"entry": 0x7C00, "segment": 0},
        {"offset": 5},
        {"stack": 0x10_FFF1},
        {"stack": -2},
        {"segment": 0x1_0000},
        {"segment": 0, "offset": 0x1_0000},
        {"data_segment": -1},
    ],
)
def test_real_mode_refuses_what_it_cannot_reach(arguments: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        modes.real_mode(**arguments)


def test_reset_vector_is_the_table_of_the_manual() -> None:
    """SDM vol. 3, table 9-1."""
    state = modes.reset_vector(signature=0x806EA)
    assert state.regs.rflags == 2
    assert linear_entry(state) == 0xFFFF_FFF0
    assert (state.sregs.cs.selector, state.sregs.cs.base, state.sregs.cs.limit) == (0xF000, 0xFFFF_0000, 0xFFFF)
    assert state.sregs.cr0 == 0x6000_0010
    assert state.regs.rdx == 0x806EA
    assert state.regs.rax == state.regs.rsp == state.sregs.efer == state.sregs.cr4 == 0
    assert state.sregs.gdt == state.sregs.idt == DescriptorTable(0, 0xFFFF)
    for name in ("ds", "es", "fs", "gs", "ss", "tr", "ldt"):
        segment = getattr(state.sregs, name)
        assert (segment.selector, segment.base, segment.limit) == (0, 0, 0xFFFF), name


def test_protected_mode_is_flat_and_unpaged() -> None:
    state = modes.protected_mode(0x10_0000, stack=0x8_0000)
    sregs = state.sregs
    assert (state.regs.rip, state.regs.rsp) == (0x10_0000, 0x8_0000)
    assert sregs.cr0 & (Cr0.PE | Cr0.PG) == Cr0.PE
    assert sregs.efer == sregs.cr4 == 0
    assert (sregs.cs.selector, sregs.cs.type, sregs.cs.db, sregs.cs.l) == (8, 11, 1, 0)
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment = getattr(sregs, name)
        assert (segment.base, segment.limit, segment.g, segment.dpl) == (0, 0xFFFF_FFFF, 1, 0), name
    assert sregs.gdt == sregs.idt == DescriptorTable(0, 0)


def test_ring_3_sets_rpl_and_dpl_together() -> None:
    for state in (modes.protected_mode(0x1000, ring=3), modes.long_mode(0x1000, 0x2000, ring=3)):
        for name in ("cs", "ds", "es", "fs", "gs", "ss"):
            segment = getattr(state.sregs, name)
            assert segment.selector & 3 == segment.dpl == 3, name


def test_16_bit_protected_mode_bases_code_at_a_high_entry() -> None:
    low = modes.protected_mode(0x7C00, bits=16)
    assert (low.sregs.cs.base, low.regs.rip, low.sregs.cs.db, low.sregs.cs.limit) == (0, 0x7C00, 0, 0xFFFF)
    high = modes.protected_mode(0x12_3456, bits=16)
    assert (high.sregs.cs.base, high.regs.rip) == (0x12_3450, 6)
    assert high.sregs.ds.limit == 0xFFFF_FFFF


def test_given_tables_reach_the_registers() -> None:
    gdt, idt = DescriptorTable(0x5000, 0x57), DescriptorTable(0x6000, 0xFFF)
    tss = modes.task_register(0x7000, 0x2068)
    for state in (
        modes.protected_mode(0, gdt=gdt, idt=idt, tss=tss),
        modes.paging32(0, 0x1000, gdt=gdt, idt=idt, tss=tss),
        modes.pae(0, 0x1000, gdt=gdt, idt=idt, tss=tss),
        modes.long_mode(0, 0x1000, gdt=gdt, idt=idt, tss=tss),
    ):
        assert (state.sregs.gdt, state.sregs.idt, state.sregs.tr) == (gdt, idt, tss)


def test_paging_states_set_the_bits_of_their_mode() -> None:
    legacy = modes.paging32(0x1000, 0x2000).sregs
    assert (legacy.cr0 & Cr0.PG, legacy.cr3, legacy.cr4, legacy.efer) == (Cr0.PG, 0x2000, Cr4.PSE, 0)
    extended = modes.pae(0x1000, 0x2020).sregs
    assert (extended.cr3, extended.cr4, extended.efer) == (0x2020, Cr4.PAE, Efer.NXE)
    long = modes.long_mode(0x1000, 0x3000).sregs
    assert long.efer == Efer.LME | Efer.LMA | Efer.NXE
    assert long.cr4 & (Cr4.PAE | Cr4.LA57) == Cr4.PAE
    assert (long.cs.l, long.cs.db) == (1, 0)
    assert modes.long_mode(0, 0, levels=5).sregs.cr4 & Cr4.LA57


def test_compatibility_mode_has_a_32_bit_code_segment_with_its_own_selector() -> None:
    state = modes.long_mode(0x1000, 0x2000, bits=32)
    assert (state.sregs.cs.l, state.sregs.cs.db, state.sregs.cs.selector) == (0, 1, 0x40)
    assert state.sregs.efer & Efer.LMA


def test_default_stack_grows_down_from_the_entry_and_is_aligned() -> None:
    assert modes.long_mode(0x40_1027, 0).regs.rsp == 0x40_1020
    assert modes.protected_mode(0x10_0001).regs.rsp == 0x10_0000


def test_task_register_scales_granularity_by_the_limit() -> None:
    """SDM vol. 3, 26.3.1.2: limit bits 31:20 need G = 1, clear bits in 11:0 need G = 0."""
    assert modes.task_register(limit=0x67).g == 0
    assert modes.task_register(limit=0x1F_FFFF).g == 1
    assert modes.task_register().type == 11


@pytest.mark.parametrize(
    "call",
    [
        lambda: modes.protected_mode(1 << 32),
        lambda: modes.protected_mode(0, stack=1 << 32),
        lambda: modes.paging32(0, 1 << 32),
        lambda: modes.pae(0, 1 << 32),
        lambda: modes.long_mode(1 << 64, 0),
        lambda: modes.long_mode(1 << 32, 0, bits=32),
        lambda: modes.reset_vector(1 << 32),
        lambda: modes.task_register(1 << 64),
    ],
)
def test_values_too_wide_name_their_register(call: object) -> None:
    assert callable(call)
    with pytest.raises(RegisterValueError):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: modes.protected_mode(0, bits=64),
        lambda: modes.protected_mode(0, ring=1),
        lambda: modes.paging32(0, 0x1001),
        lambda: modes.pae(0, 0x1010),
        lambda: modes.long_mode(0, 0x800),
        lambda: modes.long_mode(0x8000_0000_0000, 0),
        lambda: modes.long_mode(0x0100_0000_0000_0000, 0, levels=5),
        lambda: modes.long_mode(0, 0, stack=0xFFFF_0000_0000_0000),
        lambda: modes.long_mode(0, 0, levels=3),
        lambda: modes.long_mode(0, 0, bits=16),
        lambda: modes.long_mode(0, 0, ring=2),
    ],
)
def test_impossible_states_are_refused(call: object) -> None:
    assert callable(call)
    with pytest.raises(UsageError):
        call()


def test_canonical_limits_follow_the_number_of_levels() -> None:
    modes.long_mode(0x7FFF_FFFF_FFFF, 0)
    modes.long_mode(0xFFFF_8000_0000_0000, 0)
    modes.long_mode(0x00FF_FFFF_FFFF_FFFF, 0, levels=5)
    modes.long_mode(0xFF00_0000_0000_0000, 0, levels=5)


def test_segments_are_never_shared_by_mutation() -> None:
    one, two = modes.protected_mode(0), modes.protected_mode(0)
    one.sregs.cr3 = 0x1000
    assert two.sregs.cr3 == 0
    assert set(one.differences(two)) == {"sregs"}
    assert all(getattr(one.sregs, name) == getattr(two.sregs, name) for name in SEGMENT_REGISTERS)


def test_importing_modes_stays_light() -> None:
    """modes is on the path of `import kvmpy`, which has 25 ms."""
    program = (
        "import sys; before = set(sys.modules); import kvmpy.x86.modes;"
        "print(*sorted({'typing', 'dataclasses', 'enum', 're', 'functools'} & (set(sys.modules) - before)))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(kvmpy.__file__).parents[1])}
    command = [sys.executable, "-S", "-c", program]  # -S: site may have loaded the modules before
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.split() == []
