"""IRET in protected mode and RET to another segment, also to ring 3, in guests of a `Machine`.

With VT-x or AMD-V the processor runs them; elsewhere KVM gives up on these, and the machine does them.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from gnu_toolchain import assemble, assemble_with_symbols
from kvmpy import End, Machine
from kvmpy.devices import DebugExit
from kvmpy.memory import GuestMemory
from kvmpy.x86 import long_mode, protected_mode
from kvmpy.x86.descriptors import encode_segment
from kvmpy.x86.gates import Gate, Idt
from kvmpy.x86.registers import CpuState, DescriptorTable, Segment

pytestmark = pytest.mark.kvm

SIZE = 0x20_0000
CODE, STACK, HANDLERS, OUTER, GDT, TABLES = 0x1000, 0x9000, 0x6000, 0xA000, 0xB000, 0x1_0000
FLAT = 0xFFFF_FFFF
CODE_32 = Segment(0, 0, FLAT, type=10, db=1, g=1)  # not accessed yet
DATA_32 = Segment(0, 0, FLAT, type=2, db=1, g=1)
DESCRIPTORS = {
    0x08: CODE_32,
    0x10: DATA_32,
    0x18: CODE_32.replace(dpl=3),
    0x20: DATA_32.replace(dpl=3),
    0x28: CODE_32.replace(type=14),  # conforming
    0x30: CODE_32.replace(present=0),
    0x38: DATA_32.replace(dpl=3, present=0),
    0x40: DATA_32.replace(dpl=3, type=0),  # read only
    0x48: CODE_32.replace(dpl=3, limit=0xFFF, g=0),
    0x50: DATA_32.replace(dpl=3, db=0, limit=0xFFFF, g=0),  # a stack of 16 bits
    0x58: CODE_32.replace(dpl=1),
    0x60: DATA_32.replace(dpl=1),
    0x68: CODE_32.replace(dpl=3, l=1, db=0),  # 64-bit code, in long mode
    0x70: DATA_32.replace(limit=0xFFFF, g=0),
}
GP, NP, SS = 13, 11, 12
CF, TF, IF, IOPL, NT, AC, ID, FIXED = 0x1, 0x100, 0x200, 0x3000, 0x4000, 1 << 18, 1 << 21, 2
THERE = "\nthere: mov al, 1; out 0xf4, al\n"


@dataclass
class Seen:
    """How it ended: arrived, with the state there, or by `fault`, (vector, error code)."""

    fault: tuple[int, int] | None
    state: CpuState
    gdt: bytes
    there: int


def run(source: str, *, bits: int = 32, flags: int = FIXED) -> Seen:
    """`source` begins in ring 0 and is to end at `there`."""
    idt = Idt(bits=bits)
    for vector in range(32):
        idt[vector] = Gate("interrupt", HANDLERS + 16 * vector, bits=bits)
    with Machine(memory=SIZE, irqchip=False) as machine:
        memory = machine.memory
        machine.add(DebugExit())
        prepare = long_mode.prepare if bits == 64 else protected_mode.prepare
        state = prepare(memory, entry=CODE, tables=TABLES, stack=STACK, identity_map=SIZE, idt=idt)
        code, symbols = assemble_with_symbols(source + THERE, address=CODE, bits=bits)
        memory.write(CODE, code)
        for vector in range(32):
            memory.write(HANDLERS + 16 * vector, b"\xf4")
        own = memory.read(state.sregs.gdt.base, state.sregs.gdt.limit + 1)
        memory.write(GDT, own)
        base = GDT + 0x100  # behind what `prepare` made, which TR and the gates name
        for selector, segment in DESCRIPTORS.items():
            memory.write(base + selector, encode_segment(segment))
        state.sregs.gdt = DescriptorTable(GDT, 0x100 + 0x77)
        if bits == 64:
            _open_to_ring_3(memory, state.sregs.cr3)
        state.regs.rflags = flags
        machine.vcpus[0].set_cpu_state(state)
        outcome = machine.run(timeout=10)
        after = machine.vcpus[0].cpu_state()
        fault = None
        if outcome.end is End.HALTED:
            vector = (after.regs.rip - 1 - HANDLERS) // 16
            fault = vector, memory.read_u32(after.regs.rsp & 0xFFFF_FFFF)
        else:
            assert outcome.code == 3, outcome
        return Seen(fault, after, memory.read(base, 0x78), symbols["there"])


def _open_to_ring_3(memory: GuestMemory, table: int) -> None:
    """Set U/S in the first entry of each table: all is in one page of 2 MiB."""
    for _ in range(3):
        entry = memory.read_u64(table)
        memory.write_u64(table, entry | 4)
        table = entry & ~0xFFF


def selector(place: int, ring: int = 0) -> int:
    """The selector of a descriptor of the table above."""
    return 0x100 + place | ring


def frame(*numbers: int | str) -> str:
    """Pushes, the last number first, so that the first is on top."""
    return "; ".join(f"push {number}" for number in reversed(numbers))


def test_iret_returns_within_the_ring_and_takes_the_flags() -> None:
    wanted = CF | IF | IOPL | NT | AC | ID | FIXED
    seen = run(frame("offset there", selector(0x08), wanted) + "; iretd")
    assert seen.fault is None
    assert (seen.state.regs.rsp, seen.state.sregs.cs.selector) == (STACK, selector(0x08))
    assert seen.state.regs.rflags == wanted
    assert seen.state.sregs.cs.type == 11
    assert seen.gdt[0x08 + 5] & 1  # accessed, in the table, too


def test_iret_with_16_bits_leaves_the_upper_flags() -> None:
    source = f"pushw {CF | IF | FIXED}; pushw {selector(0x08)}; pushw offset there; iretw"
    seen = run(source, flags=AC | ID | FIXED)
    assert seen.fault is None
    assert seen.state.regs.rflags == AC | ID | CF | IF | FIXED
    assert seen.state.regs.rsp == STACK


def test_iret_to_an_outer_ring_takes_its_stack_and_takes_away_the_segments_of_ring_0() -> None:
    source = f"mov ax, {selector(0x20, 3)}; mov es, ax; mov ax, {selector(0x10)}; mov ds, ax; mov fs, ax;"
    source += frame("offset there", selector(0x18, 3), IOPL | FIXED, OUTER, selector(0x20, 3)) + "; iretd"
    seen = run(source)
    assert seen.fault is None
    sregs = seen.state.sregs
    assert (sregs.cs.selector, sregs.ss.selector, seen.state.regs.rsp) == (selector(0x18, 3), selector(0x20, 3), OUTER)
    assert (sregs.cs.dpl, sregs.ss.dpl) == (3, 3)
    assert sregs.es.selector == selector(0x20, 3)
    assert (sregs.ds.selector, sregs.fs.selector) == (0, 0)
    assert seen.state.regs.rflags == IOPL | FIXED


def test_iret_to_a_stack_of_16_bits_keeps_the_upper_half_of_esp() -> None:
    """The leak that Linux's espfix is about: only SP is loaded."""
    source = "mov esp, 0x19000;" + frame(
        "offset there", selector(0x18, 3), IOPL | FIXED, 0x1234_8000, selector(0x50, 3)
    ) + "; iretd"  # fmt: skip
    seen = run(source)
    assert seen.fault is None
    assert seen.state.regs.rsp == 0x0001_8000


