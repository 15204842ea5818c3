"""What a user's own scripts do, with public names only: each test is one short program.

The guests are bytes with their assembly beside them, as in the tutorial, so that nothing but kvmpy is needed.
"""

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import kvmpy
from kvmpy import (
    End,
    GuestFailed,
    Hlt,
    Interrupted,
    IoIn,
    IoOut,
    Kvm,
    Machine,
    MiB,
    MmioRead,
    MmioWrite,
    RdMsr,
    Shutdown,
    WrMsr,
)
from kvmpy.boot import ElfImage, FlatImage
from kvmpy.devices import DebugExit, Device, Region, Uart16550
from kvmpy.kvm.msr_filter import MsrFilterRange
from kvmpy.x86.page_tables import PageTables
from kvmpy.x86.page_walk import walk
from kvmpy.x86.paging import PagingMode

PATIENCE = 20.0
"""Seconds until a guest that should have exited counts as hanging."""


def code(*lines: str) -> bytes:
    """Machine code from lines of hex digits, each with its assembly behind a semicolon."""
    return b"".join(bytes.fromhex(line.partition(";")[0]) for line in lines)


# The acceptance program on a bare vCPU, word for word


def test_two_and_two_is_four(capsys: pytest.CaptureFixture[str]) -> None:
    CODE = bytes([0xBA, 0xF8, 0x03,   # mov dx, 0x3f8  # noqa: N806
                  0x00, 0xD8,         # add al, bl
                  0x04, 0x30,         # add al, '0'
                  0xEE,               # out dx, al
                  0xF4])  # hlt  # fmt: skip

    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0x1000, size=0x1000)
        vm.memory.write(0x1000, CODE)
        vcpu = vm.create_vcpu()
        vcpu.set_real_mode(entry=0x1000)
        vcpu.regs.rax = 2
        vcpu.regs.rbx = 2
        for event in vcpu.exits():
            match event:
                case IoOut(port=0x3F8, data=data):
                    print(data.decode())
                case Hlt():
                    break

    assert capsys.readouterr().out == "4\n"


# The shape of the other acceptance program, with an image of our own: a machine, a console, a load, an outcome


def test_a_machine_with_a_console_runs_an_image() -> None:
    with Machine(memory=128 * MiB, vcpus=1) as machine:
        console = machine.add(Uart16550())
        machine.load(
            FlatImage(code("ba f8 03; mov dx, 0x3f8", "b0 21; mov al, '!'", "ee; out dx, al", "fa f4; cli; hlt"))
        )
        outcome = machine.run(timeout=PATIENCE)
        assert console.text == "!"
        assert outcome.end is End.HALTED
        assert outcome.ok
        assert str(outcome).startswith("halted")


def test_a_boot_sector_goes_to_7c00_and_an_elf_is_refused_that_is_none(tmp_path: Path) -> None:
    sector = tmp_path / "boot.bin"
    sector.write_bytes(
        code("e8 00 00; call next", "58; next: pop ax", "fa f4; cli; hlt").ljust(510, b"\0") + b"\x55\xaa"
    )
    with Machine(memory=1 * MiB) as machine:
        machine.load(FlatImage(sector))
        machine.run(timeout=PATIENCE, check=True)
        assert machine.vcpus[0].regs.rax & 0xFFFF == 0x7C03
    with pytest.raises(kvmpy.ImageError, match=str(sector)):
        ElfImage(sector)


def test_a_conversation_over_the_serial_port() -> None:
    # Answers every character with its successor.
    echo = code(
        "ba fd 03; again: mov dx, 0x3fd",
        "ec; in al, dx",
        "a8 01; test al, 1",
        "74 f8; jz again",
        "ba f8 03; mov dx, 0x3f8",
        "ec; in al, dx",
        "40; inc ax",
        "ee; out dx, al",
        "eb f0; jmp again",
    )
    with Machine(memory=0x10000) as machine:
        console = machine.add(Uart16550())
        machine.load(FlatImage(echo))
        machine.start()
        console.send(b"HAL")
        console.expect(b"IBM", timeout=PATIENCE)
        assert machine.stop().end is End.STOPPED


