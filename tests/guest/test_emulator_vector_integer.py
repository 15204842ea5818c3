"""Packed integer arithmetic, comparisons, bitwise operations and shifts in software, against the processor."""

from __future__ import annotations

import pytest

from instruction_batch import Batch, compare_forms
from instruction_forms import codes_of, states_of
from vector_cases import listed, one_source, two_sources, vector_state

pytestmark = pytest.mark.kvm

TWO = """
pand pandn por pxor andps andpd andnps orps orpd xorps xorpd
paddb paddw paddd paddq paddsb paddsw paddusb paddusw psubb psubw psubd psubq psubsb psubsw psubusb psubusw
pavgb pavgw psadbw psignb psignw psignd phaddw phaddd phaddsw phsubw phsubd phsubsw
pmullw pmulhw pmulhuw pmulld pmulhrsw pmuludq pmuldq pmaddwd pmaddubsw
pcmpeqb pcmpeqw pcmpeqd pcmpeqq pcmpgtb pcmpgtw pcmpgtd pcmpgtq
pminub pmaxub pminsw pmaxsw pminsb pminsd pminuw pminud pmaxsb pmaxsd pmaxuw pmaxud
"""
SHIFTS = "psllw pslld psllq psrlw psrld psrlq psraw psrad"
OTHERS = """
phminposuw xmm1, xmm2 | vphminposuw xmm1, [rsi + 3]
vpsrlvd xmm1, xmm2, xmm3 | vpsrlvd ymm1, ymm2, [rsi + 1]
vpsrlvq ymm1, ymm2, ymm3
vpsravd ymm1, ymm2, ymm3
vpsllvd ymm1, ymm2, ymm3
vpsllvq xmm1, xmm2, xmm3 | vpsllvq ymm1, ymm2, [rsi]
pslldq xmm1, 5 | pslldq xmm9, 16 | vpslldq xmm1, xmm2, 0 | vpslldq ymm1, ymm2, 15
psrldq xmm1, 5 | psrldq xmm9, 16 | vpsrldq xmm1, xmm2, 0 | vpsrldq ymm1, ymm2, 15
"""

FORMS = two_sources(TWO) | one_source("pabsb pabsw pabsd") | listed(OTHERS)
for name in SHIFTS.split():
    FORMS[name] = [
        f"{name} xmm1, xmm2", f"{name} xmm9, xmmword ptr [rsi + 16]", f"{name} xmm1, 5", f"{name} xmm14, 77",
        f"v{name} xmm1, xmm2, xmm3", f"v{name} ymm8, ymm9, xmmword ptr [rsi + 3]", f"v{name} ymm1, ymm12, 13",
    ]  # fmt: skip


states = states_of(vector_state, "vector integer")
codes = codes_of(FORMS)


@pytest.mark.parametrize("name", FORMS)
def test_the_processor_gives_the_same(states: Batch, codes: dict[str, bytes], name: str) -> None:
    compare_forms(states, codes, FORMS[name])
