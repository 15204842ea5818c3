"""Instructions on the mask registers K0 to K7 of AVX-512: KMOV, KAND, KORTEST, KSHIFT and the rest (SDM vol. 2).

The widths are told apart by VEX.W and the mandatory prefix: W none and 0, B 66 and 0, Q none and 1, D 66 and 1.
"""

from __future__ import annotations

from collections.abc import Callable

from kvmpy.x86.emulator.extended_state import ExtendedState
from kvmpy.x86.emulator.guest_exception import GuestException
from kvmpy.x86.emulator.processor import Operands
from kvmpy.x86.emulator.table import MEMORY, REGISTER, instruction
from kvmpy.x86.emulator.vector_operands import OUTSIDE_REAL_MODE, check_avx
from kvmpy.x86.instruction import VEX

_UD = 6
_AVX_512 = 0xE6
_WIDTHS = (("w", 0, False, 16), ("b", 0x66, False, 8), ("q", 0, True, 64), ("d", 0x66, True, 32))
"""Suffix, prefix, W, bits."""
_ZF, _CF, _ARITHMETIC = 0x40, 0x1, 0x8D5

Binary = Callable[[int, int], int]


def _check(op: Operands, *, two_sources: bool = False) -> ExtendedState:
    """The state; VEX.L tells instructions with two sources from others."""
    state = check_avx(op, sources=2 if two_sources else 0)
    if op.cpu.xcr0() & _AVX_512 != _AVX_512 or op.it.vector_256 != two_sources:
        raise GuestException.of(_UD)
    return state


# VEX.R, VEX.B and VEX.vvvv[3], which would name K8 to K15, are ignored.


def _mask(state: ExtendedState, number: int, bits: int) -> int:
    return state.opmask(number & 7) & (1 << bits) - 1


def _set_mask(state: ExtendedState, number: int, value: int, bits: int) -> None:
    state.set_opmask(number & 7, value & (1 << bits) - 1)


# Moves


