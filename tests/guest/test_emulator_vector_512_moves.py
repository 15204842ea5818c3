"""EVEX encodings that move elements in software, against the processor."""

from __future__ import annotations

import pytest

from instruction_batch import Batch, compare_forms
from instruction_forms import codes_of, families_of, states_of
from vector_cases import vector_state

pytestmark = pytest.mark.kvm

D, Q = "dword ptr [rsi + 8]{1to16}", "qword ptr [rsi + 8]{1to8}"
FORMS: dict[str, list[str]] = {
    "broadcast": [
        "vbroadcastss zmm17{k1}, xmm2", "vbroadcastss xmm1, dword ptr [rsi + 12]", "vbroadcastsd zmm1{k2}{z}, xmm18",
        "vbroadcastsd ymm1, qword ptr [rsi + 16]", "vpbroadcastb zmm1{k3}, xmm17",
        "vpbroadcastw ymm17, word ptr [rsi + 6]",
        "vpbroadcastd zmm1{k3}, xmm17", "vpbroadcastq zmm18, qword ptr [rsi + 8]", "vbroadcastf32x2 zmm1{k1}, xmm17",
        "vbroadcasti32x2 xmm17, xmm1", "vbroadcasti32x2 zmm17{k4}, qword ptr [rsi + 8]",
        "vbroadcastf32x4 zmm1{k1}, [rsi + 16]", "vbroadcasti64x2 ymm17{k1}{z}, [rsi + 32]",
        "vbroadcastf32x8 zmm1{k1}, [rsi + 32]", "vbroadcasti64x4 zmm17{k5}, [rsi + 64]",
    ],
    "from general": [
        "vpbroadcastb zmm17{k1}, eax", "vpbroadcastw ymm1, ebx", "vpbroadcastd zmm1{k2}{z}, r9d",
        "vpbroadcastq xmm17, r10",
    ],
    "insert": [
        "vinsertf32x4 zmm1{k1}, zmm17, xmm3, 3", "vinserti32x4 ymm17, ymm2, xmmword ptr [rsi + 16], 1",
        "vinsertf64x2 zmm1{k2}{z}, zmm17, xmm3, 6", "vinserti64x4 zmm1, zmm2, ymm31, 1",
        "vinsertf32x8 zmm1{k3}, zmm2, ymmword ptr [rsi + 32], 0", "vinserti64x2 zmm1, zmm2, xmm3, 2",
    ],
    "extract": [
        "vextractf32x4 xmm1{k1}, zmm17, 3", "vextracti32x4 xmmword ptr [rsi + 16], ymm17, 1",
        "vextractf64x2 xmm17{k2}{z}, zmm1, 6", "vextracti64x4 ymm1, zmm31, 1",
        "vextractf32x8 ymmword ptr [rsi + 32]{k3}, zmm2, 0", "vextracti64x2 xmm1, zmm2, 2",
    ],
    "shuffle blocks": [
        "vshuff32x4 zmm1{k1}, zmm17, zmm3, 0x1b", "vshufi64x2 ymm17, ymm2, ymm3, 1",
        f"vshuff64x2 zmm1, zmm2, {Q}, 0x93",
        "vshufi32x4 ymm1{k2}{z}, ymm2, [rsi + 32], 2",
    ],
    "align": [f"valignd zmm1{{k1}}, zmm17, zmm3, {at}" for at in (0, 3, 15, 18)] + [
        "valignq ymm1, ymm2, ymm17, 3", f"valignq zmm1{{k1}}{{z}}, zmm2, {Q}, 5", "valignd xmm1, xmm2, xmm3, 7",
    ],
    "unpack": [
        f"vunpck{half}{kind} {operands}" for half in "lh" for kind, element in (("ps", D), ("pd", Q))
        for operands in ("xmm17, xmm2, xmm3", "zmm1{k1}, zmm17, [rsi + 64]", f"zmm1{{k2}}{{z}}, zmm2, {element}")
    ],
    "shuffle": [
        "vshufps zmm1{k1}, zmm17, zmm3, 0x1b", f"vshufps zmm1, zmm2, {D}, 0x93", "vshufpd zmm17, zmm2, zmm3, 0xa5",
        "vshufpd ymm1{k1}, ymm17, [rsi + 32], 9", "vmovsldup zmm1{k1}, zmm17", "vmovshdup ymm17, [rsi + 32]",
        "vmovddup zmm1{k1}, zmm17", "vmovddup xmm17, qword ptr [rsi + 8]", "vmovddup ymm17, [rsi + 32]",
    ],
    "permute": [
        "vpermilps zmm1{k1}, zmm17, 0x1b", f"vpermilpd zmm1, {Q}, 0xa5", "vpermilps ymm17, ymm2, ymm3",
        "vpermilpd zmm1{k1}{z}, zmm17, [rsi + 64]", "vpermq zmm1{k1}, zmm17, 0x1b", f"vpermpd zmm1, {Q}, 0x93",
        "vpermps ymm17, ymm2, ymm3", "vpermpd zmm1{k1}, zmm17, zmm3", "vpermb zmm1{k1}, zmm17, zmm3",
        "vpermw ymm17, ymm2, [rsi + 32]", "vpermi2b zmm1{k1}, zmm17, zmm3", "vpermt2w ymm17{k1}{z}, ymm2, ymm3",
        f"vpermi2ps zmm1, zmm2, {D}", "vpermt2pd zmm17{k2}, zmm2, zmm3",
    ],
}  # fmt: skip
PARTS = {"bw": 2, "bd": 4, "bq": 8, "wd": 2, "wq": 4, "dq": 2}
SIZES = {64: "zmmword", 32: "ymmword", 16: "xmmword", 8: "qword", 4: "dword", 2: "word"}
for suffix, part in PARTS.items():
    for sign in "sz":
        name = f"vpmov{sign}x{suffix}"
        source = {2: "ymm", 4: "xmm", 8: "xmm"}[part]
        FORMS[name] = [
            f"{name} zmm1{{k1}}, {source}17", f"{name} xmm17{{k2}}{{z}}, xmm3",
            f"{name} zmm30, {SIZES[64 // part]} ptr [rsi + {64 // part}]",
            f"{name} xmm1{{k1}}, {SIZES[16 // part]} ptr [rsi + {16 // part}]",
        ]  # fmt: skip
    for sign in ("", "s", "us"):
        name = f"vpmov{sign}{suffix[::-1]}"
        FORMS[name] = [
            f"{name} {source}1{{k1}}, zmm17", f"{name} xmm17{{k2}}{{z}}, xmm3",
            f"{name} {SIZES[64 // part]} ptr [rsi + {64 // part}], zmm17",
            f"{name} {SIZES[16 // part]} ptr [rsi + {16 // part}]{{k1}}, xmm2",
        ]  # fmt: skip


states = states_of(vector_state, "vector 512 moves", avx_512=True)
codes = codes_of(FORMS)
FAMILIES = families_of(FORMS, lambda name: name[:6])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_processor_gives_the_same(states: Batch, codes: dict[str, bytes], family: str) -> None:
    compare_forms(states, codes, FAMILIES[family])


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_the_processor_gives_the_same_for_each(states: Batch, codes: dict[str, bytes], name: str) -> None:
    compare_forms(states, codes, FORMS[name])
