"""EVEX encodings of conversions, with unsigned and 64-bit integers, and of rounding to a scale (SDM vol. 2, 2.7)."""

from __future__ import annotations

from kvmpy.x86.emulator import binary_floating as floating
from kvmpy.x86.emulator.lanes import join, split
from kvmpy.x86.emulator.processor import Operands
from kvmpy.x86.emulator.table import instruction
from kvmpy.x86.emulator.vector_512 import Vectors
from kvmpy.x86.emulator.vector_512_floating import computed
from kvmpy.x86.emulator.vector_operands import OUTSIDE_REAL_MODE
from kvmpy.x86.emulator.x87_numbers import DOUBLE, SINGLE, Format
from kvmpy.x86.instruction import EVEX

_3A = 3


class _Integer:
    """A format of whole numbers; `size` in bytes."""

    __slots__ = ("signed", "size")

    def __init__(self, size: int, *, signed: bool) -> None:
        self.size = size
        self.signed = signed


Kind = Format | _Integer
_DQ, _QQ = _Integer(4, signed=True), _Integer(8, signed=True)
_UDQ, _UQQ = _Integer(4, signed=False), _Integer(8, signed=False)


def _element(bits: int, source: Kind, target: Kind, mxcsr: int, *, truncates: bool) -> tuple[int, int]:
    if isinstance(source, _Integer):
        assert isinstance(target, Format)
        negative = source.signed and bits >> 8 * source.size - 1
        return floating.from_integer(bits - (1 << 8 * source.size) if negative else bits, target, mxcsr)
    if isinstance(target, Format):
        return floating.convert(bits, source, target, mxcsr)
    convert = floating.to_integer if target.signed else floating.to_unsigned
    return convert(bits, source, target.size, mxcsr, truncates=truncates)


def _conversion(
    name: str, opcode: int, prefix: int, source: Kind, target: Kind, *, w: bool, truncates: bool = False
) -> None:  # fmt: skip
    wider = max(source.size, target.size)

    @instruction(name, 1, opcode, prefix=prefix, w=w, encoding=EVEX, bits=OUTSIDE_REAL_MODE)
    def execute(op: Operands) -> None:
        vectors = Vectors(op, wider, first_source=False, element=source.size, rounds=True)
        count = vectors.size // wider
        size = count * source.size
        evex = op.it.evex
        assert evex is not None
        if op.it.memory is None:
            value = vectors.register(op.it.rm)
        elif evex.broadcast:
            value = vectors.second()
        else:
            value = vectors.part(size) if vectors.chosen() else 0
        elements = split(value & (1 << 8 * size) - 1, source.size, size)
        results = computed(
            vectors, lambda at, mxcsr: _element(elements[at], source, target, mxcsr, truncates=truncates)
        )  # fmt: skip
        vectors.width, vectors.size = target.size, count * target.size
        vectors.write(op.it.reg, join(results, target.size))


for _prefix, _opcode, _w, _name, _source, _target, _truncates in (
    (0, 0x5A, False, "vcvtps2pd", SINGLE, DOUBLE, False), (0x66, 0x5A, True, "vcvtpd2ps", DOUBLE, SINGLE, False),
    (0, 0x5B, False, "vcvtdq2ps", _DQ, SINGLE, False), (0, 0x5B, True, "vcvtqq2ps", _QQ, SINGLE, False),
    (0x66, 0x5B, False, "vcvtps2dq", SINGLE, _DQ, False), (0xF3, 0x5B, False, "vcvttps2dq", SINGLE, _DQ, True),
    (0xF3, 0xE6, False, "vcvtdq2pd", _DQ, DOUBLE, False), (0xF3, 0xE6, True, "vcvtqq2pd", _QQ, DOUBLE, False),
    (0x66, 0xE6, True, "vcvttpd2dq", DOUBLE, _DQ, True), (0xF2, 0xE6, True, "vcvtpd2dq", DOUBLE, _DQ, False),
    (0, 0x78, False, "vcvttps2udq", SINGLE, _UDQ, True), (0, 0x78, True, "vcvttpd2udq", DOUBLE, _UDQ, True),
    (0x66, 0x78, False, "vcvttps2uqq", SINGLE, _UQQ, True), (0x66, 0x78, True, "vcvttpd2uqq", DOUBLE, _UQQ, True),
    (0, 0x79, False, "vcvtps2udq", SINGLE, _UDQ, False), (0, 0x79, True, "vcvtpd2udq", DOUBLE, _UDQ, False),
    (0x66, 0x79, False, "vcvtps2uqq", SINGLE, _UQQ, False), (0x66, 0x79, True, "vcvtpd2uqq", DOUBLE, _UQQ, False),
    (0x66, 0x7A, False, "vcvttps2qq", SINGLE, _QQ, True), (0x66, 0x7A, True, "vcvttpd2qq", DOUBLE, _QQ, True),
    (0xF3, 0x7A, False, "vcvtudq2pd", _UDQ, DOUBLE, False), (0xF3, 0x7A, True, "vcvtuqq2pd", _UQQ, DOUBLE, False),
    (0xF2, 0x7A, False, "vcvtudq2ps", _UDQ, SINGLE, False), (0xF2, 0x7A, True, "vcvtuqq2ps", _UQQ, SINGLE, False),
    (0x66, 0x7B, False, "vcvtps2qq", SINGLE, _QQ, False), (0x66, 0x7B, True, "vcvtpd2qq", DOUBLE, _QQ, False),
):  # fmt: skip
    _conversion(_name, _opcode, _prefix, _source, _target, w=_w, truncates=_truncates)


def _round_to_scale(name: str, opcode: int, kind: Format, *, w: bool) -> None:
    """The upper half of the immediate is how many binary places stay."""

    @instruction(name, _3A, opcode, prefix=0x66, w=w, immediate=1, encoding=EVEX, bits=OUTSIDE_REAL_MODE)
    def execute(op: Operands) -> None:
        vectors, control = Vectors(op, kind.size, first_source=False, rounds=True), op.it.immediate
        elements = split(vectors.second(), kind.size, vectors.size)
        if vectors.rounding is not None:
            vectors.rounding = vectors.state.current_mxcsr >> 13 & 3  # {sae} only
        results = computed(
            vectors, lambda at, mxcsr: floating.round_to_integral(elements[at], kind, mxcsr, control, control >> 4)
        )  # fmt: skip
        vectors.write(op.it.reg, join(results, kind.size))


_round_to_scale("vrndscaleps", 0x08, SINGLE, w=False)
_round_to_scale("vrndscalepd", 0x09, DOUBLE, w=True)
