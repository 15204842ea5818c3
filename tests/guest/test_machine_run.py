"""How runs of a Machine end, and how they go on."""

import asyncio
import threading
import time

import pytest

from gnu_toolchain import assemble
from kvmpy import End, GuestFailed, HandlerResultError, Machine, OverlapError, UsageError
from kvmpy.boot import FlatImage
from kvmpy.devices import I8042, DebugExit
from kvmpy.errors import ClosedError, GuestMemoryError
from kvmpy.exits import Hlt, InternalError, Shutdown

KIB = 1024
SPIN = "1: jmp 1b"
COUNT = "1: inc dword ptr [0x2000]; jmp 1b"  # a guest that shows in memory that it runs


def machine_with(source: str, *, irqchip: bool = True, vcpus: int = 1) -> Machine:
    machine = Machine(memory=64 * KIB, vcpus=vcpus, irqchip=irqchip)
    machine.load(FlatImage(assemble(source)))
    return machine


def test_hlt_without_an_irqchip_ends_the_run_at_once() -> None:
    with machine_with("hlt", irqchip=False) as machine:
        outcome = machine.run(timeout=5)
        assert outcome.end is End.HALTED
        assert outcome.exit == Hlt()
        assert outcome.ok


def test_cli_hlt_with_the_irqchip_is_halted_within_200_ms() -> None:
    with machine_with("cli; hlt") as machine:
        assert machine.run(timeout=0.2).end is End.HALTED


def test_cli_hlt_is_halted_in_a_thread_too() -> None:
    with machine_with("cli; hlt") as machine:
        machine.start(timeout=0.2)
        assert machine.wait(timeout=5).end is End.HALTED


def test_a_guest_that_waits_for_interrupts_is_not_halted() -> None:
    with machine_with("sti; 1: hlt; jmp 1b") as machine:
        assert machine.run(timeout=0.3).end is End.TIMEOUT


def test_a_timeout_leaves_the_guest_where_it_was_and_the_next_run_goes_on() -> None:
    with machine_with(COUNT) as machine:
        outcome = machine.run(timeout=0.05)
        assert outcome.end is End.TIMEOUT
        assert not outcome.ok
        first = machine.memory.read_u32(0x2000)
        assert first > 0
        machine.run(timeout=0.05)
        assert machine.memory.read_u32(0x2000) > first


def test_check_raises_for_a_guest_that_did_not_end_well() -> None:
    with machine_with(SPIN) as machine, pytest.raises(GuestFailed, match="timeout") as failed:
        machine.run(timeout=0.02, check=True)
    assert failed.value.outcome.end is End.TIMEOUT


def test_stop_from_another_thread() -> None:
    with machine_with(SPIN) as machine:
        machine.start()
        assert machine.running
        assert machine.stop().end is End.STOPPED
        assert not machine.running
        assert machine.wait(timeout=1).end is End.STOPPED


def test_stop_ends_a_run_in_the_main_thread() -> None:
    with machine_with(SPIN) as machine:
        threading.Timer(0.05, machine.stop).start()
        assert machine.run(timeout=10).end is End.STOPPED


def test_stop_from_a_handler_ends_the_run_after_that_access() -> None:
    with machine_with("mov al, 7; 1: out 0x10, al; inc al; jmp 1b") as machine:
        seen: list[int] = []

        def write(offset: int, size: int, value: int) -> None:
            seen.append(value)
            machine.stop()

        machine.map_ports(0x10, 1, write=write)
        assert machine.run(timeout=5).end is End.STOPPED
        assert machine.run(timeout=5).end is End.STOPPED
        assert seen == [7, 8]


def test_wait_says_when_the_guest_still_runs() -> None:
    with machine_with(SPIN) as machine:
        machine.start()
        with pytest.raises(TimeoutError):
            machine.wait(timeout=0.05)
        assert machine.running
        machine.stop()


def test_the_debug_exit_port_gives_the_usual_code() -> None:
    for value, code, ok in ((0, 1, True), (0x10, 33, False)):
        with machine_with(f"mov al, {value}; out 0xf4, al; {SPIN}") as machine:
            machine.add(DebugExit())
            outcome = machine.run(timeout=5)
            assert (outcome.end, outcome.code, outcome.ok) == (End.EXITED, code, ok)


def test_a_keyboard_controller_reset_ends_the_run_as_a_reset() -> None:
    with machine_with(f"mov al, 0xfe; out 0x64, al; {SPIN}") as machine:
        machine.add(I8042())
        assert machine.run(timeout=5).end is End.RESET


def test_a_triple_fault_is_an_outcome() -> None:
    with Machine(memory=64 * KIB, irqchip=False) as machine:
        # Protected mode without an IDT: the exception cannot be delivered, nor can the double fault that follows.
        machine.load(FlatImage(assemble("ud2", bits=32), mode="protected"))
        outcome = machine.run(timeout=5)
        assert outcome.end is End.TRIPLE_FAULT
        assert outcome.exit == Shutdown()
        assert not outcome.ok