# Outcomes


def test_the_guest_s_exit_code_is_the_outcome() -> None:
    with Machine(memory=0x10000) as machine:
        machine.add(DebugExit())
        machine.load(FlatImage(code("b0 03; mov al, 3", "e6 f4; out 0xf4, al")))
        with pytest.raises(GuestFailed) as caught:
            machine.run(timeout=PATIENCE, check=True)
        assert caught.value.outcome.code == 7


def test_a_triple_fault_says_where() -> None:
    with Machine(memory=0x10000) as machine:
        machine.load(FlatImage(code("90; nop", "0f 0b; ud2"), mode="protected"))
        outcome = machine.run(timeout=PATIENCE)
        assert outcome.end is End.TRIPLE_FAULT
        assert isinstance(outcome.exit, Shutdown)
        assert not outcome.ok


def test_a_machine_under_asyncio() -> None:
    async def halted() -> bool:
        with Machine(memory=0x10000) as machine:
            machine.load(FlatImage(code("fa f4; cli; hlt")))
            return (await machine.run_async(timeout=PATIENCE)).end is End.HALTED

    assert asyncio.run(halted())


# Devices of one's own


class Adder(Device):
    """Write two bytes to port 0x300; read their sum from it."""

    name = "adder"

    def __init__(self) -> None:
        super().__init__()
        self.terms: list[int] = []

    def regions(self) -> tuple[Region, ...]:
        return (Region("port", 0x300, 1, self.name, self.read, self.write, width=1),)

    def read(self, offset: int, size: int) -> int:
        return sum(self.terms[-2:]) & 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        self.terms.append(value)

    def state(self) -> dict[str, Any]:
        return {"terms": list(self.terms)}

    def restore(self, state: dict[str, Any]) -> None:
        self.terms = list(state["terms"])


def test_a_device_of_20_lines_adds() -> None:
    with Machine(memory=0x10000) as machine:
        adder = machine.add(Adder())
        adder.restore({"terms": [40]})
        machine.load(
            FlatImage(
                code(
                    "ba 00 03; mov dx, 0x300", "b0 02; mov al, 2", "ee; out dx, al", "ec; in al, dx", "fa f4; cli; hlt"
                )
            )
        )
        assert machine.run(timeout=PATIENCE).ok
        assert machine.vcpus[0].regs.rax & 0xFF == 42
        assert machine.statistics().count("port", 0x300, "write") == 1


def test_two_functions_are_a_device_in_memory() -> None:
    written: list[tuple[int, int, int]] = []
    with Machine(memory=0x10000, irqchip=False) as machine:
        machine.map_mmio(
            0xD000_0000,
            0x10,
            read=lambda offset, size: 0x1000 + offset,
            write=lambda offset, size, value: written.append((offset, size, value)),
        )
        program = code("a1 04 00 00 d0; mov eax, [0xd0000004]", "a3 08 00 00 d0; mov [0xd0000008], eax", "f4; hlt")
        machine.load(FlatImage(program, mode="protected"))
        machine.run(timeout=PATIENCE, check=True)
    assert written == [(8, 4, 0x1004)]


def test_a_handler_that_fails_is_called_again_when_it_is_mended() -> None:
    answers: list[int] = []
    with Machine(memory=0x10000, irqchip=False) as machine:
        machine.map_ports(0x10, 1, read=lambda offset, size: answers.pop())
        machine.load(FlatImage(code("e4 10; in al, 0x10", "f4; hlt")))
        with pytest.raises(IndexError):
            machine.run(timeout=PATIENCE)
        answers.append(9)
        assert machine.run(timeout=PATIENCE).end is End.HALTED
        assert machine.vcpus[0].regs.rax & 0xFF == 9


# Page tables of one's own


