"""String comparisons of SSE4.2, gathers, MPSADBW and VTESTPS in software, against the processor."""

from __future__ import annotations

import random
import struct

import pytest

from instruction_batch import ROOM, Batch, compare_forms, xsave_image
from instruction_comparison import Given, components, xcr0
from instruction_forms import codes_of, states_of

pytestmark = pytest.mark.kvm

XMM, AVX = 160, 2
RAX, RDX, RSI = 0, 3, 4
CONTROLS = range(128)
FORMS: dict[str, list[str]] = {
    name: [f"{name} xmm1, xmm2, {control}" for control in CONTROLS]
    + [f"v{name} xmm1, xmmword ptr [rsi + 3], {control}" for control in (0, 0x1B, 0x4D, 0x72)]
    for name in ("pcmpestrm", "pcmpestri", "pcmpistrm", "pcmpistri")
}
FORMS["pcmpestri"] += [".byte 0x66, 0x48, 0x0f, 0x3a, 0x61, 0xca, 0x0c"]  # REX.W: RAX and RDX
FORMS["mpsadbw"] = [f"mpsadbw xmm1, xmm2, {at}" for at in range(8)] + [
    f"vmpsadbw ymm1, ymm2, ymm3, {at}" for at in (0, 13, 37, 63)
]
FORMS["vtest"] = [
    "vtestps xmm1, xmm2", "vtestps ymm1, ymmword ptr [rsi + 3]", "vtestpd ymm1, ymm2", "vtestpd xmm3, xmm3",
]  # fmt: skip
GATHERS = {
    "vpgatherdd": "xmm1, [rsi + xmm4 * 4], xmm2 | ymm1, [rsi + ymm4 * 2 + 8], ymm2",
    "vpgatherdq": "xmm1, [rsi + xmm4 * 4], xmm2 | ymm1, [rsi + xmm4 * 1 + 8], ymm2",
    "vpgatherqd": "xmm1, [rsi + xmm5 * 4], xmm2 | xmm1, [rsi + ymm5 * 2 + 8], xmm2",
    "vpgatherqq": "xmm1, [rsi + xmm5 * 4], xmm2 | ymm1, [rsi + ymm5 * 1 + 8], ymm2",
    "vgatherdps": "xmm1, [rsi + xmm4 * 4], xmm2 | ymm9, [rsi + ymm4 * 2 + 8], ymm2",
    "vgatherdpd": "xmm1, [rsi + xmm4 * 4], xmm2 | ymm9, [rsi + xmm4 * 1 + 8], ymm2",
    "vgatherqps": "xmm1, [rsi + xmm5 * 4], xmm2 | xmm9, [rsi + ymm5 * 2 + 8], xmm2",
    "vgatherqpd": "xmm1, [rsi + xmm5 * 4], xmm2 | ymm9, [rsi + ymm5 * 1 + 8], ymm2",
}
for name, operands in GATHERS.items():
    FORMS[name] = [f"{name} {each.strip()}" for each in operands.split("|")]
FAULTING = ["vpgatherdd ymm1, [rsi + ymm6 * 8], ymm2", "vpgatherqq ymm1, [rsi + ymm7 * 1], ymm2"]


def text(chance: random.Random) -> bytes:
    """Few different characters, so that there are matches; sometimes with an end."""
    letters = chance.choice((b"ab", b"abc\0", b"\x80\x7f\0\xff", b"aabbzz\0"))
    if chance.getrandbits(1):
        return bytes(chance.choices(letters, k=16))
    return struct.pack("<8H", *(chance.choice(letters) * chance.choice((1, 0x101, 0x100)) for _ in range(8)))


def state(chance: random.Random, number: int, place: int) -> Given:
    given = Given.random(chance)
    for register in (RAX, RDX):
        given.general[register] = chance.choice(
            (chance.randrange(20), -chance.randrange(20) % 2**64, number, 2**32 - 3)
        )
    given.general[RSI] = place
    area = bytearray(xsave_image(chance, xcr0()))
    upper, _, _ = components()[AVX]
    for register in range(16):
        for start in (XMM, upper):
            area[start + 16 * register : start + 16 * register + 16] = text(chance)
    for start in (XMM, upper):
        struct.pack_into("<4i", area, start + 64, *(chance.randrange(-2, 60) for _ in range(4)))  # XMM4
        struct.pack_into("<2q", area, start + 80, *(chance.randrange(-2, 60) for _ in range(2)))  # XMM5
        far = (0, 5, 1 << 28, chance.randrange(60))
        struct.pack_into("<4i", area, start + 96, *(chance.choice(far) for _ in range(4)))  # XMM6
        struct.pack_into("<2q", area, start + 112, *(chance.choice((0, 9, 1 << 40, 1 << 62)) for _ in range(2)))
    given.xsave = bytes(area)
    given.data = b"".join(text(chance) for _ in range(20)) + bytes(ROOM - 320)
    return given


states = states_of(state, "vector strings")
codes = codes_of(FORMS, FAULTING)


@pytest.mark.parametrize("name", FORMS)
def test_the_processor_gives_the_same(states: Batch, codes: dict[str, bytes], name: str) -> None:
    compare_forms(states, codes, FORMS[name])


def test_a_gather_that_faults_keeps_what_it_has(states: Batch, codes: dict[str, bytes]) -> None:
    """In which order elements are loaded is not said, but those that are not left in the mask are there."""
    faults = 0
    for form in FAULTING:
        width = 4 if "dd" in form else 8
        for number in range(0, len(states.cases), 5):
            given, outcome = states.cases[number], states.software(codes[form], number)
            if outcome.exception is None:
                continue
            faults += 1
            assert outcome.exception[0] in (13, 14)
            mask, before = vector_of(outcome.extended, 2), vector_of_area(given.xsave, 2)
            for at in range(0, 32, width):
                assert mask[at + width - 1] >> 7 <= before[at + width - 1] >> 7
    assert faults > 20


def vector_of(extended: tuple[bytes, ...], register: int) -> bytes:
    """YMM of what `canonical` gives."""
    upper = extended[5 + list(components()).index(AVX)]
    return extended[3][16 * register :][:16] + upper[16 * register :][:16]


def vector_of_area(area: bytes, register: int) -> bytes:
    upper = components()[AVX][0] + 16 * register
    return area[XMM + 16 * register :][:16] + area[upper : upper + 16]