def test_a_start_outside_memory_fails_and_says_where() -> None:
    with Machine(memory=64 * KIB, irqchip=False) as machine:
        machine.vcpus[0].set_real_mode(0x2_0000)  # behind RAM
        outcome = machine.run(timeout=5)
        assert outcome.end is End.FAILED
        assert isinstance(outcome.exit, InternalError)
        assert "rip" in outcome.message


def test_an_exit_handler_of_ones_own_decides() -> None:
    with machine_with("hlt; hlt; hlt", irqchip=False) as machine:
        halts: list[int] = []

        def on_hlt(vcpu: object, event: Hlt) -> None:
            halts.append(machine.vcpus[0].regs.rip)
            if len(halts) == 3:
                machine.stop()

        machine.on_exit(Hlt, on_hlt)
        assert machine.run(timeout=5).end is End.STOPPED
        assert halts == [0x1001, 0x1002, 0x1003]


# Handlers


def test_what_a_handler_raises_comes_out_and_the_exit_is_presented_again() -> None:
    with machine_with("mov al, 1; 1: out 0x10, al; inc al; cmp al, 4; jne 1b; hlt", irqchip=False) as machine:
        seen: list[int] = []

        def write(offset: int, size: int, value: int) -> None:
            seen.append(value)
            if seen.count(2) == 1 and value == 2:
                raise RuntimeError("the handler broke")

        machine.map_ports(0x10, 1, write=write)
        with pytest.raises(RuntimeError, match="the handler broke"):
            machine.run(timeout=5)
        assert machine.run(timeout=5).end is End.HALTED
        assert seen == [1, 2, 2, 3]


def test_a_handler_that_raises_in_a_thread_raises_where_one_waits() -> None:
    with machine_with("in al, 0x10; hlt", irqchip=False) as machine:

        def read(offset: int, size: int) -> int:
            raise RuntimeError("in the thread")

        machine.map_ports(0x10, 1, read=read)
        machine.start()
        with pytest.raises(RuntimeError, match="in the thread"):
            machine.wait(timeout=5)


@pytest.mark.parametrize("value", [-1, 0x100, "x", None, 1.5])
@pytest.mark.parametrize("source", ["in al, 0x10; hlt", "mov ax, 0xf000; mov ds, ax; mov al, [0x10]; hlt"])
def test_a_read_handler_that_answers_nonsense_is_named(source: str, value: object) -> None:
    with machine_with(source, irqchip=False) as machine:

        def read(offset: int, size: int) -> int:
            return value  # type: ignore[return-value]

        machine.map_ports(0x10, 1, read=read)
        machine.map_mmio(0xF0000, 0x1000, read=read)
        for _ in range(2):  # the first access and, pending, the same again
            with pytest.raises(HandlerResultError) as error:
                machine.run(timeout=5)
            assert error.value.value == value
            assert error.value.size == 1


def test_the_offset_counts_from_the_first_port_and_sizes_are_the_guests() -> None:
    source = "mov dx, 0x202; mov eax, 0x44332211; out dx, al; out dx, ax; out dx, eax; in ax, dx; mov [0x2000], ax; hlt"
    with machine_with(source, irqchip=False) as machine:
        writes: list[tuple[int, int, int]] = []
        machine.map_ports(
            0x200, 8, write=lambda offset, size, value: writes.append((offset, size, value)),
            read=lambda offset, size: 0xBEEF,
        )  # fmt: skip
        assert machine.run(timeout=5).end is End.HALTED
        assert writes == [(2, 1, 0x11), (2, 2, 0x2211), (2, 4, 0x44332211)]
        assert machine.memory.read_u16(0x2000) == 0xBEEF


def test_string_output_reaches_the_handler_item_by_item() -> None:
    source = 'mov si, offset text; mov cx, 5; mov dx, 0x10; cld; rep outsb; hlt; text: .ascii "hello"'
    with machine_with(source, irqchip=False) as machine:
        seen = bytearray()
        machine.map_ports(0x10, 1, write=lambda offset, size, value: seen.append(value))
        assert machine.run(timeout=5).end is End.HALTED
        assert seen == b"hello"


def test_string_input_fills_guest_memory() -> None:
    source = "mov di, 0x2000; mov cx, 4; mov dx, 0x10; cld; rep insw; hlt"
    with machine_with(source, irqchip=False) as machine:
        values = iter(range(0x1000, 0x1010))
        machine.map_ports(0x10, 2, read=lambda offset, size: next(values))
        assert machine.run(timeout=5).end is End.HALTED
        assert [machine.memory.read_u16(0x2000 + 2 * i) for i in range(4)] == [0x1000, 0x1001, 0x1002, 0x1003]


