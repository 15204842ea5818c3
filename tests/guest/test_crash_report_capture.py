"""Crash reports of real machines: what they take from them, when, and that they leave them alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bare_guest import guest, next_exit
from crash_guests import GUESTS, crashed
from gnu_toolchain import assemble, compile_c
from kvmpy import KiB, Machine, MiB
from kvmpy.boot import ElfImage, FirmwareImage, FlatImage
from kvmpy.debug.crash_report import CrashReport, replay
from kvmpy.devices import DebugConsole, Uart16550
from kvmpy.errors import ClosedError, UsageError
from kvmpy.machine.outcome import End, Outcome
from kvmpy.x86.modes import reset_vector

PATIENCE = 20.0


def named(name: str):  # type: ignore[no-untyped-def]
    return next(guest for guest in GUESTS if guest.name == name)


@contextmanager
def loaded(source: str, mode: str = "real", *, irqchip: bool = False, vcpus: int = 1) -> Iterator[Machine]:
    with Machine(memory=1 * MiB, irqchip=irqchip, vcpus=vcpus) as machine:
        bits = {"real": 16, "protected": 32, "long": 64}[mode]
        machine.load(FlatImage(assemble(source, address=0x1000, bits=bits), 0x1000, mode))
        yield machine


def lines_of(report: CrashReport, name: str) -> str:
    section = report.section(name)
    assert section is not None, str(report)
    return "\n".join(line.text for line in section.lines)


def test_a_report_is_a_value_that_outlives_the_machine() -> None:
    with crashed(named("page_not_present")) as (machine, _, report):
        before = str(report)
        machine.memory.fill(0, 1 * MiB, 0x90)
        machine.vcpus[0].regs.rip = 0x1234
    assert str(report) == before
    assert report.state.regs.rip == 0x100A
    with pytest.raises(AttributeError):
        report.summary = "other"  # type: ignore[misc]


def test_a_machine_that_is_closed_is_the_callers_mistake() -> None:
    with crashed(named("page_not_present")) as (machine, outcome, _):
        pass
    with pytest.raises((ClosedError, UsageError)):
        CrashReport.capture(machine, outcome)


def test_the_machine_around_the_processor_is_shown() -> None:
    source = """
        mov al, 'H'
        out 0xe9, al
        mov al, 'i'
        out 0xe9, al
        in al, 0x71
        in al, 0x99
        ud2
    """
    with loaded(source, "protected", irqchip=True, vcpus=2) as machine:
        machine.add(DebugConsole())
        machine.add(Uart16550())
        report = CrashReport.capture(machine, machine.run(timeout=PATIENCE))
    assert "Hi" in lines_of(report, "consoles")
    exits = lines_of(report, "exits")
    assert "port write 0xe9 <- 0x48" in exits
    assert "nobody there" in exits
    devices = lines_of(report, "devices")
    assert "PIC: vectors from 0x00" in devices
    assert "never initialized" in devices
    assert "0x99" in devices
    assert "vCPU 1: rip 0xfff0, real mode, waits for INIT" in devices
    assert "0x00000000..0xfffff RAM" in lines_of(report, "memory")
    assert report.cause is not None
    assert report.cause.id == "undefined-instruction"


def test_a_machine_that_runs_stands_while_it_is_looked_at() -> None:
    with loaded("mov ecx, 7; 1: inc ebx; jmp 1b", "protected") as machine:
        machine.start(timeout=PATIENCE)
        time.sleep(0.02)
        report = CrashReport.capture(machine)
        assert machine.running
        machine.stop()
    assert report.end == "still running"
    assert report.state.regs.rcx == 7
    assert report.cause is not None
    assert report.cause.id == "endless-loop"
    assert "leads out" in report.cause.text


def test_what_another_thread_holds_is_named_instead_of_shown() -> None:
    # In a handler the machine cannot pause: it waits for the handler.
    seen: list[BaseException] = []

    def look(offset: int, size: int, value: int) -> None:
        try:
            CrashReport.capture(machine)
        except UsageError as error:
            seen.append(error)

    with loaded("out 0x10, al; hlt") as machine:
        machine.map_ports(0x10, 1, write=look)
        machine.run(timeout=PATIENCE)
    assert "handler" in str(seen[0])


def test_an_exit_that_nobody_handles_is_the_cause() -> None:
    from kvmpy.exits import SetTpr

    with loaded("hlt") as machine:
        machine.run(timeout=PATIENCE)
        report = CrashReport.capture(machine, Outcome(End.FAILED, "nobody handles it", exit=SetTpr(), vcpu=0))
    assert report.cause is not None
    assert report.cause.id == "exit-not-handled"


def test_a_vcpu_without_a_machine_is_explained_too() -> None:
    with guest("mov eax, 0x100; mov ds, eax; hlt", 32) as vcpu:
        report = CrashReport.of_vcpu(vcpu, next_exit(vcpu))
        assert report.cause is not None
        assert report.cause.id == "gdt-not-loaded", str(report)
        assert not report.unavailable
        assert "0x00000000..0x7ffff RAM" in lines_of(report, "memory")
    with guest("1: jmp 1b") as vcpu:
        report = CrashReport.of_vcpu(vcpu, vcpu.run(timeout=0.05))
        assert (report.end, report.cause.id if report.cause else "") == ("timeout", "endless-loop")
        assert CrashReport.of_vcpu(vcpu).end == "still running"
    with pytest.raises(ClosedError):
        CrashReport.of_vcpu(vcpu)


def test_breakpoints_of_the_debugger_are_not_taken_for_overwritten_code() -> None:
    with loaded("1: jmp 1b", "long") as machine:
        machine.breakpoint(0x1000, lambda vcpu, point: None, hardware=False)
        assert machine.memory.read_u8(0x1000) != 0xEB
        report = CrashReport.capture(machine, Outcome(End.TIMEOUT, vcpu=0))
    assert report.cause is not None
    assert report.cause.id == "endless-loop"


KERNEL = """
#include <stdint.h>
static volatile uint64_t *lookup(uint64_t index)
{
    return (volatile uint64_t *)(0x5000000000ull + 8 * index);
}

