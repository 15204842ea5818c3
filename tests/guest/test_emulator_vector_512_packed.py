"""EVEX encodings of packed integers, comparisons into masks and blends in software, against the processor."""

from __future__ import annotations

import pytest

from instruction_batch import Batch, compare_forms
from instruction_forms import codes_of, families_of, states_of
from vector_cases import vector_state

pytestmark = pytest.mark.kvm

NARROW = """
paddb psubb paddsb paddusb psubsb psubusb pavgb pminub pmaxub pminsb pmaxsb paddw psubw paddsw paddusw psubsw psubusw
pavgw pmullw pmulhw pmulhuw pmulhrsw pminsw pmaxsw pminuw pmaxuw pshufb packsswb packuswb punpcklbw punpckhbw punpcklwd
punpckhwd pmaddwd pmaddubsw psrlvw psravw psllvw
"""
WIDE = {
    "pmulld": 4, "pminsd": 4, "pminud": 4, "pmaxsd": 4, "pmaxud": 4, "pmuludq": 8, "pmuldq": 8, "packssdw": 4,
    "packusdw": 4, "punpckldq": 4, "punpckhdq": 4, "punpcklqdq": 8, "punpckhqdq": 8, "psrlvd": 4, "psrlvq": 8,
    "psravd": 4, "psravq": 8, "psllvd": 4, "psllvq": 8, "pmullq": 8, "pminsq": 8, "pminuq": 8, "pmaxsq": 8, "pmaxuq": 8,
    "andps": 4, "andnps": 4, "orps": 4, "xorps": 4, "andpd": 8, "andnpd": 8, "orpd": 8, "xorpd": 8,
    "pblendmd": 4, "pblendmq": 8, "blendmps": 4, "blendmpd": 8,
}  # fmt: skip


def broadcast(width: int, size: int) -> str:
    return f"{'d' if width == 4 else 'q'}word ptr [rsi + 8]{{1to{size // width}}}"


FORMS: dict[str, list[str]] = {}
for name in [*NARROW.split(), "pblendmb", "pblendmw"]:
    FORMS[name] = [
        f"v{name} xmm17, xmm2, xmm31", f"v{name} ymm1{{k3}}, ymm18, ymm9", f"v{name} zmm1{{k7}}{{z}}, zmm2, zmm3",
        f"v{name} zmm30, zmm1, [rsi + 64]", f"v{name} ymm1{{k1}}, ymm16, [rsi + 32]",
    ]  # fmt: skip
for name, width in WIDE.items():
    FORMS[name] = [
        f"v{name} xmm17, xmm2, xmm31", f"v{name} ymm1{{k3}}, ymm18, ymm9", f"v{name} zmm1{{k7}}{{z}}, zmm2, zmm3",
        f"v{name} zmm30, zmm1, [rsi + 64]", f"v{name} ymm1{{k1}}, ymm16, [rsi + 32]",
        f"v{name} zmm16{{k2}}, zmm2, {broadcast(width, 64)}",
    ]  # fmt: skip
for name, width in {"pabsb": 1, "pabsw": 2, "pabsd": 4, "pabsq": 8}.items():
    FORMS[name] = [
        f"v{name} xmm17, xmm2", f"v{name} zmm1{{k7}}{{z}}, zmm2", f"v{name} zmm30{{k1}}, [rsi + 64]",
        *([f"v{name} zmm16{{k2}}, {broadcast(width, 64)}"] if width > 2 else []),
    ]  # fmt: skip
FORMS["palignr"] = [f"vpalignr zmm1{{k7}}{{z}}, zmm2, zmm3, {by}" for by in (0, 5, 16, 21, 40)]
for name in ("pshuflw", "pshufhw"):
    FORMS[name] = [f"v{name} zmm1{{k1}}, zmm2, 0x1b", f"v{name} ymm17, [rsi + 32], 0x93"]
for width, suffix in ((1, "b"), (2, "w"), (4, "d"), (8, "q")):
    for name in ("pcmpeq", "pcmpgt", "ptestm", "ptestnm"):
        FORMS[name + suffix] = [
            f"v{name}{suffix} k1, xmm17, xmm2", f"v{name}{suffix} k2{{k3}}, zmm1, zmm31",
            f"v{name}{suffix} k5{{k1}}, ymm18, [rsi + 32]", f"v{name}{suffix} k7, zmm2, zmm2",
            *([f"v{name}{suffix} k5, zmm18, {broadcast(width, 64)}"] if width > 2 else []),
        ]  # fmt: skip
    for name in ("pcmp", "pcmpu"):
        FORMS[name + suffix] = [f"v{name}{suffix} k{at % 4 + 1}{{k5}}, zmm17, zmm2, {at}" for at in range(8)] + [
            f"v{name}{suffix} k1, ymm17, [rsi + 32], {at}" for at in range(8)
        ]
    FORMS["pmovm2" + suffix] = [f"vpmovm2{suffix} zmm17, k1", f"vpmovm2{suffix} xmm2, k7"]
    FORMS[f"pmov{suffix}2m"] = [f"vpmov{suffix}2m k1, zmm17", f"vpmov{suffix}2m k7, ymm2"]


states = states_of(vector_state, "vector 512 packed", avx_512=True)
codes = codes_of(FORMS)
FAMILIES = families_of(FORMS, lambda name: name[:4])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_processor_gives_the_same(states: Batch, codes: dict[str, bytes], family: str) -> None:
    compare_forms(states, codes, FAMILIES[family])


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_the_processor_gives_the_same_for_each(states: Batch, codes: dict[str, bytes], name: str) -> None:
    compare_forms(states, codes, FORMS[name])