def _moves(suffix: str, prefix: int, w: bool, bits: int) -> None:
    @instruction(f"kmov{suffix} load", 1, 0x90, prefix=prefix, w=w, encoding=VEX, bits=OUTSIDE_REAL_MODE)
    def load(op: Operands) -> None:
        state = _check(op)
        value = _mask(state, op.it.rm, bits) if op.it.memory is None else op.load(bits // 8)
        _set_mask(state, op.it.reg, value, bits)

    @instruction(
        f"kmov{suffix} store", 1, 0x91, prefix=prefix, w=w, operand=MEMORY, encoding=VEX, bits=OUTSIDE_REAL_MODE
    )
    def store(op: Operands) -> None:
        op.store(_mask(_check(op), op.it.reg, bits), bits // 8)


def _general_moves(suffix: str, prefix: int, w: bool, bits: int) -> None:
    size = 8 if bits == 64 else 4

    @instruction(
        f"kmov{suffix} k, r", 1, 0x92, prefix=prefix, w=w, operand=REGISTER, encoding=VEX, bits=OUTSIDE_REAL_MODE
    )
    def to_mask(op: Operands) -> None:
        state = _check(op)
        _set_mask(state, op.it.reg, op.register(op.it.rm, size), bits)

    @instruction(
        f"kmov{suffix} r, k", 1, 0x93, prefix=prefix, w=w, operand=REGISTER, encoding=VEX, bits=OUTSIDE_REAL_MODE
    )
    def from_mask(op: Operands) -> None:
        state = _check(op)
        op.set_register(op.it.reg, _mask(state, op.it.rm, bits), size)


for _suffix, _prefix, _w, _bits in _WIDTHS:
    _moves(_suffix, _prefix, _w, _bits)
for _suffix, _prefix, _w, _bits in (
    ("w", 0, False, 16), ("b", 0x66, False, 8), ("q", 0xF2, True, 64), ("d", 0xF2, False, 32),
):  # fmt: skip
    _general_moves(_suffix, _prefix, _w, _bits)


# Computing


def _two(name: str, opcode: int, operation: Binary) -> None:
    for suffix, prefix, w, bits in _WIDTHS:
        _two_row(name + suffix, opcode, prefix, w, bits, operation)


def _two_row(name: str, opcode: int, prefix: int, w: bool, bits: int, operation: Binary) -> None:
    @instruction(name, 1, opcode, prefix=prefix, w=w, operand=REGISTER, encoding=VEX, bits=OUTSIDE_REAL_MODE)
    def execute(op: Operands) -> None:
        state = _check(op, two_sources=True)
        result = operation(_mask(state, op.it.vvvv, bits), _mask(state, op.it.rm, bits))
        _set_mask(state, op.it.reg, result, bits)


_two("kand", 0x41, lambda a, b: a & b)
_two("kandn", 0x42, lambda a, b: ~a & b)
_two("kor", 0x45, lambda a, b: a | b)
_two("kxnor", 0x46, lambda a, b: ~(a ^ b))
_two("kxor", 0x47, lambda a, b: a ^ b)
_two("kadd", 0x4A, lambda a, b: a + b)


def _unpack(name: str, prefix: int, w: bool, half: int) -> None:
    ones = (1 << half) - 1
    _two_row(name, 0x4B, prefix, w, 2 * half, lambda a, b: (a & ones) << half | b & ones)


_unpack("kunpckbw", 0x66, False, 8)
_unpack("kunpckwd", 0, False, 16)
_unpack("kunpckdq", 0, True, 32)


def _one(suffix: str, prefix: int, w: bool, bits: int) -> None:
    ones = (1 << bits) - 1

    @instruction(f"knot{suffix}", 1, 0x44, prefix=prefix, w=w, operand=REGISTER, encoding=VEX, bits=OUTSIDE_REAL_MODE)
    def invert(op: Operands) -> None:
        state = _check(op)
        _set_mask(state, op.it.reg, ~_mask(state, op.it.rm, bits), bits)

    @instruction(
        f"kortest{suffix}", 1, 0x98, prefix=prefix, w=w, operand=REGISTER, encoding=VEX, bits=OUTSIDE_REAL_MODE
    )
    def test_or(op: Operands) -> None:
        state = _check(op)
        value = _mask(state, op.it.reg, bits) | _mask(state, op.it.rm, bits)
        op.set_flags((0 if value else _ZF) | (_CF if value == ones else 0), _ARITHMETIC)

    @instruction(f"ktest{suffix}", 1, 0x99, prefix=prefix, w=w, operand=REGISTER, encoding=VEX, bits=OUTSIDE_REAL_MODE)
    def test(op: Operands) -> None:
        state = _check(op)
        first, second = _mask(state, op.it.reg, bits), _mask(state, op.it.rm, bits)
        op.set_flags((0 if first & second else _ZF) | (0 if ~first & second else _CF), _ARITHMETIC)


for _suffix, _prefix, _w, _bits in _WIDTHS:
    _one(_suffix, _prefix, _w, _bits)


def _shift(name: str, opcode: int, w: bool, bits: int, *, left: bool) -> None:
    @instruction(name, 3, opcode, prefix=0x66, w=w, operand=REGISTER, immediate=1, encoding=VEX, bits=OUTSIDE_REAL_MODE)
    def execute(op: Operands) -> None:
        state, by = _check(op), op.it.immediate
        value = _mask(state, op.it.rm, bits)
        _set_mask(state, op.it.reg, value << by if left else value >> by, bits)


for _direction, _opcode, _left in (("r", 0x30, False), ("l", 0x32, True)):
    _shift(f"kshift{_direction}b", _opcode, False, 8, left=_left)
    _shift(f"kshift{_direction}w", _opcode, True, 16, left=_left)
    _shift(f"kshift{_direction}d", _opcode + 1, False, 32, left=_left)
    _shift(f"kshift{_direction}q", _opcode + 1, True, 64, left=_left)
