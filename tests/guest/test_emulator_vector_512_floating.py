"""EVEX encodings of floating-point arithmetic in software, against the processor: masks, broadcast, roundings."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest

from instruction_batch import ROOM, Batch, assemble_each, batch, compare_forms, xsave_image
from instruction_comparison import Given, components, xcr0
from vector_cases import real_vectors

pytestmark = pytest.mark.kvm

XMM = 160


def forms_of(name: str, *, one_source: bool = False, sae: bool = False, immediate: str = "") -> list[str]:
    width = 4 if name.endswith("ps") else 8
    element = f"{'d' if width == 4 else 'q'}word ptr [rsi + 8]{{1to{64 // width}}}"
    second = "" if one_source else "zmm2, "
    roundings = ["{sae}"] if sae else ["{rn-sae}", "{rd-sae}", "{ru-sae}", "{rz-sae}"]
    return [
        f"{name} xmm17, {second.replace('z', 'x')}xmm31{immediate}",
        f"{name} ymm1{{k3}}, {second.replace('z', 'y')}ymm9{immediate}",
        f"{name} zmm1{{k7}}{{z}}, {second}zmm3{immediate}", f"{name} zmm30, {second}[rsi + 64]{immediate}",
        f"{name} ymm1{{k1}}, {second.replace('z', 'y')}[rsi + 32]{immediate}",
        f"{name} zmm16{{k2}}, {second}{element}{immediate}",
        *(f"{name} zmm18{{k{at + 1}}}, {second}zmm5, {rounding}{immediate}" for at, rounding in enumerate(roundings)),
    ]  # fmt: skip


FORMS: dict[str, list[str]] = {}
for suffix in ("ps", "pd"):
    for operation in ("add", "sub", "mul", "div"):
        FORMS.setdefault(operation, []).extend(forms_of(f"v{operation}{suffix}"))
    for operation in ("min", "max"):
        FORMS.setdefault(operation, []).extend(forms_of(f"v{operation}{suffix}", sae=True))
    FORMS.setdefault("sqrt", []).extend(forms_of(f"vsqrt{suffix}", one_source=True))
    for operation in ("fmadd", "fmsub", "fnmadd", "fnmsub", "fmaddsub", "fmsubadd"):
        for order in ("132", "213", "231"):
            FORMS.setdefault(operation, []).extend(forms_of(f"v{operation}{order}{suffix}"))
    for number in range(32):
        FORMS.setdefault("cmp", []).extend(
            form.replace("{z}", "").replace("xmm17,", "k1,").replace("ymm1{", "k2{").replace("zmm1{", "k3{")
            .replace("zmm30,", "k4,").replace("zmm16{", "k5{").replace("zmm18{", "k6{")
            for form in forms_of(f"vcmp{suffix}", sae=True, immediate=f", {number}")
        )  # fmt: skip


def state(chance: random.Random, number: int, place: int) -> Given:
    given = Given.random(chance)
    given.general[4] = place
    area = bytearray(xsave_image(chance, xcr0()))
    masks = chance.choice((0x1F80,) * 9 + (chance.getrandbits(6) << 7,) * 3)
    mode = chance.choice((0, 0, 0x40, 0x8000, 0x8040)) | chance.getrandbits(2) << 13
    struct.pack_into("<I", area, 24, masks | mode | chance.choice((0, 0, chance.getrandbits(6))))
    area[XMM : XMM + 256] = real_vectors(chance, 256)
    for component in (2, 6, 7):
        offset, size, _ = components()[component]
        area[offset : offset + size] = real_vectors(chance, size)
    given.xsave = bytes(area)
    given.data = real_vectors(chance, 192) + bytes(ROOM - 192)
    return given


@pytest.fixture(scope="module")
def states() -> Iterator[Batch]:
    if not {5, 6, 7} <= components().keys():
        pytest.skip("this processor has no AVX-512")
    with batch(state, "vector 512 floating") as made:
        made.state.sregs.cr4 |= 1 << 10  # OSXMMEXCPT
        yield made


@pytest.fixture(scope="module")
def codes() -> dict[str, bytes]:
    return assemble_each(form for forms in FORMS.values() for form in forms)


@pytest.mark.parametrize("name", FORMS)
def test_the_processor_gives_the_same(states: Batch, codes: dict[str, bytes], name: str) -> None:
    compare_forms(states, codes, FORMS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_the_processor_gives_the_same_in_each_form(states: Batch, codes: dict[str, bytes], name: str) -> None:
    for form in FORMS[name][:: 5 if name == "cmp" else 1]:
        compare_forms(states, codes, [form])
