"""Packed shifts: by an immediate, by a register for all elements, by an element for each (SDM vol. 2)."""

from __future__ import annotations

from collections.abc import Callable

from kvmpy.x86.emulator.lanes import elementwise, join, split
from kvmpy.x86.emulator.processor import Operands
from kvmpy.x86.emulator.table import REGISTER, instruction
from kvmpy.x86.emulator.vector_operands import (
    OPERATIONS,
    OUTSIDE_REAL_MODE,
    Operation,
    by_lane,
    check_avx,
    check_sse,
    packed,
    vector,
    vector_size,
    vector_source,
)
from kvmpy.x86.instruction import VEX

Shift = Callable[[int, int, int], int]
"""(element, count, bits of an element) -> the element shifted; a right shift keeps the sign of a negative number."""


def _left(element: int, count: int, bits: int) -> int:
    return element << count if count < bits else 0


def _right(element: int, count: int, bits: int) -> int:
    return element >> count if count < bits else 0


def _right_signed(element: int, count: int, bits: int) -> int:
    return element >> min(count, bits - 1)


def _all_elements(shift: Shift, width: int) -> Operation:
    signed = shift is _right_signed

    def operation(value: int, count: int, size: int, immediate: int) -> int:
        return join([shift(element, count, 8 * width) for element in split(value, width, size, signed=signed)], width)

    return operation


@by_lane
def _bytes_left(value: int, count: int, size: int, immediate: int) -> int:
    return value << 8 * min(immediate, 16) & (1 << 128) - 1


@by_lane
def _bytes_right(value: int, count: int, size: int, immediate: int) -> int:
    return value >> 8 * min(immediate, 16)


def _by_immediate(name: str, opcode: int, digit: int, operation: Operation) -> None:
    """Rows: the register of ModRM.rm shifted into itself, or by VEX into that of VEX.vvvv."""

    @instruction(name, 1, opcode, prefix=0x66, digit=digit, operand=REGISTER, immediate=1)
    def legacy(op: Operands) -> None:
        state, it = check_sse(op), op.it
        state.set_xmm(it.rm, operation(state.xmm(it.rm), it.immediate, 16, it.immediate))

    @instruction(
        f"v{name}", 1, opcode, prefix=0x66, digit=digit, operand=REGISTER, immediate=1, encoding=VEX,
        bits=OUTSIDE_REAL_MODE,
    )  # fmt: skip
    def vex(op: Operands) -> None:
        state, it, size = check_avx(op, sources=2), op.it, vector_size(op)
        state.set_vector(it.vvvv, operation(vector(state, it.rm, size), it.immediate, size, it.immediate))


def _by_register(name: str, opcode: int, operation: Operation) -> None:
    """Rows: the count is the low 64 bits of a register or of 16 bytes in memory, whatever the vector's size."""
    OPERATIONS[name] = operation

    @instruction(name, 1, opcode, prefix=0x66)
    def legacy(op: Operands) -> None:
        state = check_sse(op)
        count = vector_source(op, state, 16, aligned=True) & 0xFFFF_FFFF_FFFF_FFFF
        state.set_xmm(op.it.reg, operation(state.xmm(op.it.reg), count, 16, 0))

    @instruction(f"v{name}", 1, opcode, prefix=0x66, encoding=VEX, bits=OUTSIDE_REAL_MODE)
    def vex(op: Operands) -> None:
        state, size = check_avx(op, sources=2), vector_size(op)
        count = vector_source(op, state, 16, aligned=False) & 0xFFFF_FFFF_FFFF_FFFF
        state.set_vector(op.it.reg, operation(vector(state, op.it.vvvv, size), count, size, 0))


_SHIFTS: tuple[tuple[str, Shift, int, tuple[tuple[int, str, int, int], ...]], ...] = (
    ("psll", _left, 6, ((2, "w", 0xF1, 0x71), (4, "d", 0xF2, 0x72), (8, "q", 0xF3, 0x73))),
    ("psrl", _right, 2, ((2, "w", 0xD1, 0x71), (4, "d", 0xD2, 0x72), (8, "q", 0xD3, 0x73))),
    ("psra", _right_signed, 4, ((2, "w", 0xE1, 0x71), (4, "d", 0xE2, 0x72))),
)
"""Name, what it does, /digit with an immediate, and for each width: bytes, suffix, opcode by register and immediate."""

for _name, _shift, _digit, _forms in _SHIFTS:
    for _width, _suffix, _opcode, _immediate_opcode in _forms:
        _by_register(_name + _suffix, _opcode, _all_elements(_shift, _width))
        _by_immediate(_name + _suffix, _immediate_opcode, _digit, _all_elements(_shift, _width))
_by_immediate("psrldq", 0x73, 3, _bytes_right)
_by_immediate("pslldq", 0x73, 7, _bytes_left)


def _variable(name: str, opcode: int, shift: Shift, width: int) -> None:
    bits = 8 * width

    def each(element: int, count: int) -> int:
        if shift is _right_signed:
            return shift(element, count & (1 << bits) - 1, bits)
        return shift(element & (1 << bits) - 1, count & (1 << bits) - 1, bits)

    operation = elementwise(width, each, signed=shift is _right_signed)
    packed(name, opcode, operation, map=2, legacy=False, w=width == 8)


_variable("psrlvd", 0x45, _right, 4)
_variable("psrlvq", 0x45, _right, 8)
_variable("psravd", 0x46, _right_signed, 4)
_variable("psllvd", 0x47, _left, 4)
_variable("psllvq", 0x47, _left, 8)
