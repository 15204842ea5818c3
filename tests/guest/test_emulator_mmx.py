"""MMX, and what came to it with SSE, in software, against the processor."""

from __future__ import annotations

import random
import struct

import pytest

from instruction_batch import Batch, compare_forms, xsave_image
from instruction_comparison import Given, xcr0
from instruction_forms import OSXMMEXCPT, codes_of, families_of, states_of

pytestmark = pytest.mark.kvm

ST, FSW = 32, 2
TWO = """
psrlw psrld psrlq psraw psrad psllw pslld psllq paddb paddw paddd paddq paddsb paddsw paddusb paddusw
psubb psubw psubd psubq psubsb psubsw psubusb psubusw pmullw pmulhw pmulhuw pmuludq pmaddwd psadbw pavgb pavgw
pminub pminsw pmaxub pmaxsw pand pandn por pxor pcmpeqb pcmpeqw pcmpeqd pcmpgtb pcmpgtw pcmpgtd
packsswb packuswb packssdw punpcklbw punpcklwd punpckldq punpckhbw punpckhwd punpckhdq
pmaddubsw psignb psignw psignd pmulhrsw pabsb pabsw pabsd phaddw phaddd phaddsw phsubw phsubd phsubsw pshufb
"""
FORMS = {
    name: [f"{name} mm1, mm2", f"{name} mm5, {'d' if name.startswith('punpckl') else 'q'}word ptr [rsi + 3]"]
    for name in TWO.split()
}
FORMS |= {
    "shifts": [
        f"{name} mm{number}, {count}"
        for name in ("psrlw", "psrld", "psrlq", "psraw", "psrad", "psllw", "pslld", "psllq")
        for number, count in ((1, 5), (7, 40))
    ],
    "pshufw": ["pshufw mm1, mm2, 0x1b", "pshufw mm1, qword ptr [rsi], 0x93"],
    "palignr": ["palignr mm1, mm2, 3", "palignr mm1, mm2, 11", "palignr mm1, qword ptr [rsi + 1], 17"],
    "movd": ["movd mm1, eax", "movd mm2, dword ptr [rsi + 1]", "movd ebx, mm3", "movd dword ptr [rsi + 5], mm4"],
    "movq": [
        "movq mm1, rax", "movq rbx, mm3", "movq mm1, mm2", "movq mm6, qword ptr [rsi + 1]",
        "movq qword ptr [rsi + 3], mm7", ".byte 0x0f, 0x7f, 0xca",
    ],
    "movntq": ["movntq qword ptr [rsi + 8], mm1"],
    "movq2dq": ["movq2dq xmm1, mm2", "movdq2q mm1, xmm9"],
    "pinsrw": ["pinsrw mm1, eax, 2", "pinsrw mm1, word ptr [rsi + 1], 7", "pextrw eax, mm3, 1", "pmovmskb eax, mm1"],
    "maskmov": ["maskmovq mm1, mm2", "maskmovdqu xmm1, xmm2", "addr32 maskmovdqu xmm3, xmm4", "vmaskmovdqu xmm1, xmm9"],
    "conversions": [
        "cvtpi2ps xmm1, mm2", "cvtpi2pd xmm1, mm2",
        "cvtpi2pd xmm1, qword ptr [rsi + 1]", "cvtps2pi mm1, xmm2", "cvtps2pi mm1, qword ptr [rsi + 1]",
        "cvtpd2pi mm1, xmm2", "cvtpd2pi mm1, [rsi + 16]", "cvttps2pi mm1, xmm2", "cvttpd2pi mm1, xmm2",
    ],
}  # fmt: skip


def state(chance: random.Random, number: int, place: int) -> Given:
    given = Given.random(chance, 96)
    given.general[4], given.general[5] = place, place + 32  # RSI, RDI
    area = bytearray(xsave_image(chance, chance.getrandbits(64) & xcr0() | 1, unmasked=number % 8 == 0))
    for register in range(8):
        kind = chance.randrange(4)
        if kind == 0:
            struct.pack_into("<8B", area, ST + 16 * register, *chance.choices((0, 1, 0x7F, 0x80, 0xFF), k=8))
        elif kind == 1:
            struct.pack_into("<4H", area, ST + 16 * register, *chance.choices((0, 1, 0x7FFF, 0x8000, 0xFFFF, 5), k=4))
        elif kind == 2:
            struct.pack_into("<Q", area, ST + 16 * register, chance.randrange(70))
        else:
            struct.pack_into("<Q", area, ST + 16 * register, chance.getrandbits(64))
    for register in range(16):
        if register % 3 == 0:
            numbers = (chance.uniform(-1, 1) * 2 ** chance.randrange(-3, 40) for _ in range(4))
            struct.pack_into("<4f", area, 160 + 16 * register, *numbers)
        elif register % 3 == 1:
            struct.pack_into("<2d", area, 160 + 16 * register, *(chance.uniform(-1, 1) * 2.0**33 for _ in range(2)))
    struct.pack_into("<I", area, 24, 0x1F80 | chance.getrandbits(2) << 13)
    given.xsave = bytes(area)
    return given


states = states_of(state, "mmx", cr4=OSXMMEXCPT)
codes = codes_of(FORMS)
FAMILIES = families_of(FORMS, lambda name: name[:4])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_processor_gives_the_same(states: Batch, codes: dict[str, bytes], family: str) -> None:
    compare_forms(states, codes, FAMILIES[family])


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_the_processor_gives_the_same_for_each(states: Batch, codes: dict[str, bytes], name: str) -> None:
    compare_forms(states, codes, FORMS[name])