def test_a_word_to_a_byte_wide_device_arrives_as_two_bytes() -> None:
    with machine_with("mov ax, 0x2211; out 0x10, ax; in ax, 0x10; mov [0x2000], ax; hlt", irqchip=False) as machine:
        writes: list[tuple[int, int, int]] = []
        machine.map_ports(
            0x10, 2, width=1, write=lambda offset, size, value: writes.append((offset, size, value)),
            read=lambda offset, size: 0xA0 + offset,
        )  # fmt: skip
        machine.run(timeout=5)
        assert writes == [(0, 1, 0x11), (1, 1, 0x22)]
        assert machine.memory.read_u16(0x2000) == 0xA1A0


def test_an_access_over_the_end_of_a_device_is_split_and_the_rest_unclaimed() -> None:
    with machine_with(
        "mov eax, 0x44332211; out 0x10, eax; in eax, 0x10; mov [0x2000], eax; hlt", irqchip=False
    ) as machine:
        writes: list[tuple[int, int, int]] = []
        machine.map_ports(
            0x10, 2, write=lambda offset, size, value: writes.append((offset, size, value)),
            read=lambda offset, size: 0,
        )  # fmt: skip
        machine.run(timeout=5)
        assert writes == [(0, 2, 0x2211)]
        assert machine.memory.read_u32(0x2000) == 0xFFFF0000
        assert {(entry.direction, entry.address) for entry in machine.statistics().unclaimed} == {
            ("write", 0x12), ("read", 0x12)
        }  # fmt: skip


def test_unclaimed_reads_float_high_and_are_counted() -> None:
    source = "mov cx, 3; 1: in al, 0x77; loop 1b; mov [0x2000], al; mov ax, 0xf000; mov ds, ax; mov ebx, [0]; hlt"
    with machine_with(source, irqchip=False) as machine:
        assert machine.run(timeout=5).end is End.HALTED
        assert machine.memory.read_u8(0x2000) == 0xFF
        assert machine.vcpus[0].regs.rbx & 0xFFFF_FFFF == 0xFFFF_FFFF
        unclaimed = {
            (entry.kind, entry.direction, entry.address): entry.count for entry in machine.statistics().unclaimed
        }
        assert unclaimed == {("port", "read", 0x77): 3, ("mmio", "read", 0xF0000): 1}


def test_statistics_count_accesses_by_port_and_address() -> None:
    source = """
        mov cx, 10; 1: out 0x10, al; loop 1b
        mov cx, 5; 2: in al, 0x10; loop 2b
        mov ax, 0xf000; mov ds, ax; mov [0x20], eax; mov [0x20], eax; hlt"""
    with machine_with(source, irqchip=False) as machine:
        machine.map_ports(0x10, 1, read=lambda offset, size: 0, write=lambda offset, size, value: None)
        machine.map_mmio(0xF0000, 0x1000, write=lambda offset, size, value: None)
        machine.run(timeout=5)
        statistics = machine.statistics()
        assert statistics.count("port", 0x10, "write") == 10
        assert statistics.count("port", 0x10, "read") == 5
        assert statistics.count("mmio", 0xF0020) == 2
        assert statistics.exits == {"HLT": 1}


def test_statistics_count_every_item_of_a_string_and_an_access_that_is_split_once() -> None:
    source = """
        mov dx, 0x10; mov di, 0x2000; mov cx, 64; rep insb; mov si, 0x2000; mov cx, 48; rep outsb
        mov cx, 1; rep insb; mov si, 0x2000; mov cx, 20; rep outsw
        mov cx, 3; 1: out dx, eax; loop 1b
        mov dx, 0x99; mov cx, 7; rep insb; hlt"""
    with machine_with(source, irqchip=False) as machine:
        # Two ports that take bytes: the 16-bit items and the 32-bit accesses are split, the latter beyond the end.
        machine.map_ports(0x10, 2, read=lambda offset, size: 0, write=lambda offset, size, value: None, width=1)
        machine.run(timeout=5)
        statistics = machine.statistics()
        counts = {(entry.direction, entry.address, entry.size): entry.count for entry in statistics.accesses}
        assert counts == {
            ("read", 0x10, 1): 65, ("write", 0x10, 1): 48, ("write", 0x10, 2): 20, ("write", 0x10, 4): 3,
        }  # fmt: skip
        unclaimed = {(entry.direction, entry.address, entry.size): entry.count for entry in statistics.unclaimed}
        assert unclaimed == {("read", 0x99, 1): 7, ("write", 0x12, 2): 3}


