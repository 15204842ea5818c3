"""Packed integers: add, subtract, multiply, compare, bitwise operations of SSE2 to SSE4 and AVX2 (SDM vol. 2)."""

from __future__ import annotations

import operator

from kvmpy.x86.emulator.lanes import elementwise, join, saturate, split
from kvmpy.x86.emulator.vector_operands import packed

_38 = 2
_LANE = (1 << 128) - 1
_WIDTHS = ((1, "b"), (2, "w"), (4, "d"), (8, "q"))


# Bit by bit; the floating-point forms do the same.


def _and(first: int, second: int, size: int, immediate: int) -> int:
    return first & second


def _andn(first: int, second: int, size: int, immediate: int) -> int:
    return ~first & second


def _or(first: int, second: int, size: int, immediate: int) -> int:
    return first | second


def _xor(first: int, second: int, size: int, immediate: int) -> int:
    return first ^ second


packed("pand", 0xDB, _and)
packed("pandn", 0xDF, _andn)
packed("por", 0xEB, _or)
packed("pxor", 0xEF, _xor)
for _prefix, _suffix in ((0, "ps"), (0x66, "pd")):
    packed(f"and{_suffix}", 0x54, _and, prefix=_prefix)
    packed(f"andn{_suffix}", 0x55, _andn, prefix=_prefix)
    packed(f"or{_suffix}", 0x56, _or, prefix=_prefix)
    packed(f"xor{_suffix}", 0x57, _xor, prefix=_prefix)


# Sums and differences


for (_width, _suffix), _add_opcode, _subtract_opcode in zip(
    _WIDTHS, (0xFC, 0xFD, 0xFE, 0xD4), (0xF8, 0xF9, 0xFA, 0xFB), strict=True
):
    packed(f"padd{_suffix}", _add_opcode, elementwise(_width, operator.add))
    packed(f"psub{_suffix}", _subtract_opcode, elementwise(_width, operator.sub))


def _saturating(name: str, opcode: int, width: int, *, signed: bool) -> None:
    function = operator.add if name.startswith("padd") else operator.sub
    packed(
        name, opcode,
        elementwise(width, lambda a, b: saturate(function(a, b), width, signed=signed), signed=signed),
    )  # fmt: skip


_saturating("paddsb", 0xEC, 1, signed=True)
_saturating("paddsw", 0xED, 2, signed=True)
_saturating("paddusb", 0xDC, 1, signed=False)
_saturating("paddusw", 0xDD, 2, signed=False)
_saturating("psubsb", 0xE8, 1, signed=True)
_saturating("psubsw", 0xE9, 2, signed=True)
_saturating("psubusb", 0xD8, 1, signed=False)
_saturating("psubusw", 0xD9, 2, signed=False)


def _average(first: int, second: int) -> int:
    return first + second + 1 >> 1


packed("pavgb", 0xE0, elementwise(1, _average))
packed("pavgw", 0xE3, elementwise(2, _average))


def _sum_of_absolute_differences(first: int, second: int, size: int, immediate: int) -> int:
    differences = [abs(a - b) for a, b in zip(split(first, 1, size), split(second, 1, size), strict=True)]
    return join([sum(differences[at : at + 8]) for at in range(0, size, 8)], 8)


packed("psadbw", 0xF6, _sum_of_absolute_differences)


def _differences_of_blocks(first: int, second: int, size: int, immediate: int) -> int:
    """MPSADBW: four bytes of the second source against four of the first at each of eight places."""
    block = 4 * (immediate & 3)
    chosen, bytes_of_first = split(second, 1, 16)[block : block + 4], split(first, 1, 16)[immediate & 4 :]
    sums = [sum(abs(bytes_of_first[at + part] - chosen[part]) for part in range(4)) for at in range(8)]
    return join(sums, 2)


def _in_both_lanes(first: int, second: int, size: int, immediate: int) -> int:
    low = _differences_of_blocks(first & _LANE, second & _LANE, 16, immediate)
    if size == 16:
        return low
    return low | _differences_of_blocks(first >> 128, second >> 128, 16, immediate >> 3) << 128


packed("mpsadbw", 0x42, _in_both_lanes, map=3, immediate=True)


def _absolute(width: int) -> None:
    packed(
        f"pabs{dict(_WIDTHS)[width]}", {1: 0x1C, 2: 0x1D, 4: 0x1E}[width],
        elementwise(width, lambda _, b: abs(b), signed=True), map=_38, sources=1,
    )  # fmt: skip


def _sign(width: int) -> None:
    packed(
        f"psign{dict(_WIDTHS)[width]}", {1: 0x08, 2: 0x09, 4: 0x0A}[width],
        elementwise(width, lambda a, b: a if b > 0 else -a if b else 0, signed=True), map=_38,
    )  # fmt: skip


