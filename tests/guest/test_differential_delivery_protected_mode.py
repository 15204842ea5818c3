"""Event delivery in 32-bit protected mode, against the processor: gates, segments, stacks, error codes, escalation.

Tables without faults are compared on every host, and so is what their commonest faults lead to. For every bit of them
the host must have a processor that looks at it: see `checks_descriptors`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import event_delivery_tables as tables
from delivery_comparison import (
    CODE,
    Processor,
    assert_agrees,
    checks_descriptors,
    handler,
    injection,
    memory_with_handlers,
    processor,
)
from entry_rule_breaks import Bytes
from event_delivery_tables import BEYOND, CODE32, CONFORMING32, DATA16, DATA32, INTERRUPT16, INTERRUPT32, TRAP32
from fuzz_settings import PROFILE
from kvmpy import Hlt
from kvmpy.x86.descriptors import decode_segment
from kvmpy.x86.event_delivery import Event
from kvmpy.x86.flags import Rflags
from kvmpy.x86.registers import CpuState, DescriptorTable

EXAMPLES = 100 if PROFILE == "dev" else 2000
ABSENT = 0x0E  # access byte of an interrupt gate that is not present
NOT_FLAGS = Rflags.TF | Rflags.VM | Rflags.RF | Rflags.VIF | Rflags.VIP
FLAGS = st.integers(0, 0x3F_FFFF).map(lambda bits: bits & 0x24_7FD5 & ~int(NOT_FLAGS) | 2)
STACKS = st.integers(0x8100, 0xF000)


@pytest.fixture(scope="module")
def cpu() -> Iterator[Processor]:
    with processor() as machine:
        yield machine


def machine(ring: int) -> tuple[Bytes, CpuState]:
    """Tables in which every vector has a good gate, and a state at `CODE`."""
    memory = memory_with_handlers()
    memory.data[0x1000:0x5000] = tables.tables().data[0x1000:0x5000]
    for vector in range(256):
        memory.write(16 * vector, b"\xf4")  # a 16-bit gate cuts the address of the handler
        tables.gate32(memory, vector, offset=handler(vector))
    tables.tss32(memory, 0x9000)
    tables.tss32(memory, 0xA000, DATA32 | 1, ring=1)
    state = tables.protected(ring)
    state.regs.rip = CODE
    state.regs.rsp = 0x8800
    return memory, state


Case = tuple[bytes, int, Event]
"""Machine code, RAX, and what comes of them."""

EVERYWHERE: dict[str, Case] = {
    "#UD": (b"\x0f\x0b", 0, Event.exception(6)),
    "#DE": (b"\xf7\xf0", 0, Event.exception(0)),  # div eax
    "#GP": (b"\x8e\xd8", BEYOND | 3, Event.exception(13, BEYOND)),  # mov ds, ax
    "interrupt": (b"\x90\xf4", 0, Event.external_interrupt(0x40)),
    "NMI": (b"\x90\xf4", 0, Event.nmi()),
}
IN_RING: dict[int, dict[str, Case]] = {
    0: {
        **EVERYWHERE,
        "#NP": (b"\x8e\xd8", tables.ABSENT_DATA, Event.exception(11, tables.ABSENT_DATA)),
        "#SS": (b"\x8e\xd0", tables.ABSENT_DATA, Event.exception(12, tables.ABSENT_DATA)),  # mov ss, ax
    },
    3: {**EVERYWHERE, "#GP(0)": (b"\xf4", 0, Event.exception(13, 0))},
}
RING_AND_CASE = [(ring, name) for ring, names in IN_RING.items() for name in names]
CONTRIBUTORY = [(ring, name) for ring, name in RING_AND_CASE if name not in ("#UD", "interrupt", "NMI")]


def compare(cpu: Processor, memory: Bytes, state: CpuState, case: Case) -> None:
    code, rax, event = case
    memory.write(CODE, code)
    state.regs.rax = rax
    if injection(event):
        state.regs.rflags |= Rflags.IF
    assert_agrees(memory, state, event, cpu.run(memory, state, injection(event)))


# Tables without faults


@settings(max_examples=4 * EXAMPLES)
@given(
    which=st.sampled_from(RING_AND_CASE),
    selector=st.sampled_from([CODE32, CONFORMING32]),
    access=st.sampled_from([INTERRUPT32, TRAP32, INTERRUPT32 | tables.DPL3]),
    stacks=st.tuples(STACKS, STACKS, STACKS),
    small=st.booleans(),
    flags=FLAGS,
)
def test_events_through_good_tables(
    cpu: Processor,
    which: tuple[int, str],
    selector: int,
    access: int,
    stacks: tuple[int, int, int],
    small: bool,
    flags: int,
) -> None:
    ring, name = which
    memory, state = machine(ring)
    case = IN_RING[ring][name]
    vector = case[2].vector
    if ring and selector == CONFORMING32:
        selector = CODE32  # its handler would stay in ring 3, where HLT ends nothing
    tables.gate32(memory, vector, selector, handler(vector), access)
    tables.tss32(memory, stacks[0], DATA16 if small and ring else DATA32)
    tables.tss32(memory, stacks[1], DATA32 | 1, ring=1)
    state.regs.rsp = stacks[2]
    if small and not ring:
        state.sregs.ss = decode_segment(memory.read(tables.GDT + DATA16, 8), DATA16)
    state.regs.rflags = flags
    compare(cpu, memory, state, case)


@cache
def runs_software_interrupts(ring: int) -> bool:
    """Whether INT n works: KVM's emulator does not know it in protected mode, and kvm_pvm emulates all of that mode."""
    memory, state = machine(ring)
    tables.gate32(memory, 0x40, offset=handler(0x40), access=INTERRUPT32 | tables.DPL3)
    memory.write(CODE, b"\xcd\x40")
    with processor() as one:
        seen = one.run(memory, state)
        return seen.exit == Hlt() and seen.state.regs.rip == handler(0x40) + 1


