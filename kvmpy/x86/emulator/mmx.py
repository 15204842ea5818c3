"""MMX, with what SSE, SSE2 and SSSE3 added to it (SDM vol. 1, chapter 9; vol. 3, 12.2).

The registers are the significands of the x87 registers, by their own numbers and not by TOP. An MMX instruction makes
TOP 0 and all registers valid, and sets sign and exponent of one that it writes. An operation is that of SSE, on the
lower half of its vectors.
"""

from __future__ import annotations

from collections.abc import Callable

from kvmpy.x86.emulator import binary_floating as floating
from kvmpy.x86.emulator import vector_integer, vector_shifts, vector_shuffles  # noqa: F401  they fill OPERATIONS
from kvmpy.x86.emulator.extended_state import FSW, FTW, ST, ExtendedState
from kvmpy.x86.emulator.guest_exception import GuestException
from kvmpy.x86.emulator.lanes import join, split
from kvmpy.x86.emulator.processor import Operands
from kvmpy.x86.emulator.table import ANY, MEMORY, REGISTER, instruction
from kvmpy.x86.emulator.vector_floating import settle
from kvmpy.x86.emulator.vector_operands import OPERATIONS, Operation, both, check_aligned, check_sse, check_vector
from kvmpy.x86.emulator.x87_numbers import DOUBLE, SINGLE, Format
from kvmpy.x86.emulator.x87_stack import check_x87, rotate
from kvmpy.x86.flags import Cr0
from kvmpy.x86.instruction import MemoryOperand

_UD = 6
_38, _3A = 2, 3
_EM = int(Cr0.EM)
_LOW = (1 << 64) - 1
_ONES = 0xFFFF << 64
"""Sign and exponent of a register that was written."""
_RDI = 7


def _check(op: Operands) -> ExtendedState:
    if op.cpu.sregs.cr0 & _EM:
        raise GuestException.of(_UD)
    return check_x87(op)


def _register(state: ExtendedState, number: int) -> int:
    top = state.get(FSW, 2) >> 11 & 7
    return state.get(ST + 16 * ((number & 7) - top & 7), 8)


def _source(op: Operands, state: ExtendedState, size: int = 8) -> int:
    """What ModRM.rm names: a register or `size` bytes of memory."""
    return _register(state, op.it.rm) if op.it.memory is None else op.load(size)


def _finish(state: ExtendedState, number: int | None = None, value: int = 0) -> None:
    """What every MMX instruction leaves; one register is written. Nothing faults from here on."""
    status = state.get(FSW, 2)
    state.put(FSW, rotate(state, status, -(status >> 11 & 7)), 2)
    state.put(FTW, 0xFF, 1)
    if number is not None:
        state.put(ST + 16 * (number & 7), value & _LOW | _ONES, 10)


# One register from two operands, or one


def _packed(
    name: str, opcode: int, operation: Operation, *, map: int = 1, one_source: bool = False, immediate: bool = False,
    size: int = 8,
) -> None:  # fmt: skip
    """`size` are the bytes of an operand in memory."""

    @instruction(f"{name} mmx", map, opcode, immediate=1 if immediate else 0)
    def execute(op: Operands) -> None:
        state = _check(op)
        second = _source(op, state, size)
        first = 0 if one_source else _register(state, op.it.reg)
        _finish(state, op.it.reg, operation(first, second, 16, op.it.immediate))


def _of_both(operation: Operation) -> Operation:
    """For those that make the lower half of the first source and the upper half of the second: PACKSSWB, PHADDW."""
    return lambda first, second, size, immediate: operation(second << 64 | first, 0, size, immediate)


def _upper(operation: Operation) -> Operation:
    return lambda first, second, size, immediate: operation(first, second, size, immediate) >> 64


def _align(first: int, second: int, size: int, immediate: int) -> int:
    return (first << 64 | second) >> 8 * min(immediate, 16)


