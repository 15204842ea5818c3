"""Event delivery in real mode, against the processor: IVT, stack, flags.

KVM executes real mode in software where the processor cannot (old VT-x, kvm_pvm). What that software gets wrong is
probed, one function for each fault, and those cases are left out on such a host.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from delivery_comparison import (
    CODE,
    Processor,
    assert_agrees,
    handler,
    injection,
    memory_with_handlers,
    processor,
)  # fmt: skip
from entry_rule_breaks import Bytes
from fuzz_settings import PROFILE
from kvmpy import Hlt, Shutdown
from kvmpy.x86 import modes
from kvmpy.x86.event_delivery import Event
from kvmpy.x86.flags import Rflags
from kvmpy.x86.registers import CpuState, DescriptorTable, Segment

EXAMPLES = 100 if PROFILE == "dev" else 2000
STACK = 0x0700  # SS; linear 0x7000 to 0x16fff
HIGH_ESP = 0x1234_0000
UD2 = b"\x0f\x0b"
NOT_FLAGS = Rflags.TF | Rflags.VM | Rflags.RF | Rflags.VIF | Rflags.VIP
FLAGS = st.integers(0, 0x3F_FFFF).map(lambda bits: bits & 0x24_7FD5 & ~int(NOT_FLAGS) | 2)


@pytest.fixture(scope="module")
def cpu() -> Iterator[Processor]:
    with processor() as machine:
        yield machine


def machine(ivt: int = 0, shift: int = 0) -> tuple[Bytes, CpuState]:
    """Memory with an IVT at `ivt`; `shift` makes the segments of its handlers smaller, the offsets larger."""
    memory = memory_with_handlers()
    for vector in range(256):
        linear = handler(vector)
        segment = (linear >> 4) - (shift * (vector + 1) & 0xFFF)
        memory.write(ivt + 4 * vector, (linear - 16 * segment).to_bytes(2, "little") + segment.to_bytes(2, "little"))
    state = modes.real_mode(CODE)
    state.sregs.idt = DescriptorTable(ivt, 0x3FF)
    state.sregs.ss = Segment(STACK, STACK * 16, 0xFFFF, type=3)
    state.regs.rsp = 0x1000
    return memory, state


# What software in the place of the processor gets wrong


@cache
def vectors_above_0x7f_work() -> bool:
    """KVM's emulator takes the operand of INT n for a signed number: above 0x7f it looks below the IVT, for ever."""
    memory, state = machine()
    memory.write(CODE, b"\xcd\x80")
    with processor() as one:
        return one.run(memory, state, timeout=0.3).exit == Hlt()


@cache
def the_upper_half_of_esp_stays() -> bool:
    """kvm_pvm clears bits 31:16 of ESP when it delivers an exception or an interrupt."""
    memory, state = machine()
    memory.write(CODE, UD2)
    state.regs.rsp |= HIGH_ESP
    with processor() as one:
        return one.run(memory, state).state.regs.rsp & ~0xFFFF == HIGH_ESP


@cache
def a_push_at_sp_1_fails() -> bool:
    """kvm_pvm wraps a word around the end of the stack segment instead of shutting down."""
    memory, state = machine()
    memory.write(CODE, UD2)
    state.regs.rsp = 1
    with processor() as one:
        return one.run(memory, state).exit == Shutdown()


@cache
def ud2_works_in_every_segment() -> bool:
    """kvm_pvm looks for UD2 at RIP without the base of CS; where it misses it, it answers with InternalError."""
    memory, state = machine()
    memory.write(CODE, UD2)
    state.sregs.cs = Segment(CODE >> 4, CODE, 0xFFFF, type=11)
    state.regs.rip = 0
    with processor() as one:
        return one.run(memory, state).exit == Hlt()


@cache
def the_ivt_has_an_end() -> bool:
    """KVM's software delivery in real mode does not look at the limit of IDTR."""
    memory, state = machine()
    memory.write(CODE, UD2)
    state.sregs.idt = DescriptorTable(0, 0)
    with processor() as one:
        return one.run(memory, state).exit == Shutdown()


