"""Guests prepared with their tables: what stands in memory, and that every state may be entered."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from kvmpy.errors import GuestMemoryError, UsageError
from kvmpy.memory import GuestMemory, MemoryRegion
from kvmpy.x86 import long_mode, modes, protected_mode
from kvmpy.x86.descriptor_tables import IDT, TSS
from kvmpy.x86.descriptors import Gdt
from kvmpy.x86.entry_rules import violations
from kvmpy.x86.gates import Gate, Idt
from kvmpy.x86.page_walk import walk
from kvmpy.x86.paging import PagingMode
from kvmpy.x86.registers import CpuState, Segment
from kvmpy.x86.task_state import IoBitmap, Tss32, Tss64

TABLES = 0x2_0000
GIB = 1 << 30


def ram(size: int = 0x20_0000) -> GuestMemory:
    memory = GuestMemory()
    memory.add(MemoryRegion.anonymous(0, size))
    return memory


def gdt_of(memory: GuestMemory, state: CpuState, *, is_long: bool) -> Gdt:
    table = state.sregs.gdt
    return Gdt.decode(memory.read(table.base, table.limit + 1), long_mode=is_long)


def loaded(gdt: Gdt, segment: Segment) -> Segment:
    return gdt.segment(segment.selector)


@pytest.mark.parametrize(("ring", "bits"), [(0, 64), (3, 64), (0, 32), (3, 32)])
def test_long_mode_hidden_parts_are_what_its_gdt_says(ring: int, bits: int) -> None:
    """A guest that loads its own selectors again must see nothing change."""
    memory = ram()
    state = long_mode.prepare(memory, entry=0x1000, tables=TABLES, ring=ring, bits=bits)
    gdt = gdt_of(memory, state, is_long=True)
    for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr"):
        segment = getattr(state.sregs, name)
        assert loaded(gdt, segment) == segment, name
    task = dict(gdt)[modes.TSS_SELECTOR]
    assert isinstance(task, Segment)
    assert task.type == 11  # busy: TR is loaded already


@pytest.mark.parametrize(("ring", "bits"), [(0, 32), (3, 32), (0, 16)])
def test_protected_mode_hidden_parts_are_what_its_gdt_says(ring: int, bits: int) -> None:
    memory = ram()
    state = protected_mode.prepare(memory, entry=0x1000, tables=TABLES, ring=ring, bits=bits)
    gdt = gdt_of(memory, state, is_long=False)
    for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr"):
        segment = getattr(state.sregs, name)
        assert loaded(gdt, segment) == segment, name


def test_selectors_suit_syscall_and_sysret() -> None:
    """SDM vol. 3, 5.8.8: SYSCALL takes CS and CS + 8, SYSRET STAR[63:48] + 8 for SS and + 16 for 64-bit CS."""
    memory = ram()
    gdt = gdt_of(memory, long_mode.prepare(memory, entry=0, tables=TABLES), is_long=True)
    assert gdt.segment(modes.CODE_SELECTOR).l
    assert modes.DATA_SELECTOR == modes.CODE_SELECTOR + 8
    user_base = modes.USER_CODE32_SELECTOR
    assert (gdt.segment(user_base).db, gdt.segment(user_base).dpl) == (1, 3)
    assert gdt.segment(user_base + 8) == gdt.segment(modes.USER_DATA_SELECTOR)
    assert gdt.segment(user_base + 16).l
    assert user_base + 16 == modes.USER_CODE64_SELECTOR
    assert gdt.segment(modes.CODE32_SELECTOR).db
    assert gdt.segment(modes.CODE16_SELECTOR).limit == gdt.segment(modes.DATA16_SELECTOR).limit == 0xFFFF


def test_identity_map_covers_4_gib_by_default_and_no_more() -> None:
    memory = ram()
    state = long_mode.prepare(memory, entry=0x1000, tables=TABLES)
    for address in (0, 0x1234, 0xFEE0_0000, 4 * GIB - 1):
        found = walk(memory, state.sregs, address)
        assert (found.physical, found.page_size, found.writable, found.user) == (address, 0x20_0000, True, False)
    assert walk(memory, state.sregs, 4 * GIB).physical is None


def test_ring_3_may_use_the_identity_map() -> None:
    memory = ram()
    state = long_mode.prepare(memory, entry=0x1000, tables=TABLES, ring=3, identity_map=0x40_0000)
    assert walk(memory, state.sregs, 0x3F_FFFF).user
    assert walk(memory, state.sregs, 0x40_0000).physical is None


def test_identity_map_is_rounded_up_to_whole_pages() -> None:
    memory = ram()
    state = long_mode.prepare(memory, entry=0x1000, tables=TABLES, identity_map=0x20_0001)
    assert walk(memory, state.sregs, 0x3F_FFFF).physical == 0x3F_FFFF


@pytest.mark.parametrize(
    ("levels", "identity_map"),
    [(4, 1), (4, GIB), (4, GIB + 1), (4, 4 * GIB), (4, 600 * GIB), (5, 600 * GIB), (5, GIB)],
)
def test_long_mode_writes_exactly_its_announced_size(levels: int, identity_map: int) -> None:
    size = long_mode.tables_size(identity_map, levels=levels)
    memory = ram(0x60_0000)
    memory.fill(0, 0x60_0000, 0xEE)
    state = long_mode.prepare(memory, entry=0x1000, tables=TABLES, levels=levels, identity_map=identity_map)
    assert memory.read(TABLES + size, 0x1000) == b"\xee" * 0x1000
    assert memory.read(TABLES - 0x1000, 0x1000) == b"\xee" * 0x1000
    assert memory.read(TABLES + size - 0x1000, 0x1000) != b"\xee" * 0x1000
    assert walk(memory, state.sregs, identity_map - 1).physical == identity_map - 1


def test_default_area_is_0xa000_bytes() -> None:
    assert long_mode.tables_size() == 0xA000
    assert protected_mode.tables_size() == 0x4000
    assert protected_mode.tables_size(PagingMode.BITS32) == 0x5000
    assert protected_mode.tables_size(PagingMode.PAE) == 0x9000
    assert protected_mode.tables_size(PagingMode.PAE, GIB) == 0x6000


def test_long_mode_tss_grants_the_ports_and_names_the_interrupt_stack() -> None:
    memory = ram()
    state = long_mode.prepare(memory, entry=0x1000, tables=TABLES, ring=3, ports=[(0xE0, 4), (0x3F8, 8)])
    tr = state.sregs.tr
    tss = Tss64.decode(memory.read(tr.base, tr.limit + 1))
    assert tss.rsp0 == TABLES + 0x3000
    assert tr.base + tr.limit + 0x800 < tss.rsp0  # room for interrupt frames above the bitmap
    assert tss.io_bitmap == IoBitmap([(0xE0, 4), (0x3F8, 8)])


def test_ports_are_all_granted_by_default_and_none_on_request() -> None:
    memory = ram()
    for state, expected in (
        (protected_mode.prepare(memory, entry=0x1000, tables=TABLES, ring=3), True),
        (protected_mode.prepare(memory, entry=0x1000, tables=TABLES + 0x8000, ring=3, ports=()), False),
    ):
        tr = state.sregs.tr
        tss = Tss32.decode(memory.read(tr.base, tr.limit + 1))
        assert tss.io_bitmap is not None
        assert tss.io_bitmap.allowed(0, 0x1_0000) == expected
        assert tss.io_bitmap.allowed(0xFFFF) == expected
        assert (tss.ss0, tss.esp0) == (modes.DATA_SELECTOR, tr.base - TSS + 0x3000)


def test_a_given_idt_is_written_and_loaded() -> None:
    memory = ram()
    idt = Idt()
    idt[14] = Gate("interrupt", 0x9000)
    state = long_mode.prepare(memory, entry=0x1000, tables=TABLES, idt=idt, interrupt_stack=0x8000)
    assert state.sregs.idt == idt.register(TABLES + IDT)
    assert Idt.decode(memory.read(state.sregs.idt.base, 0x1000))[14] == idt[14]
    assert Tss64.decode(memory.read(TABLES + TSS, 0x68)).rsp0 == 0x8000


def test_without_an_idt_the_register_is_empty() -> None:
    assert long_mode.prepare(ram(), entry=0x1000, tables=TABLES).sregs.idt.limit == 0


@pytest.mark.parametrize("paging", [PagingMode.BITS32, PagingMode.PAE])
def test_protected_mode_maps_by_the_paging_asked_for(paging: PagingMode) -> None:
    memory = ram()
    state = protected_mode.prepare(memory, entry=0x1000, tables=TABLES, paging=paging, ring=3)
    found = walk(memory, state.sregs, 0xFEE0_0123)
    assert (found.mode, found.physical, found.user) == (paging, 0xFEE0_0123, True)


@pytest.mark.parametrize(
    "call",
    [
        lambda memory: long_mode.prepare(memory, entry=0, tables=TABLES + 8),
        lambda memory: long_mode.prepare(memory, entry=1 << 47, tables=TABLES),
        lambda memory: long_mode.prepare(memory, entry=0, tables=TABLES, identity_map=0),
        lambda memory: long_mode.prepare(memory, entry=0, tables=TABLES, identity_map=(1 << 47) + 1),
        lambda memory: long_mode.prepare(memory, entry=0, tables=TABLES, levels=6),
        lambda memory: long_mode.prepare(memory, entry=0, tables=TABLES, ring=1),
        lambda memory: long_mode.prepare(memory, entry=0, tables=TABLES, idt=Idt(bits=32)),
        lambda memory: long_mode.prepare(memory, entry=0, tables=TABLES, ports=[(0xFFFF, 2)]),
        lambda memory: protected_mode.prepare(memory, entry=0, tables=TABLES, idt=Idt()),
        lambda memory: protected_mode.prepare(memory, entry=0, tables=TABLES, paging=PagingMode.LEVEL4),
        lambda memory: protected_mode.prepare(memory, entry=0, tables=TABLES, bits=16, ring=3),
        lambda memory: protected_mode.prepare(memory, entry=0, tables=TABLES, bits=16, paging=PagingMode.PAE),
        lambda memory: protected_mode.prepare(memory, entry=0, tables=TABLES, identity_map=(1 << 32) + 1),
        lambda memory: protected_mode.prepare(memory, entry=0, tables=TABLES + 0x10),
    ],
)
def test_nothing_is_written_for_a_state_that_cannot_be(call: Callable[[GuestMemory], CpuState]) -> None:
    memory = ram(0x4_0000)
    with pytest.raises(UsageError):
        call(memory)
    assert not any(memory.read(0, 0x4_0000))


def test_an_area_outside_memory_is_a_memory_error() -> None:
    with pytest.raises(GuestMemoryError):
        long_mode.prepare(ram(0x1_0000), entry=0, tables=0xC000)


def every_state() -> list[tuple[str, GuestMemory, CpuState]]:
    memory = ram()  # for those that need none
    states = [
        ("real segment", memory, modes.real_mode(segment=0x1003, offset=0x10, data_segment=7)),
        ("reset", memory, modes.reset_vector()),
        ("high half", memory, modes.long_mode(0xFFFF_FFFF_8000_0000, 0x2000, stack=0xFFFF_8000_0000_0000)),
        ("large TSS", memory, modes.protected_mode(0, tss=modes.task_register(0x5000, 0xFFFF_FFFF))),
        ("16 bits", memory, modes.protected_mode(0x12_3456, bits=16)),
    ]
    for entry, stack in itertools.product((0, 0x7C00, 0x1_2345, 0x10_FFEF), (None, 0, 0x9_FFF5)):
        states.append((f"real {entry:#x} stack {stack}", memory, modes.real_mode(entry, stack=stack)))
    for ring in (0, 3):
        states.append((f"protected ring {ring}", memory, modes.protected_mode(0x12_3456, ring=ring)))
        states.append((f"paging32 ring {ring}", memory, modes.paging32(0x1000, 0x2000, ring=ring)))
        states.append((f"pae ring {ring}", memory, modes.pae(0x1000, 0x2020, ring=ring)))
        for bits, levels in itertools.product((32, 64), (4, 5)):
            name = f"long {bits} ring {ring} levels {levels}"
            states.append((name, memory, modes.long_mode(0x1000, 0x2000, bits=bits, ring=ring, levels=levels)))
            own = ram()
            state = long_mode.prepare(
                own, entry=0x1000, tables=TABLES, bits=bits, ring=ring, levels=levels, idt=Idt()
            )  # fmt: skip
            states.append((f"prepared {name}", own, state))
        for paging in (PagingMode.NONE, PagingMode.BITS32, PagingMode.PAE):
            own = ram()
            state = protected_mode.prepare(
                own, entry=0x1000, tables=TABLES, ring=ring, paging=paging, idt=Idt(bits=32)
            )  # fmt: skip
            states.append((f"prepared {paging.value} ring {ring}", own, state))
    return states


@pytest.mark.parametrize(
    ("name", "memory", "state"), every_state(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_state_passes_all_entry_rules(name: str, memory: GuestMemory, state: CpuState) -> None:
    assert violations(state, memory=memory) == [], name