_SAME = {
    "psrlw": 0xD1, "psrld": 0xD2, "psrlq": 0xD3, "paddq": 0xD4, "pmullw": 0xD5, "psubusb": 0xD8, "psubusw": 0xD9,
    "pminub": 0xDA, "pand": 0xDB, "paddusb": 0xDC, "paddusw": 0xDD, "pmaxub": 0xDE, "pandn": 0xDF, "pavgb": 0xE0,
    "psraw": 0xE1, "psrad": 0xE2, "pavgw": 0xE3, "pmulhuw": 0xE4, "pmulhw": 0xE5, "psubsb": 0xE8, "psubsw": 0xE9,
    "pminsw": 0xEA, "por": 0xEB, "paddsb": 0xEC, "paddsw": 0xED, "pmaxsw": 0xEE, "pxor": 0xEF, "psllw": 0xF1,
    "pslld": 0xF2, "psllq": 0xF3, "pmuludq": 0xF4, "pmaddwd": 0xF5, "psadbw": 0xF6, "psubb": 0xF8, "psubw": 0xF9,
    "psubd": 0xFA, "psubq": 0xFB, "paddb": 0xFC, "paddw": 0xFD, "paddd": 0xFE, "pcmpgtb": 0x64, "pcmpgtw": 0x65,
    "pcmpgtd": 0x66, "pcmpeqb": 0x74, "pcmpeqw": 0x75, "pcmpeqd": 0x76,
}  # fmt: skip
_SAME_38 = {"pmaddubsw": 0x04, "psignb": 0x08, "psignw": 0x09, "psignd": 0x0A, "pmulhrsw": 0x0B}
_ONE_38 = {"pabsb": 0x1C, "pabsw": 0x1D, "pabsd": 0x1E}
_OF_BOTH = {"packsswb": 0x63, "packuswb": 0x67, "packssdw": 0x6B}
_OF_BOTH_38 = {"phaddw": 0x01, "phaddd": 0x02, "phaddsw": 0x03, "phsubw": 0x05, "phsubd": 0x06, "phsubsw": 0x07}


def _rows() -> None:
    for name, opcode in _SAME.items():
        _packed(name, opcode, OPERATIONS[name])
    for name, opcode in _SAME_38.items():
        _packed(name, opcode, OPERATIONS[name], map=_38)
    for name, opcode in _ONE_38.items():
        _packed(name, opcode, OPERATIONS[name], map=_38, one_source=True)
    for name, opcode in _OF_BOTH.items():
        _packed(name, opcode, _of_both(OPERATIONS[name]))
    for name, opcode in _OF_BOTH_38.items():
        _packed(name, opcode, _of_both(OPERATIONS[name]), map=_38)
    for suffix, low in (("bw", 0x60), ("wd", 0x61), ("dq", 0x62)):
        unpack = OPERATIONS[f"punpckl{suffix}"]
        _packed(f"punpckl{suffix}", low, unpack, size=4)
        _packed(f"punpckh{suffix}", low + 8, _upper(unpack))
    shuffle = OPERATIONS["pshufb"]
    _packed("pshufb", 0x00, lambda table, *rest: shuffle(table << 64 | table, *rest), map=_38)
    _packed("pshufw", 0x70, OPERATIONS["pshuflw"], one_source=True, immediate=True)
    _packed("palignr", 0x0F, _align, map=_3A, immediate=True)


_rows()


def _shift_by_immediate(name: str, opcode: int, digit: int) -> None:
    operation = OPERATIONS[name]

    @instruction(f"{name} mmx, imm", 1, opcode, digit=digit, operand=REGISTER, immediate=1)
    def execute(op: Operands) -> None:
        state = _check(op)
        value = operation(_register(state, op.it.rm), op.it.immediate, 16, 0)
        _finish(state, op.it.rm, value)


for _opcode, _suffix in ((0x71, "w"), (0x72, "d"), (0x73, "q")):
    _shift_by_immediate(f"psrl{_suffix}", _opcode, 2)
    _shift_by_immediate(f"psll{_suffix}", _opcode, 6)
    if _suffix != "q":
        _shift_by_immediate(f"psra{_suffix}", _opcode, 4)


# Moves


def _wide(op: Operands) -> int:
    return 8 if op.it.w and op.it.bits == 64 else 4


@instruction("movd, movq load mmx", 1, 0x6E)
def _movd_load(op: Operands) -> None:
    state = _check(op)
    value = op.source(_wide(op))
    _finish(state, op.it.reg, value)


@instruction("movd, movq store mmx", 1, 0x7E)
def _movd_store(op: Operands) -> None:
    state, size = _check(op), _wide(op)
    value = _register(state, op.it.reg) & (1 << 8 * size) - 1
    if op.it.memory is None:
        op.set_register(op.it.rm, value, size)
    else:
        op.store(value, size)
    _finish(state)


@instruction("movq load mmx", 1, 0x6F)
def _movq_load(op: Operands) -> None:
    state = _check(op)
    value = _source(op, state)
    _finish(state, op.it.reg, value)


@instruction("movq store mmx", 1, 0x7F)
def _movq_store(op: Operands) -> None:
    state = _check(op)
    value = _register(state, op.it.reg)
    if op.it.memory is None:
        _finish(state, op.it.rm, value)
    else:
        op.store(value, 8)
        _finish(state)


@instruction("movntq", 1, 0xE7, operand=MEMORY)
def _movntq(op: Operands) -> None:
    state = _check(op)
    op.store(_register(state, op.it.reg), 8)
    _finish(state)


@instruction("movq2dq", 1, 0xD6, prefix=0xF3, operand=REGISTER)
def _movq2dq(op: Operands) -> None:
    state = _check(op)
    check_sse(op)
    value = _register(state, op.it.rm)
    _finish(state)
    state.set_xmm(op.it.reg, value)