def test_devices_may_come_while_the_guest_runs() -> None:
    with machine_with("1: in al, 0x10; cmp al, 0x55; jne 1b; hlt", irqchip=False) as machine:
        machine.start()
        time.sleep(0.02)
        machine.map_ports(0x10, 1, read=lambda offset, size: 0x55)
        assert machine.wait(timeout=5).end is End.HALTED


# What cannot be


def test_two_owners_of_a_port_are_both_named() -> None:
    with Machine(memory=64 * KIB) as machine:
        machine.map_ports(0x10, 8, name="first")
        with pytest.raises(OverlapError, match=r"second .*0x14.* overlaps first .*0x10\.\.0x17"):
            machine.map_ports(0x14, 1, name="second")


def test_mmio_where_ram_is_is_refused() -> None:
    with Machine(memory=64 * KIB) as machine, pytest.raises(OverlapError, match="RAM 0x0"):
        machine.map_mmio(0xF000, 0x1000)


@pytest.mark.parametrize(("first", "count"), [(0xFFFF, 2), (-1, 1), (0x10000, 1)])
def test_ports_outside_the_port_space_are_refused(first: int, count: int) -> None:
    with Machine(memory=64 * KIB) as machine, pytest.raises(UsageError, match="does not fit"):
        machine.map_ports(first, count)


def test_a_device_is_plugged_in_once_and_nothing_of_it_stays_when_it_does_not_fit() -> None:
    with Machine(memory=64 * KIB) as machine:
        device = machine.add(I8042())
        with pytest.raises(UsageError, match="plugged in already"):
            machine.add(device)
    with Machine(memory=64 * KIB) as machine:
        machine.map_ports(0x64, 1, name="in the way")
        with pytest.raises(OverlapError):
            machine.add(I8042())
        assert machine.ports.find(0x60) is None
        assert machine.devices == []


def test_run_twice_at_a_time_is_refused() -> None:
    with machine_with(SPIN) as machine:
        machine.start()
        with pytest.raises(UsageError, match="running already"):
            machine.run(timeout=1)
        machine.stop()


def test_closing_stops_a_running_guest_and_closed_is_closed() -> None:
    machine = machine_with(SPIN)
    machine.start()
    machine.close()
    machine.close()
    with pytest.raises(ClosedError):
        machine.run()
    with pytest.raises(ClosedError):
        machine.vm.create_vcpu()


def test_an_image_larger_than_memory_is_refused() -> None:
    from kvmpy.errors import ImageError

    with Machine(memory=64 * KIB) as machine, pytest.raises((ImageError, GuestMemoryError)):
        machine.load(FlatImage(b"\x90" * 128 * KIB))


# asyncio


def test_run_async_lets_the_event_loop_go_on() -> None:
    async def main() -> None:
        # The guest goes on until the event loop has.
        with machine_with("1: in al, 0x10; cmp al, 3; jb 1b; cli; hlt") as machine:
            ticks = 0
            machine.map_ports(0x10, 1, read=lambda offset, size: min(ticks, 3))

            async def tick() -> None:
                nonlocal ticks
                while True:
                    ticks += 1
                    await asyncio.sleep(0.001)

            ticking = asyncio.create_task(tick())
            outcome = await machine.run_async(timeout=10)
            ticking.cancel()
            assert outcome.end is End.HALTED

    asyncio.run(main())


def test_cancelling_run_async_stops_the_guest() -> None:
    async def main() -> None:
        with machine_with(SPIN) as machine:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(machine.run_async(), 0.05)
            assert not machine.running

    asyncio.run(main())


def test_an_exit_that_the_last_guest_left_does_not_reach_the_next_one() -> None:
    with machine_with("in al, 0x10; hlt", irqchip=False) as machine:
        calls: list[int] = []

        def read(offset: int, size: int) -> int:
            calls.append(offset)
            raise RuntimeError("no answer")

        machine.map_ports(0x10, 1, read=read)
        with pytest.raises(RuntimeError):
            machine.run(timeout=5)
        machine.load(FlatImage(assemble("mov ebx, eax; hlt")))
        assert machine.run(timeout=5).end is End.HALTED
        assert calls == [0]
        assert machine.vcpus[0].regs.rbx == 0


def test_an_infinite_timeout_is_none() -> None:
    with machine_with("hlt", irqchip=False) as machine:
        machine.start(timeout=float("inf"))
        assert machine.wait(timeout=5).end is End.HALTED


def test_an_exception_that_waits_does_not_reach_the_next_guest() -> None:
    with machine_with("hlt", irqchip=False) as machine:
        assert machine.run(timeout=5).end is End.HALTED
        machine.vcpus[0].inject_exception(6)  # as a run that was ended in the midst of it leaves one
        machine.load(FlatImage(assemble("inc ax; hlt")))
        assert machine.run(timeout=5).end is End.HALTED
        assert machine.vcpus[0].regs.rip == 0x1002
