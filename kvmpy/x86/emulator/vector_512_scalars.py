"""EVEX encodings of scalars: arithmetic, comparisons, conversions, moves; registers above 15 (SDM vol. 2, 2.7)."""

from __future__ import annotations

from collections.abc import Callable

from kvmpy.x86.emulator import binary_floating as floating
from kvmpy.x86.emulator.extended_state import ExtendedState
from kvmpy.x86.emulator.guest_exception import GuestException
from kvmpy.x86.emulator.processor import Operands
from kvmpy.x86.emulator.table import ANY, MEMORY, REGISTER, instruction
from kvmpy.x86.emulator.vector_512 import Vectors
from kvmpy.x86.emulator.vector_512_floating import without_exceptions
from kvmpy.x86.emulator.vector_floating import COMPARISONS, FUSED, OUTCOME_FLAGS, Binary, fused_element, settle
from kvmpy.x86.emulator.vector_operands import OUTSIDE_REAL_MODE
from kvmpy.x86.emulator.x87_numbers import DOUBLE, SINGLE, Format
from kvmpy.x86.instruction import EVEX

_UD = 6
_38, _3A = 2, 3
_ARITHMETIC = 0x8D5
_FORMS = (("ss", 0xF3, SINGLE, False), ("sd", 0xF2, DOUBLE, True))
"""Suffix, mandatory prefix, format, W."""


def _low(value: int, size: int) -> int:
    return value & (1 << 8 * size) - 1


def _scalar(op: Operands, size: int, *, first_source: bool, rounds: bool = True) -> Vectors:
    """The operands; the bits for the size of vectors do not count."""
    return Vectors(op, size, first_source=first_source, broadcasts=False, rounds=rounds, scalar=True)


def _one(vectors: Vectors, compute: Callable[[int], tuple[int, int]]) -> int:
    """One number, its exceptions noted unless they are suppressed."""
    mxcsr = vectors.state.current_mxcsr
    if vectors.rounding is not None:
        return compute(without_exceptions(mxcsr, vectors.rounding))[0]
    return settle(vectors.op, vectors.state, [compute(mxcsr)])[0]


def _write(vectors: Vectors, first: int, compute: Callable[[], int]) -> None:
    """Write the lowest element if the mask lets through; what is above it comes from the first source."""
    op, width = vectors.op, vectors.width
    kept = 0 if vectors.zeroes else _low(vectors.state.zmm(op.it.reg), width)
    number = compute() if vectors.mask & 1 else kept
    vectors.state.set_zmm(op.it.reg, _low(first, 16) >> 8 * width << 8 * width | number)


# Arithmetic


def _arithmetic(name: str, opcode: int, operation: Binary) -> None:
    for suffix, prefix, kind, w in _FORMS:
        _arithmetic_row(f"v{name}{suffix}", opcode, prefix, kind, w, operation)


def _arithmetic_row(name: str, opcode: int, prefix: int, kind: Format, w: bool, operation: Binary) -> None:
    @instruction(name, 1, opcode, prefix=prefix, w=w, encoding=EVEX, bits=OUTSIDE_REAL_MODE)
    def execute(op: Operands) -> None:
        vectors = _scalar(op, kind.size, first_source=True)
        first = vectors.state.zmm(op.it.vvvv)

        def compute() -> int:
            second = vectors.part(kind.size)
            return _one(vectors, lambda mxcsr: operation(_low(first, kind.size), second, kind, mxcsr))

        _write(vectors, first, compute)


_arithmetic("sqrt", 0x51, floating.square_root)
_arithmetic("add", 0x58, floating.add)
_arithmetic("mul", 0x59, floating.multiply)
_arithmetic("sub", 0x5C, floating.subtract)
_arithmetic("min", 0x5D, floating.minimum)
_arithmetic("div", 0x5E, floating.divide)
_arithmetic("max", 0x5F, floating.maximum)


def _fused(name: str, opcode: int, order: str, kind: Format, w: bool, signs: tuple[int, int]) -> None:
    @instruction(name, _38, opcode, prefix=0x66, w=w, encoding=EVEX, bits=OUTSIDE_REAL_MODE)
    def execute(op: Operands) -> None:
        vectors = _scalar(op, kind.size, first_source=True)
        destination = vectors.state.zmm(op.it.reg)

        def compute() -> int:
            by_number = {
                "1": _low(destination, kind.size), "2": _low(vectors.state.zmm(op.it.vvvv), kind.size),
                "3": vectors.part(kind.size),
            }  # fmt: skip
            a, b, c = (by_number[number] for number in order)
            return _one(vectors, lambda mxcsr: fused_element(a, b, c, signs, kind, mxcsr))

        _write(vectors, destination, compute)


for _base, _order in ((0x90, "132"), (0xA0, "213"), (0xB0, "231")):
    for _name, _digit, _has_scalar, _signs in FUSED:
        if _has_scalar:
            _fused(f"{_name}{_order}ss", _base + _digit + 1, _order, SINGLE, False, _signs(0))
            _fused(f"{_name}{_order}sd", _base + _digit + 1, _order, DOUBLE, True, _signs(0))