def test_a_page_at_two_addresses_is_one_page() -> None:
    program = code(
        "b8 00 00 00 40; mov eax, 0x40000000",
        "48 c7 00 2a 00 00 00; mov qword ptr [rax], 42",
        "b8 00 00 00 50; mov eax, 0x50000000",
        "48 8b 18; mov rbx, [rax]",
        "f4; hlt",
    )
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=4 * MiB)
        vm.memory.write(0x1000, program)
        pages = PageTables(vm.memory, PagingMode.LEVEL4, 0x10000)
        pages.map(0x1000, 0x1000, 0x1000, writable=False)
        pages.map(0x4000_0000, 0x20_0000, 0x1000)
        pages.map(0x5000_0000, 0x20_0000, 0x1000, writable=False)
        vcpu = vm.create_vcpu()
        vcpu.set_long_mode(entry=0x1000, cr3=pages.cr3)
        assert vcpu.run(timeout=PATIENCE) == Hlt()
        assert vcpu.regs.rbx == 42
        assert walk(vm.memory, vcpu.sregs, 0x5000_0123).physical == 0x20_0123
        assert vcpu.translate(0x5000_0123).physical_address == 0x20_0123
        assert vcpu.walk(0x6000_0000).physical is None


# Several processors


def test_two_bare_processors_count_together() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0x1000, size=0x2000)
        vm.memory.write(0x1000, code("b9 00 01; mov cx, 0x100", "f0 ff 06 00 20; again: lock inc word ptr [0x2000]",
                                     "e2 f9; loop again", "f4; hlt"))  # fmt: skip
        vcpus = [vm.create_vcpu() for _ in range(2)]
        for vcpu in vcpus:
            vcpu.set_real_mode(entry=0x1000)
        threads = [threading.Thread(target=vcpu.run, args=(PATIENCE,)) for vcpu in vcpus]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert vm.memory.read_u16(0x2000) == 0x200


# State


def test_saved_registers_repeat_what_the_guest_did() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0x1000, size=0x1000)
        vm.memory.write(0x1000, code("40; again: inc ax", "e6 10; out 0x10, al", "eb fb; jmp again"))
        vcpu = vm.create_vcpu()
        vcpu.set_real_mode(entry=0x1000)
        vcpu.run(timeout=PATIENCE)
        saved, saved_registers = vcpu.cpu_state(), vcpu.regs.copy()
        second = vcpu.run(timeout=PATIENCE)
        vcpu.run(timeout=PATIENCE)
        vcpu.set_cpu_state(saved)
        assert vcpu.run(timeout=PATIENCE) == second
        vcpu.regs.assign(saved_registers)
        assert vcpu.run(timeout=PATIENCE) == second


def test_a_read_is_complete_after_settle() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0x1000, size=0x1000)
        vm.memory.write(0x1000, code("e4 10; in al, 0x10", "f4; hlt"))
        vcpu = vm.create_vcpu()
        vcpu.set_real_mode(entry=0x1000)
        event = vcpu.run(timeout=PATIENCE)
        assert isinstance(event, IoIn)
        event.reply(7)
        vcpu.settle()
        assert (vcpu.regs.rax, vcpu.regs.rip) == (7, 0x1002)


# Memory


def test_a_view_shows_what_the_guest_writes_and_outlives_the_vm() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0x1000, size=0x2000)
        view = vm.memory.view(0x2000, 0x10)
        vm.memory.write(0x1000, code("c6 06 00 20 2a; mov byte ptr [0x2000], 42", "f4; hlt"))
        vcpu = vm.create_vcpu()
        vcpu.set_real_mode(entry=0x1000)
        vcpu.run(timeout=PATIENCE)
        view[1] = 43
        assert vm.memory.read(0x2000, 2) == bytes((42, 43))
    assert bytes(view[:2]) == bytes((42, 43))


