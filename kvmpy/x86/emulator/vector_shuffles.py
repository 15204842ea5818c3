"""Elements of vectors moved: shuffles, unpacks, packs, blends, widening, broadcasts, permutations (SDM vol. 2)."""

from __future__ import annotations

from kvmpy.x86.emulator.extended_state import ExtendedState
from kvmpy.x86.emulator.guest_exception import GuestException
from kvmpy.x86.emulator.lanes import join, saturate, split
from kvmpy.x86.emulator.processor import Operands
from kvmpy.x86.emulator.table import ANY, MEMORY, instruction
from kvmpy.x86.emulator.vector_operands import (
    OUTSIDE_REAL_MODE,
    Operation,
    check_avx,
    check_sse,
    packed,
    vector,
    vector_size,
    vector_source,
)
from kvmpy.x86.instruction import VEX

_UD = 6
_38, _3A = 2, 3
_LANE = (1 << 128) - 1


# Within 128 bits


def _four(value: list[int], order: int) -> list[int]:
    """Elements chosen by the four 2-bit fields of an immediate."""
    return [value[order >> at & 3] for at in (0, 2, 4, 6)]


def _shuffle_doublewords(first: int, second: int, size: int, immediate: int) -> int:
    return join(_four(split(second, 4, 16), immediate), 4)


def _shuffle_low_words(first: int, second: int, size: int, immediate: int) -> int:
    words = split(second, 2, 16)
    return join(_four(words[:4], immediate) + words[4:], 2)


def _shuffle_high_words(first: int, second: int, size: int, immediate: int) -> int:
    words = split(second, 2, 16)
    return join(words[:4] + _four(words[4:], immediate), 2)


packed("pshufd", 0x70, _shuffle_doublewords, sources=1, immediate=True, lanes=True)
packed("pshuflw", 0x70, _shuffle_low_words, prefix=0xF2, sources=1, immediate=True, lanes=True)
packed("pshufhw", 0x70, _shuffle_high_words, prefix=0xF3, sources=1, immediate=True, lanes=True)
packed("permilps", 0x04, _shuffle_doublewords, map=_3A, sources=1, immediate=True, lanes=True, legacy=False, w=False)


def _shuffle_two_singles(first: int, second: int, size: int, immediate: int) -> int:
    chosen = _four(split(first, 4, 16), immediate)[:2] + _four(split(second, 4, 16), immediate)[2:]
    return join(chosen, 4)


