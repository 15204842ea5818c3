"""Event delivery in long mode, against the processor: rings 0 and 3, interrupt stacks, page faults, escalation.

As in protected mode, tables without faults and their commonest faults are compared on every host, the rest where a
processor delivers (`checks_descriptors`). Handlers at addresses that are not canonical are left out: Intel raises #GP
instead of entering them, others enter them and raise it there.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import event_delivery_tables as tables
from delivery_comparison import (
    CODE,
    PAGE_TABLES,
    SIZE,
    Processor,
    assert_agrees,
    checks_descriptors,
    handler,
    injection,
    memory_with_handlers,
    processor,
)
from entry_rule_breaks import Bytes
from event_delivery_tables import ABSENT_DATA, BEYOND, CODE64, CONFORMING64, INTERRUPT32, TRAP32
from fuzz_settings import PROFILE
from kvmpy import Hlt
from kvmpy.x86.event_delivery import Event
from kvmpy.x86.flags import Rflags
from kvmpy.x86.registers import CpuState, DescriptorTable

EXAMPLES = 100 if PROFILE == "dev" else 2000
ABSENT = 0x0E
NOT_PRESENT, READ_ONLY = 0xD000, 0xE000
"""The pages that are mapped otherwise than all others: user, writable, accessed, dirty."""
NOT_CANONICAL = 1 << 47
NOT_FLAGS = Rflags.TF | Rflags.VM | Rflags.RF | Rflags.VIF | Rflags.VIP
FLAGS = st.integers(0, 0x3F_FFFF).map(lambda bits: bits & 0x24_7FD5 & ~int(NOT_FLAGS) | 2)
STACKS = st.integers(0x8100, 0xCFF0)
BAD_STACKS = (0xD123, 0xE123, 0x3_0000, NOT_CANONICAL, 0xFFFF_7FFF_FFFF_FFFF, 0x8000_0000_0000_0008, 0xF008, 0xE018)


@pytest.fixture(scope="module")
def cpu() -> Iterator[Processor]:
    with processor() as machine:
        yield machine


def machine(ring: int) -> tuple[Bytes, CpuState]:
    """Tables in which every vector has a good gate and every stack is good, and a state at `CODE`."""
    memory = memory_with_handlers()
    memory.data[0x1000:0x5000] = tables.tables().data[0x1000:0x5000]
    for vector in range(256):
        tables.gate64(memory, vector, offset=handler(vector))
    memory.write(tables.TSS + 4, struct.pack("<3Q", 0x9000, 0xA000, 0xB000))
    for ist in range(1, 8):
        interrupt_stack(memory, ist, 0x9800 + 0x780 * ist + ist)
    for level in range(3):
        memory.write(PAGE_TABLES + 0x1000 * level, struct.pack("<Q", PAGE_TABLES + 0x1000 * (level + 1) | 0x67))
    for page in range(0, SIZE, 0x1000):
        flags = {NOT_PRESENT: 0x66, READ_ONLY: 0x65}.get(page, 0x67)
        memory.write(PAGE_TABLES + 0x3000 + 8 * (page >> 12), struct.pack("<Q", page | flags))
    state = tables.long(ring)
    state.sregs.cr3 = PAGE_TABLES
    state.regs.rip = CODE
    state.regs.rsp = 0x8805
    return memory, state


def interrupt_stack(memory: Bytes, ist: int, top: int) -> None:
    memory.write(tables.TSS + 0x1C + 8 * ist, struct.pack("<Q", top))


Case = tuple[bytes, Event]

EVERYWHERE: dict[str, Case] = {
    "#UD": (b"\x0f\x0b", Event.exception(6)),
    "#DE": (b"\xf7\xf0", Event.exception(0)),  # div eax
    "#GP": (b"\x88\x06", Event.exception(13)),  # mov [rsi], al
    "#SS": (b"\x88\x45\x00", Event.exception(12)),  # mov [rbp], al
    "interrupt": (b"\x90\xf4", Event.external_interrupt(0x40)),
    "NMI": (b"\x90\xf4", Event.nmi()),
}
IN_RING: dict[int, dict[str, Case]] = {
    0: {
        **EVERYWHERE,
        "#GP(selector)": (b"\x8e\xd9", Event.exception(13, BEYOND)),  # mov ds, cx
        "#NP": (b"\x8e\xda", Event.exception(11, ABSENT_DATA)),  # mov ds, dx
        "#PF": (b"\x88\x03", Event.page_fault(NOT_PRESENT + 0xD, 2)),  # mov [rbx], al
        "#PF(protection)": (b"\x88\x07", Event.page_fault(READ_ONLY + 0xD, 3)),  # mov [rdi], al
    },
    3: {
        **EVERYWHERE,
        "#GP(0)": (b"\xf4", Event.exception(13)),
        "#PF": (b"\x8a\x03", Event.page_fault(NOT_PRESENT + 0xD, 4)),  # mov al, [rbx]
        "#PF(protection)": (b"\x88\x07", Event.page_fault(READ_ONLY + 0xD, 7)),
        "#PF(fetch)": (b"\xff\xe3", Event.page_fault(NOT_PRESENT + 0xD, 0x14)),  # jmp rbx
    },
}
RING_AND_CASE = [(ring, name) for ring, names in IN_RING.items() for name in names]
SERIOUS = [(ring, name) for ring, name in RING_AND_CASE if name not in ("#UD", "interrupt", "NMI", "#PF(fetch)")]


@cache
def loses_in_ring_3() -> int:
    """The RFLAGS bits that ring 3 does not keep: kvm_pvm runs it natively with IOPL 0, NT 0 and interrupts on."""
    memory, state = machine(3)
    memory.write(CODE, b"\x0f\x0b")
    lost = 0
    wanted = int(Rflags.IOPL0 | Rflags.IOPL1 | Rflags.NT) | 2
    with processor() as one:
        for flags in (wanted, wanted | Rflags.IF):
            state.regs.rflags = int(flags)
            seen = one.run(memory, state)
            lost |= int.from_bytes(seen.memory[0x9000 - 24 : 0x9000 - 16], "little") & ~int(Rflags.RF) ^ int(flags)
    return lost


def compare(cpu: Processor, memory: Bytes, state: CpuState, case: Case) -> None:
    code, event = case
    memory.write(CODE, code)
    regs = state.regs
    regs.rbx, regs.rdi, regs.rsi, regs.rbp = NOT_PRESENT + 0xD, READ_ONLY + 0xD, NOT_CANONICAL, NOT_CANONICAL
    regs.rcx, regs.rdx = BEYOND, ABSENT_DATA
    if injection(event):
        regs.rflags |= Rflags.IF
    at_event = state.copy()
    if code == b"\xff\xe3":
        at_event.regs.rip = regs.rbx
    lost = loses_in_ring_3() if state.sregs.ss.dpl else 0
    assert_agrees(memory, at_event, event, cpu.run(memory, state, injection(event)), flags_differ=lost)


def test_ring_3_keeps_all_flags_but_the_known_ones() -> None:
    assert loses_in_ring_3() & ~int(Rflags.IOPL0 | Rflags.IOPL1 | Rflags.NT | Rflags.IF) == 0


# Tables without faults


@settings(max_examples=4 * EXAMPLES)
@given(
    which=st.sampled_from(RING_AND_CASE),
    selector=st.sampled_from([CODE64, CONFORMING64]),
    access=st.sampled_from([INTERRUPT32, TRAP32, INTERRUPT32 | tables.DPL3]),
    ist=st.integers(0, 7),
    stacks=st.tuples(STACKS, STACKS, STACKS),
    flags=FLAGS,
)
def test_events_through_good_tables(
    cpu: Processor,
    which: tuple[int, str],
    selector: int,
    access: int,
    ist: int,
    stacks: tuple[int, int, int],
    flags: int,
) -> None:
    ring, name = which
    memory, state = machine(ring)
    case = IN_RING[ring][name]
    vector = case[1].vector
    if ring:
        selector = CODE64  # conforming code would stay in ring 3, where HLT ends nothing
    tables.gate64(memory, vector, selector, handler(vector), access, ist)
    memory.write(tables.TSS + 4, struct.pack("<Q", stacks[0]))
    if ist:
        interrupt_stack(memory, ist, stacks[1])
    state.regs.rsp = stacks[2]
    state.regs.rflags = flags
    compare(cpu, memory, state, case)


@settings(max_examples=EXAMPLES)
@given(rsp=st.one_of(st.sampled_from(BAD_STACKS), st.integers(0, 2**64 - 1)), name=st.sampled_from(sorted(IN_RING[3])))
def test_the_stack_of_ring_3_does_not_matter(cpu: Processor, rsp: int, name: str) -> None:
    memory, state = machine(3)
    state.regs.rsp = rsp
    compare(cpu, memory, state, IN_RING[3][name])


@cache
def runs_software_interrupts(ring: int) -> bool:
    """Whether INT n works: KVM's emulator knows none outside real mode; in ring 3 kvm_pvm makes #UD of it."""
    memory, state = machine(ring)
    tables.gate64(memory, 0x40, offset=handler(0x40), access=INTERRUPT32 | tables.DPL3)
    memory.write(CODE, b"\xcd\x40")
    with processor() as one:
        seen = one.run(memory, state)
        return seen.exit == Hlt() and seen.state.regs.rip == handler(0x40) + 1