# The comparison


@st.composite
def machines(draw: st.DrawFn) -> tuple[Bytes, CpuState]:
    memory, state = machine(draw(st.sampled_from([0, 0x400, 0x1234])), draw(st.integers(0, 0xFFF)))
    segment = draw(st.integers(0, CODE >> 4))
    state.sregs.cs = Segment(segment, segment << 4, 0xFFFF, type=11)
    state.regs.rip = CODE - 16 * segment
    state.regs.rsp = draw(st.one_of(st.integers(0x100, 0x8000), st.integers(0, 8)))
    state.regs.rsp |= draw(st.sampled_from([0, 0, HIGH_ESP]))
    state.regs.rflags = draw(FLAGS)
    state.regs.rbp = 0xFFFF
    return memory, state


def compare(cpu: Processor, memory: Bytes, state: CpuState, code: bytes, event: Event) -> None:
    if state.regs.rsp & 0xFFFF in (1, 3, 5):
        assume(a_push_at_sp_1_fails())
    if not event.software and state.regs.rsp > 0xFFFF:
        assume(the_upper_half_of_esp_stays())
    if code == UD2 and state.sregs.cs.base:
        assume(ud2_works_in_every_segment())
    memory.write(CODE, code)
    assert_agrees(memory, state, event, cpu.run(memory, state, injection(event)))


@settings(max_examples=EXAMPLES)
@given(machine=machines(), vector=st.integers(0, 255))
def test_int_n(cpu: Processor, machine: tuple[Bytes, CpuState], vector: int) -> None:
    if not vectors_above_0x7f_work():
        vector &= 0x7F
    compare(cpu, *machine, bytes((0xCD, vector)), Event.software_interrupt(vector))


@settings(max_examples=EXAMPLES // 2)
@given(machine=machines(), into=st.booleans())
def test_int3_and_into(cpu: Processor, machine: tuple[Bytes, CpuState], into: bool) -> None:
    memory, state = machine
    if into:
        state.regs.rflags |= Rflags.OF
        compare(cpu, memory, state, b"\xce", Event.into())
    else:
        compare(cpu, memory, state, b"\xcc", Event.int3())


EXCEPTIONS = {
    "#UD": (UD2, Event.exception(6)),
    "#DE": (b"\xf7\xf0", Event.exception(0)),  # div ax, by 0
    "#GP": (b"\xa1\xff\xff", Event.exception(13)),  # mov ax, [0xffff]
    "#SS": (b"\x8b\x46\x00", Event.exception(12)),  # mov ax, [bp], with BP = 0xffff
}


@settings(max_examples=EXAMPLES)
@given(machine=machines(), which=st.sampled_from(sorted(EXCEPTIONS)))
def test_exceptions(cpu: Processor, machine: tuple[Bytes, CpuState], which: str) -> None:
    compare(cpu, *machine, *EXCEPTIONS[which])


@settings(max_examples=EXAMPLES)
@given(machine=machines(), vector=st.integers(0, 255), nmi=st.booleans())
def test_interrupts_and_nmi(cpu: Processor, machine: tuple[Bytes, CpuState], vector: int, nmi: bool) -> None:
    memory, state = machine
    state.regs.rflags |= Rflags.IF
    compare(cpu, memory, state, b"\x90\xf4", Event.nmi() if nmi else Event.external_interrupt(vector))


@pytest.mark.parametrize("limit", [4 * 6 + 3, 4 * 6 + 2, 0])
def test_the_idt_limit(cpu: Processor, limit: int) -> None:
    if not the_ivt_has_an_end():
        pytest.skip("this host's KVM delivers in real mode by software that ignores the limit of IDTR")
    memory, state = machine()
    memory.write(CODE, UD2)
    state.sregs.idt = DescriptorTable(0, limit)
    assert_agrees(memory, state, Event.exception(6), cpu.run(memory, state))
