"""EVEX encodings that move elements: broadcasts, inserts, shuffles, permutations, widths (SDM vol. 2, 2.7)."""

from __future__ import annotations

from collections.abc import Callable

from kvmpy.x86.emulator import vector_shuffles  # noqa: F401  it fills OPERATIONS
from kvmpy.x86.emulator.guest_exception import GuestException
from kvmpy.x86.emulator.lanes import join, saturate, split
from kvmpy.x86.emulator.processor import Operands
from kvmpy.x86.emulator.table import ANY, MEMORY, REGISTER, instruction
from kvmpy.x86.emulator.vector_512 import Vectors, one_table, row, two_tables
from kvmpy.x86.emulator.vector_operands import OPERATIONS, OUTSIDE_REAL_MODE
from kvmpy.x86.instruction import EVEX

_UD = 6
_38, _3A = 2, 3


def _repeated(value: int, width: int, size: int) -> int:
    return int.from_bytes(value.to_bytes(width, "little") * (size // width), "little")


# One element, or several, to every place


def _broadcast(
    name: str, opcode: int, part: int, width: int, *, w: bool, operand: str = ANY, least: int = 16
) -> None:  # fmt: skip
    """`part` bytes to all places; `width` is that of the mask's elements, `least` the size of the smallest vector."""

    @instruction(name, _38, opcode, prefix=0x66, w=w, operand=operand, encoding=EVEX, bits=OUTSIDE_REAL_MODE)
    def execute(op: Operands) -> None:
        vectors = Vectors(op, width, first_source=False, broadcasts=False)
        if vectors.size < least:
            raise GuestException.of(_UD)
        value = vectors.part(part) if op.it.memory is None or vectors.chosen() else 0
        vectors.write(op.it.reg, _repeated(value, part, vectors.size))


_broadcast("vbroadcastss", 0x18, 4, 4, w=False)
_broadcast("vbroadcastsd", 0x19, 8, 8, w=True, least=32)
_broadcast("vpbroadcastb", 0x78, 1, 1, w=False)
_broadcast("vpbroadcastw", 0x79, 2, 2, w=False)
_broadcast("vpbroadcastd", 0x58, 4, 4, w=False)
_broadcast("vpbroadcastq", 0x59, 8, 8, w=True)
_broadcast("vbroadcastf32x2", 0x19, 8, 4, w=False, least=32)
_broadcast("vbroadcasti32x2", 0x59, 8, 4, w=False)
for _kind, _opcode in (("f", 0x1A), ("i", 0x5A)):
    _broadcast(f"vbroadcast{_kind}32x4", _opcode, 16, 4, w=False, operand=MEMORY, least=32)
    _broadcast(f"vbroadcast{_kind}64x2", _opcode, 16, 8, w=True, operand=MEMORY, least=32)
    _broadcast(f"vbroadcast{_kind}32x8", _opcode + 1, 32, 4, w=False, operand=MEMORY, least=64)
    _broadcast(f"vbroadcast{_kind}64x4", _opcode + 1, 32, 8, w=True, operand=MEMORY, least=64)


def _broadcast_general(name: str, opcode: int, width: int, *, w: bool) -> None:
    @instruction(name, _38, opcode, prefix=0x66, w=w, operand=REGISTER, encoding=EVEX, bits=OUTSIDE_REAL_MODE)
    def execute(op: Operands) -> None:
        vectors = Vectors(op, width, first_source=False, broadcasts=False)
        value = op.register(op.it.rm & 15, width)
        vectors.write(op.it.reg, _repeated(value, width, vectors.size))


_broadcast_general("vpbroadcastb", 0x7A, 1, w=False)
_broadcast_general("vpbroadcastw", 0x7B, 2, w=False)
_broadcast_general("vpbroadcastd", 0x7C, 4, w=False)
_broadcast_general("vpbroadcastq", 0x7C, 8, w=True)


# Blocks of 128 or 256 bits


def _blocks(kind: str, insert: int, extract: int, shuffle: int) -> None:
    for width, w, numbers in ((4, False, ("32x4", "32x8")), (8, True, ("64x2", "64x4"))):
        for block, offset, number in ((16, 0, numbers[0]), (32, 2, numbers[1])):
            _insert(f"vinsert{kind}{number}", insert + offset, block, width, w=w)
            _extract(f"vextract{kind}{number}", extract + offset, block, width, w=w)
        _shuffle_blocks(f"vshuf{kind}{numbers[0]}", shuffle, width, w=w)


def _place(op: Operands, size: int, block: int) -> int:
    """The bit at which the block begins that the immediate chooses."""
    if size <= block:
        raise GuestException.of(_UD)
    return 8 * block * (op.it.immediate % (size // block))


def _insert(name: str, opcode: int, block: int, width: int, *, w: bool) -> None:
    @instruction(name, _3A, opcode, prefix=0x66, w=w, immediate=1, encoding=EVEX, bits=OUTSIDE_REAL_MODE)
    def execute(op: Operands) -> None:
        vectors = Vectors(op, width, first_source=True, broadcasts=False)
        place = _place(op, vectors.size, block)
        mask = (1 << 8 * block) - 1 << place
        vectors.write(op.it.reg, vectors.register(op.it.vvvv) & ~mask | vectors.part(block) << place)


def _extract(name: str, opcode: int, block: int, width: int, *, w: bool) -> None:
    @instruction(name, _3A, opcode, prefix=0x66, w=w, immediate=1, encoding=EVEX, bits=OUTSIDE_REAL_MODE)
    def execute(op: Operands) -> None:
        vectors = Vectors(op, width, first_source=False, broadcasts=False)
        value = vectors.register(op.it.reg) >> _place(op, vectors.size, block) & (1 << 8 * block) - 1
        if op.it.memory is None:
            vectors.size = block
            vectors.write(op.it.rm, value)
            return
        if vectors.zeroes:
            raise GuestException.of(_UD)
        vectors.store_part(value, block)


def _shuffle_blocks(name: str, opcode: int, width: int, *, w: bool) -> None:
    def operation(old: int, first: int, second: int, size: int, immediate: int) -> int:
        count = size // 16
        bits = count.bit_length() - 1
        result = 0
        for at in range(count):
            source = first if at < count // 2 else second
            chosen = immediate >> bits * at & count - 1
            result |= (source >> 128 * chosen & (1 << 128) - 1) << 128 * at
        if size == 16:
            raise GuestException.of(_UD)
        return result

    row(name, opcode, width, operation, map=_3A, w=w, immediate=True, permutes=True)


_blocks("f", 0x18, 0x19, 0x23)
_blocks("i", 0x38, 0x39, 0x43)


# Elements


def _align(width: int) -> Callable[[int, int, int, int, int], int]:
    def operation(old: int, first: int, second: int, size: int, immediate: int) -> int:
        by = 8 * width * (immediate % (size // width))
        return (first << 8 * size | second) >> by & (1 << 8 * size) - 1

    return operation


row("valignd", 0x03, 4, _align(4), map=_3A, w=False, immediate=True, permutes=True)
row("valignq", 0x03, 8, _align(8), map=_3A, w=True, immediate=True, permutes=True)


def _as_in_avx(
    name: str, opcode: int, width: int, *, map: int = 1, prefix: int = 0x66, w: bool, sources: int = 2,
    immediate: bool = False, broadcasts: bool = True,
) -> None:  # fmt: skip
    operation = OPERATIONS[name]
    row(
        f"v{name}", opcode, width, lambda old, first, second, size, imm: operation(first, second, size, imm), map=map,
        prefix=prefix, w=w, sources=sources, immediate=immediate, broadcasts=broadcasts, permutes=True,
    )  # fmt: skip


_as_in_avx("unpcklps", 0x14, 4, prefix=0, w=False)
_as_in_avx("unpckhps", 0x15, 4, prefix=0, w=False)
_as_in_avx("unpcklpd", 0x14, 8, w=True)
_as_in_avx("unpckhpd", 0x15, 8, w=True)
_as_in_avx("shufps", 0xC6, 4, prefix=0, w=False, immediate=True)
_as_in_avx("shufpd", 0xC6, 8, w=True, immediate=True)
_as_in_avx("movsldup", 0x12, 4, prefix=0xF3, w=False, sources=1, broadcasts=False)
_as_in_avx("movshdup", 0x16, 4, prefix=0xF3, w=False, sources=1, broadcasts=False)


def _within_lane(width: int, choose: Callable[[int, int, int], int]) -> Callable[[int, int, int, int, int], int]:
    """`choose(place, control, immediate)` says which element of its 128 bits comes to a place."""
    count = 16 // width

    def operation(old: int, first: int, second: int, size: int, immediate: int) -> int:
        table, controls = split(first, width, size), split(second, width, size)
        chosen = [at - at % count + choose(at, controls[at], immediate) for at in range(size // width)]
        return join([table[at] for at in chosen], width)

    return operation


def _by_immediate(width: int, choose: Callable[[int, int], int]) -> Callable[[int, int, int, int, int], int]:
    inner = _within_lane(width, lambda at, control, immediate: choose(at, immediate))
    return lambda old, first, second, size, immediate: inner(old, second, second, size, immediate)


row("vpermilps", 0x04, 4, _by_immediate(4, lambda at, imm: imm >> 2 * (at % 4) & 3), map=_3A, w=False, sources=1,
    immediate=True, permutes=True)  # fmt: skip
row("vpermilpd", 0x05, 8, _by_immediate(8, lambda at, imm: imm >> at & 1), map=_3A, w=True, sources=1,
    immediate=True, permutes=True)  # fmt: skip
row("vpermilps", 0x0C, 4, _within_lane(4, lambda at, control, _: control & 3), map=_38, w=False, permutes=True)
row("vpermilpd", 0x0D, 8, _within_lane(8, lambda at, control, _: control >> 1 & 1), map=_38, w=True, permutes=True)


def _quadwords_by_immediate(old: int, first: int, second: int, size: int, immediate: int) -> int:
    if size == 16:
        raise GuestException.of(_UD)
    elements = split(second, 8, size)
    return join([elements[at & ~3 | immediate >> 2 * (at & 3) & 3] for at in range(len(elements))], 8)


for _name, _opcode in (("vpermq", 0x00), ("vpermpd", 0x01)):
    row(_name, _opcode, 8, _quadwords_by_immediate, map=_3A, w=True, sources=1, immediate=True, permutes=True)
row("vpermps", 0x16, 4, one_table(4), map=_38, w=False, permutes=True)
row("vpermpd", 0x16, 8, one_table(8), map=_38, w=True, permutes=True)
for _width, _suffix, _w in ((1, "b", False), (2, "w", True)):
    row(f"vperm{_suffix}", 0x8D, _width, one_table(_width), map=_38, w=_w, permutes=True, broadcasts=False)
    for _name, _opcode, _in_destination in (("vpermi2", 0x75, True), ("vpermt2", 0x7D, False)):
        row(
            _name + _suffix, _opcode, _width, two_tables(_width, indices_in_destination=_in_destination), map=_38,
            w=_w, permutes=True, broadcasts=False,
        )  # fmt: skip
for _width, _suffix, _w in ((4, "ps", False), (8, "pd", True)):
    for _name, _opcode, _in_destination in (("vpermi2", 0x77, True), ("vpermt2", 0x7F, False)):
        row(
            _name + _suffix, _opcode, _width, two_tables(_width, indices_in_destination=_in_destination), map=_38,
            w=_w, permutes=True,
        )  # fmt: skip


@instruction("vmovddup", 1, 0x12, prefix=0xF2, w=True, encoding=EVEX, bits=OUTSIDE_REAL_MODE)
def _movddup(op: Operands) -> None:
    vectors = Vectors(op, 8, first_source=False, broadcasts=False)
    value = vectors.part(8 if vectors.size == 16 else vectors.size)
    elements = split(value & (1 << 8 * vectors.size) - 1, 8, vectors.size)
    vectors.write(op.it.reg, join([elements[at & ~1] for at in range(len(elements))], 8))


# Wider and narrower elements


def _widen(name: str, opcode: int, narrow: int, wide: int, *, signed: bool) -> None:
    @instruction(
        name, _38, opcode, prefix=0x66, w=False if wide == 8 and narrow == 4 else None, encoding=EVEX,
        bits=OUTSIDE_REAL_MODE,
    )  # fmt: skip
    def execute(op: Operands) -> None:
        vectors = Vectors(op, wide, first_source=False, broadcasts=False)
        part = vectors.size * narrow // wide
        vectors.write(op.it.reg, join(split(vectors.part(part), narrow, part, signed=signed), wide))


def _narrow(name: str, opcode: int, wide: int, narrow: int, convert: Callable[[int], int], *, signed: bool) -> None:
    @instruction(name, _38, opcode, prefix=0xF3, w=False, encoding=EVEX, bits=OUTSIDE_REAL_MODE)
    def execute(op: Operands) -> None:
        vectors = Vectors(op, narrow, first_source=False, broadcasts=False)
        elements = split(vectors.register(op.it.reg), wide, vectors.size, signed=signed)
        value, part = join([convert(each) for each in elements], narrow), vectors.size * narrow // wide
        if op.it.memory is not None:
            if vectors.zeroes:
                raise GuestException.of(_UD)
            vectors.store_part(value, part)
            return
        vectors.size = part
        vectors.write(op.it.rm, value)


_PAIRS = ((1, 2, "bw"), (1, 4, "bd"), (1, 8, "bq"), (2, 4, "wd"), (2, 8, "wq"), (4, 8, "dq"))
_FROM = ((2, 1, "wb"), (4, 1, "db"), (8, 1, "qb"), (4, 2, "dw"), (8, 2, "qw"), (8, 4, "qd"))


def _saturating(width: int, *, signed: bool) -> Callable[[int], int]:
    return lambda each: saturate(each, width, signed=signed)


for _offset, (_small, _large, _suffix) in enumerate(_PAIRS):
    _widen(f"vpmovsx{_suffix}", 0x20 + _offset, _small, _large, signed=True)
    _widen(f"vpmovzx{_suffix}", 0x30 + _offset, _small, _large, signed=False)
for _offset, (_large, _small, _suffix) in enumerate(_FROM):
    _narrow(f"vpmov{_suffix}", 0x30 + _offset, _large, _small, lambda each: each, signed=False)
    _narrow(f"vpmovs{_suffix}", 0x20 + _offset, _large, _small, _saturating(_small, signed=True), signed=True)
    _narrow(f"vpmovus{_suffix}", 0x10 + _offset, _large, _small, _saturating(_small, signed=False), signed=False)
