"""Floating-point arithmetic, comparisons and conversions of SSE, AVX and FMA in software, against the processor.

All roundings, denormals as zero and flushed to zero, and exceptions that are not masked.
"""

from __future__ import annotations

import random
import struct
from dataclasses import replace

import pytest

from instruction_batch import ROOM, Batch, compare_forms, xsave_image
from instruction_comparison import Given, components, xcr0
from instruction_forms import OSXMMEXCPT, codes_of, families_of, states_of
from vector_cases import listed, real_vectors

pytestmark = pytest.mark.kvm

XMM, AVX = 160, 2


def forms_of(name: str, size: str, *, immediate: str = "", one_source: bool = False) -> list[str]:
    """Registers and memory, legacy and VEX; those of vectors also with 256 bits."""
    packed = size == "xmmword"
    first = "" if one_source else "xmm2, "
    forms = [
        f"{name} xmm1, xmm2{immediate}", f"{name} xmm9, {size} ptr [rsi + 16]{immediate}",
        f"v{name} xmm1, {first}xmm3{immediate}", f"v{name} xmm10, {first}{size} ptr [rsi + rdi + 4]{immediate}",
    ]  # fmt: skip
    if packed:
        wide = first.replace("x", "y")
        forms += [
            f"v{name} ymm8, {wide}ymm10{immediate}", f"v{name} ymm1, {wide}ymmword ptr [rsi + rdi + 4]{immediate}"
        ]  # fmt: skip
    return forms


SIZES = {"ps": "xmmword", "pd": "xmmword", "ss": "dword", "sd": "qword"}
FORMS: dict[str, list[str]] = {}
for suffix, size in SIZES.items():
    for operation in ("add", "sub", "mul", "div", "min", "max"):
        FORMS[operation + suffix] = forms_of(operation + suffix, size)
    FORMS[f"sqrt{suffix}"] = forms_of(f"sqrt{suffix}", size, one_source=suffix in ("ps", "pd"))
    for number in (*range(12), 15):
        name = f"round{suffix}"
        FORMS[f"{name} {number}"] = forms_of(name, size, immediate=f", {number}", one_source=suffix in ("ps", "pd"))
    for number in range(32):
        forms = forms_of(f"cmp{suffix}", size, immediate=f", {number}")
        FORMS[f"cmp{suffix} {number}"] = forms if number < 8 else forms[2:]
for name in ("haddps", "haddpd", "hsubps", "hsubpd", "addsubps", "addsubpd"):
    FORMS[name] = forms_of(name, "xmmword")
for name in ("ucomiss", "ucomisd", "comiss", "comisd"):
    FORMS[name] = forms_of(name, SIZES[name[-2:]], one_source=True)
for order in ("132", "213", "231"):
    for operation in ("vfmadd", "vfmsub", "vfnmadd", "vfnmsub", "vfmaddsub", "vfmsubadd"):
        for suffix, size in SIZES.items():
            if len(suffix) == 2 and suffix[0] == "s" and operation in ("vfmaddsub", "vfmsubadd"):
                continue
            name = f"{operation}{order}{suffix}"
            FORMS[name] = forms_of(name[1:], size)[2:]
CONVERSIONS = """
cvtsi2ss xmm1, eax | cvtsi2ss xmm9, rbx | cvtsi2ss xmm1, dword ptr [rsi] | vcvtsi2ss xmm1, xmm2, rax
| vcvtsi2ss xmm1, xmm2, qword ptr [rsi + 3]
cvtsi2sd xmm1, eax | cvtsi2sd xmm9, rbx | cvtsi2sd xmm1, qword ptr [rsi] | vcvtsi2sd xmm1, xmm2, rax
cvttss2si eax, xmm1 | cvttss2si r9, xmm2 | cvttss2si eax, dword ptr [rsi + 4] | vcvttss2si rax, xmm3
cvttsd2si eax, xmm1 | cvttsd2si r9, xmm2 | cvttsd2si rax, qword ptr [rsi + 8] | vcvttsd2si eax, xmm3
cvtss2si eax, xmm1 | cvtss2si r9, xmm2 | cvtss2si eax, dword ptr [rsi + 4] | vcvtss2si rax, xmm3
cvtsd2si eax, xmm1 | cvtsd2si r9, xmm2 | cvtsd2si rax, qword ptr [rsi + 8] | vcvtsd2si eax, xmm3
cvtss2sd xmm1, xmm2 | cvtss2sd xmm9, dword ptr [rsi + 4] | vcvtss2sd xmm1, xmm2, xmm3
cvtsd2ss xmm1, xmm2 | cvtsd2ss xmm9, qword ptr [rsi + 8] | vcvtsd2ss xmm1, xmm2, xmm3
cvtps2pd xmm1, xmm2 | cvtps2pd xmm9, qword ptr [rsi + 4] | vcvtps2pd xmm1, xmm3 | vcvtps2pd ymm1, xmm3
| vcvtps2pd ymm1, [rsi + rdi + 4]
cvtpd2ps xmm1, xmm2 | cvtpd2ps xmm9, [rsi + 16] | vcvtpd2ps xmm1, xmm3 | vcvtpd2ps xmm1, ymm3
| vcvtpd2ps xmm1, ymmword ptr [rsi + rdi + 4]
cvtdq2ps xmm1, xmm2 | cvtdq2ps xmm9, [rsi + 16] | vcvtdq2ps ymm1, ymm3
cvtps2dq xmm1, xmm2 | cvtps2dq xmm9, [rsi + 16] | vcvtps2dq ymm1, ymm3
cvttps2dq xmm1, xmm2 | cvttps2dq xmm9, [rsi + 16] | vcvttps2dq ymm1, ymm3
cvttpd2dq xmm1, xmm2 | cvttpd2dq xmm9, [rsi + 16] | vcvttpd2dq xmm1, ymm3
vcvtph2ps xmm1, xmm2 | vcvtph2ps ymm1, xmm2 | vcvtph2ps ymm9, [rsi + rdi] | vcvtph2ps xmm1, qword ptr [rsi + 1]
vcvtps2ph xmm1, xmm2, 0 | vcvtps2ph xmm1, ymm2, 1 | vcvtps2ph [rsi + rdi], ymm2, 6 | vcvtps2ph xmm1, xmm2, 3
| vcvtps2ph qword ptr [rsi + 1], xmm2, 2
cvtdq2pd xmm1, xmm2 | cvtdq2pd xmm9, [rsi + 8] | vcvtdq2pd ymm1, xmm3
cvtpd2dq xmm1, xmm2 | cvtpd2dq xmm9, [rsi + 16] | vcvtpd2dq xmm1, ymm3
"""
FORMS |= listed(CONVERSIONS)
for number in (0xF1, 0x31, 0x7F, 0xFA, 0x0F, 0xF0, 0x93):
    FORMS[f"dpps {number}"] = forms_of("dpps", "xmmword", immediate=f", {number}")
    FORMS[f"dppd {number}"] = forms_of("dppd", "xmmword", immediate=f", {number}")[:4]


