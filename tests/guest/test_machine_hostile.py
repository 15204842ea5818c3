"""Guests that mean no good, or are merely awkward: what they may not do is hang, mislead or fill the host."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time
from collections.abc import Callable

import pytest

from gnu_toolchain import assemble
from kvmpy import End, Machine, exits
from kvmpy.boot import FlatImage
from kvmpy.exits import Exit
from kvmpy.kvm.vcpu import Vcpu
from kvmpy.machine.outcome import Outcome

KIB = 1024
INIT_ALL = "mov dword ptr [rbx + 0x300], 0xc4500"
SIPI_ALL = "mov dword ptr [rbx + 0x300], 0xc4608"
NMI_ALL = "mov dword ptr [rbx + 0x300], 0xc4400"
APIC = "mov ebx, 0xfee00000; mov dword ptr [rbx + 0xf0], 0x1ff"


def machine_with(source: str, *, irqchip: bool = True, memory: int = 1 << 20) -> Machine:
    machine = Machine(memory=memory, irqchip=irqchip)
    machine.load(FlatImage(assemble(source, address=0x1000), address=0x1000))
    return machine


def two_processors(first: str, other: str) -> Machine:
    """The first one runs `first` in long mode, RBX the local APIC; SIPI_ALL starts the other, in real mode."""
    machine = Machine(memory=2048 * KIB, vcpus=2)
    code = assemble(f"{APIC}; {first}", bits=64, address=0x10000)
    machine.load(FlatImage(code, address=0x10000, mode="long"))
    machine.memory.write(0x8000, assemble(other, bits=16, address=0x8000))
    return machine


# Is it halted?


def test_a_processor_in_a_long_handler_is_not_halted_although_it_once_waited_to_be_started() -> None:
    # The other one has been seen waiting for ever when it is started; then the first one halts for good, and the
    # started one spends a long time in a handler, without a tick.
    first = f"mov ecx, 400000; 1: dec ecx; jnz 1b; {INIT_ALL}; {SIPI_ALL}; cli; 2: hlt; jmp 2b"
    with two_processors(first, "out 0x10, al; out 0x11, al; 1: jmp 1b") as machine:
        machine.map_ports(0x10, 1, write=lambda offset, size, value: time.sleep(0.6))
        machine.map_ports(0x11, 1, write=lambda offset, size, value: machine.board.exit(0, "test"))
        assert machine.run(timeout=20).end is End.EXITED


def test_a_processor_that_got_init_and_no_sipi_counts_as_waiting() -> None:
    with two_processors(f"{INIT_ALL}; cli; 1: hlt; jmp 1b", "hlt") as machine:
        assert machine.run(timeout=3).end is End.HALTED


def test_processors_that_wake_each_other_by_nmi_all_the_time_are_not_halted() -> None:
    # Both are halted with interrupts off most of the time.
    handler = "mov dword ptr cs:[0x7000], 1; iret"
    first = f"""
        {INIT_ALL}; {SIPI_ALL}
        mov ebp, 60
    again:
        mov ecx, 8000
    1:  dec ecx
        jnz 1b
        {NMI_ALL}
        dec ebp
        jnz again
        out 0x11, al
    """
    with two_processors(first, "cli; 1: hlt; jmp 1b") as machine:
        machine.memory.write(0x9000, assemble(handler, bits=16, address=0x9000))
        machine.memory.write(2 * 4, (0x9000).to_bytes(4, "little"))
        machine.map_ports(0x11, 1, write=lambda offset, size, value: machine.board.exit(0, "test"))
        assert machine.run(timeout=20).end is End.EXITED


def test_an_nmi_that_waits_to_be_delivered_keeps_a_halted_machine_running() -> None:
    with machine_with("cli; hlt; out 0x10, al; 1: jmp 1b") as machine:
        machine.memory.write(0x9000, assemble("iret", address=0x9000))
        machine.memory.write(2 * 4, (0x9000).to_bytes(4, "little"))
        machine.map_ports(0x10, 1, write=lambda offset, size, value: machine.board.exit(0, "test"))
        assert machine.run(timeout=5).end is End.HALTED
        machine.vcpus[0].nmi()
        assert machine.run(timeout=5).end is End.EXITED


# Stopping what does not want to stop


@pytest.mark.parametrize(
    "source",
    [
        "1: jmp 1b",
        "1: out 0x99, al; jmp 1b",
        "cld; xor cx, cx; dec cx; 1: mov cx, 0xffff; rep stosb; jmp 1b",
        "mov dx, 0x99; 1: mov cx, 0xffff; mov di, 0; rep insb; jmp 1b",
        "mov dx, 0x99; 1: mov cx, 0xffff; mov si, 0; rep outsb; jmp 1b",
        "sti; 1: hlt; jmp 1b",
    ],
    ids=["jmp", "out", "rep stosb", "rep insb", "rep outsb", "sti hlt"],
)
def test_a_guest_that_never_ends_meets_its_deadline_and_stop(source: str) -> None:
    with machine_with(f"mov ax, 0x3000; mov es, ax; mov ds, ax; {source}") as machine:
        assert machine.run(timeout=0.05).end is End.TIMEOUT
        machine.start()
        assert machine.stop().end is End.STOPPED


def test_triple_faults_at_once_leave_no_descriptor_and_no_thread() -> None:
    def run() -> None:
        with Machine(memory=64 * KIB) as machine:
            machine.load(FlatImage(assemble("ud2", bits=32), mode="protected"))  # there is no IDT
            assert machine.run(timeout=5).end is End.TRIPLE_FAULT

    run()
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(20):
        run()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


# Filling the host's memory


def test_distinct_addresses_of_a_large_device_do_not_fill_the_host() -> None:
    source = "mov edi, 0x100000; mov ecx, 12000; 1: mov byte ptr [edi], al; inc edi; dec ecx; jnz 1b; hlt"
    with Machine(memory=1 << 20, irqchip=False) as machine:
        machine.load(FlatImage(assemble(source, bits=32, address=0x1000), address=0x1000, mode="protected"))
        seen = bytearray(1 << 20)

        def write(offset: int, size: int, value: int) -> None:
            seen[offset] += 1

        machine.map_mmio(0x10_0000, 1 << 20, write=write)
        assert machine.run(timeout=20).end is End.HALTED
        assert sum(seen) == 12000
        assert len(machine.statistics().accesses) <= 8192


def test_scanning_all_ports_is_counted_up_to_a_limit() -> None:
    with machine_with("xor dx, dx; 1: in al, dx; inc dx; jnz 1b; hlt", irqchip=False) as machine:
        assert machine.run(timeout=20).end is End.HALTED
        assert len(machine.statistics().unclaimed) == 4096


# Odd accesses


@pytest.mark.parametrize(("size", "register"), [(1, "al"), (2, "ax"), (4, "eax"), (8, "rax")])
def test_accesses_over_the_end_of_ram_reach_ram_and_device(size: int, register: str) -> None:
    # The device begins where RAM ends; each access lies one byte before that.
    source = f"mov rax, 0x1122334455667788; mov edi, 0x1fffff; mov [rdi], {register}; hlt"
    with Machine(memory=2 << 20, irqchip=False) as machine:
        machine.load(FlatImage(assemble(source, bits=64, address=0x10000), address=0x10000, mode="long"))
        seen = bytearray(16)

        def write(offset: int, size: int, value: int) -> None:
            seen[offset : offset + size] = value.to_bytes(size, "little")

        machine.map_mmio(0x20_0000, 16, write=write)
        assert machine.run(timeout=5).end is End.HALTED
        data = (0x1122334455667788).to_bytes(8, "little")[:size]
        assert machine.memory.read(0x1FFFFF, 1) + seen[: size - 1] == data


def test_code_that_changes_itself_runs_as_changed() -> None:
    source = "mov byte ptr cs:[1f + 1], 0x22; 1: mov al, 0x11; out 0x10, al; hlt"
    with machine_with(source, irqchip=False) as machine:
        seen: list[int] = []
        machine.map_ports(0x10, 1, write=lambda offset, size, value: seen.append(value))
        machine.run(timeout=5)
        assert seen == [0x22]


# Handlers that raise


def test_a_string_whose_handler_raises_goes_on_where_it_was() -> None:
    # rep insb comes as one exit of many items: those that were read already are not read again.
    with machine_with("mov di, 0x5000; mov cx, 16; mov dx, 0x10; rep insb; hlt", irqchip=False) as machine:
        given: list[int] = []

        def read(offset: int, size: int) -> int:
            if len(given) == 10 and not raised:
                raised.append(True)
                raise ZeroDivisionError
            given.append(len(given))
            return given[-1]

        raised: list[bool] = []
        machine.map_ports(0x10, 1, read=read)
        with pytest.raises(ZeroDivisionError):
            machine.run(timeout=5)
        assert machine.run(timeout=5).end is End.HALTED
        assert given == list(range(16))
        assert machine.memory.read(0x5000, 16) == bytes(range(16))


def test_an_exit_that_was_settled_between_two_runs_still_reaches_its_device() -> None:
    with machine_with("mov al, 7; out 0x10, al; mov al, 8; out 0x10, al; hlt", irqchip=False) as machine:
        seen: list[int] = []
        raised: list[bool] = []

        def write(offset: int, size: int, value: int) -> None:
            if not raised:
                raised.append(True)
                raise ZeroDivisionError
            seen.append(value)

        machine.map_ports(0x10, 1, write=write)
        with pytest.raises(ZeroDivisionError):
            machine.run(timeout=5)
        machine.vcpus[0].settle()  # as somebody does who wants to look at complete registers
        assert machine.run(timeout=5).end is End.HALTED
        assert seen == [7, 8]


def test_a_read_handler_that_stops_the_machine_has_answered() -> None:
    with machine_with("in al, 0x10; out 0x11, al; hlt", irqchip=False) as machine:
        seen: list[int] = []

        def read(offset: int, size: int) -> int:
            machine.stop()
            return 0x5A

        machine.map_ports(0x10, 1, read=read)
        machine.map_ports(0x11, 1, write=lambda offset, size, value: seen.append(value))
        assert machine.run(timeout=5).end is End.STOPPED
        assert machine.vcpus[0].regs.rax & 0xFF == 0x5A
        assert machine.run(timeout=5).end is End.HALTED
        assert seen == [0x5A]


def test_an_exit_handler_that_ends_the_run_has_answered() -> None:
    # The answer must be in the registers, as after a port's handler, although the run ends with this exit.
    with Machine(irqchip=False) as machine:
        machine.vm.exit_on_msrs(2)  # unknown ones
        code = assemble("mov ecx, 0x12345678; rdmsr; hlt", bits=32, address=0x1000)
        machine.load(FlatImage(code, address=0x1000, mode="protected"))

        def answer(vcpu: Vcpu, event: exits.RdMsr) -> Outcome:
            event.reply(0x1_0000_0002)
            return Outcome(End.PANIC)

        machine.on_exit(exits.RdMsr, answer)
        assert machine.run(timeout=5).end is End.PANIC
        assert (machine.vcpus[0].regs.rax, machine.vcpus[0].regs.rdx) == (2, 1)


def test_a_memory_fault_reaches_its_handler() -> None:
    # This KVM reports none by itself: stand in for the one KVM_RUN that would.
    with machine_with("hlt", irqchip=False) as machine:
        vcpu = machine.vcpus[0]
        enter: Callable[..., int] = vcpu.enter
        seen: list[Exit] = []

        def fault(*arguments: int) -> int:
            vcpu.enter = enter
            vcpu.page.u32[2] = 39
            ctypes.set_errno(errno.EFAULT)
            return -1

        def handle(vcpu: Vcpu, event: Exit) -> Outcome:
            seen.append(event)
            return Outcome(End.PANIC)

        vcpu.enter = fault
        machine.on_exit(exits.MemoryFault, handle)
        assert machine.run(timeout=5).end is End.PANIC
        assert len(seen) == 1
        assert machine.run(timeout=5).end is End.HALTED