def test_iret_of_a_less_privileged_ring_changes_neither_iopl_nor_if() -> None:
    """Ring 1 may have interrupts off, by IOPL 1, and then IRET sets them but not IOPL; with IOPL 0 it sets neither."""
    inner = "jmp 2f; 1: " + frame("offset there", selector(0x58, 1), CF | IF | IOPL | FIXED) + "; iretd; 2: "
    for iopl, expected in ((0x1000, CF | IF | 0x1000 | FIXED), (0, CF | FIXED)):
        outer = frame("offset 1b", selector(0x58, 1), iopl | FIXED, OUTER, selector(0x60, 1))
        seen = run(inner + outer + "; iretd")
        assert seen.fault is None
        assert seen.state.regs.rflags == expected
        assert seen.state.sregs.cs.selector == selector(0x58, 1)


@pytest.mark.parametrize(
    ("cs", "stack_selector", "fault"),
    [
        (0, 0, (GP, 0)),
        (3, 0, (GP, 0)),
        (0x1F8, 0, (GP, 0x1F8)),
        (0x0C, 0, (GP, 0x0C)),  # there is no LDT
        (selector(0x10), 0, (GP, selector(0x10))),  # data
        (selector(0x08, 3), selector(0x20, 3), (GP, selector(0x08))),  # RPL 3, DPL 0
        (selector(0x18), 0, (GP, selector(0x18))),  # RPL 0, DPL 3
        (selector(0x30), 0, (NP, selector(0x30))),
        (selector(0x48, 3), selector(0x20, 3), (GP, 0)),  # EIP beyond the limit
        (selector(0x48, 3), selector(0x10, 3), (GP, selector(0x10))),  # SS is judged before it
        (selector(0x18, 3), 0, (GP, 0)),
        (selector(0x18, 3), 3, (GP, 0)),
        (selector(0x18, 3), 0x1FB, (GP, 0x1F8)),
        (selector(0x18, 3), selector(0x20), (GP, selector(0x20))),  # RPL of SS is not that of CS
        (selector(0x18, 3), selector(0x10, 3), (GP, selector(0x10))),  # DPL 0
        (selector(0x18, 3), selector(0x18, 3), (GP, selector(0x18))),  # code
        (selector(0x18, 3), selector(0x40, 3), (GP, selector(0x40))),  # read only
        (selector(0x18, 3), selector(0x38, 3), (SS, selector(0x38))),
        (selector(0x28, 3), selector(0x20, 3), None),  # conforming, DPL 0
    ],
)
@pytest.mark.parametrize("name", ["iretd", "retf"])
def test_what_returns_nowhere_faults(name: str, cs: int, stack_selector: int, fault: tuple[int, int] | None) -> None:
    numbers: list[int | str] = ["offset there", cs, *([IOPL | FIXED] if name == "iretd" else []), OUTER, stack_selector]
    seen = run(f"pushfd; or dword ptr [esp], {IOPL}; popfd;{frame(*numbers)}; {name}")
    assert seen.fault == fault


