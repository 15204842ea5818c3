"""Forms of SSE and AVX instructions for tests, and the states to compare them in."""

from __future__ import annotations

import random
import struct

from instruction_batch import ROOM, xsave_image
from instruction_comparison import Given, xcr0

__all__ = ["listed", "one_source", "real_vectors", "two_sources", "vector_state"]


def vector_state(chance: random.Random, number: int, place: int) -> Given:
    """All vector registers random. RSI leads to memory that is aligned to 64 bytes, RDI is a small number."""
    given = Given.random(chance, 96)
    given.general[4], given.general[5] = place, number % 4
    given.xsave = xsave_image(chance, xcr0() if number % 4 else chance.getrandbits(64) & xcr0())
    # The same kinds of vectors in memory as in registers.
    start = chance.randrange(160, 320) & ~15
    given.data = given.xsave[start : start + 96] + bytes(ROOM - 96)
    return given


def listed(text: str) -> dict[str, list[str]]:
    """Forms divided by `|`, those of one instruction on a line (or more, from the second on beginning with `|`)."""
    joined = text.strip().replace("\n|", "|")
    forms = [[form.strip() for form in line.split("|")] for line in joined.splitlines()]
    return {line[0].split()[0]: line for line in forms}


def two_sources(names: str, *, immediate: str = "") -> dict[str, list[str]]:
    """Legacy and VEX forms of instructions with two vectors as sources, from registers and memory, by name."""
    return {
        name: [
            f"{name} xmm1, xmm2{immediate}", f"{name} xmm9, xmmword ptr [rsi + 16]{immediate}",
            f"v{name} xmm1, xmm2, xmm3{immediate}", f"v{name} ymm8, ymm9, ymm10{immediate}",
            f"v{name} ymm1, ymm1, ymmword ptr [rsi + rdi + 5]{immediate}",
        ] for name in names.split()
    }  # fmt: skip


def one_source(names: str, *, immediate: str = "") -> dict[str, list[str]]:
    """The same for those with one."""
    return {
        name: [
            f"{name} xmm1, xmm12{immediate}", f"{name} xmm9, xmmword ptr [rsi + 16]{immediate}",
            f"v{name} xmm1, xmm2{immediate}", f"v{name} ymm8, ymmword ptr [rsi + rdi + 5]{immediate}",
        ] for name in names.split()
    }  # fmt: skip


def _real(chance: random.Random, exponent_bits: int, fraction_bits: int) -> int:
    """A number of every kind: zero, denormal, infinite, NaN of both sorts, near a power of two, of like size."""
    kind = chance.randrange(12)
    sign = chance.getrandbits(1) << exponent_bits + fraction_bits
    most = (1 << exponent_bits) - 1
    fraction = chance.getrandbits(fraction_bits)
    if kind == 0:
        return sign
    if kind == 1:
        return sign | fraction >> chance.randrange(fraction_bits)
    if kind == 2:
        return sign | most << fraction_bits | chance.choice((0, fraction, fraction >> 1, 1 << fraction_bits - 1))
    if kind == 3:
        exponent = chance.choice((1, 2, most - 1, most - 2, chance.randrange(1, most)))
        return sign | exponent << fraction_bits | fraction
    bias = most >> 1
    exponent = bias + chance.randrange(-3, 4) if kind < 9 else bias + chance.randrange(-bias // 2, bias // 2)
    if kind in (5, 6):
        fraction = chance.choice((0, 1, (1 << fraction_bits) - 1, 1 << fraction_bits - 1, 3 << fraction_bits - 2))
    elif kind == 7:
        fraction = fraction >> fraction_bits // 2 << fraction_bits // 2
    return sign | exponent << fraction_bits | fraction


def real_vectors(chance: random.Random, size: int) -> bytes:
    """Vectors of 16 bytes with singles or doubles in them."""
    parts = []
    for _ in range(size // 16):
        if chance.getrandbits(1):
            parts.append(struct.pack("<4I", *(_real(chance, 8, 23) for _ in range(4))))
        else:
            parts.append(struct.pack("<2Q", *(_real(chance, 11, 52) for _ in range(2))))
    return b"".join(parts)