def state(chance: random.Random, count: int, place: int) -> Given:
    given = Given.random(chance)
    given.general[4], given.general[5] = place, count % 4
    area = bytearray(xsave_image(chance, xcr0()))
    masks = chance.choice((0x1F80,) * 9 + (chance.getrandbits(6) << 7,) * 3)
    mode = chance.choice((0, 0, 0x40, 0x8000, 0x8040)) | chance.getrandbits(2) << 13
    struct.pack_into("<I", area, 24, masks | mode | chance.choice((0, 0, chance.getrandbits(6))))
    area[XMM : XMM + 256] = real_vectors(chance, 256)
    offset = components()[AVX][0]
    area[offset : offset + 256] = real_vectors(chance, 256)
    given.xsave = bytes(area)
    given.data = real_vectors(chance, 96) + bytes(ROOM - 96)
    return given


states = states_of(state, "vector floating", cr4=OSXMMEXCPT)
codes = codes_of(FORMS)


def family_of(name: str) -> str:
    """Forms that differ only in what they work on: all of ADDPS, ADDPD, ADDSS, ADDSD together."""
    family = name.split()[0].removeprefix("v").rstrip("123")
    for suffix in SIZES:
        if not family.startswith("cvt"):
            family = family.removesuffix(suffix).rstrip("123")
    return family


FAMILIES = families_of(FORMS, family_of)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_processor_gives_the_same(states: Batch, codes: dict[str, bytes], family: str) -> None:
    compare_forms(states, codes, FAMILIES[family])


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_the_processor_gives_the_same_for_each(states: Batch, codes: dict[str, bytes], name: str) -> None:
    compare_forms(states, codes, FORMS[name])


def test_the_states_raise_every_exception(states: Batch, codes: dict[str, bytes]) -> None:
    """What is compared above is worth comparing: each flag of MXCSR is raised by some, and #XM too."""
    raised, traps = 0, 0
    for name in ("divps xmm1, xmm2", "mulpd xmm1, xmm2"):
        for given, outcome in zip(states.cases, states.native(codes[name]), strict=True):
            before, after = (struct.unpack_from("<I", each)[0] for each in (given.xsave[24:28], outcome.extended[4]))
            raised |= after & ~before
            traps += outcome.exception == (19, None, None)
    assert raised & 0x3F == 0x3F
    assert traps > 20


def test_without_osxmmexcpt_an_exception_that_is_not_masked_is_an_undefined_opcode(
    states: Batch, codes: dict[str, bytes]
) -> None:
    given = next(given for given in states.cases if not struct.unpack_from("<I", given.xsave, 24)[0] & 0x1000)
    area = bytearray(given.xsave)
    struct.pack_into("<2d", area, XMM + 16, 1.0, 1.0)
    struct.pack_into("<2d", area, XMM + 32, 3.0, 3.0)  # a third is not exact
    given = replace(given, xsave=bytes(area))
    assert states.software(codes["divpd xmm1, xmm2"], 0, given).exception == (19, None, None)
    states.state.sregs.cr4 &= ~OSXMMEXCPT
    try:
        assert states.software(codes["divpd xmm1, xmm2"], 0, given).exception == (6, None, None)
    finally:
        states.state.sregs.cr4 |= OSXMMEXCPT
