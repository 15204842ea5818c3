"""A kernel finds the machine that it runs in by the tables that the machine left it: MP table and ACPI."""

from pathlib import Path

import pytest

from gnu_toolchain import compile_c
from kvmpy import End, Machine, MiB
from kvmpy.boot import MultibootKernel
from kvmpy.devices import DebugExit, Uart16550

SOURCE = Path(__file__).with_name("platform_tables.c")


def kernel(cmdline: str) -> MultibootKernel:
    program = compile_c(SOURCE.read_text("utf-8"), address=0x10_0000, bits=32)
    return MultibootKernel(program.elf, cmdline=cmdline)


def run(image: MultibootKernel, vcpus: int) -> str:
    """What the kernel prints until it leaves. RAM is full of 0xcc before it is loaded."""
    with Machine(memory=4 * MiB, vcpus=vcpus) as machine:
        machine.memory.fill(0, 4 * MiB, 0xCC)
        console = machine.add(Uart16550())
        machine.add(DebugExit())
        machine.load(image)
        outcome = machine.run(timeout=40)
        assert outcome.end is End.EXITED, (outcome, console.text)
        return console.text


@pytest.mark.parametrize("vcpus", [1, 4])
def test_processors_and_interrupt_inputs_are_where_the_mp_table_says(vcpus: int) -> None:
    others = "".join(f"up {number}\n" for number in range(1, vcpus))
    assert run(kernel("mp"), vcpus) == (
        f"processors {vcpus}\nboot 0\nlapic fee00000\nioapic fec00000\nlevels 0\n{others}timer 40\nserial 44\ndone\n"
    )
