"""Instructions on the mask registers of AVX-512 in software, against the processor."""

from __future__ import annotations

import pytest

from instruction_batch import Batch, compare_forms
from instruction_forms import codes_of, families_of, states_of
from vector_cases import vector_state

pytestmark = pytest.mark.kvm

SIZES = {"b": "byte", "w": "word", "d": "dword", "q": "qword"}
FORMS: dict[str, list[str]] = {}
for suffix, size in SIZES.items():
    general = ("rax", "r9") if suffix == "q" else ("eax", "r9d")
    FORMS[f"kmov{suffix}"] = [
        f"kmov{suffix} k1, k2", f"kmov{suffix} k3, {size} ptr [rsi + 3]", f"kmov{suffix} {size} ptr [rsi + 5], k7",
        f"kmov{suffix} k1, {general[0]}", f"kmov{suffix} k0, {general[1]}", f"kmov{suffix} {general[0]}, k1",
        f"kmov{suffix} {general[1]}, k5",
    ]  # fmt: skip
    for name in ("kand", "kandn", "kor", "kxnor", "kxor", "kadd"):
        FORMS[name + suffix] = [
            f"{name}{suffix} k1, k2, k3",
            f"{name}{suffix} k5, k5, k7",
            f"{name}{suffix} k0, k6, k6",
        ]
    for name in ("knot", "kortest", "ktest"):
        FORMS[name + suffix] = [f"{name}{suffix} k1, k2", f"{name}{suffix} k6, k6"]
    for name in ("kshiftl", "kshiftr"):
        FORMS[name + suffix] = [f"{name}{suffix} k1, k2, {by}" for by in (0, 1, 7, 8, 15, 16, 31, 33, 63, 64, 200)]
for name in ("kunpckbw", "kunpckwd", "kunpckdq"):
    FORMS[name] = [f"{name} k1, k2, k3", f"{name} k0, k7, k7"]


states = states_of(vector_state, "opmasks", avx_512=True)
codes = codes_of(FORMS)
FAMILIES = families_of(FORMS, lambda name: name[:4])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_processor_gives_the_same(states: Batch, codes: dict[str, bytes], family: str) -> None:
    compare_forms(states, codes, FAMILIES[family])


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_the_processor_gives_the_same_for_each(states: Batch, codes: dict[str, bytes], name: str) -> None:
    compare_forms(states, codes, FORMS[name])


def test_unusual_encodings(states: Batch) -> None:
    """VEX.L that does not fit, mask registers above K7, VEX.vvvv where there is no second source."""
    codes = [
        "c5 f8 41 ca", "c5 fc 90 ca", "c5 7c 41 ca", "c5 e8 90 ca", "c4 c1 f8 90 ca", "c5 b4 41 ca", "c4 c1 78 92 ca",
        "c5 78 93 ca", "c5 78 92 ca", "c4 c1 78 93 ca",
    ]  # fmt: skip
    compare_forms(states, {code: bytes.fromhex(code) for code in codes}, codes)
