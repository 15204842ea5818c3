"""EVEX encodings of floating-point arithmetic in software, against the processor: masks, broadcast, roundings."""

from __future__ import annotations

import random
import struct

import pytest

from instruction_batch import ROOM, Batch, compare_forms, xsave_image
from instruction_comparison import Given, components, xcr0
from instruction_forms import OSXMMEXCPT, codes_of, families_of, states_of
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

CONVERSIONS = {
    "vcvtps2pd": (4, 8), "vcvtpd2ps": (8, 4), "vcvtdq2ps": (4, 4), "vcvtqq2ps": (8, 4), "vcvtps2dq": (4, 4),
    "vcvttps2dq": (4, 4), "vcvtdq2pd": (4, 8), "vcvtqq2pd": (8, 8), "vcvttpd2dq": (8, 4), "vcvtpd2dq": (8, 4),
    "vcvttps2udq": (4, 4), "vcvttpd2udq": (8, 4), "vcvttps2uqq": (4, 8), "vcvttpd2uqq": (8, 8), "vcvtps2udq": (4, 4),
    "vcvtpd2udq": (8, 4), "vcvtps2uqq": (4, 8), "vcvtpd2uqq": (8, 8), "vcvttps2qq": (4, 8), "vcvttpd2qq": (8, 8),
    "vcvtudq2pd": (4, 8), "vcvtuqq2pd": (8, 8), "vcvtudq2ps": (4, 4), "vcvtuqq2ps": (8, 4), "vcvtps2qq": (4, 8),
    "vcvtpd2qq": (8, 8),
}  # fmt: skip
for name, (source, target) in CONVERSIONS.items():
    wider = max(source, target)
    into, out_of = ("ymm" if target < source else "zmm"), ("ymm" if source < target else "zmm")
    part = 64 * source // wider
    memory = {64: "zmmword", 32: "ymmword"}[part]
    element = f"{'d' if source == 4 else 'q'}word ptr [rsi + 8]{{1to{64 // wider}}}"
    rounding = "{sae}" if name.startswith("vcvtt") or name == "vcvtps2pd" else "{ru-sae}"
    FORMS[name] = [
        f"{name} {into}17, {out_of}31", f"{name} xmm1{{k3}}, xmm9", f"{name} {into}1{{k7}}{{z}}, {out_of}3",
        f"{name} {into}30{{k1}}, {memory} ptr [rsi + {part}]", f"{name} {into}16{{k2}}, {element}",
        *([] if name in ("vcvtdq2pd", "vcvtudq2pd") else [f"{name} {into}18{{k4}}, {out_of}5, {rounding}"]),
    ]  # fmt: skip
for suffix, element in (("ps", "dword ptr [rsi + 8]{1to16}"), ("pd", "qword ptr [rsi + 8]{1to8}")):
    name = f"vrndscale{suffix}"
    FORMS[name] = [
        *(f"{name} zmm17{{k1}}, zmm2, {number}" for number in (0, 1, 2, 3, 4, 0x18, 0x2B, 0xF4, 0xA1)),
        f"{name} zmm1, {element}, 0x42", f"{name} zmm1{{k2}}, zmm3, {{sae}}, 0x24", f"{name} xmm1, [rsi + 16], 0x11",
    ]  # fmt: skip
