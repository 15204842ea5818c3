"""Conversions of SSE2 and AVX: between singles, doubles and integers (SDM vol. 2, CVT...)."""

from __future__ import annotations

from kvmpy.x86.emulator import binary_floating as floating
from kvmpy.x86.emulator.lanes import join, split
from kvmpy.x86.emulator.processor import Operands
from kvmpy.x86.emulator.table import instruction
from kvmpy.x86.emulator.vector_floating import settle
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
from kvmpy.x86.instruction import VEX


def _general_size(op: Operands) -> int:
    return 8 if op.it.w and op.it.bits == 64 else 4


def _signed(value: int, size: int) -> int:
    return value - (1 << 8 * size) if value >> 8 * size - 1 else value


# Scalars


def _from_general(name: str, prefix: int, kind: Format) -> None:
    @both(name, 0x2A, prefix)
    def execute(op: Operands) -> None:
        state, size = check_vector(op, sources=2, only_128=False), _general_size(op)
        value = _signed(op.source(size), size)
        (result,) = settle(op, state, [floating.from_integer(value, kind, state.current_mxcsr)])
        width = 8 * kind.size
        destination(op, state, first_source(op, state) >> width << width | result)


def _to_general(name: str, opcode: int, prefix: int, kind: Format, *, truncates: bool) -> None:
    @both(name, opcode, prefix)
    def execute(op: Operands) -> None:
        state, size = check_vector(op, only_128=False), _general_size(op)
        source = vector_source(op, state, kind.size, aligned=False)
        converted = floating.to_integer(source, kind, size, state.current_mxcsr, truncates=truncates)
        (result,) = settle(op, state, [converted])
        op.set_register(op.it.reg, result, size)


for _prefix, _suffix, _kind in ((0xF3, "ss", SINGLE), (0xF2, "sd", DOUBLE)):
    _from_general(f"cvtsi2{_suffix}", _prefix, _kind)
    _to_general(f"cvtt{_suffix}2si", 0x2C, _prefix, _kind, truncates=True)
    _to_general(f"cvt{_suffix}2si", 0x2D, _prefix, _kind, truncates=False)


def _between_scalars(name: str, prefix: int, kind: Format, target: Format) -> None:
    @both(name, 0x5A, prefix)
    def execute(op: Operands) -> None:
        state = check_vector(op, sources=2, only_128=False)
        source = vector_source(op, state, kind.size, aligned=False)
        (result,) = settle(op, state, [floating.convert(source, kind, target, state.current_mxcsr)])
        width = 8 * target.size
        destination(op, state, first_source(op, state) >> width << width | result)


_between_scalars("cvtss2sd", 0xF3, SINGLE, DOUBLE)
_between_scalars("cvtsd2ss", 0xF2, DOUBLE, SINGLE)


# Vectors: the elements may become wider or narrower; the wider ones fill the vector


def _vectors(
    name: str, opcode: int, prefix: int, source: Format | None, target: Format | None, *, truncates: bool = False
) -> None:
    """`source` or `target` None: signed integers of 4 bytes."""
    width = source.size if source is not None else 4
    result_width = target.size if target is not None else 4
    wider = max(width, result_width)

    def element(bits: int, mxcsr: int) -> tuple[int, int]:
        if source is None:
            assert target is not None
            return floating.from_integer(_signed(bits, 4), target, mxcsr)
        if target is None:
            return floating.to_integer(bits, source, 4, mxcsr, truncates=truncates)
        return floating.convert(bits, source, target, mxcsr)

    @both(name, opcode, prefix)
    def execute(op: Operands) -> None:
        state = check_vector(op, only_128=False)
        count = vector_size(op) // wider
        size = count * width
        aligned = op.it.encoding != VEX and size == 16
        elements = split(vector_source(op, state, size, aligned=aligned), width, size)
        mxcsr = state.current_mxcsr
        destination(op, state, join(settle(op, state, [element(each, mxcsr) for each in elements]), result_width))


_vectors("cvtps2pd", 0x5A, 0, SINGLE, DOUBLE)
_vectors("cvtpd2ps", 0x5A, 0x66, DOUBLE, SINGLE)
_vectors("cvtdq2ps", 0x5B, 0, None, SINGLE)
_vectors("cvtps2dq", 0x5B, 0x66, SINGLE, None)
_vectors("cvttps2dq", 0x5B, 0xF3, SINGLE, None, truncates=True)
_vectors("cvttpd2dq", 0xE6, 0x66, DOUBLE, None, truncates=True)
_vectors("cvtdq2pd", 0xE6, 0xF3, None, DOUBLE)
_vectors("cvtpd2dq", 0xE6, 0xF2, DOUBLE, None)


# Halves (F16C)

_HALF = Format(2, 5, 10)
_FTZ, _DAZ, _DENORMAL = 1 << 15, 1 << 6, 2


@instruction("vcvtph2ps", 2, 0x13, prefix=0x66, encoding=VEX, w=False, bits=OUTSIDE_REAL_MODE)
def _from_halves(op: Operands) -> None:
    state = check_avx(op)
    size = vector_size(op) // 2
    elements = split(vector_source(op, state, size, aligned=False), 2, size)
    # A denormal half is an ordinary single: it neither raises anything nor becomes zero.
    mxcsr = state.current_mxcsr & ~_DAZ
    results = [floating.convert(each, _HALF, SINGLE, mxcsr) for each in elements]
    numbers = settle(op, state, [(number, flags & ~_DENORMAL) for number, flags in results])
    state.set_vector(op.it.reg, join(numbers, 4))


@instruction("vcvtps2ph", 3, 0x1D, prefix=0x66, encoding=VEX, immediate=1, w=False, bits=OUTSIDE_REAL_MODE)
def _to_halves(op: Operands) -> None:
    state, size, control = check_avx(op), vector_size(op), op.it.immediate
    mxcsr = state.current_mxcsr & ~_FTZ
    if not control & 4:
        mxcsr = mxcsr & ~0x6000 | (control & 3) << 13
    elements = split(vector(state, op.it.reg, size), 4, size)
    numbers = settle(op, state, [floating.convert(each, SINGLE, _HALF, mxcsr) for each in elements])
    if op.it.memory is None:
        state.set_vector(op.it.rm, join(numbers, 2))
    else:
        op.store(join(numbers, 2), size // 2)