for _width in (1, 2, 4):
    _absolute(_width)
    _sign(_width)


def _horizontal(name: str, opcode: int, width: int, *, saturates: bool = False) -> None:
    """Sums or differences of neighbours: those of the first source below, those of the second above."""
    function = operator.add if name.startswith("phadd") else operator.sub

    def operation(first: int, second: int, size: int, immediate: int) -> int:
        elements = split(first, width, 16, signed=True) + split(second, width, 16, signed=True)
        results = [function(elements[at], elements[at + 1]) for at in range(0, len(elements), 2)]
        return join([saturate(each, width, signed=True) for each in results] if saturates else results, width)

    packed(name, opcode, operation, map=_38, lanes=True)


_horizontal("phaddw", 0x01, 2)
_horizontal("phaddd", 0x02, 4)
_horizontal("phaddsw", 0x03, 2, saturates=True)
_horizontal("phsubw", 0x05, 2)
_horizontal("phsubd", 0x06, 4)
_horizontal("phsubsw", 0x07, 2, saturates=True)


# Products


packed("pmullw", 0xD5, elementwise(2, operator.mul))
packed("pmulhw", 0xE5, elementwise(2, lambda a, b: a * b >> 16, signed=True))
packed("pmulhuw", 0xE4, elementwise(2, lambda a, b: a * b >> 16))
packed("pmulld", 0x40, elementwise(4, operator.mul), map=_38)
packed("pmulhrsw", 0x0B, elementwise(2, lambda a, b: (a * b >> 14) + 1 >> 1, signed=True), map=_38)


def _even_products(first: int, second: int, size: int, *, signed: bool) -> int:
    evens = zip(split(first, 4, size, signed=signed)[::2], split(second, 4, size, signed=signed)[::2], strict=True)
    return join([a * b for a, b in evens], 8)


packed("pmuludq", 0xF4, lambda a, b, size, _: _even_products(a, b, size, signed=False))
packed("pmuldq", 0x28, lambda a, b, size, _: _even_products(a, b, size, signed=True), map=_38)


def _multiply_add(first: int, second: int, size: int, immediate: int) -> int:
    words = zip(split(first, 2, size, signed=True), split(second, 2, size, signed=True), strict=True)
    products = [a * b for a, b in words]
    return join([products[at] + products[at + 1] for at in range(0, len(products), 2)], 4)


def _multiply_add_bytes(first: int, second: int, size: int, immediate: int) -> int:
    products = [a * b for a, b in zip(split(first, 1, size), split(second, 1, size, signed=True), strict=True)]
    sums = [products[at] + products[at + 1] for at in range(0, size, 2)]
    return join([saturate(each, 2, signed=True) for each in sums], 2)


packed("pmaddwd", 0xF5, _multiply_add)
packed("pmaddubsw", 0x04, _multiply_add_bytes, map=_38)


# Comparisons


def _equal(width: int) -> None:
    packed(
        f"pcmpeq{dict(_WIDTHS)[width]}", {1: 0x74, 2: 0x75, 4: 0x76, 8: 0x29}[width],
        elementwise(width, lambda a, b: -(a == b)), map=_38 if width == 8 else 1,
    )  # fmt: skip


def _greater(width: int) -> None:
    packed(
        f"pcmpgt{dict(_WIDTHS)[width]}", {1: 0x64, 2: 0x65, 4: 0x66, 8: 0x37}[width],
        elementwise(width, lambda a, b: -(a > b), signed=True), map=_38 if width == 8 else 1,
    )  # fmt: skip


for _width, _ in _WIDTHS:
    _equal(_width)
    _greater(_width)

packed("pminub", 0xDA, elementwise(1, min))
packed("pmaxub", 0xDE, elementwise(1, max))
packed("pminsw", 0xEA, elementwise(2, min, signed=True))
packed("pmaxsw", 0xEE, elementwise(2, max, signed=True))
packed("pminsb", 0x38, elementwise(1, min, signed=True), map=_38)
packed("pminsd", 0x39, elementwise(4, min, signed=True), map=_38)
packed("pminuw", 0x3A, elementwise(2, min), map=_38)
packed("pminud", 0x3B, elementwise(4, min), map=_38)
packed("pmaxsb", 0x3C, elementwise(1, max, signed=True), map=_38)
packed("pmaxsd", 0x3D, elementwise(4, max, signed=True), map=_38)
packed("pmaxuw", 0x3E, elementwise(2, max), map=_38)
packed("pmaxud", 0x3F, elementwise(4, max), map=_38)


def _least_word(first: int, second: int, size: int, immediate: int) -> int:
    words = split(second, 2, 16)
    least = min(words)
    return least | words.index(least) << 16


packed("phminposuw", 0x41, _least_word, map=_38, sources=1, only_128=True)