for suffix, size, general in (("ss", "dword", "eax"), ("sd", "qword", "r9")):
    for operation in ("add", "sub", "mul", "div", "min", "max", "sqrt"):
        rounding = "{sae}" if operation in ("min", "max") else "{rd-sae}"
        FORMS.setdefault(f"scalar {operation}", []).extend([
            f"v{operation}{suffix} xmm17, xmm2, xmm31", f"v{operation}{suffix} xmm1{{k1}}, xmm18, {size} ptr [rsi + 8]",
            f"v{operation}{suffix} xmm1{{k2}}{{z}}, xmm18, xmm3",
            f"v{operation}{suffix} xmm1{{k3}}, xmm2, xmm5, {rounding}",
        ])  # fmt: skip
    for operation in ("fmadd", "fmsub", "fnmadd", "fnmsub"):
        for order in ("132", "213", "231"):
            name = f"v{operation}{order}{suffix}"
            FORMS.setdefault("scalar fma", []).extend([
                f"{name} xmm17, xmm2, xmm31", f"{name} xmm1{{k1}}, xmm18, {size} ptr [rsi + 8]",
                f"{name} xmm1{{k2}}{{z}}, xmm18, xmm3", f"{name} xmm1{{k3}}, xmm2, xmm5, {{rz-sae}}",
            ])  # fmt: skip
    FORMS.setdefault("scalar compare", []).extend([
        *(f"vcmp{suffix} k1{{k2}}, xmm17, xmm3, {number}" for number in range(32)),
        f"vcmp{suffix} k3, xmm1, {size} ptr [rsi + 8], 1", f"vcmp{suffix} k3, xmm1, xmm2, {{sae}}, 2",
        f"vucomi{suffix} xmm17, xmm2", f"vcomi{suffix} xmm17, {size} ptr [rsi + 8]",
        f"vucomi{suffix} xmm17, xmm2, {{sae}}",
    ])  # fmt: skip
    FORMS.setdefault("scalar round", []).extend(
        f"vrndscale{suffix} xmm1{{k1}}, xmm17, xmm2, {number}" for number in (0, 1, 2, 3, 4, 0x18, 0x2B, 0xF4)
    )
    FORMS.setdefault("scalar conversions", []).extend([
        f"vcvtsi2{suffix} xmm17, xmm2, rax", f"vcvtusi2{suffix} xmm1, xmm17, eax",
        f"vcvtusi2{suffix} xmm1, xmm17, qword ptr [rsi + 8]", f"vcvtusi2{suffix} xmm1, xmm2, {{ru-sae}}, rbx",
        f"vcvt{suffix}2si {general}, xmm17", f"vcvtt{suffix}2si {general}, xmm18", f"vcvt{suffix}2usi {general}, xmm1",
        f"vcvtt{suffix}2usi {general}, {size} ptr [rsi + 8]", f"vcvt{suffix}2usi {general}, xmm1, {{rd-sae}}",
        f"vcvtt{suffix}2si {general}, xmm1, {{sae}}",
    ])  # fmt: skip
    FORMS.setdefault("scalar moves", []).extend([
        f"vmov{suffix} xmm17, {size} ptr [rsi + 8]", f"vmov{suffix} xmm1{{k1}}, {size} ptr [rsi + 16]",
        f"vmov{suffix} {size} ptr [rsi + 8]{{k1}}, xmm17", f"vmov{suffix} xmm17{{k2}}, xmm1, xmm3",
        f"vmov{suffix} xmm1{{k1}}{{z}}, xmm17, xmm3", f"vmov{suffix}.s xmm1{{k1}}, xmm17, xmm3",
    ])  # fmt: skip
FORMS["scalar conversions"] += [
    "vcvtss2sd xmm17, xmm2, xmm3", "vcvtss2sd xmm1{k1}, xmm17, dword ptr [rsi + 8]",
    "vcvtsd2ss xmm17{k1}{z}, xmm2, xmm3",
    "vcvtsd2ss xmm1, xmm2, xmm3, {ru-sae}", "vcvtsd2ss xmm1{k1}, xmm17, qword ptr [rsi + 8]",
]  # fmt: skip
FORMS["scalar moves"] += [
    "vmovd xmm17, eax", "vmovq xmm18, r9", "vmovd dword ptr [rsi + 8], xmm17", "vmovq rax, xmm17", "vmovd r9d, xmm31",
    "vmovq xmm17, xmm2", "vmovq xmm17, qword ptr [rsi + 16]", "vmovq qword ptr [rsi + 8], xmm17",
    "vmovd xmm17, dword ptr [rsi + 4]",
]  # fmt: skip


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


states = states_of(state, "vector 512 floating", avx_512=True, cr4=OSXMMEXCPT)
codes = codes_of(FORMS)
FAMILIES = families_of(FORMS, lambda name: "vcvt" if name.startswith("vcvt") else name.removeprefix("scalar ")[:4])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_processor_gives_the_same(states: Batch, codes: dict[str, bytes], family: str) -> None:
    compare_forms(states, codes, FAMILIES[family])


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_the_processor_gives_the_same_in_each_form(states: Batch, codes: dict[str, bytes], name: str) -> None:
    for form in FORMS[name][:: 5 if name == "cmp" else 1]:
        compare_forms(states, codes, [form])
