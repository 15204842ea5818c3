"""Forms of SSE and AVX instructions for tests, and the states to compare them in."""

from __future__ import annotations

import random

from instruction_batch import ROOM, xsave_image
from instruction_comparison import Given, xcr0

__all__ = ["listed", "one_source", "two_sources", "vector_state"]


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
