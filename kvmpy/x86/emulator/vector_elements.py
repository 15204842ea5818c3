"""Parts of vectors to and from general registers and memory: MOVD, MOVQ, MOVLPS, PINSR, PEXTR, masks (SDM vol. 2)."""

from __future__ import annotations

from kvmpy.x86.emulator.lanes import join, split
from kvmpy.x86.emulator.processor import Operands
from kvmpy.x86.emulator.table import ANY, MEMORY, REGISTER, instruction
from kvmpy.x86.emulator.vector_operands import (
    OUTSIDE_REAL_MODE,
    both,
    check_avx,
    check_vector,
    destination,
    first_source,
    vector,
    vector_size,
    vector_source,
)
from kvmpy.x86.instruction import VEX

_3A = 3
_LOW = (1 << 64) - 1
_CF, _ZF = 0x1, 0x40
_ARITHMETIC = 0x8D5


def _wide(op: Operands) -> int:
    """4 bytes, or 8 with REX.W or VEX.W in 64-bit mode."""
    return 8 if op.it.w and op.it.bits == 64 else 4


# Low parts, the rest cleared


@both("movd, movq load", 0x6E, 0x66)
def _movd_load(op: Operands) -> None:
    state = check_vector(op)
    destination(op, state, op.source(_wide(op)))


@both("movd, movq store", 0x7E, 0x66)
def _movd_store(op: Operands) -> None:
    size = _wide(op)
    value = check_vector(op).xmm(op.it.reg) & (1 << 8 * size) - 1
    if op.it.memory is None:
        op.set_register(op.it.rm, value, size)
    else:
        op.store(value, size)


@both("movq", 0x7E, 0xF3)
def _movq_load(op: Operands) -> None:
    state = check_vector(op)
    destination(op, state, vector_source(op, state, 8, aligned=False))


@both("movq store", 0xD6, 0x66)
def _movq_store(op: Operands) -> None:
    state = check_vector(op)
    value = state.xmm(op.it.reg) & _LOW
    if op.it.memory is not None:
        op.store(value, 8)
    elif op.it.encoding == VEX:
        state.set_vector(op.it.rm, value)
    else:
        state.set_xmm(op.it.rm, value)


# Halves of 128 bits


def _halves(name: str, opcode: int, prefix: int, *, high: bool) -> None:
    shift = 64 if high else 0

    @both(f"{name} load", opcode, prefix, operand=MEMORY)
    def load(op: Operands) -> None:
        state = check_vector(op, sources=2)
        value = op.load(8)
        destination(op, state, first_source(op, state) & ~(_LOW << shift) | value << shift)

    @both(f"{name} store", opcode + 1, prefix, operand=MEMORY)
    def store(op: Operands) -> None:
        op.store(check_vector(op).xmm(op.it.reg) >> shift & _LOW, 8)


_halves("movlps", 0x12, 0, high=False)
_halves("movlpd", 0x12, 0x66, high=False)
_halves("movhps", 0x16, 0, high=True)
_halves("movhpd", 0x16, 0x66, high=True)


@both("movhlps", 0x12, 0, operand=REGISTER)
def _movhlps(op: Operands) -> None:
    state = check_vector(op, sources=2)
    destination(op, state, first_source(op, state) >> 64 << 64 | state.xmm(op.it.rm) >> 64)


@both("movlhps", 0x16, 0, operand=REGISTER)
def _movlhps(op: Operands) -> None:
    state = check_vector(op, sources=2)
    destination(op, state, first_source(op, state) & _LOW | (state.xmm(op.it.rm) & _LOW) << 64)


# One element


def _insert(name: str, opcode: int, width: int | None, *, map: int) -> None:
    @both(name, opcode, 0x66, map=map, immediate=1)
    def insert(op: Operands) -> None:
        state, size = check_vector(op, sources=2), width or _wide(op)
        element = op.register(op.it.rm, size) if op.it.memory is None else op.load(size)
        shift = 8 * size * (op.it.immediate & 16 // size - 1)
        mask = (1 << 8 * size) - 1 << shift
        destination(op, state, first_source(op, state) & ~mask | element << shift)


_insert("pinsrw", 0xC4, 2, map=1)
_insert("pinsrb", 0x20, 1, map=_3A)
_insert("pinsrd, pinsrq", 0x22, None, map=_3A)


def _extract(name: str, opcode: int, width: int | None, *, map: int = _3A, to_reg: bool = False) -> None:
    @both(name, opcode, 0x66, map=map, immediate=1, operand=REGISTER if to_reg else ANY)
    def extract(op: Operands) -> None:
        state, size = check_vector(op), width or _wide(op)
        source = op.it.rm if to_reg else op.it.reg
        element = state.xmm(source) >> 8 * size * (op.it.immediate & 16 // size - 1) & (1 << 8 * size) - 1
        if op.it.memory is not None:
            op.store(element, size)
        else:
            op.set_register(op.it.reg if to_reg else op.it.rm, element, 8)  # what is above it is cleared


_extract("pextrw", 0xC5, 2, map=1, to_reg=True)
_extract("pextrb", 0x14, 1)
_extract("pextrw", 0x15, 2)
_extract("pextrd, pextrq", 0x16, None)
_extract("extractps", 0x17, 4)


@both("insertps", 0x21, 0x66, map=_3A, immediate=1)
def _insertps(op: Operands) -> None:
    state, choice = check_vector(op, sources=2), op.it.immediate
    element = split(state.xmm(op.it.rm), 4, 16)[choice >> 6] if op.it.memory is None else op.load(4)
    elements = split(first_source(op, state), 4, 16)
    elements[choice >> 4 & 3] = element
    destination(op, state, join([0 if choice >> at & 1 else each for at, each in enumerate(elements)], 4))


# Masks: the highest bits of the elements


def _mask(name: str, opcode: int, prefix: int, width: int) -> None:
    @both(name, opcode, prefix, operand=REGISTER)
    def mask(op: Operands) -> None:
        state, size = check_vector(op, only_128=False), vector_size(op)
        elements = split(vector(state, op.it.rm, size), width, size, signed=True)
        op.set_register(op.it.reg, sum(1 << at for at, element in enumerate(elements) if element < 0), 8)


_mask("movmskps", 0x50, 0, 4)
_mask("movmskpd", 0x50, 0x66, 8)
_mask("pmovmskb", 0xD7, 0x66, 1)


@both("ptest", 0x17, 0x66, map=2)
def _ptest(op: Operands) -> None:
    state, size = check_vector(op, only_128=False), vector_size(op)
    second = vector_source(op, state, size, aligned=op.it.encoding != VEX)
    first = vector(state, op.it.reg, size)
    op.set_flags((0 if first & second else _ZF) | (0 if ~first & second else _CF), _ARITHMETIC)


def _test_signs(name: str, opcode: int, width: int) -> None:
    @instruction(name, 2, opcode, prefix=0x66, encoding=VEX, w=False, bits=OUTSIDE_REAL_MODE)
    def test(op: Operands) -> None:
        state, size = check_avx(op), vector_size(op)
        second = vector_source(op, state, size, aligned=False)
        first = vector(state, op.it.reg, size)
        signs = join([1 << 8 * width - 1] * (size // width), width)
        op.set_flags((0 if first & second & signs else _ZF) | (0 if ~first & second & signs else _CF), _ARITHMETIC)


_test_signs("vtestps", 0x0E, 4)
_test_signs("vtestpd", 0x0F, 8)
