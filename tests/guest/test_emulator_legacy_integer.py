"""Decimal adjustment, BOUND, ARPL, ENTER with levels, INT1 and what is undefined, in guests and against the processor.

What 64-bit code does not have runs in guests of a `Machine`: with VT-x or AMD-V by the processor, else by the emulator.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest

from gnu_toolchain import assemble, assemble_with_symbols
from instruction_comparison import DATA, Comparison, Given, PlainProcessor, comparison
from kvmpy import End, Machine
from kvmpy.boot import FlatImage
from kvmpy.x86 import long_mode, protected_mode
from kvmpy.x86.emulator import GuestException, perform
from kvmpy.x86.gates import Gate, Idt

pytestmark = pytest.mark.kvm

SIZE = 0x20_0000
CODE, STACK, HANDLERS, TABLES, OUT = 0x1000, 0x9000, 0x6000, 0x1_0000, 0x3000
CF, AF, ZF = 1, 0x10, 0x40
RESULT_FLAGS = 0xC4  # SF, ZF, PF


# Decimal adjustment: each of 256 values of AL with each of CF and AF

ALL = """
    mov di, 0x4000; xor bx, bx
1:  mov ah, bh                  # AH: CF, and AF in bit 4
    and ah, 0x11; or ah, 2
    sahf
    mov al, bl; mov ah, 0x35
    {name}
    mov [di], ax
    lahf; mov [di + 2], ah
    add di, 4
    inc bl; jnz 1b
    add bh, 1; cmp bh, 0x12; jne 2f
    hlt
2:  cmp bh, 2; jne 1b           # BH goes through 0, 1, 0x10, 0x11
    mov bh, 0x10; jmp 1b
