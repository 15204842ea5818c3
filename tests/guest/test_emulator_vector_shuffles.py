"""Shuffles, unpacks, packs, blends, widening, broadcasts and permutations in software, against the processor."""

from __future__ import annotations

import pytest

from instruction_batch import Batch, compare_forms
from instruction_forms import codes_of, states_of
from vector_cases import listed, one_source, two_sources, vector_state

pytestmark = pytest.mark.kvm

TWO = """
pshufb punpcklbw punpcklwd punpckldq punpcklqdq punpckhbw punpckhwd punpckhdq punpckhqdq
unpcklps unpckhps unpcklpd unpckhpd packsswb packuswb packssdw packusdw
"""
TWO_AND_IMMEDIATE = "shufps shufpd palignr pblendw blendps blendpd"
OTHERS = """
vpermilps xmm1, xmm2, 0x1b | vpermilps ymm1, [rsi + 1], 0xc9 | vpermilps xmm1, xmm2, xmm3 | vpermilps ymm1, ymm2, [rsi]
vpermilpd xmm1, xmm2, 1 | vpermilpd ymm1, [rsi + 1], 6 | vpermilpd xmm1, xmm2, xmm3 | vpermilpd ymm1, ymm2, [rsi]
vpblendd xmm1, xmm2, xmm3, 5 | vpblendd ymm1, ymm2, [rsi + 2], 0xa6
pblendvb xmm1, xmm2 | pblendvb xmm1, [rsi] | vpblendvb xmm1, xmm2, xmm3, xmm14 | vpblendvb ymm1, ymm2, [rsi + 1], ymm4
blendvps xmm1, xmm2 | blendvps xmm1, [rsi] | vblendvps xmm1, xmm2, xmm3, xmm14 | vblendvps ymm1, ymm2, [rsi + 1], ymm4
blendvpd xmm1, xmm2 | blendvpd xmm1, [rsi] | vblendvpd xmm1, xmm2, xmm3, xmm14 | vblendvpd ymm1, ymm2, [rsi + 1], ymm4
movsldup xmm1, xmm2 | movsldup xmm1, [rsi] | vmovsldup ymm1, ymm2 | vmovsldup xmm1, [rsi + 1]
movshdup xmm1, xmm2 | movshdup xmm1, [rsi] | vmovshdup ymm1, ymm2 | vmovshdup xmm1, [rsi + 1]
movddup xmm1, xmm2 | movddup xmm1, [rsi + 1] | vmovddup ymm1, ymm2 | vmovddup ymm1, [rsi + 1] | vmovddup xmm1, [rsi + 1]
vbroadcastss xmm1, [rsi + 1] | vbroadcastss ymm1, [rsi + 1] | vbroadcastss ymm1, xmm12
vbroadcastsd ymm1, [rsi + 1] | vbroadcastsd ymm1, xmm12
vbroadcastf128 ymm1, [rsi + 1]
vbroadcasti128 ymm1, [rsi + 1]
vpbroadcastb xmm1, [rsi + 1] | vpbroadcastb ymm1, xmm2
vpbroadcastw xmm1, [rsi + 1] | vpbroadcastw ymm1, xmm2
vpbroadcastd xmm1, [rsi + 1] | vpbroadcastd ymm1, xmm2
vpbroadcastq xmm1, [rsi + 1] | vpbroadcastq ymm1, xmm2
vpermq ymm1, ymm2, 0x1b | vpermq ymm1, [rsi + 1], 0xd8
vpermpd ymm1, ymm2, 0x1b | vpermpd ymm1, [rsi + 1], 0xd8
vpermd ymm1, ymm2, ymm3 | vpermd ymm1, ymm2, [rsi + 1]
vpermps ymm1, ymm2, ymm3 | vpermps ymm1, ymm2, [rsi + 1]
vperm2f128 ymm1, ymm2, ymm3, 0x21 | vperm2f128 ymm1, ymm2, [rsi + 1], 0x83
vperm2i128 ymm1, ymm2, ymm3, 0x30 | vperm2i128 ymm1, ymm2, [rsi + 1], 0x18
vinsertf128 ymm1, ymm2, xmm3, 1 | vinsertf128 ymm1, ymm2, [rsi + 1], 0
vinserti128 ymm1, ymm2, xmm3, 1 | vinserti128 ymm1, ymm2, [rsi + 1], 0
vextractf128 xmm1, ymm2, 1 | vextractf128 [rsi + 1], ymm2, 1
vextracti128 xmm1, ymm2, 0 | vextracti128 [rsi + 1], ymm2, 1
"""

FORMS = two_sources(TWO) | listed(OTHERS)
for name, forms in two_sources(TWO_AND_IMMEDIATE, immediate=", {}").items():
    FORMS[name] = [form.format(immediate) for form, immediate in zip(forms, (0x1B, 5, 0xE4, 0x8C, 19), strict=True)]
for name, forms in one_source("pshufd pshuflw pshufhw", immediate=", {}").items():
    FORMS[name] = [form.format(immediate) for form, immediate in zip(forms, (0x1B, 5, 0xE4, 0x8C), strict=True)]
for sign in "sz":
    for sizes, word in {"bw": "q", "bd": "d", "bq": "w", "wd": "q", "wq": "d", "dq": "q"}.items():
        name = f"pmov{sign}x{sizes}"
        size = {"q": "qword", "d": "dword", "w": "word"}[word]
        double = {"q": "xmmword", "d": "qword", "w": "dword"}[word]
        FORMS[name] = [
            f"{name} xmm1, xmm12", f"{name} xmm9, {size} ptr [rsi + 3]", f"v{name} xmm1, xmm2", f"v{name} ymm1, xmm2",
            f"v{name} ymm8, {double} ptr [rsi + rdi + 5]",
        ]  # fmt: skip


states = states_of(vector_state, "vector shuffles")
codes = codes_of(FORMS)


@pytest.mark.parametrize("name", FORMS)
def test_the_processor_gives_the_same(states: Batch, codes: dict[str, bytes], name: str) -> None:
    compare_forms(states, codes, FORMS[name])