__attribute__((noinline)) static uint64_t read_entry(uint64_t index)
{
    return *lookup(index); /* here */
}

__attribute__((section(".text.entry"))) void _start(void)
{
    read_entry(3);
    for (;;)
        ;
}
"""


def test_a_kernel_in_c_is_shown_with_its_symbols_and_source_lines() -> None:
    program = compile_c(KERNEL, flags=("-g",))
    with Machine(memory=4 * MiB, irqchip=False) as machine:
        machine.load(ElfImage(program.elf))
        report = CrashReport.capture(machine, machine.run(timeout=PATIENCE))
    assert "<read_entry" in report.summary
    assert report.cause is not None
    assert report.cause.id == "page-not-present"
    code = report.section("code")
    assert code is not None
    (current,) = (line for line in code.data if line["current"])
    line = 1 + KERNEL[: KERNEL.index("/* here */")].count("\n")
    assert current["source"].endswith(f":{line}")
    assert "<_start" in lines_of(report, "stack")


def test_registers_that_kvm_has_reset_are_noticed() -> None:
    """What AMD-V's KVM does: after a shutdown the processor is as after power-on. Here the test does it."""
    with crashed(named("divide_without_idt")) as (machine, outcome, _):
        machine.vcpus[0].set_cpu_state(reset_vector())
        report = CrashReport.capture(machine, outcome)
        assert machine.entry is not None
        assert report.state == machine.entry.state
    assert report.registers_lost
    assert [finding.id for finding in report.findings] == ["registers-lost"]
    assert "replay" in str(report)
    assert report.as_data()["registers_lost"] is True


def test_a_firmware_that_shuts_down_at_the_reset_vector_has_lost_nothing() -> None:
    with Machine(memory=1 * MiB, irqchip=False) as machine:
        rom = bytearray(b"\xff" * 0x1_0000)
        rom[-16:-13] = b"\x0f\x0b\x90"
        machine.load(FirmwareImage(bytes(rom)))
        report = CrashReport.capture(machine, Outcome(End.TRIPLE_FAULT, vcpu=0))
    assert not report.registers_lost
    assert report.state.regs.rip == 0xFFF0


# Replays


@pytest.mark.parametrize(
    ("name", "last"), [("data_segment_not_reloaded", 0), ("divide_without_idt", 3), ("page_not_present", 1)]
)
def test_a_replay_shows_the_instructions_up_to_the_fatal_one(name: str, last: int) -> None:
    guest = named(name)
    report = replay(guest.machine, timeout=PATIENCE)
    assert report.end == "triple fault"
    assert report.cause is not None
    assert report.cause.id == guest.finds
    with crashed(guest) as (_, _, at_full_speed):
        assert report.state.regs.rip == at_full_speed.state.regs.rip
    steps = report.section("steps")
    assert steps is not None
    assert steps.data["count"] >= 1
    if last:
        assert steps.data["count"] == last
    assert steps.data["last"][-1]["address"] == report.state.regs.rip


def test_a_replay_shows_what_each_instruction_changed() -> None:
    with_steps = replay(named("divide_without_idt").machine, timeout=PATIENCE)
    steps = with_steps.section("steps")
    assert steps is not None
    changes = [step["changes"] for step in steps.data["last"]]
    assert changes[1].startswith("rax=0x3e8")
    assert changes[-1] == ""


def test_a_replay_ends_where_it_is_told_to() -> None:
    guest = named("endless_loop")
    by_symbol = replay(guest.machine, until="again", timeout=PATIENCE)
    assert by_symbol.end == "stopped"
    assert by_symbol.state.regs.rcx == 1
    by_function = replay(guest.machine, until=lambda vcpu: vcpu.regs.rcx >= 9, timeout=PATIENCE)
    assert by_function.state.regs.rcx == 9
    by_address = replay(guest.machine, until=by_symbol.state.regs.rip, timeout=PATIENCE)
    assert by_address.state == by_symbol.state
    counted = replay(guest.machine, steps=10, keep=4, timeout=PATIENCE)
    steps = counted.section("steps")
    assert steps is not None
    assert (steps.data["count"], len(steps.data["last"])) == (10, 4)


@pytest.mark.parametrize("irqchip", [False, True])
def test_a_replay_ends_at_hlt_as_the_guest_does(irqchip: bool) -> None:
    def make() -> Machine:
        machine = Machine(memory=512 * KiB, irqchip=irqchip)
        machine.load(FlatImage(assemble("cli; nop; hlt; nop", address=0x1000), 0x1000))
        return machine

    report = replay(make, timeout=PATIENCE)
    assert report.end == "halted"
    assert report.state.regs.rip == 0x1003


@pytest.mark.parametrize("limits", [{"keep": 0}, {"steps": 0}, {"timeout": 0.0}, {"timeout": float("nan")}])
def test_a_replay_refuses_limits_that_allow_nothing(limits: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="positive"):
        replay(named("endless_loop").machine, **limits)  # type: ignore[arg-type]