@instruction("movdq2q", 1, 0xD6, prefix=0xF2, operand=REGISTER)
def _movdq2q(op: Operands) -> None:
    state = _check(op)
    check_sse(op)
    _finish(state, op.it.reg, state.xmm(op.it.rm) & _LOW)


@instruction("pinsrw mmx", 1, 0xC4, immediate=1)
def _pinsrw(op: Operands) -> None:
    state, shift = _check(op), 16 * (op.it.immediate & 3)
    word = op.source(2)
    _finish(state, op.it.reg, _register(state, op.it.reg) & ~(0xFFFF << shift) | word << shift)


@instruction("pextrw mmx", 1, 0xC5, operand=REGISTER, immediate=1)
def _pextrw(op: Operands) -> None:
    state = _check(op)
    op.set_register(op.it.reg, _register(state, op.it.rm) >> 16 * (op.it.immediate & 3) & 0xFFFF, 8)
    _finish(state)


@instruction("pmovmskb mmx", 1, 0xD7, operand=REGISTER)
def _pmovmskb(op: Operands) -> None:
    state = _check(op)
    elements = split(_register(state, op.it.rm), 1, 8)
    op.set_register(op.it.reg, sum((element >> 7) << at for at, element in enumerate(elements)), 8)
    _finish(state)


# Bytes chosen by a mask, to DS:RDI


def _store_masked(op: Operands, value: bytes, mask: bytes) -> None:
    target = MemoryOperand(_RDI, None, 1, 0, op.it.segment or "ds", False)
    places = [op.linear(at, target) for at, each in enumerate(mask) if each & 0x80]
    chosen = [each for each, choice in zip(value, mask, strict=True) if choice & 0x80]
    for place in places:
        op.cpu.memory.check_writable(place, 1)
    for place, each in zip(places, chosen, strict=True):
        op.cpu.memory.write(place, bytes((each,)))


@instruction("maskmovq", 1, 0xF7, operand=REGISTER)
def _maskmovq(op: Operands) -> None:
    state = _check(op)
    value, mask = _register(state, op.it.reg), _register(state, op.it.rm)
    _store_masked(op, value.to_bytes(8, "little"), mask.to_bytes(8, "little"))
    _finish(state)


@both("maskmovdqu", 0xF7, 0x66, operand=REGISTER)
def _maskmovdqu(op: Operands) -> None:
    state = check_vector(op)
    value, mask = state.xmm(op.it.reg), state.xmm(op.it.rm)
    _store_masked(op, value.to_bytes(16, "little"), mask.to_bytes(16, "little"))


# Conversions between the vectors of MMX and of SSE

Convert = Callable[[Operands, ExtendedState, int], list[tuple[int, int]]]


def _to_xmm(name: str, prefix: int, kind: Format) -> None:
    """Two signed integers as two numbers. From memory, MMX is not touched (CVTPI2PS on Intel's processors does)."""

    @instruction(name, 1, 0x2A, prefix=prefix, operand=ANY)
    def execute(op: Operands) -> None:
        state = check_sse(op)
        uses_mmx = op.it.memory is None
        if uses_mmx:
            _check(op)
        elements = split(_source(op, state), 4, 8, signed=True)
        mxcsr = state.current_mxcsr
        results = settle(op, state, [floating.from_integer(each, kind, mxcsr) for each in elements])
        if uses_mmx:
            _finish(state)
        value = join(results, kind.size)
        state.set_xmm(op.it.reg, value if kind is DOUBLE else state.xmm(op.it.reg) >> 64 << 64 | value)


def _from_xmm(name: str, opcode: int, prefix: int, kind: Format, *, truncates: bool) -> None:
    size = 2 * kind.size

    @instruction(name, 1, opcode, prefix=prefix, operand=ANY)
    def execute(op: Operands) -> None:
        state = check_sse(op)
        _check(op)
        if op.it.memory is None:
            value = state.xmm(op.it.rm) & (1 << 8 * size) - 1
        else:
            if size == 16:
                check_aligned(op, 16)
            value = op.load(size)
        mxcsr = state.current_mxcsr
        converted = [
            floating.to_integer(each, kind, 4, mxcsr, truncates=truncates) for each in split(value, kind.size, size)
        ]
        results = settle(op, state, converted)
        _finish(state, op.it.reg, join(results, 4))


for _suffix, _prefix, _kind in (("ps", 0, SINGLE), ("pd", 0x66, DOUBLE)):
    _to_xmm(f"cvtpi2{_suffix}", _prefix, _kind)
    _from_xmm(f"cvtt{_suffix}2pi", 0x2C, _prefix, _kind, truncates=True)
    _from_xmm(f"cvt{_suffix}2pi", 0x2D, _prefix, _kind, truncates=False)