def _round(name: str, opcode: int, kind: Format, w: bool) -> None:
    @instruction(name, _3A, opcode, prefix=0x66, w=w, immediate=1, encoding=EVEX, bits=OUTSIDE_REAL_MODE)
    def execute(op: Operands) -> None:
        vectors, control = _scalar(op, kind.size, first_source=True), op.it.immediate
        if vectors.rounding is not None:
            vectors.rounding = vectors.state.current_mxcsr >> 13 & 3

        def compute() -> int:
            value = vectors.part(kind.size)
            return _one(
                vectors, lambda mxcsr: floating.round_to_integral(value, kind, mxcsr, control, control >> 4)
            )  # fmt: skip

        _write(vectors, vectors.state.zmm(op.it.vvvv), compute)


_round("vrndscaless", 0x0A, SINGLE, False)
_round("vrndscalesd", 0x0B, DOUBLE, True)


# Comparisons


def _comparison(name: str, prefix: int, kind: Format, w: bool) -> None:
    @instruction(name, 1, 0xC2, prefix=prefix, w=w, immediate=1, encoding=EVEX, bits=OUTSIDE_REAL_MODE)
    def execute(op: Operands) -> None:
        vectors = _scalar(op, kind.size, first_source=True)
        if vectors.zeroes:
            raise GuestException.of(_UD)
        result = 0
        if vectors.mask & 1:
            first, second = _low(vectors.state.zmm(op.it.vvvv), kind.size), vectors.part(kind.size)
            compare = COMPARISONS[op.it.immediate & 31]
            result = int(_one(vectors, lambda mxcsr: compare(first, second, kind, mxcsr)) != 0)
        vectors.state.set_opmask(op.it.reg & 7, result)


for _suffix, _prefix, _kind, _w in _FORMS:
    _comparison(f"vcmp{_suffix}", _prefix, _kind, _w)


def _unmasked(op: Operands, size: int, *, first_source: bool = False, rounds: bool = True) -> Vectors:
    vectors = _scalar(op, size, first_source=first_source, rounds=rounds)
    if vectors.mask != -1:
        raise GuestException.of(_UD)
    return vectors


def _flags(name: str, opcode: int, prefix: int, kind: Format, w: bool, *, signals: bool) -> None:
    @instruction(name, 1, opcode, prefix=prefix, w=w, encoding=EVEX, bits=OUTSIDE_REAL_MODE)
    def execute(op: Operands) -> None:
        vectors = _unmasked(op, kind.size)
        first, second = _low(vectors.state.zmm(op.it.reg), kind.size), vectors.part(kind.size)
        mxcsr = vectors.state.current_mxcsr
        order, raised = floating.compare(first, second, kind, mxcsr, signals=signals)
        if vectors.rounding is None:
            settle(op, vectors.state, [(0, raised)])
        op.set_flags(OUTCOME_FLAGS[order], _ARITHMETIC)


for _name, _opcode, _signals in (("vucomis", 0x2E, False), ("vcomis", 0x2F, True)):
    _flags(f"{_name}s", _opcode, 0, SINGLE, False, signals=_signals)
    _flags(f"{_name}d", _opcode, 0x66, DOUBLE, True, signals=_signals)


# Conversions


def _from_general(name: str, opcode: int, prefix: int, kind: Format, *, signed: bool) -> None:
    @instruction(name, 1, opcode, prefix=prefix, encoding=EVEX, bits=OUTSIDE_REAL_MODE)
    def execute(op: Operands) -> None:
        size = 8 if op.it.w and op.it.bits == 64 else 4
        vectors = _unmasked(op, kind.size, first_source=True)
        value = op.register(op.it.rm & 15, size) if op.it.memory is None else vectors.part(size)
        if signed and value >> 8 * size - 1:
            value -= 1 << 8 * size
        number = _one(vectors, lambda mxcsr: floating.from_integer(value, kind, mxcsr))
        _write(vectors, vectors.state.zmm(op.it.vvvv), lambda: number)


def _to_general(name: str, opcode: int, prefix: int, kind: Format, *, signed: bool, truncates: bool) -> None:
    convert = floating.to_integer if signed else floating.to_unsigned

    @instruction(name, 1, opcode, prefix=prefix, encoding=EVEX, bits=OUTSIDE_REAL_MODE)
    def execute(op: Operands) -> None:
        size = 8 if op.it.w and op.it.bits == 64 else 4
        vectors = _unmasked(op, kind.size)
        value = vectors.part(kind.size)
        result = _one(vectors, lambda mxcsr: convert(value, kind, size, mxcsr, truncates=truncates))
        op.set_register(op.it.reg & 15, result, size)


def _between(name: str, prefix: int, kind: Format, target: Format, w: bool) -> None:
    @instruction(name, 1, 0x5A, prefix=prefix, w=w, encoding=EVEX, bits=OUTSIDE_REAL_MODE)
    def execute(op: Operands) -> None:
        vectors = _scalar(op, target.size, first_source=True)

        def compute() -> int:
            value = vectors.part(kind.size)
            return _one(vectors, lambda mxcsr: floating.convert(value, kind, target, mxcsr))

        _write(vectors, vectors.state.zmm(op.it.vvvv), compute)


