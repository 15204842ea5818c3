"""A kernel finds the machine that it runs in by the tables that the machine left it: MP table and ACPI."""

import threading
from pathlib import Path

import pytest

from gnu_toolchain import assemble, compile_c
from kvmpy import End, Machine, MiB
from kvmpy.boot import FlatImage, MultibootKernel
from kvmpy.boot.platform import FixedHardware, IsaDevice, SleepRegisters
from kvmpy.devices import I8042, AcpiPm, AcpiSleep, Cmos, DebugExit, Device, PciHostBridge, Uart16550
from kvmpy.errors import OverlapError
from kvmpy.machine.platform_tables import platform_of

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


def test_a_machine_gets_power_management_with_the_first_kernel_and_keeps_it() -> None:
    image = kernel("acpi")
    with machine_with_ram_full_of_rubbish(vcpus=2) as machine:
        console = machine.add(Uart16550())
        machine.add(DebugExit())
        texts = []
        for _ in range(2):
            entry = machine.load(image)
            texts.append((entry.ranges, machine.memory.read(0xF_0000, 0x1_0000)))
            assert [type(each).__name__ for each in machine.devices] == ["Uart16550", "DebugExit", "AcpiPm"]
        assert texts[0] == texts[1]
        machine.start(timeout=40)
        console.expect("press", timeout=30)
        power = machine.devices[2]
        assert isinstance(power, AcpiPm)
        power.press_power_button()
        assert machine.wait().end is End.SHUTDOWN
        # And once more, in the same machine. Its local APIC still holds the interrupts of the first time.
        machine.load(image)
        machine.start(timeout=40)
        console.expect("press", timeout=30)
        power.press_power_button()
        assert machine.wait().end is End.SHUTDOWN
        assert console.text.count(found(2, levels=1 << 9)) == 2


def test_kernels_that_were_given_tables_and_machines_without_irqchip_get_none() -> None:
    program = compile_c(SOURCE.read_text("utf-8"), address=0x10_0000, bits=32)
    for image, irqchip in (
        (MultibootKernel(program.elf, tables=()), True),
        (MultibootKernel(program.elf), False),
    ):
        with Machine(memory=4 * MiB, irqchip=irqchip) as machine:
            console = machine.add(Uart16550())
            machine.add(DebugExit())
            machine.load(image)
            assert machine.run(timeout=20).end is End.EXITED
            assert console.text == "no MP table\n"
            assert len(machine.devices) == 2
        assert machine.memory.read(0xF_0000, 0x1_0000) == bytes(0x1_0000)


def test_devices_that_are_plugged_in_are_described() -> None:
    with Machine(memory=4 * MiB, vcpus=2) as machine:
        for serial in (Uart16550(), Uart16550(port=0x2F8, irq=3)):
            machine.add(serial)
        for device in (I8042(), Cmos(), PciHostBridge(), AcpiPm(0xB000, 10, timer_bits=24)):
            machine.add(device)
        platform = platform_of(machine)
    assert platform.apic_ids == (0, 1)
    assert platform.signature
    assert platform.serial_ports == (IsaDevice(0x3F8, 4), IsaDevice(0x2F8, 3))
    assert (platform.keyboard, platform.clock, platform.pci) == (IsaDevice(0x60, 1), IsaDevice(0x70, 8), True)
    assert isinstance(platform.power, FixedHardware)
    assert (platform.power.pm_timer, platform.power.sci, platform.power.timer_bits) == (0xB008, 10, 24)


def test_a_device_where_power_management_wants_to_be_is_named() -> None:
    with Machine(memory=4 * MiB) as machine:
        machine.map_ports(0x604, 1, name="mine")
        with pytest.raises(OverlapError, match=r"ACPI PM.*mine"):
            machine.load(kernel("acpi"))
        machine.add(AcpiPm(0xB000))
        machine.load(kernel("acpi"))


def test_a_machine_with_the_reduced_registers_is_described_so_and_ends_by_them() -> None:
    source = """
        mov dx, 0x600
        mov al, 0x14
        out dx, al
        mov al, 0x34
        out dx, al
        hlt
    """
    with Machine(memory=4 * MiB) as machine:
        machine.add(AcpiSleep())
        machine.load(kernel("acpi"))
        assert len(machine.devices) == 1
        assert isinstance(platform_of(machine).power, SleepRegisters)
        machine.load(FlatImage(assemble(source)))
        outcome = machine.run(timeout=10)
        assert (outcome.end, outcome.message) == (End.SHUTDOWN, "ACPI sleep registers: sleep type 5, soft off")


@pytest.mark.parametrize(("device", "port"), [(AcpiPm, 0x60C), (AcpiSleep, 0x602)])
def test_the_reset_register_ends_the_run_as_a_reset(device: type[Device], port: int) -> None:
    with Machine(memory=64 << 10) as machine:
        machine.add(device())
        machine.load(FlatImage(assemble(f"mov dx, {port}; mov al, 1; out dx, al; hlt")))
        assert machine.run(timeout=10).end is End.RESET


@pytest.mark.parametrize("busy", [0, 1])
def test_a_handler_can_ask_for_the_platform_while_another_processor_runs(busy: int) -> None:
    with Machine(memory=1 * MiB, vcpus=2) as machine:
        at_rest = platform_of(machine)
        owner = machine.vcpus[busy]
        claimed, answered = threading.Event(), threading.Event()

        def hold() -> None:
            owner.claim()
            claimed.set()
            answered.wait(10)
            owner.release()

        thread = threading.Thread(target=hold)
        thread.start()
        try:
            assert claimed.wait(10)
            assert platform_of(machine) == at_rest
        finally:
            answered.set()
            thread.join()
