"""EVEX encodings in software, against the processor: masks, zeroing, broadcast, registers above 15."""

from __future__ import annotations

import pytest

from instruction_batch import Batch, assemble_each, compare_forms
from instruction_forms import codes_of, states_of
from vector_cases import vector_state

pytestmark = pytest.mark.kvm

TWO = {
    "vpaddd": 4, "vpaddq": 8, "vpsubd": 4, "vpsubq": 8, "vpandd": 4, "vpandq": 8, "vpandnd": 4, "vpandnq": 8,
    "vpord": 4, "vporq": 8, "vpxord": 4, "vpxorq": 8, "vprolvd": 4, "vprolvq": 8, "vprorvd": 4, "vprorvq": 8,
    "vpermi2d": 4, "vpermi2q": 8, "vpermt2d": 4, "vpermt2q": 8,
}  # fmt: skip
ONE_AND_IMMEDIATE = {
    "vprold": 4, "vprolq": 8, "vprord": 4, "vprorq": 8, "vpslld": 4, "vpsllq": 8, "vpsrld": 4, "vpsrlq": 8,
    "vpsrad": 4, "vpsraq": 8, "vpshufd": 4,
}  # fmt: skip
MOVES = {
    "vmovdqa32": True, "vmovdqa64": True, "vmovdqu8": False, "vmovdqu16": False, "vmovdqu32": False, "vmovdqu64": False,
    "vmovaps": True, "vmovapd": True, "vmovups": False, "vmovupd": False,
}  # fmt: skip

FORMS = {
    name: [
        f"{name} xmm17, xmm2, xmm31", f"{name} ymm1{{k3}}, ymm18, ymm9", f"{name} zmm1{{k7}}{{z}}, zmm2, zmm3",
        f"{name} zmm30, zmm1, [rsi + 64]", f"{name} ymm1{{k1}}, ymm16, [rsi + 32]",
        f"{name} zmm16{{k2}}, zmm2, {'d' if width == 4 else 'q'}word ptr [rsi + 8]{{1to{64 // width}}}",
    ] for name, width in TWO.items()
}  # fmt: skip
for name, width in ONE_AND_IMMEDIATE.items():
    FORMS[name] = [
        f"{name} xmm17, xmm2, 13", f"{name} ymm1{{k3}}, ymm18, 77", f"{name} zmm1{{k7}}{{z}}, zmm2, 0x1b",
        f"{name} zmm30, [rsi + 64], 5",
        f"{name} ymm16, {'d' if width == 4 else 'q'}word ptr [rsi + 8]{{1to{32 // width}}}, 3",
    ]  # fmt: skip
for name, width in {"vpermd": 4, "vpermq": 8}.items():
    FORMS[name] = [
        f"{name} ymm17, ymm2, ymm31", f"{name} zmm1{{k7}}{{z}}, zmm2, zmm3", f"{name} zmm30{{k1}}, zmm1, [rsi + 64]",
        f"{name} ymm16, ymm2, {'d' if width == 4 else 'q'}word ptr [rsi + 8]{{1to{32 // width}}}",
    ]  # fmt: skip
for name, aligned in MOVES.items():
    at = "[rsi + 64]" if aligned else "[rsi + rdi + 5]"
    FORMS[name] = [
        f"{name} xmm17, xmm2", f"{name} zmm1{{k3}}, zmm31", f"{name} ymm1{{k7}}{{z}}, ymm18", f"{name} zmm30, {at}",
        f"{name} zmm1{{k4}}, {at}", f"{name} {at}, ymm17", f"{name} {at}{{k5}}, zmm1", f"{name}.s zmm1{{k3}}, zmm31",
    ]  # fmt: skip
MISALIGNED = ["vmovdqa32 zmm1, [rsi + 32]", "vmovdqa64 [rsi + 16], ymm17", "vmovaps xmm16, [rsi + 1]"]


states = states_of(vector_state, "vector 512", avx_512=True)
codes = codes_of(FORMS, MISALIGNED)


@pytest.mark.parametrize("name", FORMS)
def test_the_processor_gives_the_same(states: Batch, codes: dict[str, bytes], name: str) -> None:
    compare_forms(states, codes, FORMS[name])


def test_every_immediate_of_the_ternary_operation(states: Batch) -> None:
    forms = [f"vpternlog{'dq'[number % 2]} zmm1, zmm18, zmm3, {number}" for number in range(256)]
    compare_forms(states, assemble_each(forms), forms)


def test_memory_that_has_to_be_aligned_is_checked(states: Batch, codes: dict[str, bytes]) -> None:
    compare_forms(states, codes, MISALIGNED)
    assert states.software(codes[MISALIGNED[0]], 0).exception == (13, 0, None)


UNDEFINED = ["62 f1 7d c8 6f ca", "62 f1 6d 68 fe cb", "62 f1 75 48 6f ca", "62 f1 7d c9 7f 0e"]


@pytest.mark.parametrize("code", UNDEFINED)
def test_fields_that_do_not_fit_are_an_undefined_opcode(states: Batch, code: str) -> None:
    """Zeroing without a mask, a length that is none, a first source too many, a zeroing store."""
    compare_forms(states, {code: bytes.fromhex(code)}, [code])
    assert states.software(bytes.fromhex(code), 0).exception == (6, None, None)
