"""Whole vectors and scalars moved, and VZEROUPPER, VZEROALL, LDMXCSR, STMXCSR (SDM vol. 2)."""

from __future__ import annotations

from kvmpy.x86.emulator.extended_state import SSE
from kvmpy.x86.emulator.guest_exception import GuestException
from kvmpy.x86.emulator.lanes import join, split
from kvmpy.x86.emulator.processor import Operands
from kvmpy.x86.emulator.table import ANY, MEMORY, REGISTER, instruction
from kvmpy.x86.emulator.vector_operands import (
    OUTSIDE_REAL_MODE,
    both,
    check_aligned,
    check_avx,
    check_vector,
    destination,
    vector,
    vector_size,
    vector_source,
)
from kvmpy.x86.instruction import VEX

_GP = 13
_38 = 2


# Whole vectors


def _load_row(name: str, opcode: int, prefix: int, *, map: int = 1, aligned: bool, operand: str = ANY) -> None:
    @both(name, opcode, prefix, map=map, operand=operand)
    def load(op: Operands) -> None:
        state = check_vector(op, only_128=False)
        destination(op, state, vector_source(op, state, vector_size(op), aligned=aligned))


def _store_row(name: str, opcode: int, prefix: int, *, aligned: bool, operand: str = ANY) -> None:
    @both(name, opcode, prefix, operand=operand)
    def store(op: Operands) -> None:
        state, size = check_vector(op, only_128=False), vector_size(op)
        value = vector(state, op.it.reg, size)
        if op.it.memory is None:
            if op.it.encoding == VEX:
                state.set_vector(op.it.rm, value)
            else:
                state.set_xmm(op.it.rm, value)
            return
        if aligned:
            check_aligned(op, size)
        op.store(value, size)


for _name, _prefix, _load, _store, _aligned in (
    ("movups", 0, 0x10, 0x11, False),
    ("movupd", 0x66, 0x10, 0x11, False),
    ("movaps", 0, 0x28, 0x29, True),
    ("movapd", 0x66, 0x28, 0x29, True),
    ("movdqa", 0x66, 0x6F, 0x7F, True),
    ("movdqu", 0xF3, 0x6F, 0x7F, False),
):
    _load_row(_name, _load, _prefix, aligned=_aligned)
    _store_row(_name, _store, _prefix, aligned=_aligned)
_load_row("lddqu", 0xF0, 0xF2, aligned=False, operand=MEMORY)
_load_row("movntdqa", 0x2A, 0x66, map=_38, aligned=True, operand=MEMORY)
_store_row("movntps", 0x2B, 0, aligned=True, operand=MEMORY)
_store_row("movntpd", 0x2B, 0x66, aligned=True, operand=MEMORY)
_store_row("movntdq", 0xE7, 0x66, aligned=True, operand=MEMORY)


# Scalars: a load from memory clears the rest of the register, a move between registers keeps it


def _scalar(name: str, prefix: int, size: int) -> None:
    mask = (1 << 8 * size) - 1

    @both(f"{name} load", 0x10, prefix, operand=MEMORY)
    def load(op: Operands) -> None:
        state = check_vector(op, only_128=False)  # VEX.L is ignored
        destination(op, state, op.load(size))

    @both(f"{name} store", 0x11, prefix, operand=MEMORY)
    def store(op: Operands) -> None:
        op.store(check_vector(op, only_128=False).xmm(op.it.reg) & mask, size)

    def move(op: Operands, target: int, source: int) -> None:
        state = check_vector(op, sources=2, only_128=False)
        if op.it.encoding == VEX:
            state.set_vector(target, state.xmm(op.it.vvvv) & ~mask | state.xmm(source) & mask)
        else:
            state.set_xmm(target, state.xmm(target) & ~mask | state.xmm(source) & mask)

    @both(f"{name}", 0x10, prefix, operand=REGISTER)
    def to_reg(op: Operands) -> None:
        move(op, op.it.reg, op.it.rm)

    @both(f"{name}", 0x11, prefix, operand=REGISTER)
    def to_rm(op: Operands) -> None:
        move(op, op.it.rm, op.it.reg)


_scalar("movss", 0xF3, 4)
_scalar("movsd", 0xF2, 8)


# Memory as a mask allows: elements whose mask has its highest bit. Others are neither read nor written.


def _masked(name: str, opcode: int, width: int, *, w: bool, stores: bool) -> None:
    def selected(op: Operands, mask: int, size: int) -> list[int]:
        return [place for place, element in enumerate(split(mask, width, size, signed=True)) if element < 0]

    @instruction(
        name, _38, opcode, prefix=0x66, operand=MEMORY, encoding=VEX, w=w, bits=OUTSIDE_REAL_MODE
    )  # fmt: skip
    def move(op: Operands) -> None:
        state, size = check_avx(op, sources=2), vector_size(op)
        places = selected(op, vector(state, op.it.vvvv, size), size)
        memory = op.cpu.memory
        if stores:
            elements = split(vector(state, op.it.reg, size), width, size)
            for place in places:
                memory.check_writable(op.linear(width * place), width)
            for place in places:
                memory.write(op.linear(width * place), elements[place].to_bytes(width, "little"))
            return
        loaded = [0] * (size // width)
        for place in places:
            loaded[place] = int.from_bytes(memory.read(op.linear(width * place), width), "little")
        state.set_vector(op.it.reg, join(loaded, width))


for _name, _load, _store, _width, _w in (
    ("vmaskmovps", 0x2C, 0x2E, 4, False),
    ("vmaskmovpd", 0x2D, 0x2F, 8, False),
    ("vpmaskmovd", 0x8C, 0x8E, 4, False),
    ("vpmaskmovq", 0x8C, 0x8E, 8, True),
):
    _masked(f"{_name} load", _load, _width, w=_w, stores=False)
    _masked(f"{_name} store", _store, _width, w=_w, stores=True)


# All registers


@instruction("vzeroupper, vzeroall", 1, 0x77, modrm=False, encoding=VEX, bits=OUTSIDE_REAL_MODE)
def _vzero(op: Operands) -> None:
    state = check_avx(op)
    state.clear_vectors(16 if op.it.bits == 64 else 8, upper_only=not op.it.vector_256)


# MXCSR


@both("ldmxcsr", 0xAE, 0, operand=MEMORY, digit=2)
def _ldmxcsr(op: Operands) -> None:
    state = check_vector(op)
    value = op.load(4)
    if value & ~state.mxcsr_bits:
        raise GuestException.of(_GP, 0)
    state.need(SSE)
    state.current_mxcsr = value


@both("stmxcsr", 0xAE, 0, operand=MEMORY, digit=3)
def _stmxcsr(op: Operands) -> None:
    op.store(check_vector(op).current_mxcsr, 4)
