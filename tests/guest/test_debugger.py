"""Breakpoints, watchpoints and steps of a machine, in every mode, on one processor and several."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gnu_toolchain import assemble_with_symbols, compile_c
from kvmpy import End, Machine, Outcome, UsageError
from kvmpy.boot import ElfImage, FlatImage
from kvmpy.debug.breakpoint import Stop, StopKind
from kvmpy.debug.disassembly import Disassembler
from kvmpy.devices import DebugExit
from kvmpy.kvm import Vcpu
from two_processors import COUNTER, working_twice

pytestmark = pytest.mark.kvm

SECONDS = 5.0
MODES = {16: "real", 32: "protected", 64: "long"}
CODE, VALUE, STACK = 0x1000, 0x8000, 0x7000

COUNTING = f"""
_start: mov ecx, 5
again:  call work
        dec ecx
        jnz again
        mov al, 0
        out 0xf4, al
        hlt
work:   inc ebx
        mov dword ptr [{VALUE:#x}], ebx
last:   ret
"""

ENDED_WELL = Outcome(End.EXITED, "debug exit at port 0xf4, value 0x0", code=1)

every_mode = pytest.mark.parametrize("bits", MODES)
every_kind = pytest.mark.parametrize("hardware", [True, False], ids=["register", "memory"])


@contextmanager
def loaded(source: str, bits: int, vcpus: int = 1) -> Iterator[tuple[Machine, dict[str, int]]]:
    code, symbols = assemble_with_symbols(source, address=CODE, bits=bits)
    with Machine(vcpus=vcpus) as machine:
        machine.add(DebugExit())
        machine.load(FlatImage(code, CODE, MODES[bits], stack=STACK))
        yield machine, symbols


@every_mode
@every_kind
@pytest.mark.parametrize("vcpus", [1, 2])
def test_a_handler_is_called_before_each_execution(bits: int, hardware: bool, vcpus: int) -> None:
    seen = []
    with loaded(COUNTING, bits, vcpus) as (machine, symbols):
        point = machine.breakpoint(
            symbols["work"], lambda vcpu, point: seen.append((vcpu.id, vcpu.regs.rbx, vcpu.regs.rip)), hardware=hardware
        )
        assert machine.run(SECONDS) == ENDED_WELL
        assert seen == [(0, count, symbols["work"]) for count in range(5)]
        assert point.hits == 5


@every_mode
@every_kind
def test_without_a_handler_the_run_ends_there_and_the_next_goes_on(bits: int, hardware: bool) -> None:
    with loaded(COUNTING, bits) as (machine, symbols):
        machine.breakpoint(symbols["work"], hardware=hardware)
        for count in range(5):
            outcome = machine.run(SECONDS)
            assert (outcome.end, outcome.ok) == (End.BREAKPOINT, True)
            assert machine.vcpus[0].regs.rip == symbols["work"]
            assert machine.vcpus[0].regs.rbx == count
        assert machine.run(SECONDS) == ENDED_WELL


@every_mode
@every_kind
def test_the_first_instruction_can_have_a_breakpoint(bits: int, hardware: bool) -> None:
    with loaded(COUNTING, bits) as (machine, _):
        machine.breakpoint(CODE, hardware=hardware)
        assert machine.run(SECONDS).end is End.BREAKPOINT
        assert machine.vcpus[0].regs.rip == CODE
        assert machine.run(SECONDS) == ENDED_WELL


@every_kind
def test_breakpoints_one_after_the_other_each_count(hardware: bool) -> None:
    with loaded(COUNTING, 64) as (machine, symbols):
        points = [machine.breakpoint(symbols[name], lambda *_: None, hardware=hardware) for name in ("work", "last")]
        points.append(machine.breakpoint(symbols["again"], lambda *_: None, hardware=hardware))
        assert machine.run(SECONDS) == ENDED_WELL
        assert [point.hits for point in points] == [5, 5, 5]


@every_kind
def test_a_breakpoint_at_an_instruction_that_jumps_to_itself_is_reached_again(hardware: bool) -> None:
    with loaded("_start: mov ecx, 3\nhere: loop here\nmov al, 0\nout 0xf4, al", 64) as (machine, symbols):
        point = machine.breakpoint(symbols["here"], lambda *_: None, hardware=hardware)
        assert machine.run(SECONDS) == ENDED_WELL
        assert point.hits == 3


def test_a_condition_decides() -> None:
    with loaded(COUNTING, 64) as (machine, symbols):
        point = machine.breakpoint(symbols["work"], condition=lambda vcpu: vcpu.regs.rcx == 2)
        assert machine.run(SECONDS).end is End.BREAKPOINT
        assert machine.vcpus[0].regs.rbx == 3
        assert point.hits == 1
        assert machine.run(SECONDS) == ENDED_WELL


@every_kind
def test_a_temporary_one_goes_when_it_is_reached(hardware: bool) -> None:
    with loaded(COUNTING, 64) as (machine, symbols):
        before = machine.memory.read(CODE, 64)
        point = machine.breakpoint(symbols["work"], temporary=True, hardware=hardware)
        assert machine.run(SECONDS).end is End.BREAKPOINT
        assert not point.active
        assert machine.memory.read(CODE, 64) == before
        assert machine.run(SECONDS) == ENDED_WELL


@every_kind
def test_a_removed_one_stops_nobody(hardware: bool) -> None:
    with loaded(COUNTING, 64) as (machine, symbols):
        with machine.breakpoint(symbols["work"], hardware=hardware) as point:
            assert machine.run(SECONDS).end is End.BREAKPOINT
        point.remove()
        assert machine.run(SECONDS) == ENDED_WELL


def test_a_handler_can_end_the_run_change_registers_and_remove_its_breakpoint() -> None:
    def handler(vcpu: Vcpu, point: object) -> Outcome | None:
        if vcpu.regs.rbx == 1:
            vcpu.regs.rcx = 1
            work.remove()
            return Outcome(End.STOPPED, "enough")
        return None

    with loaded(COUNTING, 64) as (machine, symbols):
        work = machine.breakpoint(symbols["work"], handler, hardware=False)
        assert machine.run(SECONDS) == Outcome(End.STOPPED, "enough")
        assert machine.run(SECONDS) == ENDED_WELL
        assert machine.memory.read_u32(VALUE) == 2


def test_more_breakpoints_than_registers_go_into_memory() -> None:
    with loaded("_start: nop; nop; nop; nop; nop; nop; mov al, 0; out 0xf4, al", 64) as (machine, _):
        points = [machine.breakpoint(CODE + number, lambda *_: None) for number in range(6)]
        assert [point.hardware for point in points] == [True] * 4 + [False] * 2
        with pytest.raises(UsageError, match="four debug registers"):
            machine.breakpoint(CODE, hardware=True)
        assert machine.run(SECONDS) == ENDED_WELL
        assert [point.hits for point in points] == [1] * 6


def test_a_debugger_reads_and_writes_memory_as_if_there_were_no_breakpoint() -> None:
    with loaded(COUNTING, 64) as (machine, symbols):
        code = machine.memory.read(CODE, 64)
        work = symbols["work"]
        machine.breakpoint(work, hardware=False)
        assert machine.memory.read(CODE, 64) != code
        debugger, vcpu = machine.debugger, machine.vcpus[0]
        assert debugger.read_memory(vcpu, CODE, 64) == code
        debugger.write_memory(vcpu, work, b"\xc3")  # ret
        assert debugger.read_memory(vcpu, work, 1) == b"\xc3"
        for _ in range(5):
            assert machine.run(SECONDS).end is End.BREAKPOINT
        assert machine.run(SECONDS) == ENDED_WELL
        assert machine.vcpus[0].regs.rbx == 0


def test_int3_of_the_guest_itself_is_left_alone() -> None:
    source = """
    _start: mov word ptr [3 * 4], offset handler
            mov word ptr [3 * 4 + 2], 0
    mine:   nop
            int3
            mov al, bl
            out 0xf4, al
    handler:
            inc bl
            iret
    """
    with loaded(source, 16) as (machine, symbols):
        machine.vcpus[0].regs.rbx = 0
        point = machine.breakpoint(symbols["mine"], lambda *_: None, hardware=False)
        assert machine.run(SECONDS).code == 3  # (1 << 1) | 1
        assert point.hits == 1


@pytest.mark.parametrize("where", [-1, 1 << 64, 1.5, b"main"])
def test_a_place_that_is_none_is_refused(where: int) -> None:
    with loaded(COUNTING, 64) as (machine, _), pytest.raises(UsageError):
        machine.breakpoint(where)


def test_a_software_breakpoint_at_an_address_that_is_not_mapped_is_refused() -> None:
    with loaded(COUNTING, 64) as (machine, _), pytest.raises(UsageError, match="not mapped"):
        machine.breakpoint(0x7F00_0000_0000, hardware=False)


C_GUEST = """
static volatile int total;

static __attribute__((noinline)) void add(int number)
{
    total += number;
}

void _start(void)
{
    for (int i = 1; i <= 3; i++)
        add(i);
    asm volatile("outb %0, $0xf4" :: "a"((char)total));
    for (;;)
        ;
}
"""


def test_places_have_names_and_lines_in_a_program_with_debug_information() -> None:
    program = compile_c(C_GUEST, flags=("-g",))
    with Machine() as machine:
        machine.add(DebugExit())
        machine.load(ElfImage(program.elf, stack=STACK))
        calls: list[int] = []
        by_name = machine.breakpoint("add", lambda vcpu, _: calls.append(vcpu.regs.rdi & 0xFFFF_FFFF))
        assert machine.lines is not None
        (file,) = machine.lines.files()
        by_line = machine.breakpoint(f"{file}:6", lambda *_: None)
        watch = machine.watchpoint("total", 4, lambda *_: None)
        assert machine.run(SECONDS).code == 13
        assert calls == [1, 2, 3]
        assert (by_name.hits, by_line.hits, watch.hits) == (3, 3, 3)
        assert (by_name.name, by_name.address) == ("add", machine.symbols.address_of("add"))
        with pytest.raises(UsageError, match="did you mean 'add'"):
            machine.breakpoint("ad")
        with pytest.raises(UsageError, match="has no code; near it have"):
            machine.breakpoint(f"{file}:3")


# Several processors


@every_kind
def test_processors_that_reach_one_breakpoint_at_the_same_time_miss_none(hardware: bool) -> None:
    with loaded(working_twice(50), 16, vcpus=2) as (machine, symbols):
        machine.vcpus[1].set_real_mode(CODE, stack=0x6000)
        seen: list[int] = []
        point = machine.breakpoint(symbols["work"], lambda vcpu, _: seen.append(vcpu.id), hardware=hardware)
        outcome = machine.run(SECONDS)
        assert outcome.end is End.EXITED, outcome
        assert sorted(seen) == [0] * 50 + [1] * 50
        assert point.hits == 100
        assert machine.memory.read_u16(COUNTER) == 100


# Watchpoints


@every_mode
def test_a_watchpoint_tells_after_each_write(bits: int) -> None:
    seen = []
    with loaded(COUNTING, bits) as (machine, symbols):
        machine.watchpoint(VALUE, 4, lambda vcpu, _: seen.append((vcpu.regs.rip, machine.memory.read_u32(VALUE))))
        assert machine.run(SECONDS) == ENDED_WELL
        assert seen == [(symbols["last"], count) for count in range(1, 6)]


def test_a_watchpoint_without_a_handler_ends_the_run() -> None:
    with loaded(COUNTING, 64) as (machine, symbols):
        point = machine.watchpoint(VALUE + 3, 1)
        assert machine.run(SECONDS).end is End.BREAKPOINT
        assert machine.vcpus[0].regs.rip == symbols["last"]
        point.remove()
        assert machine.run(SECONDS) == ENDED_WELL
        assert machine.memory.read_u32(VALUE) == 5


def test_other_bytes_of_a_watched_page_work_as_ever() -> None:
    with loaded(COUNTING, 64) as (machine, _):
        point = machine.watchpoint(VALUE + 8, 4)
        assert machine.run(SECONDS) == ENDED_WELL
        assert point.hits == 0
        assert machine.memory.read_u32(VALUE) == 5


def test_reads_are_told_when_asked_for() -> None:
    source = f"_start: mov eax, [{VALUE}]; mov [{VALUE}], eax; mov ebx, [{VALUE + 4}]; mov al, 0; out 0xf4, al"
    with loaded(source, 64) as (machine, _):
        machine.memory.write_u64(VALUE, 0x1234_5678_9ABC_DEF0)
        seen: list[int] = []
        point = machine.watchpoint(VALUE, 4, lambda vcpu, _: seen.append(vcpu.regs.rax), access="access")
        assert machine.run(SECONDS) == ENDED_WELL
        assert seen == [0x9ABC_DEF0] * 2
        assert machine.vcpus[0].regs.rbx == 0x1234_5678
        point.remove()
        machine.vm.memory.write_u8(VALUE, 1)


def test_a_watchpoint_may_cross_a_page() -> None:
    source = """
    _start: mov qword ptr [0x8ffc], rsp
            mov byte ptr [0x9003], 1
            mov byte ptr [0x9004], 1
            mov al, 0
            out 0xf4, al
    """
    with loaded(source, 64) as (machine, _):
        point = machine.watchpoint(0x8FFE, 6, lambda *_: None)
        assert machine.run(SECONDS) == ENDED_WELL
        assert point.hits in (2, 3)  # the first write may come in two pieces
        assert machine.memory.read_u64(0x8FFC) == machine.vcpus[0].regs.rsp | 1 << 56


def test_what_cannot_be_watched_is_refused_and_changes_nothing() -> None:
    with loaded(COUNTING, 64) as (machine, _):
        for length, access in ((0, "write"), (4, "execute")):
            with pytest.raises(UsageError):
                machine.watchpoint(VALUE, length, access=access)
        with pytest.raises(UsageError, match="not mapped"):
            machine.watchpoint(0x7F00_0000_0000, hardware=False)
        assert machine.run(SECONDS) == ENDED_WELL


# Steps


@every_mode
def test_steps_go_through_every_instruction(bits: int) -> None:
    with loaded(COUNTING, bits) as (machine, symbols):
        vcpu = machine.vcpus[0]
        places: list[int] = []
        for _ in range(3):
            assert machine.step().end is End.STOPPED
            places.append(vcpu.regs.rip)
        assert places[0] == symbols["again"]
        assert places[1] == symbols["work"]
        assert vcpu.regs.rbx == 1
        assert machine.step(2).end is End.STOPPED
        assert vcpu.regs.rip > symbols["again"]
        assert machine.run(SECONDS) == ENDED_WELL


def test_a_step_past_the_end_gives_the_end() -> None:
    with loaded(COUNTING, 64) as (machine, _):
        assert machine.step(1000) == ENDED_WELL


def test_a_step_stops_at_a_breakpoint_on_its_way() -> None:
    with loaded(COUNTING, 64) as (machine, symbols):
        machine.breakpoint(symbols["work"])
        assert machine.step(10).end is End.BREAKPOINT
        assert machine.vcpus[0].regs.rip == symbols["work"]
        assert machine.step().end is End.STOPPED
        assert machine.vcpus[0].regs.rbx == 1


DEVICES = """
_start: mov edx, 0x10
        out dx, al
        inc ebx
        in al, dx
        inc ebx
        mov dword ptr [0xd0000000], eax
        inc ebx
        mov eax, [0xd0000000]
        inc ebx
        mov edi, 0x9000
        mov ecx, 3
        rep insb
        mov esi, 0x9000
        mov ecx, 3
        rep outsb
        popcnt eax, ecx
        inc ebx
        hlt
"""


def test_a_step_over_an_access_to_a_device_or_an_instruction_in_software_is_one_step() -> None:
    code, _ = assemble_with_symbols(DEVICES, address=CODE, bits=64)
    expected, at = [], CODE
    disassembler = Disassembler()
    if not disassembler.available:
        pytest.skip(disassembler.advice)
    for instruction in disassembler.disassemble(code, CODE, 64):
        at = instruction.end
        expected.append(at)
    with loaded(DEVICES, 64) as (machine, _):
        values: list[int] = []
        machine.map_ports(0x10, 4, read=lambda *_: 7, write=lambda offset, size, value: values.append(value))
        machine.map_mmio(0xD000_0000, 0x1000, read=lambda *_: 5, write=lambda offset, size, value: None)
        places: list[int] = []
        for _ in expected[:-1]:
            assert machine.step().end is End.STOPPED
            if not places or machine.vcpus[0].regs.rip != places[-1]:
                places.append(machine.vcpus[0].regs.rip)
        steps_of_strings = [place for place in places if place not in expected]
        assert steps_of_strings == []
        assert places == expected[: len(places)]
        assert values[0] == 0
        while machine.step().end is End.STOPPED and machine.vcpus[0].regs.rip != expected[-2]:
            pass
        assert values == [0, 7, 7, 7]
        assert machine.vcpus[0].regs.rbx == 5
        assert machine.statistics().count("port", 0x10, "write") == 4


@every_kind
def test_a_breakpoint_at_an_access_to_a_device_is_passed_alone(hardware: bool) -> None:
    with loaded("_start: mov ecx, 4; 1: here: out 0x10, al; next: inc ebx; loop 1b; mov al, 0; out 0xf4, al", 64) as (
        machine, symbols,
    ):  # fmt: skip
        here = machine.breakpoint(symbols["here"], lambda *_: None, hardware=hardware)
        following = machine.breakpoint(symbols["next"], lambda *_: None, hardware=hardware)
        assert machine.run(SECONDS) == ENDED_WELL
        assert (here.hits, following.hits) == (4, 4)


@every_kind
def test_a_breakpoint_at_an_instruction_that_kvm_may_give_up_on_is_passed(hardware: bool) -> None:
    with loaded("_start: mov ecx, 3; here: popcnt eax, ecx; loop here; mov al, 0; out 0xf4, al", 64) as (
        machine,
        symbols,
    ):
        point = machine.breakpoint(symbols["here"], lambda *_: None, hardware=hardware)
        assert machine.run(SECONDS) == ENDED_WELL
        assert point.hits == 3


def test_an_attached_debugger_is_not_stopped_by_instructions_done_in_software() -> None:
    stops: queue.Queue[Stop] = queue.Queue()
    with loaded("_start: popcnt eax, ecx; popcnt eax, ecx; mov al, 0; out 0xf4, al", 64) as (machine, _):
        machine.debugger.attach(stops.put)
        assert machine.run(SECONDS) == ENDED_WELL
        assert stops.get(timeout=SECONDS).outcome == ENDED_WELL
        completed = machine.statistics().completed
        assert completed in ({}, {"popcnt": 2})  # where the processor runs ring 0 itself, or KVM's emulator


@every_kind
def test_a_breakpoint_set_where_the_guest_stands_counts_from_the_next_time_on(hardware: bool) -> None:
    with loaded(COUNTING, 64) as (machine, symbols):
        machine.step(2)
        assert machine.vcpus[0].regs.rip == symbols["work"]
        point = machine.breakpoint(symbols["work"], lambda *_: None, hardware=hardware)
        assert machine.run(SECONDS) == ENDED_WELL
        assert point.hits == 4


def test_a_step_over_hlt_halts() -> None:
    code, _ = assemble_with_symbols("nop; hlt; nop", address=CODE, bits=64)
    with Machine(irqchip=False) as machine:
        machine.load(FlatImage(code, CODE, "long"))
        assert machine.step().end is End.STOPPED
        assert machine.step().end is End.HALTED
        assert machine.vcpus[0].regs.rip == CODE + 2


def test_a_step_over_hlt_sleeps_until_an_interrupt_where_there_are_controllers() -> None:
    with loaded("_start: cli; hlt; nop; jmp _start", 64) as (machine, _):
        assert machine.step(2).end is End.STOPPED
        assert machine.vcpus[0].regs.rip == CODE + 2
        assert machine.run(SECONDS).end is End.HALTED


# Somebody attached

ENDLESS = "_start: inc rbx\nagain: inc rbx\njmp again"


def test_an_attached_debugger_is_told_and_the_guest_stands() -> None:
    stops: queue.Queue[Stop] = queue.Queue()
    with loaded(COUNTING, 64, vcpus=2) as (machine, symbols):
        debugger, vcpu = machine.debugger, machine.vcpus[0]
        machine.breakpoint(symbols["work"])
        debugger.attach(stops.put)
        machine.start(SECONDS)
        stop = stops.get(timeout=SECONDS)
        assert (stop.kind, stop.vcpu, stop.address) == (StopKind.BREAKPOINT, 0, symbols["work"])
        assert debugger.interrupt(SECONDS)
        assert vcpu.regs.rip == symbols["work"]
        for count in range(3):
            debugger.step(vcpu)
            stop = stops.get(timeout=SECONDS)
            assert stop.kind is StopKind.STEP
            assert debugger.interrupt(SECONDS)
            assert stop.address == vcpu.regs.rip
            assert count or stop.address != symbols["work"]
        debugger.detach()
        assert machine.wait(SECONDS).end is End.BREAKPOINT
        assert vcpu.regs.rip == symbols["work"]


def test_a_running_guest_can_be_interrupted_and_goes_on() -> None:
    stops: queue.Queue[Stop] = queue.Queue()
    with loaded(ENDLESS, 64) as (machine, _):
        debugger, vcpu = machine.debugger, machine.vcpus[0]
        debugger.attach(stops.put)
        machine.start()
        for _ in range(20):
            assert debugger.interrupt(SECONDS)
            before = vcpu.regs.rbx
            debugger.step(vcpu, 3)
            assert stops.get(timeout=SECONDS).kind is StopKind.STEP
            assert debugger.interrupt(SECONDS)
            assert vcpu.regs.rbx > before
            debugger.resume()
        machine.stop()
        assert stops.get(timeout=SECONDS).kind is StopKind.ENDED


def test_a_bad_end_stops_first_and_comes_when_the_guest_is_resumed() -> None:
    stops: queue.Queue[Stop] = queue.Queue()
    with loaded("_start: mov ebx, 7; ud2", 64) as (machine, _):
        machine.debugger.attach(stops.put)
        machine.start(SECONDS)
        stop = stops.get(timeout=SECONDS)
        assert stop.kind is StopKind.ENDED
        assert stop.outcome is not None
        assert stop.outcome.end is End.TRIPLE_FAULT
        assert machine.debugger.interrupt(SECONDS)
        assert machine.vcpus[0].regs.rbx == 7
        assert machine.running
        machine.debugger.resume()
        assert machine.wait(SECONDS).end is End.TRIPLE_FAULT
        assert stops.get(timeout=SECONDS).kind is StopKind.ENDED


def test_the_deadline_waits_while_a_debugger_holds_the_guest() -> None:
    with loaded(ENDLESS, 64) as (machine, _):
        machine.debugger.attach(lambda stop: None)
        machine.start(0.2)
        assert machine.debugger.interrupt(SECONDS)
        with pytest.raises(TimeoutError):
            machine.wait(0.5)
        machine.debugger.resume()
        assert machine.wait(SECONDS).end is End.TIMEOUT


def test_only_one_can_be_attached() -> None:
    with loaded(COUNTING, 64) as (machine, _):
        machine.debugger.attach(lambda stop: None)
        with pytest.raises(UsageError, match="attached"):
            machine.debugger.attach(lambda stop: None)
        machine.debugger.detach()
        machine.debugger.attach(lambda stop: None)
