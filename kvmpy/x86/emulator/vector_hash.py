"""SHA-1 and SHA-256 steps, and bytes as elements of GF(2^8) (SDM vol. 2, SHA1..., SHA256..., GF2P8...)."""

from __future__ import annotations

from collections.abc import Callable

from kvmpy.x86.emulator.lanes import join, split
from kvmpy.x86.emulator.vector_operands import Operation, packed

_38, _3A = 2, 3
_MASK = 0xFFFF_FFFF


def _left(word: int, by: int) -> int:
    return (word << by | word >> 32 - by) & _MASK


def _right(word: int, by: int) -> int:
    return _left(word, 32 - by)


def _words(value: int) -> list[int]:
    """Doublewords, the highest first, as the manual lists them."""
    return split(value, 4, 16)[::-1]


def _vector(*words: int) -> int:
    return join(words[::-1], 4)


def _choose(x: int, y: int, z: int) -> int:
    return x & y ^ ~x & z


def _majority(x: int, y: int, z: int) -> int:
    return x & y ^ x & z ^ y & z


def _parity(x: int, y: int, z: int) -> int:
    return x ^ y ^ z


# SHA-1

_FUNCTIONS: tuple[Callable[[int, int, int], int], ...] = (_choose, _parity, _majority, _parity)
_CONSTANTS = (0x5A82_7999, 0x6ED9_EBA1, 0x8F1B_BCDC, 0xCA62_C1D6)


def _sha1_rounds(first: int, second: int, size: int, immediate: int) -> int:
    function, constant = _FUNCTIONS[immediate & 3], _CONSTANTS[immediate & 3]
    a, b, c, d = _words(first)
    e = 0
    for word in _words(second):
        total = function(b, c, d) + _left(a, 5) + word + e + constant
        a, b, c, d, e = total & _MASK, a, _left(b, 30), c, d
    return _vector(a, b, c, d)


def _sha1_next(first: int, second: int, size: int, immediate: int) -> int:
    high, *others = _words(second)
    return _vector(high + _left(_words(first)[0], 30), *others)


def _sha1_message_1(first: int, second: int, size: int, immediate: int) -> int:
    w0, w1, w2, w3 = _words(first)
    w4, w5, *_ = _words(second)
    return _vector(w2 ^ w0, w3 ^ w1, w4 ^ w2, w5 ^ w3)


def _sha1_message_2(first: int, second: int, size: int, immediate: int) -> int:
    words, (_, w13, w14, w15) = _words(first), _words(second)
    w16, w17, w18 = (_left(word ^ other, 1) for word, other in zip(words, (w13, w14, w15), strict=False))
    return _vector(w16, w17, w18, _left(words[3] ^ w16, 1))


def _legacy(name: str, opcode: int, operation: Operation, *, map: int = _38, immediate: bool = False) -> None:
    packed(name, opcode, operation, map=map, prefix=0, immediate=immediate, vex=False)


_legacy("sha1rnds4", 0xCC, _sha1_rounds, map=_3A, immediate=True)
_legacy("sha1nexte", 0xC8, _sha1_next)
_legacy("sha1msg1", 0xC9, _sha1_message_1)
_legacy("sha1msg2", 0xCA, _sha1_message_2)


# SHA-256


def _small_0(word: int) -> int:
    return _right(word, 7) ^ _right(word, 18) ^ word >> 3


def _small_1(word: int) -> int:
    return _right(word, 17) ^ _right(word, 19) ^ word >> 10


def _sha256_rounds(first: int, second: int, size: int, xmm0: int) -> int:
    (c, d, g, h), (a, b, e, f) = _words(first), _words(second)
    for word in split(xmm0, 4, 16)[:2]:
        total = _choose(e, f, g) + (_right(e, 6) ^ _right(e, 11) ^ _right(e, 25)) + word + h
        sum_0 = _majority(a, b, c) + (_right(a, 2) ^ _right(a, 13) ^ _right(a, 22))
        a, b, c, d, e, f, g, h = total + sum_0 & _MASK, a, b, c, total + d & _MASK, e, f, g
    return _vector(a, b, e, f)


def _sha256_message_1(first: int, second: int, size: int, immediate: int) -> int:
    words = [*split(first, 4, 16), split(second, 4, 16)[0]]
    return join([words[at] + _small_0(words[at + 1]) for at in range(4)], 4)


def _sha256_message_2(first: int, second: int, size: int, immediate: int) -> int:
    words, others = split(first, 4, 16), split(second, 4, 16)
    w16, w17 = (words[0] + _small_1(others[2])) & _MASK, (words[1] + _small_1(others[3])) & _MASK
    return join([w16, w17, words[2] + _small_1(w16), words[3] + _small_1(w17)], 4)


packed("sha256rnds2", 0xCB, _sha256_rounds, map=_38, prefix=0, vex=False, with_xmm0=True)
_legacy("sha256msg1", 0xCC, _sha256_message_1)
_legacy("sha256msg2", 0xCD, _sha256_message_2)


# GF(2^8), modulo x^8 + x^4 + x^3 + x + 1


def _product(a: int, b: int) -> int:
    result = 0
    while b:
        if b & 1:
            result ^= a
        a = a << 1 ^ (0x11B if a & 0x80 else 0)
        b >>= 1
    return result


def _inverse(element: int) -> int:
    """element^254, which is 0 for 0."""
    result, power = 1, element
    for _ in range(7):
        power = _product(power, power)
        result = _product(result, power)
    return result if element else 0


def _products(first: int, second: int, size: int, immediate: int) -> int:
    pairs = zip(first.to_bytes(size, "little"), second.to_bytes(size, "little"), strict=True)
    return int.from_bytes(bytes(_product(a, b) for a, b in pairs), "little")


def _affine(*, inverts: bool) -> Operation:
    def operation(first: int, second: int, size: int, immediate: int) -> int:
        elements, matrices = first.to_bytes(size, "little"), second.to_bytes(size, "little")
        result = bytearray()
        for at, element in enumerate(elements):
            element = _inverse(element) if inverts else element
            matrix = matrices[at & ~7 : (at & ~7) + 8]
            row = sum(((matrix[7 - bit] & element).bit_count() & 1) << bit for bit in range(8))
            result.append(row ^ immediate)
        return int.from_bytes(result, "little")

    return operation


packed("gf2p8mulb", 0xCF, _products, map=_38, w=False)
packed("gf2p8affineqb", 0xCE, _affine(inverts=False), map=_3A, immediate=True, w=True)
packed("gf2p8affineinvqb", 0xCF, _affine(inverts=True), map=_3A, immediate=True, w=True)
