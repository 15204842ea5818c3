"""x87 loads, stores, exchanges: FLD, FST, FILD, FIST, FXCH, FFREE, FINCSTP, constants (SDM vol. 2)."""

from __future__ import annotations

from kvmpy.x86.emulator.processor import Operands
from kvmpy.x86.emulator.table import MEMORY, REGISTER, instruction
from kvmpy.x86.emulator.x87_numbers import (
    DOUBLE,
    SINGLE,
    Format,
    from_binary,
    from_integer,
    to_binary,
    to_integer,
)
from kvmpy.x86.emulator.x87_stack import INDEFINITE, INVALID, PRECISION, STACK_FAULT, X87Stack

__all__ = ["store"]

_EXCEPTIONS = 0x3F
_TRUNCATE = 3


# Loads


def _load_integer(op: Operands, size: int) -> None:
    stack = X87Stack(op)
    value = op.load(size)
    if value >> 8 * size - 1:
        value -= 1 << 8 * size
    stack.push(from_integer(value))
    stack.done()


@instruction("fild m16", 0, 0xDF, prefix=None, digit=0, operand=MEMORY)
def _fild_16(op: Operands) -> None:
    _load_integer(op, 2)


@instruction("fild m32", 0, 0xDB, prefix=None, digit=0, operand=MEMORY)
def _fild_32(op: Operands) -> None:
    _load_integer(op, 4)


@instruction("fild m64", 0, 0xDF, prefix=None, digit=5, operand=MEMORY)
def _fild_64(op: Operands) -> None:
    _load_integer(op, 8)


def _load_binary(op: Operands, kind: Format) -> None:
    stack = X87Stack(op)
    stack.push(*from_binary(op.load(kind.size), kind))
    stack.done()


@instruction("fld m32", 0, 0xD9, prefix=None, digit=0, operand=MEMORY)
def _fld_32(op: Operands) -> None:
    _load_binary(op, SINGLE)


@instruction("fld m64", 0, 0xDD, prefix=None, digit=0, operand=MEMORY)
def _fld_64(op: Operands) -> None:
    _load_binary(op, DOUBLE)


@instruction("fld m80", 0, 0xDB, prefix=None, digit=5, operand=MEMORY)
def _fld_80(op: Operands) -> None:
    stack = X87Stack(op)
    stack.push(op.load(10))
    stack.done()


@instruction("fld st", 0, 0xD9, prefix=None, digit=0, operand=REGISTER)
def _fld_register(op: Operands) -> None:
    stack = X87Stack(op)
    place = op.it.rm & 7
    if stack.is_empty(place):
        stack.push(INDEFINITE, INVALID | STACK_FAULT)
    else:
        stack.push(stack[place])
    stack.done()


_CONSTANTS = {
    "fld1": 0x3FFF_8000_0000_0000_0000,
    "fldl2t": 0x4000_D49A_784B_CD1B_8AFE,
    "fldl2e": 0x3FFF_B8AA_3B29_5C17_F0BC,
    "fldpi": 0x4000_C90F_DAA2_2168_C235,
    "fldlg2": 0x3FFD_9A20_9A84_FBCF_F799,
    "fldln2": 0x3FFE_B172_17F7_D1CF_79AC,
    "fldz": 0,
}
"""In the order of their opcodes, rounded to nearest. The four with more digits depend on FCW.RC."""
_BEFORE_ROUNDING = {"fldl2t": -1, "fldl2e": 1, "fldpi": 1, "fldlg2": 1, "fldln2": 1}
"""Whether nearest is above the exact number."""


def _constant(name: str, place: int) -> None:
    @instruction(name, 0, 0xD9, prefix=None, digit=5, rm=place)
    def load(op: Operands) -> None:
        stack = X87Stack(op)
        value = _CONSTANTS[name]
        above, rounding = _BEFORE_ROUNDING.get(name, 0), stack.control >> 10 & 3
        if above > 0 and rounding in (1, 3):
            value -= 1
        elif above < 0 and rounding == 2:
            value += 1
        stack.push(value)
        stack.done()


for _place, _name in enumerate(_CONSTANTS):
    _constant(_name, _place)


# Stores


def store(op: Operands, stack: X87Stack, size: int, value: int, flags: int, *, pops: bool) -> None:
    """Store what `flags` allow, pop. Nothing is stored when an exception but precision is not masked."""
    kept = not flags & ~stack.control & (_EXCEPTIONS & ~PRECISION)
    if kept:
        op.store(value, size)
    elif flags & ~PRECISION & _EXCEPTIONS:
        op.cpu.memory.check_writable(op.address(), size)
    stack.status |= flags
    if kept and pops:
        stack.pop()
    stack.done()


