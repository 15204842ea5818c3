"""x87 arithmetic: FADD to FDIVR, FSQRT, FSCALE, FPREM, FRNDINT, FXTRACT, FCHS, FABS, FCMOV, BCD (SDM vol. 2).

Not FSIN, F2XM1, FYL2X and their sisters: their last bits are the processor's own.
"""

from __future__ import annotations

from collections.abc import Callable

from kvmpy.x86.emulator import extended_floating as floating
from kvmpy.x86.emulator.processor import Operands
from kvmpy.x86.emulator.table import MEMORY, REGISTER, instruction
from kvmpy.x86.emulator.x87_moves import store
from kvmpy.x86.emulator.x87_numbers import DOUBLE, SINGLE, from_binary, from_integer, to_integer
from kvmpy.x86.emulator.x87_stack import (
    C0,
    C1,
    C2,
    C3,
    DENORMAL,
    INDEFINITE,
    INVALID,
    STACK_FAULT,
    ZERO_DIVIDE,
    X87Stack,
)  # fmt: skip
from kvmpy.x86.flags import Rflags

__all__ = ["Loaded", "finish", "integer_operand", "real_operand"]

_BEFORE_COMPUTING = INVALID | DENORMAL | ZERO_DIVIDE
_QUIET, _SIGN = 1 << 62, 1 << 79
_CF, _PF, _ZF = int(Rflags.CF), int(Rflags.PF), int(Rflags.ZF)

Operation = Callable[[int, int, int], tuple[int, int]]
"""(first, second, FCW) -> the result and flags, as in `extended_floating`."""
Loaded = tuple[int, int]
"""An operand from memory, and DENORMAL when it was one there and is none as 80 bits."""


def real_operand(op: Operands) -> Loaded:
    """A single (opcode D8) or double (DC) of memory; a signalling NaN stays one."""
    kind = DOUBLE if op.it.opcode & 4 else SINGLE
    value, flags = from_binary(op.load(kind.size), kind)
    return value & ~_QUIET if flags & INVALID else value, flags & DENORMAL


def integer_operand(op: Operands) -> Loaded:
    """An integer of 32 (opcode DA) or 16 bits (DE) of memory."""
    size = 2 if op.it.opcode & 4 else 4
    value = op.load(size)
    return from_integer(value - (1 << 8 * size) if value >> 8 * size - 1 else value), 0


def finish(stack: X87Stack, place: int, result: int, flags: int, *, pops: bool = False) -> None:
    """Keep what was computed in ST(place), unless an exception that prevents it is not masked."""
    prevented = flags & _BEFORE_COMPUTING & ~stack.control
    if prevented:
        flags &= _BEFORE_COMPUTING | STACK_FAULT
    stack.status |= flags
    if not prevented:
        stack[place] = result
        if pops:
            stack.pop()
    stack.done()


def _compute(
    stack: X87Stack, place: int, first: int, second: int, operation: Operation, *, denormal: int = 0, pops: bool = False
) -> None:
    result, flags = operation(first, second, stack.control)
    if denormal and not flags & (INVALID | ZERO_DIVIDE) and not floating.Operand(result).is_nan:
        flags |= denormal
    finish(stack, place, result, flags, pops=pops)


# Two operands


def _reversed(operation: Operation) -> Operation:
    return lambda first, second, control: operation(second, first, control)


_BINARY: tuple[tuple[str, int, Operation], ...] = (
    ("add", 0, floating.add), ("mul", 1, floating.multiply), ("sub", 4, floating.subtract),
    ("subr", 5, _reversed(floating.subtract)), ("div", 6, floating.divide), ("divr", 7, _reversed(floating.divide)),
)  # fmt: skip


def _with_memory(name: str, opcode: int, digit: int, operation: Operation, load: Callable[[Operands], Loaded]) -> None:
    @instruction(name, 0, opcode, prefix=None, digit=digit, operand=MEMORY)
    def execute(op: Operands) -> None:
        stack = X87Stack(op)
        second, denormal = load(op)
        if stack.is_empty(0):
            finish(stack, 0, INDEFINITE, INVALID | STACK_FAULT)
        else:
            _compute(stack, 0, stack[0], second, operation, denormal=denormal)


def _with_register(name: str, opcode: int, digit: int, operation: Operation, *, to_other: bool, pops: bool) -> None:
    """ST0 = ST0 op ST(i), or with `to_other` ST(i) = ST(i) op ST0."""

    @instruction(name, 0, opcode, prefix=None, digit=digit, operand=REGISTER)
    def execute(op: Operands) -> None:
        stack, other = X87Stack(op), op.it.rm & 7
        place, source = (other, 0) if to_other else (0, other)
        if stack.is_empty(0) or stack.is_empty(other):
            finish(stack, place, INDEFINITE, INVALID | STACK_FAULT, pops=pops)
        else:
            _compute(stack, place, stack[place], stack[source], operation, pops=pops)


for _name, _digit, _operation in _BINARY:
    for _opcode, _size in ((0xD8, "m32"), (0xDC, "m64")):
        _with_memory(f"f{_name} {_size}", _opcode, _digit, _operation, real_operand)
    for _opcode, _size in ((0xDA, "m32"), (0xDE, "m16")):
        _with_memory(f"fi{_name} {_size}", _opcode, _digit, _operation, integer_operand)
    _with_register(f"f{_name} st", 0xD8, _digit, _operation, to_other=False, pops=False)
    # Where ST(i) is the destination, the digits of SUB and SUBR, of DIV and DIVR, have changed places.
    _other_digit = _digit ^ 1 if _digit > 1 else _digit
    _with_register(f"f{_name} st(i), st", 0xDC, _other_digit, _operation, to_other=True, pops=False)
    _with_register(f"f{_name}p", 0xDE, _other_digit, _operation, to_other=True, pops=True)