@settings(max_examples=EXAMPLES)
@given(
    ring=st.sampled_from([0, 3]),
    which=st.sampled_from(["int n", "int3", "into"]),
    vector=st.integers(0, 255),
    dpl=st.sampled_from([0, tables.DPL3]),
    flags=FLAGS,
)
def test_software_interrupts(cpu: Processor, ring: int, which: str, vector: int, dpl: int, flags: int) -> None:
    if not runs_software_interrupts(ring):
        pytest.skip("this host's KVM emulates protected mode without INT n, INT3 and INTO")
    code, event = {
        "int n": (bytes((0xCD, vector)), Event.software_interrupt(vector)),
        "int3": (b"\xcc", Event.int3()),
        "into": (b"\xce", Event.into()),
    }[which]
    memory, state = machine(ring)
    tables.gate32(memory, event.vector, offset=handler(event.vector), access=INTERRUPT32 | dpl)
    state.regs.rflags = flags | Rflags.OF
    compare(cpu, memory, state, (code, 0, event))


# Faults in the tables that every host notices


@pytest.mark.parametrize(("ring", "name"), CONTRIBUTORY)
def test_an_absent_gate_of_a_contributory_exception_is_a_double_fault(cpu: Processor, ring: int, name: str) -> None:
    memory, state = machine(ring)
    case = IN_RING[ring][name]
    tables.gate32(memory, case[2].vector, access=ABSENT)
    compare(cpu, memory, state, case)


@pytest.mark.parametrize(("ring", "name"), CONTRIBUTORY)
def test_an_idt_that_ends_before_the_gate_is_a_double_fault(cpu: Processor, ring: int, name: str) -> None:
    memory, state = machine(ring)
    case = IN_RING[ring][name]
    last_of_8 = 8 * 8 + 7
    state.sregs.idt = DescriptorTable(tables.IDT, max(8 * case[2].vector + 6, last_of_8))
    if case[2].vector > 8:
        compare(cpu, memory, state, case)


@pytest.mark.parametrize("selector", [0, BEYOND])
@pytest.mark.parametrize(("ring", "name"), CONTRIBUTORY)
def test_a_gate_to_no_segment_is_a_double_fault(cpu: Processor, ring: int, name: str, selector: int) -> None:
    memory, state = machine(ring)
    case = IN_RING[ring][name]
    tables.gate32(memory, case[2].vector, selector, handler(case[2].vector))
    compare(cpu, memory, state, case)