def _shuffle_two_doubles(first: int, second: int, size: int, immediate: int) -> int:
    elements: list[int] = []
    for at in range(0, size // 8, 2):
        low, high = split(first, 8, size)[at : at + 2], split(second, 8, size)[at : at + 2]
        elements += low[immediate >> at & 1], high[immediate >> at + 1 & 1]
    return join(elements, 8)


packed("shufps", 0xC6, _shuffle_two_singles, prefix=0, immediate=True, lanes=True)
packed("shufpd", 0xC6, _shuffle_two_doubles, immediate=True)


def _permute_doubles(first: int, second: int, size: int, immediate: int) -> int:
    elements = split(second, 8, size)
    return join([elements[at & ~1 | immediate >> at & 1] for at in range(len(elements))], 8)


packed("permilpd", 0x05, _permute_doubles, map=_3A, sources=1, immediate=True, legacy=False, w=False)


def _permute_by_register(width: int) -> Operation:
    shift = width // 4 - 1  # for doubles the bit that counts is bit 1

    def operation(first: int, second: int, size: int, immediate: int) -> int:
        elements, control = split(first, width, 16), split(second, width, 16)
        return join([elements[each >> shift & len(elements) - 1] for each in control], width)

    return operation


packed("permilps", 0x0C, _permute_by_register(4), map=_38, lanes=True, legacy=False, w=False)
packed("permilpd", 0x0D, _permute_by_register(8), map=_38, lanes=True, legacy=False, w=False)


def _shuffle_bytes(first: int, second: int, size: int, immediate: int) -> int:
    table = first.to_bytes(16, "little")
    return join([0 if control & 0x80 else table[control & 15] for control in second.to_bytes(16, "little")], 1)


packed("pshufb", 0x00, _shuffle_bytes, map=_38, lanes=True)


def _align(first: int, second: int, size: int, immediate: int) -> int:
    return (first << 128 | second) >> 8 * min(immediate, 32) & _LANE


packed("palignr", 0x0F, _align, map=_3A, immediate=True, lanes=True)


def _unpack(width: int, *, high: bool) -> Operation:
    def operation(first: int, second: int, size: int, immediate: int) -> int:
        half = 8 // width
        part = slice(half, None) if high else slice(half)
        pairs = zip(split(first, width, 16)[part], split(second, width, 16)[part], strict=True)
        return join([element for pair in pairs for element in pair], width)

    return operation


for _width, _suffix, _low, _high in (
    (1, "bw", 0x60, 0x68),
    (2, "wd", 0x61, 0x69),
    (4, "dq", 0x62, 0x6A),
    (8, "qdq", 0x6C, 0x6D),
):
    packed(f"punpckl{_suffix}", _low, _unpack(_width, high=False), lanes=True)
    packed(f"punpckh{_suffix}", _high, _unpack(_width, high=True), lanes=True)
for _width, _suffix, _prefix in ((4, "ps", 0), (8, "pd", 0x66)):
    packed(f"unpckl{_suffix}", 0x14, _unpack(_width, high=False), prefix=_prefix, lanes=True)
    packed(f"unpckh{_suffix}", 0x15, _unpack(_width, high=True), prefix=_prefix, lanes=True)


def _pack(width: int, *, signed: bool) -> Operation:
    """Signed elements of `width` bytes of both sources, as elements of half the width, saturated."""

    def operation(first: int, second: int, size: int, immediate: int) -> int:
        elements = split(first, width, 16, signed=True) + split(second, width, 16, signed=True)
        return join([saturate(element, width // 2, signed=signed) for element in elements], width // 2)

    return operation


packed("packsswb", 0x63, _pack(2, signed=True), lanes=True)
packed("packuswb", 0x67, _pack(2, signed=False), lanes=True)
packed("packssdw", 0x6B, _pack(4, signed=True), lanes=True)
packed("packusdw", 0x2B, _pack(4, signed=False), map=_38, lanes=True)


# Blends


def _blend(width: int) -> Operation:
    def operation(first: int, second: int, size: int, immediate: int) -> int:
        pairs = list(zip(split(first, width, size), split(second, width, size), strict=True))
        return join([pair[immediate >> (at & 7) & 1] for at, pair in enumerate(pairs)], width)

    return operation


packed("pblendw", 0x0E, _blend(2), map=_3A, immediate=True)
packed("blendps", 0x0C, _blend(4), map=_3A, immediate=True)
packed("blendpd", 0x0D, _blend(8), map=_3A, immediate=True)
packed("pblendd", 0x02, _blend(4), map=_3A, immediate=True, legacy=False, w=False)


def _variable_blend(name: str, width: int, opcode: int, vex_opcode: int) -> None:
    """Rows: the highest bits of the elements of a mask choose, which is XMM0, or by VEX what the immediate names."""

    def choose(first: int, second: int, mask: int, size: int) -> int:
        parts = zip(
            split(first, width, size), split(second, width, size), split(mask, width, size, signed=True), strict=True
        )
        return join([b if bit < 0 else a for a, b, bit in parts], width)

    @instruction(name, _38, opcode, prefix=0x66)
    def legacy(op: Operands) -> None:
        state = check_sse(op)
        second = vector_source(op, state, 16, aligned=True)
        state.set_xmm(op.it.reg, choose(state.xmm(op.it.reg), second, state.xmm(0), 16))

    @instruction(f"v{name}", _3A, vex_opcode, prefix=0x66, immediate=1, encoding=VEX, w=False, bits=OUTSIDE_REAL_MODE)
    def vex(op: Operands) -> None:
        state, size = check_avx(op, sources=2), vector_size(op)
        second = vector_source(op, state, size, aligned=False)
        mask = vector(state, op.it.immediate >> 4 & (15 if op.it.bits == 64 else 7), size)
        state.set_vector(op.it.reg, choose(vector(state, op.it.vvvv, size), second, mask, size))


_variable_blend("pblendvb", 1, 0x10, 0x4C)
_variable_blend("blendvps", 4, 0x14, 0x4A)
_variable_blend("blendvpd", 8, 0x15, 0x4B)


# Widening, and elements to every place


def _widen(name: str, opcode: int, narrow: int, wide: int, *, signed: bool) -> None:
    def operation(first: int, second: int, size: int, immediate: int) -> int:
        return join(split(second, narrow, size * narrow // wide, signed=signed), wide)

    def cut(first: int, second: int, size: int, immediate: int) -> int:
        return operation(first, second & (1 << 8 * (size * narrow // wide)) - 1, size, immediate)

    packed(name, opcode, cut, map=_38, sources=1, part=wide // narrow)


for _offset, (_narrow, _wide, _suffix) in enumerate(
    ((1, 2, "bw"), (1, 4, "bd"), (1, 8, "bq"), (2, 4, "wd"), (2, 8, "wq"), (4, 8, "dq"))
):
    _widen(f"pmovsx{_suffix}", 0x20 + _offset, _narrow, _wide, signed=True)
    _widen(f"pmovzx{_suffix}", 0x30 + _offset, _narrow, _wide, signed=False)


def _duplicate(name: str, opcode: int, prefix: int, width: int, odd: int) -> None:
    def operation(first: int, second: int, size: int, immediate: int) -> int:
        elements = split(second, width, size)
        return join([elements[at & ~1 | odd] for at in range(len(elements))], width)

    packed(name, opcode, operation, prefix=prefix, sources=1)


_duplicate("movsldup", 0x12, 0xF3, 4, 0)
_duplicate("movshdup", 0x16, 0xF3, 4, 1)


def _movddup(op: Operands, state: ExtendedState, size: int) -> int:
    """The even doubles twice; from memory only 8 bytes for 128 bits."""
    value = vector_source(op, state, 8 if size == 16 else 32, aligned=False)
    evens = [value & (1 << 64) - 1, value >> 128 & (1 << 64) - 1][: size // 16]
    return join([element for element in evens for _ in range(2)], 8)


@instruction("movddup", 1, 0x12, prefix=0xF2)
def _movddup_legacy(op: Operands) -> None:
    state = check_sse(op)
    state.set_xmm(op.it.reg, _movddup(op, state, 16))


@instruction("vmovddup", 1, 0x12, prefix=0xF2, encoding=VEX, bits=OUTSIDE_REAL_MODE)
def _movddup_vex(op: Operands) -> None:
    state = check_avx(op)
    state.set_vector(op.it.reg, _movddup(op, state, vector_size(op)))


def _broadcast(name: str, opcode: int, width: int, *, operand: str = ANY, only_256: bool = False) -> None:
    @instruction(
        name, _38, opcode, prefix=0x66, operand=operand, encoding=VEX, w=False, bits=OUTSIDE_REAL_MODE
    )  # fmt: skip
    def broadcast(op: Operands) -> None:
        state, size = check_avx(op), vector_size(op)
        if only_256 and size == 16:
            raise GuestException.of(_UD)
        element = vector_source(op, state, width, aligned=False)
        state.set_vector(op.it.reg, int.from_bytes(element.to_bytes(width, "little") * (size // width), "little"))


_broadcast("vbroadcastss", 0x18, 4)
_broadcast("vbroadcastsd", 0x19, 8, only_256=True)
_broadcast("vbroadcastf128", 0x1A, 16, operand=MEMORY, only_256=True)
_broadcast("vpbroadcastd", 0x58, 4)
_broadcast("vpbroadcastq", 0x59, 8)
_broadcast("vbroadcasti128", 0x5A, 16, operand=MEMORY, only_256=True)
_broadcast("vpbroadcastb", 0x78, 1)
_broadcast("vpbroadcastw", 0x79, 2)


# Across 128 bits


def _permute_quadwords(first: int, second: int, size: int, immediate: int) -> int:
    return join(_four(split(second, 8, 32), immediate), 8)


def _permute_doublewords(first: int, second: int, size: int, immediate: int) -> int:
    elements = split(second, 4, 32)
    return join([elements[place & 7] for place in split(first, 4, 32)], 4)


def _permute_halves(first: int, second: int, size: int, immediate: int) -> int:
    halves = first & _LANE, first >> 128, second & _LANE, second >> 128
    low, high = (0 if field & 8 else halves[field & 3] for field in (immediate, immediate >> 4))
    return low | high << 128


packed("permq", 0x00, _permute_quadwords, map=_3A, sources=1, immediate=True, legacy=False, w=True, only_256=True)
packed("permpd", 0x01, _permute_quadwords, map=_3A, sources=1, immediate=True, legacy=False, w=True, only_256=True)
packed("permd", 0x36, _permute_doublewords, map=_38, legacy=False, w=False, only_256=True)
packed("permps", 0x16, _permute_doublewords, map=_38, legacy=False, w=False, only_256=True)
packed("perm2f128", 0x06, _permute_halves, map=_3A, immediate=True, legacy=False, w=False, only_256=True)
packed("perm2i128", 0x46, _permute_halves, map=_3A, immediate=True, legacy=False, w=False, only_256=True)


def _insert_half(name: str, opcode: int) -> None:
    @instruction(name, _3A, opcode, prefix=0x66, immediate=1, encoding=VEX, w=False, bits=OUTSIDE_REAL_MODE)
    def insert(op: Operands) -> None:
        state = check_avx(op, sources=2)
        if not op.it.vector_256:
            raise GuestException.of(_UD)
        half = vector_source(op, state, 16, aligned=False)
        shift = 128 * (op.it.immediate & 1)
        state.set_vector(op.it.reg, state.ymm(op.it.vvvv) & ~(_LANE << shift) | half << shift)


def _extract_half(name: str, opcode: int) -> None:
    @instruction(name, _3A, opcode, prefix=0x66, immediate=1, encoding=VEX, w=False, bits=OUTSIDE_REAL_MODE)
    def extract(op: Operands) -> None:
        state = check_avx(op)
        if not op.it.vector_256:
            raise GuestException.of(_UD)
        half = state.ymm(op.it.reg) >> 128 * (op.it.immediate & 1) & _LANE
        if op.it.memory is None:
            state.set_vector(op.it.rm, half)
        else:
            op.store(half, 16)


_insert_half("vinsertf128", 0x18)
_insert_half("vinserti128", 0x38)
_extract_half("vextractf128", 0x19)
_extract_half("vextracti128", 0x39)
