"""x87 comparisons: FCOM, FUCOM, FICOM, FTST, FXAM, into FSW or into RFLAGS (SDM vol. 2)."""

from __future__ import annotations

from collections.abc import Callable

from kvmpy.x86.emulator import extended_floating as floating
from kvmpy.x86.emulator.processor import Operands
from kvmpy.x86.emulator.table import MEMORY, REGISTER, instruction
from kvmpy.x86.emulator.x87_arithmetic import Loaded, integer_operand, real_operand
from kvmpy.x86.emulator.x87_stack import C0, C1, C2, C3, INVALID, STACK_FAULT, X87Stack
from kvmpy.x86.flags import Rflags

_CODES = {1: 0, -1: C0, 0: C3, None: C0 | C2 | C3}
_CF, _PF, _ZF = int(Rflags.CF), int(Rflags.PF), int(Rflags.ZF)
_RESULTS = {1: 0, -1: _CF, 0: _ZF, None: _CF | _PF | _ZF}
_ARITHMETIC = 0x8D5


def _compared(stack: X87Stack, second: int | None, *, signals: bool, denormal: int = 0) -> tuple[int | None, bool]:
    """ST0 against a number, None for an empty register: the order, and whether it counts."""
    if stack.is_empty(0) or second is None:
        order, flags = None, INVALID | STACK_FAULT
    else:
        order, flags = floating.compare(stack[0], second, signals=signals)
        if order is not None:
            flags |= denormal
    return order, stack.signal(flags)


def _into_status(stack: X87Stack, order: int | None, counts: bool, *, pops: int = 0) -> None:
    stack.status = stack.status & ~(C0 | C2 | C3) | _CODES[order]
    if counts:
        for _ in range(pops):
            stack.pop()
    stack.done()


def _other(stack: X87Stack, place: int) -> int | None:
    return None if stack.is_empty(place) else stack[place]


def _with_memory(name: str, opcode: int, digit: int, load: Callable[[Operands], Loaded], *, pops: int) -> None:
    @instruction(name, 0, opcode, prefix=None, digit=digit, operand=MEMORY)
    def execute(op: Operands) -> None:
        stack = X87Stack(op)
        second, denormal = load(op)
        _into_status(stack, *_compared(stack, second, signals=True, denormal=denormal), pops=pops)


for _digit, _pops, _suffix in ((2, 0, ""), (3, 1, "p")):
    _with_memory(f"fcom{_suffix} m32", 0xD8, _digit, real_operand, pops=_pops)
    _with_memory(f"fcom{_suffix} m64", 0xDC, _digit, real_operand, pops=_pops)
    _with_memory(f"ficom{_suffix} m32", 0xDA, _digit, integer_operand, pops=_pops)
    _with_memory(f"ficom{_suffix} m16", 0xDE, _digit, integer_operand, pops=_pops)


def _with_register(
    name: str, opcode: int, digit: int, *, signals: bool, pops: int, rm: int | None = None, into_flags: bool = False
) -> None:
    @instruction(name, 0, opcode, prefix=None, digit=digit, rm=rm, operand=REGISTER)
    def execute(op: Operands) -> None:
        stack = X87Stack(op)
        second = _other(stack, op.it.rm & 7)
        order, counts = _compared(stack, second, signals=signals)
        if not into_flags:
            _into_status(stack, order, counts, pops=pops)
            return
        if not stack.is_empty(0) and second is not None:
            stack.keep_c1()
        op.set_flags(_RESULTS[order], _ARITHMETIC)
        if counts and pops:
            stack.pop()
        stack.done()


_with_register("fcom", 0xD8, 2, signals=True, pops=0)
_with_register("fcomp", 0xD8, 3, signals=True, pops=1)
_with_register("fcompp", 0xDE, 3, rm=1, signals=True, pops=2)
_with_register("fucom", 0xDD, 4, signals=False, pops=0)
_with_register("fucomp", 0xDD, 5, signals=False, pops=1)
_with_register("fucompp", 0xDA, 5, rm=1, signals=False, pops=2)
_with_register("fcomi", 0xDB, 6, signals=True, pops=0, into_flags=True)
_with_register("fcomip", 0xDF, 6, signals=True, pops=1, into_flags=True)
_with_register("fucomi", 0xDB, 5, signals=False, pops=0, into_flags=True)
_with_register("fucomip", 0xDF, 5, signals=False, pops=1, into_flags=True)


@instruction("ftst", 0, 0xD9, prefix=None, digit=4, rm=4)
def _ftst(op: Operands) -> None:
    stack = X87Stack(op)
    _into_status(stack, *_compared(stack, 0, signals=True))


@instruction("fxam", 0, 0xD9, prefix=None, digit=4, rm=5)
def _fxam(op: Operands) -> None:
    stack = X87Stack(op)
    one = floating.Operand(stack[0])
    if stack.is_empty(0):
        kind = C3 | C0
    elif one.unsupported:
        kind = 0
    elif one.is_nan:
        kind = C0
    elif one.is_infinite:
        kind = C2 | C0
    elif one.is_zero:
        kind = C3
    else:
        kind = C3 | C2 if one.is_denormal else C2
    stack.status = stack.status & ~(C0 | C2 | C3) | kind | (C1 if one.negative else 0)
    stack.done()
