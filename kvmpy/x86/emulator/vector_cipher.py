"""AES-NI and PCLMULQDQ, which the crypto code of kernels uses (SDM vol. 2; FIPS 197)."""

from __future__ import annotations

from functools import cache

from kvmpy.x86.emulator.vector_operands import Operation, packed

_38, _3A = 2, 3


def _times_x(byte: int) -> int:
    """Times x in GF(2^8) modulo x^8 + x^4 + x^3 + x + 1."""
    return byte << 1 ^ (0x11B if byte & 0x80 else 0)


def _times(a: int, b: int) -> int:
    product = 0
    while b:
        if b & 1:
            product ^= a
        a, b = _times_x(a), b >> 1
    return product


@cache
def _substitution() -> tuple[bytes, bytes]:
    """The S-box, and its inverse: the inverse in GF(2^8), and an affine transformation (FIPS 197, 5.1.1)."""
    box = bytearray(256)
    for byte in range(256):
        inverse = next((other for other in range(256) if _times(byte, other) == 1), 0)
        box[byte] = 0x63
        for turn in range(5):
            box[byte] ^= (inverse << turn | inverse >> 8 - turn) & 0xFF
    return bytes(box), bytes(box.index(byte) for byte in range(256))


@cache
def _multiples(by: int) -> bytes:
    return bytes(_times(byte, by) for byte in range(256))


_ROWS = bytes(4 * (column + row & 3) + row for column in range(4) for row in range(4))
"""ShiftRows: where each byte of the result comes from; byte 4 c + r is row r of column c."""
_ROWS_BACK = bytes(_ROWS.index(place) for place in range(16))


def _shift_rows(state: bytes, order: bytes) -> bytes:
    return bytes(state[place] for place in order)


def _mix_columns(state: bytes, factors: tuple[int, int, int, int]) -> bytes:
    tables = [_multiples(factor) for factor in factors]
    mixed = bytearray(16)
    for at in range(16):
        column, row = at & ~3, at & 3
        for step in range(4):
            mixed[at] ^= tables[step][state[column + (row + step & 3)]]
    return bytes(mixed)


_MIX, _MIX_BACK = (2, 3, 1, 1), (14, 11, 13, 9)


def _round(*, back: bool, last: bool) -> Operation:
    def operation(first: int, second: int, size: int, immediate: int) -> int:
        box = _substitution()[back]
        state = _shift_rows(first.to_bytes(16, "little"), _ROWS_BACK if back else _ROWS).translate(box)
        if not last:
            state = _mix_columns(state, _MIX_BACK if back else _MIX)
        return int.from_bytes(state, "little") ^ second

    return operation


packed("aesenc", 0xDC, _round(back=False, last=False), map=_38, lanes=True)
packed("aesenclast", 0xDD, _round(back=False, last=True), map=_38, lanes=True)
packed("aesdec", 0xDE, _round(back=True, last=False), map=_38, lanes=True)
packed("aesdeclast", 0xDF, _round(back=True, last=True), map=_38, lanes=True)


def _inverse_mix(first: int, second: int, size: int, immediate: int) -> int:
    return int.from_bytes(_mix_columns(second.to_bytes(16, "little"), _MIX_BACK), "little")


packed("aesimc", 0xDB, _inverse_mix, map=_38, sources=1, only_128=True)


def _key_assist(first: int, second: int, size: int, immediate: int) -> int:
    substituted = second.to_bytes(16, "little").translate(_substitution()[0])
    words: list[int] = []
    for at in (4, 12):
        word = int.from_bytes(substituted[at : at + 4], "little")
        words += word, (word >> 8 | word << 24 & 0xFF00_0000) ^ immediate
    return sum(word << 32 * at for at, word in enumerate(words))


packed("aeskeygenassist", 0xDF, _key_assist, map=_3A, sources=1, immediate=True, only_128=True)


def _carryless_product(first: int, second: int, size: int, immediate: int) -> int:
    a = first >> (64 if immediate & 1 else 0) & (1 << 64) - 1
    b = second >> (64 if immediate & 16 else 0) & (1 << 64) - 1
    product = 0
    while b:
        lowest = b & -b
        product ^= a * lowest
        b ^= lowest
    return product


packed("pclmulqdq", 0x44, _carryless_product, map=_3A, immediate=True, lanes=True)