def test_a_stack_that_ends_too_soon_is_a_stack_fault() -> None:
    seen = run(f"mov ax, {selector(0x70)}; mov ss, ax; mov esp, 0xfff8; iretd")
    assert seen.fault == (SS, 0)


def test_far_returns_release_parameters_on_both_stacks() -> None:
    source = "pushfd; or dword ptr [esp], 0x3000; popfd;"
    source += frame("offset there", selector(0x18, 3), 111, 222, OUTER, selector(0x20, 3)) + "; retf 8"
    seen = run(source)
    assert seen.fault is None
    assert (seen.state.regs.rsp, seen.state.sregs.ss.selector) == (OUTER + 8, selector(0x20, 3))
    seen = run(frame("offset there", selector(0x08), 111, 222) + "; retf 8")
    assert seen.fault is None
    assert (seen.state.regs.rsp, seen.state.sregs.cs.selector) == (STACK, selector(0x08))


def test_64_bit_code_returns_to_ring_3() -> None:
    source = frame("offset there", selector(0x68, 3), OUTER, selector(0x20, 3)) + "; retfq"
    seen = run(source, bits=64)
    assert seen.fault is None
    assert (seen.state.regs.rsp, seen.state.sregs.ss.selector) == (OUTER, selector(0x20, 3))
    assert seen.state.sregs.ss.dpl == 3
    low = "push 0x10; " + frame("offset there", selector(0x68, 3), OUTER, selector(0x20)) + "; retfq"
    assert run(low, bits=64).fault == (GP, selector(0x20))
    far = "mov rax, 1 << 47; mov [rsp - 24], rax; push {}; push {}; push {}; sub rsp, 8; mov [rsp], rax; retfq"
    assert run(far.format(selector(0x20, 3), OUTER, selector(0x68, 3)), bits=64).fault == (GP, 0)


TIMER = """
    mov esp, 0x9000
    mov al, 0x11; out 0x20, al; mov al, 0x20; out 0x21, al; mov al, 4; out 0x21, al; mov al, 1; out 0x21, al
    mov al, 0xfe; out 0x21, al
    mov al, 0x34; out 0x43, al; mov al, 0x9c; out 0x40, al; mov al, 0x2e; out 0x40, al
    sti
1:  cmp dword ptr [0x3000], 5
    jb 1b
    cli
    hlt
tick: inc dword ptr [0x3000]; push eax; mov al, 0x20; out 0x20, al; pop eax; iretd
system_call: add eax, ebx; iretd
breakpoint: inc dword ptr [0x3004]; iretd
"""


def test_protected_mode_with_interrupts_and_system_calls() -> None:
    """A timer, INT n and INT3 in 32-bit protected mode, whose handlers return."""
    source = TIMER.replace("sti\n", "mov eax, 40; mov ebx, 2; int 0x80; mov [0x3008], eax; int3; sti\n")
    code, symbols = assemble_with_symbols(source, address=CODE, bits=32)
    idt = Idt(bits=32)
    for vector, name in ((0x20, "tick"), (0x80, "system_call"), (3, "breakpoint")):
        idt[vector] = Gate("interrupt", symbols[name], bits=32)
    with Machine(memory=SIZE) as machine:
        machine.memory.write(CODE, code)
        state = protected_mode.prepare(machine.memory, entry=CODE, tables=TABLES, stack=STACK, idt=idt)
        machine.vcpus[0].set_cpu_state(state)
        outcome = machine.run(timeout=20)
        assert outcome.end is End.HALTED, outcome
        assert machine.memory.read_u32(0x3000) >= 5
        assert (machine.memory.read_u32(0x3004), machine.memory.read_u32(0x3008)) == (1, 42)
        assert machine.vcpus[0].regs.rsp == STACK


def test_the_handler_of_an_exception_returns() -> None:
    """UD2 is skipped by its handler; the frame that the processor pushed is what IRET takes."""
    source = "mov eax, 1; ud2; inc eax; mov [0x3000], eax; hlt"
    idt = Idt(bits=32)
    idt[6] = Gate("interrupt", HANDLERS, bits=32)
    with Machine(memory=SIZE, irqchip=False) as machine:
        machine.memory.write(CODE, assemble(source, address=CODE, bits=32))
        machine.memory.write(HANDLERS, assemble("add dword ptr [esp], 2; iretd", address=HANDLERS, bits=32))
        state = protected_mode.prepare(machine.memory, entry=CODE, tables=TABLES, stack=STACK, idt=idt)
        machine.vcpus[0].set_cpu_state(state)
        assert machine.run(timeout=10).end is End.HALTED
        assert machine.memory.read_u32(0x3000) == 2