@settings(max_examples=EXAMPLES)
@given(
    ring=st.sampled_from([0, 3]),
    vector=st.integers(0, 255),
    int3=st.booleans(),
    dpl=st.sampled_from([0, tables.DPL3]),
    flags=FLAGS,
)
def test_software_interrupts(cpu: Processor, ring: int, vector: int, int3: bool, dpl: int, flags: int) -> None:
    if not runs_software_interrupts(ring):
        pytest.skip("this host's KVM runs no INT n in long mode")
    code, event = (b"\xcc", Event.int3()) if int3 else (bytes((0xCD, vector)), Event.software_interrupt(vector))
    memory, state = machine(ring)
    tables.gate64(memory, event.vector, offset=handler(event.vector), access=INTERRUPT32 | dpl)
    state.regs.rflags = flags
    compare(cpu, memory, state, (code, event))


@settings(max_examples=EXAMPLES // 2)
@given(flags=FLAGS, stack=STACKS, ist=st.integers(0, 7))
def test_int3_in_ring_3(cpu: Processor, flags: int, stack: int, ist: int) -> None:
    memory, state = machine(3)
    tables.gate64(memory, 3, offset=handler(3), access=INTERRUPT32 | tables.DPL3, ist=ist)
    state.regs.rflags, state.regs.rsp = flags, stack
    compare(cpu, memory, state, (b"\xcc", Event.int3()))


# Faults in the tables that every host notices

Change = Callable[[Bytes, CpuState, int], None]


def gate(selector: int = CODE64, access: int = INTERRUPT32, ist: int = 0) -> Change:
    return lambda memory, state, vector: tables.gate64(memory, vector, selector, handler(vector), access, ist)


def bad_interrupt_stack(top: int) -> Change:
    def change(memory: Bytes, state: CpuState, vector: int) -> None:
        tables.gate64(memory, vector, CODE64, handler(vector), INTERRUPT32, 1)
        interrupt_stack(memory, 1, top)

    return change


def bad_stack_of_ring_0(top: int) -> Change:
    def change(memory: Bytes, state: CpuState, vector: int) -> None:
        memory.write(tables.TSS + 4, struct.pack("<Q", top))
        if not state.sregs.ss.dpl:
            state.regs.rsp = top

    return change


def idt_limit_before_the_gate(memory: Bytes, state: CpuState, vector: int) -> None:
    state.sregs.idt = DescriptorTable(
        tables.IDT, max(16 * vector + 14, 16 * 8 + 15) if vector > 8 else 16 * vector + 14
    )


NOTICED: dict[str, Change] = {
    "absent gate": gate(access=ABSENT),
    "gate to no segment": gate(BEYOND),
    "gate to the null segment": gate(0),
    "IDT ends before the gate": idt_limit_before_the_gate,
    **{f"interrupt stack at {top:#x}": bad_interrupt_stack(top) for top in BAD_STACKS if top >= NOT_CANONICAL},
    **{f"stack at {top:#x}": bad_stack_of_ring_0(top) for top in BAD_STACKS},
}


@pytest.mark.parametrize("fault", NOTICED)
def test_a_fault_on_the_way_to_the_handler_of_a_serious_exception(cpu: Processor, fault: str) -> None:
    for ring, name in SERIOUS:
        memory, state = machine(ring)
        case = IN_RING[ring][name]
        NOTICED[fault](memory, state, case[1].vector)
        compare(cpu, memory, state, case)


@pytest.mark.parametrize(("ring", "name"), RING_AND_CASE)
def test_an_empty_idt_is_a_triple_fault(cpu: Processor, ring: int, name: str) -> None:
    memory, state = machine(ring)
    state.sregs.idt = DescriptorTable(tables.IDT, 0)
    compare(cpu, memory, state, IN_RING[ring][name])


# Every other fault


def tss_limit(limit: int, ist: int = 0) -> Change:
    def change(memory: Bytes, state: CpuState, vector: int) -> None:
        tables.gate64(memory, vector, CODE64, handler(vector), INTERRUPT32, ist)
        state.sregs.tr = state.sregs.tr.replace(limit=limit)

    return change


FAULTS: dict[str, Change] = {
    **NOTICED,
    "absent code segment": gate(tables.ABSENT_CODE64),
    "gate to 32-bit code": gate(tables.CODE32),
    "gate to code with L and D": gate(tables.CODE64_AND_32),
    "gate to data": gate(tables.DATA32),
    "gate to ring 1 code": gate(tables.RING1_CODE),
    "gate with RPL 3, which does not count": gate(CODE64 | 3),
    "16-bit gate": gate(access=tables.INTERRUPT16),
    "task gate": gate(access=tables.TASK),
    "call gate": gate(access=0x8C),
    "gate of type 0": gate(access=0x80),
    **{f"interrupt stack at {top:#x}": bad_interrupt_stack(top) for top in BAD_STACKS},
    "TSS ends in rsp0": tss_limit(0xA),
    "TSS ends after rsp0": tss_limit(0xB),
    "TSS ends in ist7": tss_limit(0x5A, ist=7),
    "TSS ends after ist7": tss_limit(0x5B, ist=7),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_tables(cpu: Processor, fault: str) -> None:
    if not checks_descriptors():
        pytest.skip("this host's KVM delivers events by software that does not look at all of the tables")
    for ring, name in RING_AND_CASE:
        memory, state = machine(ring)
        case = IN_RING[ring][name]
        FAULTS[fault](memory, state, case[1].vector)
        compare(cpu, memory, state, case)


@settings(max_examples=EXAMPLES)
@given(
    which=st.sampled_from(RING_AND_CASE),
    faults=st.dictionaries(st.sampled_from((8, 10, 11, 12, 13, 14)), st.sampled_from(sorted(FAULTS))),
)
def test_combinations_of_faults(cpu: Processor, which: tuple[int, str], faults: dict[int, str]) -> None:
    if not checks_descriptors():
        pytest.skip("this host's KVM delivers events by software that does not look at all of the tables")
    ring, name = which
    memory, state = machine(ring)
    for vector, fault in faults.items():
        FAULTS[fault](memory, state, vector)
    compare(cpu, memory, state, IN_RING[ring][name])
