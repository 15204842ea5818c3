"""x87 control, loads, stores, exchanges, arithmetic and comparisons in software, against the processor."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import pytest

from instruction_batch import Batch, assemble_each, batch, compare_batch, compare_forms, xsave_image
from instruction_comparison import Given, xcr0
from instruction_forms import states_of

pytestmark = pytest.mark.kvm

CONTROL = """
fnclex | fwait | fldcw [rsi] | fnstsw ax | emms | ldmxcsr [rsi] | stmxcsr [rsi]
fninit | fnstcw [rsi] | fnstsw [rsi] | fneni | fndisi | fnsetpm
"""
LOADS = """
fild word ptr [rsi] | fild dword ptr [rsi] | fild qword ptr [rsi]
fld dword ptr [rsi] | fld qword ptr [rsi] | fld tbyte ptr [rsi] | fld tbyte ptr [rsi + 16] | fld st(0) | fld st(3)
fld1 | fldl2t | fldl2e | fldpi | fldlg2 | fldln2 | fldz
"""
STORES = """
fst dword ptr [rsi] | fstp dword ptr [rsi] | fst qword ptr [rsi] | fstp qword ptr [rsi] | fstp tbyte ptr [rsi]
fist word ptr [rsi] | fist dword ptr [rsi] | fistp word ptr [rsi] | fistp dword ptr [rsi] | fistp qword ptr [rsi]
fisttp word ptr [rsi] | fisttp dword ptr [rsi] | fisttp qword ptr [rsi]
fst st(2) | fstp st(0) | fstp st(7)
"""
STACK = """
fxch | fxch st(0) | fxch st(5) | ffree st(0) | ffree st(4) | ffreep st(3) | fincstp | fdecstp
"""
ENVIRONMENT = """
fnstenv [rsi] | data16 fnstenv [rsi] | fldenv [rsi + 16] | data16 fldenv [rsi + 16]
fnsave [rsi] | data16 fnsave [rsi] | frstor [rsi + 16] | data16 frstor [rsi + 16]
"""

OPERATIONS = {
    name: f"""
    f{name} dword ptr [rsi] | f{name} qword ptr [rsi] | f{name} st, st(3) | f{name} st(2), st | f{name} st, st(0)
    fi{name} dword ptr [rsi] | fi{name} word ptr [rsi] | f{name}p st(1), st | f{name}p st(4), st
    """
    for name in ("add", "mul", "sub", "subr", "div", "divr")
} | {
    "cmov": """
    fcmovb st, st(1) | fcmove st, st(2) | fcmovbe st, st(3) | fcmovu st, st(4)
    fcmovnb st, st(1) | fcmovne st, st(2) | fcmovnbe st, st(3) | fcmovnu st, st(4)
    """,
    "com": """
    fcom dword ptr [rsi] | fcomp dword ptr [rsi] | fcom qword ptr [rsi] | fcomp qword ptr [rsi]
    ficom dword ptr [rsi] | ficomp dword ptr [rsi] | ficom word ptr [rsi] | ficomp word ptr [rsi]
    fcom st(1) | fcomp st(2) | fcompp
    """,
    "ucom": "fucom st(1) | fucomp st(2) | fucompp | ftst | fxam",
    "comi": "fcomi st, st(1) | fcomip st, st(3) | fucomi st, st(1) | fucomip st, st(3)",
    "others": "fchs | fabs | fnop | fbstp tbyte ptr [rsi]",
    "sqrt": "fsqrt", "rndint": "frndint", "scale": "fscale", "xtract": "fxtract", "prem": "fprem", "prem1": "fprem1",
}  # fmt: skip
"""What computes, by what it does."""


def forms(*groups: str) -> list[str]:
    return [form.strip() for group in groups for form in group.replace("\n", "|").split("|") if form.strip()]


FORMS = forms(CONTROL, LOADS, STORES, STACK, ENVIRONMENT)
COMPUTING = forms(*OPERATIONS.values())


def state(chance: random.Random, number: int, place: int) -> Given:
    given = Given.random(chance, 128)
    given.general[4] = place  # RSI
    given.xsave = xsave_image(chance, chance.getrandbits(64) & xcr0() | 1, unmasked=True)
    data = bytearray(given.data)
    if number % 3 == 0:  # numbers of all kinds: singles, doubles, 80 bits
        single = chance.getrandbits(32)
        kinds = struct.pack("<I", single & 0x807F_FFFF), struct.pack("<I", single | 0x7F80_0000), bytes(4)
        data[:4] = chance.choice((*kinds, struct.pack("<f", chance.uniform(-9, 9))))
    elif number % 3 == 1:
        sign = chance.getrandbits(1) << 63
        data[:8] = struct.pack(
            "<Q", sign | chance.choice((chance.getrandbits(52), chance.getrandbits(52) | 0x7FF << 52))
        )
    given.data = bytes(data)
    return given


states = states_of(state, "x87")


@pytest.fixture(scope="module")
def codes() -> dict[str, bytes]:
    return assemble_each([*FORMS, *COMPUTING])


@pytest.mark.parametrize("form", FORMS)
def test_the_processor_gives_the_same(states: Batch, codes: dict[str, bytes], form: str) -> None:
    compare_batch(states, codes[form], leave_out=_pushes_an_empty_register(form))


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_processor_computes_the_same(states: Batch, codes: dict[str, bytes], name: str) -> None:
    compare_forms(states, codes, forms(OPERATIONS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("form", COMPUTING)
def test_the_processor_computes_the_same_in_each_form(states: Batch, codes: dict[str, bytes], form: str) -> None:
    compare_batch(states, codes[form])


def decimal(chance: random.Random, number: int, place: int) -> Given:
    """18 decimal digits at RSI, as FBLD takes them."""
    given = state(chance, number, place)
    digits = "".join(chance.choices("0123456789", k=18))[: chance.randrange(19)].rjust(18, "0")
    given.data = bytes.fromhex(digits)[::-1] + bytes((chance.choice((0, 0x80)),)) + bytes(118)
    return given


def test_packed_decimals_are_loaded(codes: dict[str, bytes]) -> None:
    with batch(decimal, "x87 decimals") as made:
        compare_batch(made, assemble_each(["fbld tbyte ptr [rsi]"])["fbld tbyte ptr [rsi]"])


def _pushes_an_empty_register(form: str) -> Callable[[Given], bool]:
    """FLD of an empty register pushes the indefinite number (SDM vol. 1, 8.5.1.1); AMD's leave its tag empty."""
    place = {"fld st(0)": 0, "fld st(3)": 3}.get(form)

    def pushes(given: Given) -> bool:
        status, tags = struct.unpack_from("<HB", given.xsave, 2)
        return place is not None and not tags >> ((status >> 11) + place & 7) & 1

    return pushes


def test_pushing_an_empty_register_pushes_the_indefinite_number(states: Batch, codes: dict[str, bytes]) -> None:
    leave_out = _pushes_an_empty_register("fld st(3)")
    seen = 0
    for number, given in enumerate(states.cases):
        control, status, tags = struct.unpack_from("<HHB", given.xsave)
        if leave_out(given) and control & 1 and not status & 0x80:
            words, registers, *_ = states.software(codes["fld st(3)"], number).extended
            full = tags >> ((status >> 11) - 1 & 7) & 1
            _, after, tags_after = struct.unpack("<HHB", words)
            top = after >> 11 & 7
            assert (top, after & 0x41) == ((status >> 11) - 1 & 7, 0x41)
            assert bool(after & 0x200) == bool(full)
            assert tags_after == tags | 1 << top
            assert registers[:10].hex() == "00000000000000c0ffff"
            seen += 1
    assert seen > 50