def test_memory_mapped_away_from_ram_is_an_exit() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0x1000, size=0x1000)
        vm.memory.write(0x1000, code("a0 00 90; mov al, [0x9000]", "a2 01 90; mov [0x9001], al", "f4; hlt"))
        vcpu = vm.create_vcpu()
        vcpu.set_real_mode(entry=0x1000)
        seen = []
        for event in vcpu.exits(PATIENCE):
            match event:
                case MmioRead(address=0x9000, size=1):
                    event.reply(5)
                case MmioWrite(address=address, data=data):
                    seen.append((address, data))
                case Hlt():
                    break
        assert seen == [(0x9001, b"\x05")]


def test_the_dirty_log_names_the_pages_that_were_written() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        ram = vm.add_ram(0, size=0x8000)
        vm.set_dirty_logging(ram)
        program = code(
            "c6 06 00 30 01; mov byte ptr [0x3000], 1", "c6 06 00 50 01; mov byte ptr [0x5000], 1", "f4; hlt"
        )
        vm.memory.write(0x1000, program)
        vcpu = vm.create_vcpu()
        vcpu.set_real_mode(entry=0x1000)
        vcpu.run(timeout=PATIENCE)
        assert vm.dirty_pages(ram) == [0x3000, 0x5000]
        assert vm.dirty_pages(ram) == []


# Exits for MSRs


def test_an_msr_of_one_s_own() -> None:
    lstar = 0xC000_0082
    program = code("b9 82 00 00 c0; mov ecx, LSTAR", "0f 32; rdmsr", "ff c0; inc eax", "0f 30; wrmsr", "f4; hlt")
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=1 * MiB)
        vm.memory.write(0x1000, program)
        vm.exit_on_msrs(4)  # KVM_MSR_EXIT_REASON_FILTER
        vm.set_msr_filter([MsrFilterRange(lstar)])
        vcpu = vm.create_vcpu()
        vcpu.set_long_mode(entry=0x1000, tables=0x20000)
        written = []
        for event in vcpu.exits(PATIENCE):
            match event:
                case RdMsr(index=0xC000_0082):
                    event.reply(0x1_0000_0041)
                case WrMsr(index=0xC000_0082, value=value):
                    written.append(value)
                case Hlt():
                    break
        assert written == [0x1_0000_0042]


# Kicks


def test_a_kick_brings_a_vcpu_out_of_an_endless_loop() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0x1000, size=0x1000)
        vm.memory.write(0x1000, code("eb fe; jmp itself"))
        vcpu = vm.create_vcpu()
        vcpu.set_real_mode(entry=0x1000)
        timer = threading.Timer(0.02, vcpu.kick)
        timer.start()
        assert vcpu.run(timeout=PATIENCE) == Interrupted(timed_out=False)
        timer.join()
        assert vcpu.run(timeout=0.02) == Interrupted(timed_out=True)
        vcpu.kick()  # between two runs: the next one comes back at once
        assert vcpu.run(timeout=PATIENCE) == Interrupted(timed_out=False)


def test_a_machine_is_looked_at_while_it_runs() -> None:
    with Machine(memory=0x10000) as machine:
        machine.load(FlatImage(code("fe 06 00 20; again: inc byte ptr [0x2000]", "eb fa; jmp again")))
        machine.start()
        with machine.paused():
            registers = machine.vcpus[0].regs.copy()
            count = machine.memory.read_u8(0x2000)
            assert registers.rip in (0x1000, 0x1004)
            assert machine.memory.read_u8(0x2000) == count
        while machine.memory.read_u8(0x2000) == count:  # until the processor's thread has it again
            time.sleep(0.001)
        with pytest.raises(kvmpy.VcpuBusyError):
            machine.vcpus[0].sregs.copy()
        machine.stop()


# Names


def test_every_public_name_can_be_imported() -> None:
    names = [name for name in dir(kvmpy) if not name.startswith("_")]
    assert {"Kvm", "Machine", "IoOut", "KvmError", "MiB"} <= set(names)
    for name in names:
        assert getattr(kvmpy, name) is not None or name == "TYPE_CHECKING"