# One operand, or ST0 and ST1


def _unary(name: str, rm: int, digit: int, operation: Callable[[int, int], tuple[int, int]]) -> None:
    @instruction(name, 0, 0xD9, prefix=None, digit=digit, rm=rm)
    def execute(op: Operands) -> None:
        stack = X87Stack(op)
        if stack.is_empty(0):
            finish(stack, 0, INDEFINITE, INVALID | STACK_FAULT)
        else:
            finish(stack, 0, *operation(stack[0], stack.control))


_unary("fchs", 0, 4, lambda value, control: (value ^ _SIGN, 0))
_unary("fabs", 1, 4, lambda value, control: (value & ~_SIGN, 0))
_unary("fsqrt", 2, 7, floating.square_root)
_unary("frndint", 4, 7, floating.round_to_integral)


@instruction("fscale", 0, 0xD9, prefix=None, digit=7, rm=5)
def _fscale(op: Operands) -> None:
    stack = X87Stack(op)
    if stack.is_empty(0) or stack.is_empty(1):
        finish(stack, 0, INDEFINITE, INVALID | STACK_FAULT)
    else:
        finish(stack, 0, *floating.scale(stack[0], stack[1], stack.control))


@instruction("fxtract", 0, 0xD9, prefix=None, digit=6, rm=4)
def _fxtract(op: Operands) -> None:
    stack = X87Stack(op)
    if stack.is_empty(0):
        power, significand, flags = INDEFINITE, INDEFINITE, INVALID | STACK_FAULT
    elif not stack.is_empty(-1):
        power, significand, flags = INDEFINITE, INDEFINITE, INVALID | STACK_FAULT | C1
    else:
        power, significand, flags = floating.extract(stack[0])
    stack.status |= flags
    if not flags & _BEFORE_COMPUTING & ~stack.control:
        stack[0] = power
        stack.rotate(-1)
        stack[0] = significand
    stack.done()


def _remainder(name: str, rm: int, digit: int, *, nearest: bool) -> None:
    @instruction(name, 0, 0xD9, prefix=None, digit=digit, rm=rm)
    def execute(op: Operands) -> None:
        stack = X87Stack(op)
        stack.status &= ~C2
        if stack.is_empty(0) or stack.is_empty(1):
            finish(stack, 0, INDEFINITE, INVALID | STACK_FAULT)
            return
        result, flags, quotient = floating.remainder(stack[0], stack[1], stack.control, nearest=nearest)
        if quotient is not None and not flags & _BEFORE_COMPUTING & ~stack.control:
            stack.status &= ~(C0 | C3)
            flags |= (C0 if quotient & 4 else 0) | (C3 if quotient & 2 else 0) | (C1 if quotient & 1 else 0)
        finish(stack, 0, result, flags)


_remainder("fprem", 0, 7, nearest=False)
_remainder("fprem1", 5, 6, nearest=True)


@instruction("fnop", 0, 0xD9, prefix=None, digit=2, rm=0)
def _fnop(op: Operands) -> None:
    X87Stack(op)


# Conditional moves


def _conditional(name: str, opcode: int, digit: int, flags: int, *, wanted: bool) -> None:
    @instruction(name, 0, opcode, prefix=None, digit=digit, operand=REGISTER)
    def execute(op: Operands) -> None:
        stack, other = X87Stack(op), op.it.rm & 7
        if stack.is_empty(0) or stack.is_empty(other):
            finish(stack, 0, INDEFINITE, INVALID | STACK_FAULT)
            return
        stack.keep_c1()
        if bool(op.flags & flags) == wanted:
            stack[0] = stack[other]
        stack.done()


for _digit, (_suffix, _flags) in enumerate((("b", _CF), ("e", _ZF), ("be", _CF | _ZF), ("u", _PF))):
    _conditional(f"fcmov{_suffix}", 0xDA, _digit, _flags, wanted=True)
    _conditional(f"fcmovn{_suffix}", 0xDB, _digit, _flags, wanted=False)


# Packed decimals: 18 digits, and a sign in the uppermost byte

_DIGITS = 18
_DECIMAL_INDEFINITE = 0xFFFF_C000_0000_0000_0000


@instruction("fbld", 0, 0xDF, prefix=None, digit=4, operand=MEMORY)
def _fbld(op: Operands) -> None:
    stack = X87Stack(op)
    bits = op.load(10)
    magnitude = 0
    for place in reversed(range(_DIGITS)):
        magnitude = magnitude * 10 + (bits >> 4 * place & 15)
    stack.push(from_integer(magnitude) | (_SIGN if bits >> 79 else 0))
    stack.done()


@instruction("fbstp", 0, 0xDF, prefix=None, digit=6, operand=MEMORY)
def _fbstp(op: Operands) -> None:
    stack = X87Stack(op)
    value, flags = _DECIMAL_INDEFINITE, INVALID | STACK_FAULT
    if not stack.is_empty(0):
        whole, flags = to_integer(stack[0], 8, stack.control >> 10 & 3)
        magnitude = (1 << 64) - whole if whole >> 63 else whole
        if flags & INVALID or magnitude >= 10**_DIGITS:
            flags = INVALID
        else:
            value = (stack[0] & _SIGN) | int(str(magnitude), 16)
    store(op, stack, 10, value, flags, pops=True)