for _suffix, _prefix, _kind, _ in _FORMS:
    _from_general(f"vcvtsi2{_suffix}", 0x2A, _prefix, _kind, signed=True)
    _from_general(f"vcvtusi2{_suffix}", 0x7B, _prefix, _kind, signed=False)
    for _name, _opcode, _truncates in (("vcvtt", 0x2C, True), ("vcvt", 0x2D, False)):
        _to_general(f"{_name}{_suffix}2si", _opcode, _prefix, _kind, signed=True, truncates=_truncates)
    for _name, _opcode, _truncates in (("vcvtt", 0x78, True), ("vcvt", 0x79, False)):
        _to_general(f"{_name}{_suffix}2usi", _opcode, _prefix, _kind, signed=False, truncates=_truncates)
_between("vcvtss2sd", 0xF3, SINGLE, DOUBLE, False)
_between("vcvtsd2ss", 0xF2, DOUBLE, SINGLE, True)


# Moves


def _moves(suffix: str, prefix: int, kind: Format, w: bool) -> None:
    size = kind.size

    @instruction(
        f"vmov{suffix} load", 1, 0x10, prefix=prefix, w=w, operand=MEMORY, encoding=EVEX, bits=OUTSIDE_REAL_MODE
    )
    def load(op: Operands) -> None:
        vectors = _scalar(op, size, first_source=False, rounds=False)
        _write(vectors, 0, lambda: vectors.part(size))

    @instruction(
        f"vmov{suffix} store", 1, 0x11, prefix=prefix, w=w, operand=MEMORY, encoding=EVEX, bits=OUTSIDE_REAL_MODE
    )
    def store(op: Operands) -> None:
        vectors = _scalar(op, size, first_source=False, rounds=False)
        if vectors.zeroes:
            raise GuestException.of(_UD)
        if vectors.mask & 1:
            vectors.mask = -1
            vectors.store_part(_low(vectors.state.zmm(op.it.reg), size), size)

    def copy(op: Operands, *, to_rm: bool) -> None:
        vectors = _scalar(op, size, first_source=True, rounds=False)
        target, source = (op.it.rm, op.it.reg) if to_rm else (op.it.reg, op.it.rm)
        state: ExtendedState = vectors.state
        chosen = vectors.mask & 1
        number = _low(state.zmm(source if chosen else target), size) if chosen or not vectors.zeroes else 0
        state.set_zmm(target, _low(state.zmm(op.it.vvvv), 16) >> 8 * size << 8 * size | number)

    for opcode, to_rm in ((0x10, False), (0x11, True)):
        instruction(
            f"vmov{suffix}", 1, opcode, prefix=prefix, w=w, operand=REGISTER, encoding=EVEX, bits=OUTSIDE_REAL_MODE
        )(lambda op, to_rm=to_rm: copy(op, to_rm=to_rm))  # type: ignore[misc]


for _suffix, _prefix, _kind, _w in _FORMS:
    _moves(_suffix, _prefix, _kind, _w)


@instruction("vmovd, vmovq load", 1, 0x6E, prefix=0x66, encoding=EVEX, bits=OUTSIDE_REAL_MODE)
def _load_general(op: Operands) -> None:
    size = 8 if op.it.w and op.it.bits == 64 else 4
    vectors = _unmasked(op, size, rounds=False)
    value = op.register(op.it.rm & 15, size) if op.it.memory is None else vectors.part(size)
    vectors.state.set_zmm(op.it.reg, value)


@instruction("vmovd, vmovq store", 1, 0x7E, prefix=0x66, encoding=EVEX, bits=OUTSIDE_REAL_MODE)
def _store_general(op: Operands) -> None:
    size = 8 if op.it.w and op.it.bits == 64 else 4
    vectors = _unmasked(op, size, rounds=False)
    value = _low(vectors.state.zmm(op.it.reg), size)
    if op.it.memory is None:
        op.set_register(op.it.rm & 15, value, size)
    else:
        vectors.store_part(value, size)


@instruction("vmovq", 1, 0x7E, prefix=0xF3, w=True, operand=ANY, encoding=EVEX, bits=OUTSIDE_REAL_MODE)
def _movq(op: Operands) -> None:
    vectors = _unmasked(op, 8, rounds=False)
    vectors.state.set_zmm(op.it.reg, vectors.part(8))


@instruction("vmovq store", 1, 0xD6, prefix=0x66, w=True, operand=ANY, encoding=EVEX, bits=OUTSIDE_REAL_MODE)
def _movq_store(op: Operands) -> None:
    vectors = _unmasked(op, 8, rounds=False)
    value = _low(vectors.state.zmm(op.it.reg), 8)
    if op.it.memory is None:
        vectors.state.set_zmm(op.it.rm, value)
    else:
        vectors.store_part(value, 8)
