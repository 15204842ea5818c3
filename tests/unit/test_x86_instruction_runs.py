"""Going through code by a regular expression, against going through it one instruction after the other."""

import random
import re

from kvmpy.x86 import instruction_length
from kvmpy.x86.instruction_runs import PLAIN, reaches, starts_of, sweep

PREFIXES = (b"", b"", b"H", b"A", b"f", b"\xf3", b"\x0f", b"H\x0f", b"f\x0f", b"\xf3\x0f", b"e", b"eH", b".", b"fA")


def test_an_instruction_is_as_long_by_the_expression_as_by_the_function_and_not_sensitive() -> None:
    chance = random.Random(1)
    plain = re.compile(PLAIN, re.DOTALL)
    known = 0
    for _ in range(40_000):
        code = chance.choice(PREFIXES) + chance.randbytes(20)
        found = plain.match(code)
        if found is not None:
            known += 1
            assert instruction_length.length_and_kind(code, 0) == (found.end(), False), code.hex(" ")
    assert known > 15_000


def test_a_sweep_finds_what_the_function_finds() -> None:
    chance = random.Random(2)
    for _ in range(50):
        code = chance.randbytes(500)
        starts, sensitive = instruction_length.sweep(code, 0, 450)
        end, found = sweep(code, 0, 450)
        assert found == sensitive
        assert starts_of(code, 0, 450) == starts
        assert end >= 450
        assert reaches(code, 0, max(starts))
        assert all(reaches(code, 0, at) == (at in starts) for at in range(60))


def test_a_sweep_ends_where_the_code_ends_within_an_instruction() -> None:
    assert sweep(bytes.fromhex("90 9c 90 f4 e8 00 00"), 0, 100) == (9, [1])
    assert sweep(bytes.fromhex("90 9c 90 f4 0f"), 0, 100) == (4, [1])