"""


def adjusted(name: str, al: int, carry: bool, auxiliary: bool) -> tuple[int, int, int]:
    """AX, the flags, and which of them are defined."""
    low, high = al & 15 > 9 or auxiliary, al > 0x99 or carry
    if name in ("aaa", "aas"):
        ax = 0x3500 | al
        ax += (0x106 if name == "aaa" else -0x106) if low else 0
        return ax & 0xFF0F, CF | AF if low else 0, CF | AF
    by = (6 if low else 0) + (0x60 if high else 0)
    value = al + by if name == "daa" else al - by
    carried = high or (name == "das" and low and al < 6)
    value &= 0xFF
    flags = (CF if carried else 0) | (AF if low else 0)
    flags |= (0 if value else ZF) | value & 0x80 | (0 if value.bit_count() & 1 else 4)
    return 0x3500 | value, flags, CF | AF | RESULT_FLAGS


@pytest.mark.parametrize("name", ["daa", "das", "aaa", "aas"])
def test_decimal_adjustment_of_every_byte(name: str) -> None:
    with Machine(memory=SIZE, irqchip=False) as machine:
        machine.load(FlatImage(assemble(ALL.format(name=name), address=CODE), CODE, "real"))
        assert machine.run(timeout=20).end is End.HALTED
        found = machine.memory.read(0x4000, 4 * 1024)
    for number in range(1024):
        al, carry, auxiliary = number & 0xFF, bool(number >> 8 & 1), bool(number >> 9)
        ax, flags = struct.unpack_from("<HB", found, 4 * number)
        expected, expected_flags, defined = adjusted(name, al, carry, auxiliary)
        assert (ax, flags & defined) == (expected, expected_flags), (hex(al), carry, auxiliary)


# In protected mode


def in_protected_mode(source: str, vector: int | None = None) -> tuple[bytes, int]:
    """What a guest leaves at OUT, and how far its EIP is when it halts; `vector` may halt it, too."""
    idt = Idt(bits=32)
    if vector is not None:
        idt[vector] = Gate("interrupt", HANDLERS, bits=32)
    with Machine(memory=SIZE, irqchip=False) as machine:
        memory = machine.memory
        memory.write(CODE, assemble(source, address=CODE, bits=32))
        memory.write(HANDLERS, assemble("mov eax, [esp]; mov [0x3ffc], eax; hlt", address=HANDLERS, bits=32))
        machine.vcpus[0].set_cpu_state(protected_mode.prepare(memory, entry=CODE, tables=TABLES, stack=STACK, idt=idt))
        outcome = machine.run(timeout=10)
        assert outcome.end is End.HALTED, outcome
        return memory.read(OUT, 0x100), memory.read_u32(0x3FFC)


@pytest.mark.parametrize(
    ("value", "low", "high", "fits"),
    [(5, 0, 9, True), (0, 0, 0, True), (-1, 0, 9, False), (10, 0, 9, False), (-5, -9, -1, True), (-10, -9, -1, False)],
)
@pytest.mark.parametrize("register", ["ax", "eax"])
def test_bound_compares_signed_numbers(register: str, value: int, low: int, high: int, fits: bool) -> None:
    size = 2 if register == "ax" else 4
    limits = struct.pack("<hh" if size == 2 else "<ii", low, high)
    source = f"""
        jmp 2f
        limits: .byte {", ".join(map(str, limits))}
    2:  mov {register}, {value}
        here: bound {register}, [limits]
        mov dword ptr [0x3000], 1
        hlt
    """
    _, symbols = assemble_with_symbols(source, address=CODE, bits=32)
    out, stopped_at = in_protected_mode(source, vector=5)
    assert (out[0] == 1) == fits
    assert stopped_at == (0 if fits else symbols["here"])


def test_arpl_raises_the_privilege_level_of_a_selector() -> None:
    pairs = [(0x1230 | selector, 0x5678 | ring) for selector in range(4) for ring in range(4)]
    lines = [
        f"mov ax, {selector}; mov bx, {ring}; mov word ptr [0x4000], ax; arpl ax, bx; setz [{OUT + 8 * at + 2}];"
        f"mov [{OUT + 8 * at}], ax; arpl word ptr [0x4000], bx; setz [{OUT + 8 * at + 6}]; mov ax, [0x4000];"
        f"mov [{OUT + 8 * at + 4}], ax"
        for at, (selector, ring) in enumerate(pairs)
    ]
    out, _ = in_protected_mode("\n".join([*lines, "hlt"]))
    for at, (selector, ring) in enumerate(pairs):
        raised = selector & 3 < ring & 3
        expected = selector & ~3 | ring & 3 if raised else selector
        assert struct.unpack_from("<HBxHB", out, 8 * at) == (expected, raised, expected, raised)


def test_arpl_is_undefined_in_real_mode() -> None:
    with Machine(memory=SIZE, irqchip=False) as machine:
        machine.load(FlatImage(assemble("arpl ax, bx; cli; hlt", address=CODE), CODE, "real"))
        machine.memory.write(4 * 6, struct.pack("<HH", HANDLERS, 0))
        machine.memory.write(HANDLERS, b"\xf4")
        assert machine.run(timeout=10).end is End.HALTED
        assert machine.vcpus[0].regs.rip == HANDLERS + 1


@pytest.mark.parametrize("code", ["0f ff c0", "0f b9 c0", "0f b9 00", "0f 78 c0", "0f 37", "f3 0f c7 33", "0f 01 c2"])
@pytest.mark.parametrize("bits", [32, 64])
def test_what_is_undefined_raises_ud(code: str, bits: int) -> None:
    """UD0, UD1, VMREAD, GETSEC, VMXON, VMLAUNCH, where nothing has enabled them."""
    idt = Idt(bits=bits)
    idt[6] = Gate("interrupt", HANDLERS, bits=bits)
    prepare = long_mode.prepare if bits == 64 else protected_mode.prepare
    with Machine(memory=SIZE, irqchip=False) as machine:
        machine.memory.write(CODE, bytes.fromhex(code) + b"\xf4")
        machine.memory.write(HANDLERS, b"\xf4")
        state = prepare(machine.memory, entry=CODE, tables=TABLES, stack=STACK, identity_map=SIZE, idt=idt)
        machine.vcpus[0].set_cpu_state(state)
        assert machine.run(timeout=10).end is End.HALTED
        regs = machine.vcpus[0].regs
        assert regs.rip == HANDLERS + 1
        assert machine.memory.read_u32(regs.rsp) == CODE


@pytest.mark.parametrize("bits", [32, 64])
def test_int1_is_a_debug_trap(bits: int) -> None:
    idt = Idt(bits=bits)
    idt[1] = Gate("interrupt", HANDLERS, bits=bits)
    prepare = long_mode.prepare if bits == 64 else protected_mode.prepare
    with Machine(memory=SIZE, irqchip=False) as machine:
        machine.memory.write(CODE, b"\xf1\x90\xf4")
        machine.memory.write(HANDLERS, b"\xf4")
        state = prepare(machine.memory, entry=CODE, tables=TABLES, stack=STACK, identity_map=SIZE, idt=idt)
        machine.vcpus[0].set_cpu_state(state)
        assert machine.run(timeout=10).end is End.HALTED
        regs = machine.vcpus[0].regs
        assert regs.rip == HANDLERS + 1
        assert machine.memory.read_u32(regs.rsp) == CODE + 1


# ENTER, against the processor


@pytest.fixture(scope="module")
def processors() -> Iterator[Comparison]:
    with comparison() as pair:
        yield pair


def test_enter_builds_the_same_frames(processors: Comparison) -> None:
    chance = random.Random("enter")
    bottom, top = 0xB000, 0xC000

    def both(code: bytes, given: Given) -> tuple[tuple[int, int, bytes], tuple[int, int, bytes]]:
        processors.memory.write(bottom, bytes(top - bottom))
        processors.native(code, given)
        regs = processors.vcpu.regs
        native = regs.rsp, regs.rbp, processors.memory.read(bottom, top - bottom)
        processors.memory.write(bottom, bytes(top - bottom))
        general = [*given.general, CODE, 2]
        general[6] = top
        cpu = PlainProcessor(processors.memory, processors.state.sregs, general, b"")
        perform(cpu, code + bytes(15), 64)
        return native, (general[6], general[7], processors.memory.read(bottom, top - bottom))

    for number in range(1000):
        room, level = chance.randrange(0x400), chance.randrange(1, 64)
        given = Given.random(chance)
        given.data = chance.randbytes(0x400)
        given.general[7] = DATA + 0x300 + chance.randrange(16)
        prefix = "data16 " if number % 5 == 0 else ""
        native, software = both(_assembled(f"{prefix}enter {room}, {level}"), given)
        assert software == native, (prefix, room, level)


def _assembled(source: str) -> bytes:
    """ENTER is C8, 16 bits of room, 8 of level; assembling each would take a second a hundred."""
    words = source.replace(",", "").split()
    code = b"\xc8" + struct.pack("<HB", int(words[-2]), int(words[-1]))
    return b"\x66" + code if words[0] == "data16" else code


def test_the_assembler_agrees() -> None:
    for source in ("enter 291, 4", "data16 enter 291, 4"):
        assert _assembled(source) == assemble(source, bits=64)


def test_enter_with_its_end_outside_memory_faults_and_changes_nothing(processors: Comparison) -> None:
    general = [0] * 18
    general[6], general[7], general[16], general[17] = 0x100, 0x1234, CODE, 2
    cpu = PlainProcessor(processors.memory, processors.state.sregs, general, b"")
    before = list(general)
    with pytest.raises(GuestException) as caught:
        perform(cpu, _assembled("enter 512, 1") + bytes(15), 64)
    assert caught.value.event.vector in (12, 14)
    assert general == before
