"""The guest whose instructions are done in software: its machine code is what its source says."""

from __future__ import annotations

import pytest

from gnu_toolchain import assemble
from kvmpy.bench import instruction_completion
from kvmpy.bench.instruction_completion import INSTRUCTIONS, SOURCE, program


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_the_machine_code_is_what_the_source_says(instruction: str) -> None:
    assert program(instruction) == assemble(SOURCE.format(instruction=instruction), bits=64)


def test_every_instruction_has_a_row_of_the_emulator() -> None:
    """What is counted is found by that name; on another host it is not counted at all."""
    from kvmpy.x86.emulator import decode

    for instruction, code in INSTRUCTIONS.items():
        row, _ = decode(code + bytes(15), 64)
        assert row.name == instruction_completion.row_name(instruction)
