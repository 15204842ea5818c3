"""A kernel finds the machine that it runs in by the tables that the machine left it: MP table and ACPI."""

from pathlib import Path

import pytest

from gnu_toolchain import compile_c
from kvmpy import End, Machine, MiB
from kvmpy.boot import MultibootKernel
from kvmpy.devices import AcpiPm, DebugExit, Uart16550

SOURCE = Path(__file__).with_name("platform_tables.c")


def kernel(cmdline: str) -> MultibootKernel:
    program = compile_c(SOURCE.read_text("utf-8"), address=0x10_0000, bits=32)
    return MultibootKernel(program.elf, cmdline=cmdline)


def machine_with_ram_full_of_rubbish(vcpus: int) -> Machine:
    machine = Machine(memory=4 * MiB, vcpus=vcpus)
    machine.memory.fill(0, 4 * MiB, 0xCC)
    return machine


def found(vcpus: int, levels: int) -> str:
    """What the kernel says when it has found processors and interrupt inputs."""
    others = "".join(f"up {number}\n" for number in range(1, vcpus))
    return (
        f"processors {vcpus}\nboot 0\nlapic fee00000\nioapic fec00000\nlevels {levels:x}\n{others}timer 40\nserial 44\n"
    )


@pytest.mark.parametrize("vcpus", [1, 4])
def test_processors_and_interrupt_inputs_are_where_the_mp_table_says(vcpus: int) -> None:
    with machine_with_ram_full_of_rubbish(vcpus) as machine:
        console = machine.add(Uart16550())
        machine.add(DebugExit())
        machine.load(kernel("mp"))
        outcome = machine.run(timeout=40)
        assert (outcome.end, console.text) == (End.EXITED, found(vcpus, levels=1 << 9) + "done\n")


@pytest.mark.parametrize("vcpus", [1, 4])
def test_processors_interrupt_inputs_and_power_management_are_where_acpi_says(vcpus: int) -> None:
    with machine_with_ram_full_of_rubbish(vcpus) as machine:
        power = machine.add(AcpiPm())
        console = machine.add(Uart16550())
        machine.load(kernel("acpi"))
        machine.start(timeout=40)
        console.expect("press", timeout=30)
        power.press_power_button()
        outcome = machine.wait()
        assert console.text == found(vcpus, levels=1 << 9) + ("counts\npress\nbutton 49\nstatus 100\ncleared 0\ns5 5\n")
        assert (outcome.end, outcome.ok) == (End.SHUTDOWN, True)
        assert "sleep type 5" in str(outcome)
        assert power.counters == {}
