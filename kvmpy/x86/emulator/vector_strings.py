"""String comparisons of SSE4.2, and gathers of AVX2 (SDM vol. 2, PCMPESTRI ..., section 4.1; VPGATHERDD ...)."""

from __future__ import annotations

from kvmpy.x86.emulator.guest_exception import GuestException
from kvmpy.x86.emulator.lanes import join, split
from kvmpy.x86.emulator.processor import Operands
from kvmpy.x86.emulator.table import MEMORY, instruction
from kvmpy.x86.emulator.vector_operands import (
    OUTSIDE_REAL_MODE,
    both,
    check_avx,
    check_vector,
    vector,
    vector_size,
    vector_source,
)
from kvmpy.x86.flags import Rflags
from kvmpy.x86.instruction import VEX, MemoryOperand

_UD = 6
_38, _3A = 2, 3
_RAX, _RCX, _RDX = 0, 1, 2
_CF, _ZF, _SF, _OF = (int(flag) for flag in (Rflags.CF, Rflags.ZF, Rflags.SF, Rflags.OF))
_ARITHMETIC = 0x8D5
_EQUAL_ANY, _RANGES, _EQUAL_EACH, _EQUAL_ORDERED = range(4)


def _matches(a: list[int], b: list[int], length_a: int, length_b: int, how: int) -> list[bool]:
    """For each element of `b`, the string that is searched, what the aggregation says (IntRes1)."""
    count = len(b)
    if how == _EQUAL_ANY:
        return [j < length_b and b[j] in a[:length_a] for j in range(count)]
    if how == _RANGES:
        pairs = [(a[i], a[i + 1]) for i in range(0, length_a - 1, 2)]
        return [j < length_b and any(low <= b[j] <= high for low, high in pairs) for j in range(count)]
    if how == _EQUAL_EACH:
        return [
            a[j] == b[j] if j < length_a and j < length_b else j >= length_a and j >= length_b for j in range(count)
        ]  # fmt: skip
    return [
        all(i + j < length_b and a[i] == b[i + j] for i in range(min(length_a, count - j))) for j in range(count)
    ]  # fmt: skip


def _compare(op: Operands, *, explicit: bool) -> tuple[int, int, int]:
    """The result as a bit for each element, how many elements, bytes of one; flags are set."""
    state = check_vector(op)
    control = op.it.immediate
    width, signed = (2 if control & 1 else 1), bool(control & 2)
    searched = vector_source(op, state, 16, aligned=False)
    a, b = split(state.xmm(op.it.reg), width, 16, signed=signed), split(searched, width, 16, signed=signed)
    count = len(b)
    if explicit:
        size = 8 if op.it.w and op.it.bits == 64 else 4
        length_a, length_b = (_length(op.register(number, size), size, count) for number in (_RAX, _RDX))
    else:
        length_a, length_b = ((each.index(0) if 0 in each else count) for each in (a, b))
    found = _matches(a, b, length_a, length_b, control >> 2 & 3)
    negates, only_valid = bool(control & 0x10), bool(control & 0x20)
    if negates:
        found = [not each if not only_valid or at < length_b else each for at, each in enumerate(found)]
    result = sum(1 << at for at, each in enumerate(found) if each)
    flags = (_CF if result else 0) | (_OF if result & 1 else 0)
    flags |= (_ZF if length_b < count else 0) | (_SF if length_a < count else 0)
    op.set_flags(flags, _ARITHMETIC)
    return result, count, width


def _length(value: int, size: int, most: int) -> int:
    """The absolute value of a signed number, at most as many as there are."""
    return min(abs(value - (1 << 8 * size) if value >> 8 * size - 1 else value), most)


def _index(name: str, opcode: int, *, explicit: bool) -> None:
    @both(name, opcode, 0x66, map=_3A, immediate=1)
    def execute(op: Operands) -> None:
        result, count, _ = _compare(op, explicit=explicit)
        highest, lowest = result.bit_length() - 1, (result & -result).bit_length() - 1
        place = count if not result else highest if op.it.immediate & 0x40 else lowest
        op.set_register(_RCX, place, 4)


def _mask(name: str, opcode: int, *, explicit: bool) -> None:
    @both(name, opcode, 0x66, map=_3A, immediate=1)
    def execute(op: Operands) -> None:
        result, count, width = _compare(op, explicit=explicit)
        state = op.cpu.extended_state()
        if op.it.immediate & 0x40:
            ones = (1 << 8 * width) - 1
            result = join([ones if result >> at & 1 else 0 for at in range(count)], width)
        if op.it.encoding == VEX:
            state.set_vector(0, result)
        else:
            state.set_xmm(0, result)


_mask("pcmpestrm", 0x60, explicit=True)
_index("pcmpestri", 0x61, explicit=True)
_mask("pcmpistrm", 0x62, explicit=False)
_index("pcmpistri", 0x63, explicit=False)


# Gathers: the index of the address is a vector


def _gather(name: str, opcode: int, *, index_width: int, width: int) -> None:
    @instruction(
        name, _38, opcode, prefix=0x66, operand=MEMORY, encoding=VEX, w=width == 8, bits=OUTSIDE_REAL_MODE
    )  # fmt: skip
    def execute(op: Operands) -> None:
        it, operand = op.it, op.it.memory
        assert operand is not None
        state, size = check_avx(op, sources=2), vector_size(op)
        index_register = 4 if operand.index is None else operand.index  # here RSP's number is a register like others
        if len({it.reg, it.vvvv, index_register}) < 3 or it.modrm & 7 != 4:
            raise GuestException.of(_UD)
        count = min(size // width, size // index_width)
        indices = split(vector(state, index_register, size), index_width, size, signed=True)[:count]
        whole = count * width
        elements = split(vector(state, it.reg, size) & (1 << 8 * whole) - 1, width, whole)
        mask = split(vector(state, it.vvvv, size) & (1 << 8 * whole) - 1, width, whole, signed=True)
        base = MemoryOperand(operand.base, None, 1, operand.displacement, operand.segment, operand.rip_relative)
        try:
            for at, index in enumerate(indices):
                if mask[at] < 0:
                    linear = op.linear(index * operand.scale, base)
                    elements[at] = int.from_bytes(op.cpu.memory.read(linear, width), "little")
                    mask[at] = 0
        except GuestException:  # what was gathered stays; the instruction is repeated for the rest
            state.set_vector(it.reg, join(elements, width))
            state.set_vector(it.vvvv, join([-1 << 8 * width - 1 if each < 0 else 0 for each in mask], width))
            raise
        state.set_vector(it.reg, join(elements, width))
        state.set_vector(it.vvvv, 0)


for _opcode, _names in ((0x90, ("vpgatherdd", "vpgatherdq")), (0x92, ("vgatherdps", "vgatherdpd"))):
    for _name, _width in zip(_names, (4, 8), strict=True):
        _gather(_name, _opcode, index_width=4, width=_width)
for _opcode, _names in ((0x91, ("vpgatherqd", "vpgatherqq")), (0x93, ("vgatherqps", "vgatherqpd"))):
    for _name, _width in zip(_names, (4, 8), strict=True):
        _gather(_name, _opcode, index_width=8, width=_width)
