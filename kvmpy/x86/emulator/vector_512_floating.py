"""EVEX encodings of floating-point arithmetic: masks, broadcast, roundings of their own (SDM vol. 2, 2.7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvmpy.x86.emulator import binary_floating as floating
from kvmpy.x86.emulator.guest_exception import GuestException
from kvmpy.x86.emulator.lanes import join, split
from kvmpy.x86.emulator.processor import Operands
from kvmpy.x86.emulator.table import instruction
from kvmpy.x86.emulator.vector_512 import Vectors
from kvmpy.x86.emulator.vector_floating import COMPARISONS, FUSED, Binary, fused_element, settle
from kvmpy.x86.emulator.vector_operands import OUTSIDE_REAL_MODE
from kvmpy.x86.emulator.x87_numbers import DOUBLE, SINGLE, Format
from kvmpy.x86.instruction import EVEX

__all__ = ["Element", "computed", "without_exceptions"]

_UD = 6
_38 = 2
_FORMS = (("ps", 0, SINGLE, False), ("pd", 0x66, DOUBLE, True))
"""Suffix, mandatory prefix, format, W."""
_EXCEPTIONS_MASKED = 0x1F80

Element = Callable[[int, int], tuple[int, int]]
"""(place, MXCSR) -> the result for the element there, and exceptions."""


def without_exceptions(mxcsr: int, rounding: int) -> int:
    """MXCSR as an instruction sees it that has its own rounding."""
    return mxcsr & ~0x6000 | rounding << 13 | _EXCEPTIONS_MASKED


def computed(vectors: Vectors, element: Element) -> list[int]:
    """The elements that the mask lets through are computed, the others are zero here and raise nothing."""
    op, state = vectors.op, vectors.state
    mxcsr = state.current_mxcsr
    silent = vectors.rounding is not None
    if vectors.rounding is not None:
        mxcsr = without_exceptions(mxcsr, vectors.rounding)
    chosen = vectors.chosen()
    results = [element(place, mxcsr) for place in chosen]
    numbers = [number for number, _ in results] if silent else settle(op, state, results)
    everything = [0] * (vectors.size // vectors.width)
    for place, number in zip(chosen, numbers, strict=True):
        everything[place] = number
    return everything


def _elements(vectors: Vectors, value: int) -> Sequence[int]:
    return split(value, vectors.width, vectors.size)


def _arithmetic(name: str, opcode: int, operation: Binary, *, one_source: bool = False) -> None:
    for suffix, prefix, kind, w in _FORMS:
        _arithmetic_row(f"v{name}{suffix}", opcode, prefix, kind, w, operation, one_source)


def _arithmetic_row(
    name: str, opcode: int, prefix: int, kind: Format, w: bool, operation: Binary, one_source: bool
) -> None:
    @instruction(name, 1, opcode, prefix=prefix, w=w, encoding=EVEX, bits=OUTSIDE_REAL_MODE)
    def execute(op: Operands) -> None:
        vectors = Vectors(op, kind.size, first_source=not one_source, rounds=True)
        second = _elements(vectors, vectors.second())
        first = second if one_source else _elements(vectors, vectors.register(op.it.vvvv))
        results = computed(vectors, lambda at, mxcsr: operation(first[at], second[at], kind, mxcsr))
        vectors.write(op.it.reg, join(results, kind.size))


_arithmetic("sqrt", 0x51, floating.square_root, one_source=True)
_arithmetic("add", 0x58, floating.add)
_arithmetic("mul", 0x59, floating.multiply)
_arithmetic("sub", 0x5C, floating.subtract)
_arithmetic("min", 0x5D, floating.minimum)
_arithmetic("div", 0x5E, floating.divide)
_arithmetic("max", 0x5F, floating.maximum)


def _comparison(name: str, prefix: int, kind: Format, w: bool) -> None:
    @instruction(name, 1, 0xC2, prefix=prefix, w=w, immediate=1, encoding=EVEX, bits=OUTSIDE_REAL_MODE)
    def execute(op: Operands) -> None:
        vectors = Vectors(op, kind.size, first_source=True, rounds=True)
        if vectors.zeroes:
            raise GuestException.of(_UD)
        compare = COMPARISONS[op.it.immediate & 31]
        second = _elements(vectors, vectors.second())
        first = _elements(vectors, vectors.register(op.it.vvvv))
        results = computed(vectors, lambda at, mxcsr: compare(first[at], second[at], kind, mxcsr))
        vectors.state.set_opmask(op.it.reg & 7, sum(1 << at for at, true in enumerate(results) if true))


for _suffix, _prefix, _kind, _w in _FORMS:
    _comparison(f"vcmp{_suffix}", _prefix, _kind, _w)


def _fused(name: str, opcode: int, order: str, kind: Format, w: bool, signs: Callable[[int], tuple[int, int]]) -> None:
    @instruction(name, _38, opcode, prefix=0x66, w=w, encoding=EVEX, bits=OUTSIDE_REAL_MODE)
    def execute(op: Operands) -> None:
        vectors = Vectors(op, kind.size, first_source=True, rounds=True)
        third = _elements(vectors, vectors.second())
        second = _elements(vectors, vectors.register(op.it.vvvv))
        first = _elements(vectors, vectors.register(op.it.reg))
        by_number = {"1": first, "2": second, "3": third}
        a, b, c = (by_number[number] for number in order)
        results = computed(
            vectors, lambda at, mxcsr: fused_element(a[at], b[at], c[at], signs(at), kind, mxcsr)
        )  # fmt: skip
        vectors.write(op.it.reg, join(results, kind.size))


for _base, _order in ((0x90, "132"), (0xA0, "213"), (0xB0, "231")):
    for _name, _digit, _, _signs in FUSED:
        _fused(f"{_name}{_order}ps", _base + _digit, _order, SINGLE, False, _signs)
        _fused(f"{_name}{_order}pd", _base + _digit, _order, DOUBLE, True, _signs)
