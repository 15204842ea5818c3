"""Floating-point arithmetic of SSE to SSE4.1, AVX and FMA: singles and doubles, packed and scalar (SDM vol. 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kvmpy.x86.emulator import binary_floating as floating
from kvmpy.x86.emulator.extended_state import ExtendedState
from kvmpy.x86.emulator.guest_exception import GuestException
from kvmpy.x86.emulator.lanes import join, split
from kvmpy.x86.emulator.processor import Operands
from kvmpy.x86.emulator.table import instruction
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
from kvmpy.x86.emulator.x87_numbers import DOUBLE, SINGLE, Format
from kvmpy.x86.flags import Cr4
from kvmpy.x86.instruction import VEX

__all__ = ["COMPARISONS", "FUSED", "OUTCOME_FLAGS", "Binary", "fused_element", "settle"]

_UD, _XM = 6, 19
_38, _3A = 2, 3
_OSXMMEXCPT = int(Cr4.OSXMMEXCPT)
_FORMS = ((0, "ps", SINGLE, False), (0x66, "pd", DOUBLE, False), (0xF3, "ss", SINGLE, True), (0xF2, "sd", DOUBLE, True))
"""Mandatory prefix, suffix, format, whether scalar."""
_PACKED = _FORMS[:2]
_ARITHMETIC, _ZF, _PF, _CF = 0x8D5, 0x40, 0x4, 0x1

Binary = Callable[[int, int, Format, int], tuple[int, int]]
Computed = Iterable[tuple[int, int]]


def settle(op: Operands, state: ExtendedState, results: Computed) -> list[int]:
    """The numbers of elements that are computed, their exceptions noted in MXCSR. Raises #XM when one is not masked.

    What can be told before computing, of any element, comes before the rest (SDM vol. 1, 11.5.2, 11.5.3).
    """
    numbers, flags = [], 0
    for number, raised in results:
        numbers.append(number)
        flags |= raised
    if flags:
        mxcsr = state.current_mxcsr
        unmasked = flags & ~(mxcsr >> 7)
        if unmasked & floating.BEFORE_COMPUTING:
            flags &= floating.BEFORE_COMPUTING
        if flags & ~mxcsr:
            state.current_mxcsr = mxcsr | flags
        if unmasked:
            raise GuestException.of(_XM if op.cpu.sregs.cr4 & _OSXMMEXCPT else _UD)
    return numbers


def _scalar(op: Operands, state: ExtendedState, first: int, number: int, width: int) -> None:
    """Write a scalar result: what is above it comes from the first source."""
    destination(op, state, first >> 8 * width << 8 * width | number)


def _low(value: int, width: int) -> int:
    return value & (1 << 8 * width) - 1


# Two operands (or one), element by element


def _arithmetic(name: str, opcode: int, operation: Binary, *, one_source: bool = False) -> None:
    for prefix, suffix, kind, scalar in _FORMS:
        (_scalar_row if scalar else _packed_row)(f"{name}{suffix}", opcode, prefix, kind, operation, one_source)


def _packed_row(name: str, opcode: int, prefix: int, kind: Format, operation: Binary, one_source: bool) -> None:
    width = kind.size

    @both(name, opcode, prefix)
    def execute(op: Operands) -> None:
        state = check_vector(op, sources=0 if one_source else 2, only_128=False)
        vex, size = op.it.encoding == VEX, vector_size(op)
        second = split(vector_source(op, state, size, aligned=not vex), width, size)
        first = second if one_source else split(vector(state, op.it.vvvv if vex else op.it.reg, size), width, size)
        mxcsr = state.current_mxcsr
        results = [operation(a, b, kind, mxcsr) for a, b in zip(first, second, strict=True)]
        destination(op, state, join(settle(op, state, results), width))


def _scalar_row(name: str, opcode: int, prefix: int, kind: Format, operation: Binary, one_source: bool) -> None:
    width = kind.size

    @both(name, opcode, prefix)
    def execute(op: Operands) -> None:
        state = check_vector(op, sources=2, only_128=False)
        second = vector_source(op, state, width, aligned=False)
        first = first_source(op, state)
        results = settle(op, state, [operation(_low(first, width), second, kind, state.current_mxcsr)])
        _scalar(op, state, first, results[0], width)


_arithmetic("sqrt", 0x51, floating.square_root, one_source=True)
_arithmetic("add", 0x58, floating.add)
_arithmetic("mul", 0x59, floating.multiply)
_arithmetic("sub", 0x5C, floating.subtract)
_arithmetic("min", 0x5D, floating.minimum)
_arithmetic("div", 0x5E, floating.divide)
_arithmetic("max", 0x5F, floating.maximum)


def _neighbours(name: str, opcode: int, prefix: int, kind: Format, operation: Binary) -> None:
    """HADDPS and its sisters: pairs of the first source below, those of the second above, in each 128 bits."""
    width = kind.size

    @both(name, opcode, prefix)
    def execute(op: Operands) -> None:
        state = check_vector(op, sources=2, only_128=False)
        vex, size = op.it.encoding == VEX, vector_size(op)
        second = split(vector_source(op, state, size, aligned=not vex), width, size)
        first = split(vector(state, op.it.vvvv if vex else op.it.reg, size), width, size)
        mxcsr, count = state.current_mxcsr, 16 // width
        results = []
        for lane in range(0, len(first), count):
            elements = first[lane : lane + count] + second[lane : lane + count]
            results += [
                operation(elements[at], elements[at + 1], kind, mxcsr) for at in range(0, len(elements), 2)
            ]  # fmt: skip
        destination(op, state, join(settle(op, state, results), width))


def _alternating(name: str, prefix: int, kind: Format) -> None:
    """ADDSUBPS and ADDSUBPD: differences in the even elements, sums in the odd ones."""
    width = kind.size

    @both(name, 0xD0, prefix)
    def execute(op: Operands) -> None:
        state = check_vector(op, sources=2, only_128=False)
        vex, size = op.it.encoding == VEX, vector_size(op)
        second = split(vector_source(op, state, size, aligned=not vex), width, size)
        first = split(vector(state, op.it.vvvv if vex else op.it.reg, size), width, size)
        mxcsr = state.current_mxcsr
        results = [
            (floating.add if at & 1 else floating.subtract)(a, b, kind, mxcsr)
            for at, (a, b) in enumerate(zip(first, second, strict=True))
        ]
        destination(op, state, join(settle(op, state, results), width))


for _prefix, _suffix, _kind in ((0x66, "pd", DOUBLE), (0xF2, "ps", SINGLE)):
    _neighbours(f"hadd{_suffix}", 0x7C, _prefix, _kind, floating.add)
    _neighbours(f"hsub{_suffix}", 0x7D, _prefix, _kind, floating.subtract)
    _alternating(f"addsub{_suffix}", _prefix, _kind)


# Comparisons

_LESS, _EQUAL, _GREATER, _UNORDERED = 1, 2, 4, 8
_PREDICATES = (
    _EQUAL, _LESS, _LESS | _EQUAL, _UNORDERED,
    _LESS | _GREATER | _UNORDERED, _EQUAL | _GREATER | _UNORDERED, _GREATER | _UNORDERED, _LESS | _EQUAL | _GREATER,
    _EQUAL | _UNORDERED, _LESS | _UNORDERED, _LESS | _EQUAL | _UNORDERED, 0,
    _LESS | _GREATER, _EQUAL | _GREATER, _GREATER, _LESS | _EQUAL | _GREATER | _UNORDERED,
)  # fmt: skip
"""What is true for which predicate; 16 to 31 are the same, but signal where these do not (SDM vol. 2, table 3-1)."""
_OUTCOME = {-1: _LESS, 0: _EQUAL, 1: _GREATER, None: _UNORDERED}


def _comparison(predicate: int) -> Binary:
    signals = (predicate & 3 in (1, 2)) != bool(predicate & 16)
    true = _PREDICATES[predicate & 15]

    def operation(first: int, second: int, kind: Format, mxcsr: int) -> tuple[int, int]:
        order, flags = floating.compare(first, second, kind, mxcsr, signals=signals)
        return (1 << 8 * kind.size) - 1 if _OUTCOME[order] & true else 0, flags

    return operation


COMPARISONS = [_comparison(predicate) for predicate in range(32)]


def _compare_row(name: str, prefix: int, kind: Format, scalar: bool) -> None:
    width = kind.size

    @both(name, 0xC2, prefix, immediate=1)
    def execute(op: Operands) -> None:
        state = check_vector(op, sources=2, only_128=False)
        vex = op.it.encoding == VEX
        size = vector_size(op)
        operation = COMPARISONS[op.it.immediate & (31 if vex else 7)]
        mxcsr = state.current_mxcsr
        if scalar:
            second = vector_source(op, state, width, aligned=False)
            first = first_source(op, state)
            results = settle(op, state, [operation(_low(first, width), second, kind, mxcsr)])
            _scalar(op, state, first, results[0], width)
            return
        others = split(vector_source(op, state, size, aligned=not vex), width, size)
        ones = split(vector(state, op.it.vvvv if vex else op.it.reg, size), width, size)
        results = settle(op, state, [operation(a, b, kind, mxcsr) for a, b in zip(ones, others, strict=True)])
        destination(op, state, join(results, width))


for _prefix, _suffix, _kind, _is_scalar in _FORMS:
    _compare_row(f"cmp{_suffix}", _prefix, _kind, _is_scalar)


OUTCOME_FLAGS = {-1: _CF, 0: _ZF, 1: 0, None: _ZF | _PF | _CF}
"""What COMISD makes of an order; None is unordered."""


def _flags_row(name: str, opcode: int, prefix: int, kind: Format, *, signals: bool) -> None:
    @both(name, opcode, prefix)
    def execute(op: Operands) -> None:
        state = check_vector(op, only_128=False)
        second = vector_source(op, state, kind.size, aligned=False)
        first = _low(state.xmm(op.it.reg), kind.size)
        order, raised = floating.compare(first, second, kind, state.current_mxcsr, signals=signals)
        settle(op, state, [(0, raised)])
        op.set_flags(OUTCOME_FLAGS[order], _ARITHMETIC)


_flags_row("ucomiss", 0x2E, 0, SINGLE, signals=False)
_flags_row("ucomisd", 0x2E, 0x66, DOUBLE, signals=False)
_flags_row("comiss", 0x2F, 0, SINGLE, signals=True)
_flags_row("comisd", 0x2F, 0x66, DOUBLE, signals=True)


# Rounding to integers


def _round_row(name: str, opcode: int, kind: Format, scalar: bool) -> None:
    width = kind.size

    @both(name, opcode, 0x66, map=_3A, immediate=1)
    def execute(op: Operands) -> None:
        state = check_vector(op, sources=2 if scalar else 0, only_128=False)
        size = width if scalar else vector_size(op)
        source = split(vector_source(op, state, size, aligned=not scalar and op.it.encoding != VEX), width, size)
        mxcsr, control = state.current_mxcsr, op.it.immediate
        results = settle(op, state, [floating.round_to_integral(each, kind, mxcsr, control) for each in source])
        if scalar:
            _scalar(op, state, first_source(op, state), results[0], width)
        else:
            destination(op, state, join(results, width))


for _opcode, (_, _suffix, _kind, _is_scalar) in enumerate(_FORMS, 0x08):
    _round_row(f"round{_suffix}", _opcode, _kind, _is_scalar)


# Products of elements, added up, each step rounded


def _dot_product(name: str, opcode: int, kind: Format, *, only_128: bool) -> None:
    """The immediate chooses the elements that count, above, and those that get the sum, below."""
    width, count = kind.size, 16 // kind.size

    @both(name, opcode, 0x66, map=_3A, immediate=1)
    def execute(op: Operands) -> None:
        state = check_vector(op, sources=2, only_128=only_128)
        vex, size = op.it.encoding == VEX, vector_size(op)
        second = split(vector_source(op, state, size, aligned=not vex), width, size)
        first = split(vector(state, op.it.vvvv if vex else op.it.reg, size), width, size)
        choice = op.it.immediate
        mxcsr = state.current_mxcsr
        products = settle(op, state, [
            floating.multiply(a, b, kind, mxcsr) if choice >> 4 + at % count & 1 else (0, 0)
            for at, (a, b) in enumerate(zip(first, second, strict=True))
        ])  # fmt: skip
        sums = products
        for _ in range(count.bit_length() - 1):  # neighbours, until one is left in each 128 bits
            pairs = zip(sums[::2], sums[1::2], strict=True)
            sums = settle(op, state, [floating.add(a, b, kind, mxcsr) for a, b in pairs])
        results = [sums[at // count] if choice >> at % count & 1 else 0 for at in range(len(products))]
        destination(op, state, join(results, width))


_dot_product("dpps", 0x40, SINGLE, only_128=False)
_dot_product("dppd", 0x41, DOUBLE, only_128=True)


# Products added up, rounded once


def _fused(
    name: str, opcode: int, order: str, kind: Format, scalar: bool, signs: Callable[[int], tuple[int, int]]
) -> None:
    """`order` says which operands are multiplied and which is added; `signs(element)` flips signs of those."""
    width = kind.size

    @instruction(
        f"{name}{order}", _38, opcode, prefix=0x66, encoding=VEX, w=kind is DOUBLE, bits=OUTSIDE_REAL_MODE
    )  # fmt: skip
    def execute(op: Operands) -> None:
        state = check_avx(op, sources=2)
        size = width if scalar else vector_size(op)
        third = split(vector_source(op, state, size, aligned=False), width, size)
        second = split(vector(state, op.it.vvvv, size), width, size)
        first = split(vector(state, op.it.reg, size), width, size)
        by_number = {"1": first, "2": second, "3": third}
        mxcsr = state.current_mxcsr
        results = []
        for at, (a, b, c) in enumerate(zip(*(by_number[number] for number in order), strict=True)):
            results.append(fused_element(a, b, c, signs(at), kind, mxcsr))
        numbers = settle(op, state, results)
        if scalar:
            _scalar(op, state, state.xmm(op.it.reg), numbers[0], width)
        else:
            destination(op, state, join(numbers, width))


def fused_element(
    first: int, second: int, third: int, signs: tuple[int, int], kind: Format, mxcsr: int
) -> tuple[int, int]:
    """first * second + third; `signs` flip those of the product and of what is added, but not a NaN's."""
    product, added = (flips << 8 * kind.size - 1 for flips in signs)
    if not floating.is_nan(first, kind):
        first ^= product
    if not floating.is_nan(third, kind):
        third ^= added
    return floating.multiply_add(first, second, third, kind, mxcsr)


FUSED: tuple[tuple[str, int, bool, Callable[[int], tuple[int, int]]], ...] = (
    ("vfmaddsub", 0x6, False, lambda at: (0, 0 if at & 1 else 1)),
    ("vfmsubadd", 0x7, False, lambda at: (0, 1 if at & 1 else 0)),
    ("vfmadd", 0x8, True, lambda at: (0, 0)),
    ("vfmsub", 0xA, True, lambda at: (0, 1)),
    ("vfnmadd", 0xC, True, lambda at: (1, 0)),
    ("vfnmsub", 0xE, True, lambda at: (1, 1)),
)
for _base, _order in ((0x90, "132"), (0xA0, "213"), (0xB0, "231")):
    for _name, _digit, _has_scalar, _signs in FUSED:
        for _, _suffix, _kind, _is_scalar in _FORMS if _has_scalar else _PACKED:
            _fused(f"{_name}{_suffix}", _base + _digit + _is_scalar, _order, _kind, _is_scalar, _signs)