@pytest.mark.parametrize(("ring", "name"), RING_AND_CASE)
def test_an_empty_idt_is_a_triple_fault(cpu: Processor, ring: int, name: str) -> None:
    memory, state = machine(ring)
    state.sregs.idt = DescriptorTable(tables.IDT, 0)
    compare(cpu, memory, state, IN_RING[ring][name])


# Every other fault

Change = Callable[[Bytes, CpuState, int], None]


def gate(selector: int = CODE32, access: int = INTERRUPT32) -> Change:
    return lambda memory, state, vector: tables.gate32(memory, vector, selector, handler(vector), access)


def ring_0_stack(selector: int) -> Change:
    return lambda memory, state, vector: tables.tss32(memory, 0x9000, selector)


def tss_limit(limit: int) -> Change:
    return lambda memory, state, vector: setattr(state.sregs, "tr", state.sregs.tr.replace(limit=limit))


def idt_limit_before_the_gate(memory: Bytes, state: CpuState, vector: int) -> None:
    state.sregs.idt = DescriptorTable(tables.IDT, 8 * vector + 6)


def small_stack(memory: Bytes, state: CpuState, vector: int) -> None:
    if not state.sregs.ss.dpl:
        state.sregs.ss = decode_segment(memory.read(tables.GDT + tables.SMALL_STACK, 8), tables.SMALL_STACK)


FAULTS: dict[str, Change] = {
    "gate with RPL 3, which does not count": gate(CODE32 | 3),
    "16-bit gate": gate(access=INTERRUPT16),
    "16-bit gate to a 16-bit segment": gate(tables.CODE16, INTERRUPT16),
    "handler beyond the limit of its segment": gate(tables.SMALL_CODE),
    "handler beyond the limit of a 16-bit segment": gate(tables.CODE16),
    "absent gate": gate(access=ABSENT),
    "absent code segment": gate(tables.ABSENT_CODE),
    "gate to ring 1 code": gate(tables.RING1_CODE),
    "gate to data": gate(DATA32),
    "gate to no segment": gate(BEYOND),
    "gate to the null segment": gate(0),
    "call gate": gate(access=0x8C),
    "gate of type 0": gate(access=0x80),
    "IDT ends before the gate": idt_limit_before_the_gate,
    "stack in read-only data": ring_0_stack(tables.READ_ONLY),
    "stack in code": ring_0_stack(CODE32),
    "stack in an absent segment": ring_0_stack(tables.ABSENT_DATA),
    "stack of ring 3": ring_0_stack(tables.USER_DATA32 | 3),
    "stack with RPL 1": ring_0_stack(DATA32 | 1),
    "stack in no segment": ring_0_stack(BEYOND),
    "stack in the null segment": ring_0_stack(0),
    "stack in a segment too small": ring_0_stack(tables.SMALL_STACK),
    "present stack too small": small_stack,
    "TSS ends in ss0": tss_limit(8),
    "TSS ends after ss0": tss_limit(9),
    "TSS is too short for esp0": tss_limit(5),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_tables(cpu: Processor, fault: str) -> None:
    if not checks_descriptors():
        pytest.skip("this host's KVM delivers events by software that does not look at all of the tables")
    for ring, name in RING_AND_CASE:
        memory, state = machine(ring)
        case = IN_RING[ring][name]
        FAULTS[fault](memory, state, case[2].vector)
        compare(cpu, memory, state, case)


@settings(max_examples=EXAMPLES)
@given(
    which=st.sampled_from(RING_AND_CASE),
    faults=st.dictionaries(st.sampled_from((8, 10, 11, 12, 13)), st.sampled_from(sorted(FAULTS))),
)
def test_combinations_of_faults(cpu: Processor, which: tuple[int, str], faults: dict[int, str]) -> None:
    if not checks_descriptors():
        pytest.skip("this host's KVM delivers events by software that does not look at all of the tables")
    ring, name = which
    memory, state = machine(ring)
    for vector, fault in faults.items():
        FAULTS[fault](memory, state, vector)
    compare(cpu, memory, state, IN_RING[ring][name])