def _store_binary(op: Operands, kind: Format, *, pops: bool) -> None:
    stack = X87Stack(op)
    if stack.is_empty(0):
        value = to_binary(INDEFINITE, kind, 0)[0], INVALID | STACK_FAULT
    else:
        value = to_binary(stack[0], kind, stack.control)
    store(op, stack, kind.size, *value, pops=pops)


@instruction("fst m32", 0, 0xD9, prefix=None, digit=2, operand=MEMORY)
def _fst_32(op: Operands) -> None:
    _store_binary(op, SINGLE, pops=False)


@instruction("fstp m32", 0, 0xD9, prefix=None, digit=3, operand=MEMORY)
def _fstp_32(op: Operands) -> None:
    _store_binary(op, SINGLE, pops=True)


@instruction("fst m64", 0, 0xDD, prefix=None, digit=2, operand=MEMORY)
def _fst_64(op: Operands) -> None:
    _store_binary(op, DOUBLE, pops=False)


@instruction("fstp m64", 0, 0xDD, prefix=None, digit=3, operand=MEMORY)
def _fstp_64(op: Operands) -> None:
    _store_binary(op, DOUBLE, pops=True)


@instruction("fstp m80", 0, 0xDB, prefix=None, digit=7, operand=MEMORY)
def _fstp_80(op: Operands) -> None:
    stack = X87Stack(op)
    value = (INDEFINITE, INVALID | STACK_FAULT) if stack.is_empty(0) else (stack[0], 0)
    store(op, stack, 10, *value, pops=True)


def _store_integer(op: Operands, size: int, *, pops: bool, truncates: bool = False) -> None:
    stack = X87Stack(op)
    if stack.is_empty(0):
        value = 1 << 8 * size - 1, INVALID | STACK_FAULT
    else:
        value = to_integer(stack[0], size, _TRUNCATE if truncates else stack.control >> 10 & 3)
    store(op, stack, size, *value, pops=pops)


def _integer_stores(size: int, opcode: int, digit: int, *, pops: bool, truncates: bool = False) -> None:
    name = "fisttp" if truncates else "fistp" if pops else "fist"

    @instruction(f"{name} m{8 * size}", 0, opcode, prefix=None, digit=digit, operand=MEMORY)
    def execute(op: Operands) -> None:
        _store_integer(op, size, pops=pops, truncates=truncates)


_integer_stores(2, 0xDF, 2, pops=False)
_integer_stores(2, 0xDF, 3, pops=True)
_integer_stores(2, 0xDF, 1, pops=True, truncates=True)
_integer_stores(4, 0xDB, 2, pops=False)
_integer_stores(4, 0xDB, 3, pops=True)
_integer_stores(4, 0xDB, 1, pops=True, truncates=True)
_integer_stores(8, 0xDF, 7, pops=True)
_integer_stores(8, 0xDD, 1, pops=True, truncates=True)


def _store_register(op: Operands, *, pops: bool) -> None:
    stack = X87Stack(op)
    value = stack[0]
    if stack.is_empty(0):
        if not stack.signal(INVALID | STACK_FAULT):
            stack.done()
            return
        value = INDEFINITE
    stack[op.it.rm & 7] = value
    if pops:
        stack.pop()
    stack.done()


@instruction("fst st", 0, 0xDD, prefix=None, digit=2, operand=REGISTER)
def _fst_register(op: Operands) -> None:
    _store_register(op, pops=False)


@instruction("fstp st", 0, 0xDD, prefix=None, digit=3, operand=REGISTER)
def _fstp_register(op: Operands) -> None:
    _store_register(op, pops=True)


# The stack


@instruction("fxch", 0, 0xD9, prefix=None, digit=1, operand=REGISTER)
def _fxch(op: Operands) -> None:
    stack = X87Stack(op)
    place = op.it.rm & 7
    empty = {at for at in (0, place) if stack.is_empty(at)}
    if not empty or stack.signal(INVALID | STACK_FAULT):
        first, other = (INDEFINITE if at in empty else stack[at] for at in (0, place))
        stack[0], stack[place] = other, first
    stack.done()


@instruction("ffree", 0, 0xDD, prefix=None, digit=0, operand=REGISTER)
def _ffree(op: Operands) -> None:
    stack = X87Stack(op)
    stack.free(op.it.rm & 7)
    stack.done()


@instruction("ffreep", 0, 0xDF, prefix=None, digit=0, operand=REGISTER)
def _ffreep(op: Operands) -> None:
    stack = X87Stack(op)
    stack.free(op.it.rm & 7)
    stack.pop()
    stack.done()


@instruction("fincstp", 0, 0xD9, prefix=None, digit=6, rm=7)
def _fincstp(op: Operands) -> None:
    stack = X87Stack(op)
    stack.rotate(1)
    stack.done()


@instruction("fdecstp", 0, 0xD9, prefix=None, digit=6, rm=6)
def _fdecstp(op: Operands) -> None:
    stack = X87Stack(op)
    stack.rotate(-1)
    stack.done()
