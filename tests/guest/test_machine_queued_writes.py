"""Writes that KVM queues instead of exiting: the guest's characters to a UART that nobody waits for."""

import pytest

from gnu_toolchain import assemble
from kvmpy import End, Kvm, Machine
from kvmpy.abi.capabilities import Cap
from kvmpy.boot import FlatImage
from kvmpy.devices import Uart16550
from waiting import wait_until

KIB = 1024


@pytest.fixture(autouse=True)
def _queue() -> None:
    with Kvm() as kvm:
        if not kvm.check_extension(Cap.COALESCED_PIO):
            pytest.skip("this host's KVM queues no port writes (KVM_CAP_COALESCED_PIO)")


def machine_with(source: str, *, mode: str = "real", irqchip: bool = False) -> tuple[Machine, Uart16550]:
    machine = Machine(memory=64 * KIB, irqchip=irqchip)
    console = machine.add(Uart16550())
    machine.load(FlatImage(assemble(source, bits=32 if mode == "protected" else 16), mode=mode))
    return machine, console


def test_queued_characters_reach_the_device_before_the_exit_that_comes_after_them() -> None:
    source = """
        mov dx, 0x3f8; mov al, 'a'; out dx, al; out dx, al; out 0x10, al
        mov al, 'b'; out dx, al; in al, 0x10
        mov al, 'c'; out dx, al; mov bx, 0xf000; mov ds, bx; mov [0], al
        mov al, 'd'; out dx, al; hlt"""
    machine, console = machine_with(source)
    with machine:
        seen: list[bytes] = []

        def write(offset: int, size: int, value: int) -> None:
            seen.append(console.output)

        def read(offset: int, size: int) -> int:
            seen.append(console.output)
            return 0

        machine.map_ports(0x10, 1, read=read, write=write)
        machine.map_mmio(0xF0000, 0x1000, write=write)
        assert machine.run(timeout=5).end is End.HALTED
        assert seen == [b"aa", b"aab", b"aabc"]
        assert console.output == b"aabcd"
        assert machine.statistics().count("port", 0x3F8, "write") == 5


def test_more_characters_than_the_queue_holds_arrive_once_and_in_order() -> None:
    source = "mov dx, 0x3f8; mov cx, 1000; 1: mov al, cl; out dx, al; loop 1b; hlt"
    machine, console = machine_with(source)
    with machine:
        assert machine.run(timeout=5).end is End.HALTED
        assert console.output == bytes(count & 0xFF for count in range(1000, 0, -1))


@pytest.mark.parametrize("irqchip", [False, True])
def test_a_guest_that_does_nothing_more_is_heard_all_the_same(irqchip: bool) -> None:
    machine, console = machine_with("mov dx, 0x3f8; mov al, '!'; out dx, al; 1: jmp 1b", irqchip=irqchip)
    with machine:
        machine.start()
        console.expect(b"!", timeout=5)
        assert machine.stop().end is End.STOPPED


def test_the_last_words_before_a_triple_fault_are_there() -> None:
    machine, console = machine_with("mov dx, 0x3f8; mov al, '?'; out dx, al; ud2", mode="protected")
    with machine:
        assert machine.run(timeout=5).end is End.TRIPLE_FAULT
        assert console.output == b"?"


def test_a_sink_that_raises_loses_and_doubles_no_character() -> None:
    received = bytearray()
    broken = [True]

    def sink(data: bytes) -> None:
        if data == b"c" and broken[0]:
            broken[0] = False
            raise OSError("the disk is full")
        received.extend(data)

    source = "mov dx, 0x3f8; mov al, 'a'; mov cx, 5; 1: out dx, al; inc al; loop 1b; out 0x10, al; hlt"
    machine, console = machine_with(source)
    with machine:
        console.connect_sink(sink)
        ports: list[int] = []
        machine.map_ports(0x10, 1, write=lambda offset, size, value: ports.append(value))
        with pytest.raises(OSError, match="disk is full"):
            machine.run(timeout=5)
        assert ports == []
        assert machine.run(timeout=5).end is End.HALTED
        assert received == console.output == b"abcde"
        assert ports == [ord("f")]


def test_interrupts_of_the_transmitter_switch_the_queue_off_and_on_again() -> None:
    source = """
        mov dx, 0x3f9; mov al, 2; out dx, al        # IER: interrupt when the transmitter is empty
        dec dx; mov al, 'x'; out dx, al
        inc dx; xor al, al; out dx, al
        dec dx; mov al, 'y'; out dx, al; out dx, al; hlt"""
    machine, console = machine_with(source)
    with machine:
        assert machine.run(timeout=5).end is End.HALTED
        assert console.output == b"xyy"
        assert machine.run(timeout=0.1).end is not End.FAILED


def test_a_device_plugged_in_while_the_guest_runs_is_heard_too() -> None:
    source = "1: mov dx, 0x2f8; mov al, 'z'; out dx, al; jmp 1b"
    with Machine(memory=64 * KIB, irqchip=False) as machine:
        machine.load(FlatImage(assemble(source)))
        machine.start()
        second = machine.add(Uart16550(0x2F8, 3))
        second.expect(b"zzz", timeout=5)
        machine.stop()
        before = len(second.output) + second.dropped
        machine.start()
        wait_until(lambda: len(second.output) + second.dropped > before)
        machine.stop()


def test_two_processors_share_the_queue() -> None:
    # Both print 500 characters each without ever looking at the UART.
    other = assemble("mov dx, 0x3f8; mov cx, 500; mov al, '2'; 1: out dx, al; loop 1b; cli; hlt", address=0x4000)
    first = assemble("mov dx, 0x3f8; mov cx, 500; mov al, '1'; 1: out dx, al; loop 1b; cli; hlt")
    with Machine(memory=64 * KIB, vcpus=2) as machine:
        console = machine.add(Uart16550())
        machine.load(FlatImage(first))
        machine.memory.write(0x4000, other)
        machine.vcpus[1].set_real_mode(0x4000)
        assert machine.run(timeout=20).end is End.HALTED
        assert (console.output.count(b"1"), console.output.count(b"2"), len(console.output)) == (500, 500, 1000)
