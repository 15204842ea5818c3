"""Coverage by single steps: every instruction is counted, and the guest does what it does without."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gnu_toolchain import assemble_with_symbols
from kvmpy import End, Machine, Outcome, UsageError
from kvmpy.boot import FlatImage
from kvmpy.debug.coverage import Coverage, stepping
from kvmpy.debug.coverage.step_support import steps_in_ring3
from kvmpy.debug.disassembly import Disassembler
from kvmpy.devices import DebugExit
from kvmpy.x86 import long_mode
from kvmpy.x86.gates import Gate, Idt
from two_processors import COUNTER, working_twice

pytestmark = pytest.mark.kvm

SECONDS = 5.0
MODES = {16: "real", 32: "protected", 64: "long"}
CODE, STACK, TABLES = 0x1000, 0x7000, 0x2_0000

every_mode = pytest.mark.parametrize("bits", MODES)

LOOP = """
_start: mov ecx, 5
again:  call work
after:  dec ecx
        jnz again
skip:   jmp done
never:  inc eax
done:   mov al, 0
write:  out 0xf4, al
halt:   hlt
work:   cmp ecx, 100
        ja never
        inc ebx
last:   ret
"""

ENDED_WELL = Outcome(End.EXITED, "debug exit at port 0xf4, value 0x0", code=1)


@contextmanager
def loaded(source: str, bits: int, *, irqchip: bool = True) -> Iterator[tuple[Machine, dict[str, int]]]:
    code, symbols = assemble_with_symbols(source, address=CODE, bits=bits)
    with Machine(irqchip=irqchip) as machine:
        machine.add(DebugExit())
        machine.load(FlatImage(code, CODE, MODES[bits], stack=STACK))
        yield machine, symbols


@contextmanager
def loaded_with_handlers(
    source: str, handlers: dict[int, str], *, ring: int = 0
) -> Iterator[tuple[Machine, dict[str, int]]]:
    """In long mode, with an IDT that leads to labels, and a TSS that lets ring 3 use the debug exit."""
    code, symbols = assemble_with_symbols(source, address=CODE, bits=64)
    with Machine() as machine:
        machine.add(DebugExit())
        machine.memory.write(CODE, code)
        idt = Idt()
        for vector, label in handlers.items():
            idt[vector] = Gate("interrupt", symbols[label])
        state = long_mode.prepare(
            machine.memory, entry=symbols["_start"], tables=TABLES, stack=STACK, ring=ring, idt=idt, ports=((0xF4, 1),)
        )
        machine.vcpus[0].set_cpu_state(state)
        yield machine, symbols


def by_name(coverage: Coverage, symbols: dict[str, int]) -> dict[str, int]:
    return {name: coverage.counts.get(address, 0) for name, address in symbols.items()}


@every_mode
def test_every_instruction_is_counted_as_often_as_it_is_executed(bits: int) -> None:
    with loaded(LOOP, bits) as (machine, symbols):
        with Coverage(machine) as coverage:
            assert machine.run(SECONDS) == ENDED_WELL
        assert by_name(coverage, symbols) == {
            "_start": 1, "again": 5, "after": 5, "skip": 1, "work": 5, "last": 5, "never": 0, "done": 1, "write": 1,
            "halt": 0,
        }  # fmt: skip
        assert sum(coverage.counts.values()) == 1 + 5 * 3 + 5 * 4 + 1 + 2
        assert len(coverage.addresses) == 11
        assert machine.vcpus[0].regs.rbx == 5


@every_mode
def test_blocks_are_entered_at_their_start_and_left_at_their_end(bits: int) -> None:
    with loaded(LOOP, bits) as (machine, symbols):
        with Coverage(machine) as coverage:
            machine.run(SECONDS)
        found = {block.start: block for block in coverage.blocks}
        assert found.keys() == {symbols[name] for name in ("_start", "again", "after", "skip", "done", "work")}
        assert found[symbols["done"]].end == symbols["halt"]
        assert found[symbols["work"]].end == symbols["last"] + 1
        assert {address for block in coverage.blocks for address in block.instructions} == coverage.addresses


def test_the_exits_of_steps_are_seen_by_nobody_else() -> None:
    with loaded(LOOP, 64) as (machine, _):
        with Coverage(machine):
            machine.run(SECONDS)
        assert [type(exit).__name__ for exit in machine.recent_exits()] == ["DeviceAccess"]
        assert not machine.runners[0].loop.other_exits


def test_runs_that_follow_each_other_are_one_coverage() -> None:
    with loaded("again: inc ebx; nop; jmp again", 64) as (machine, symbols), Coverage(machine) as coverage:
        for _ in range(3):
            assert machine.run(0.02).end is End.TIMEOUT
        counts = [coverage.counts[address] for address in sorted(coverage.addresses)]
        assert len(counts) == 3
        assert max(counts) - min(counts) <= 1
        assert machine.vcpus[0].regs.rbx == coverage.counts[symbols["again"]]


def test_after_the_coverage_the_guest_runs_without_steps() -> None:
    with loaded(LOOP, 64) as (machine, symbols):
        machine.breakpoint(symbols["last"])
        with Coverage(machine) as coverage:
            assert machine.run(SECONDS).end is End.BREAKPOINT
        assert not machine.runners[0].debug.traced
        before = dict(coverage.counts)
        for _ in range(4):
            assert machine.run(SECONDS).end is End.BREAKPOINT
        assert machine.run(SECONDS) == ENDED_WELL
        assert coverage.counts == before
        assert before[symbols["work"]] == 1


@every_mode
def test_breakpoints_and_steps_of_a_debugger_work_meanwhile(bits: int) -> None:
    with loaded(LOOP, bits) as (machine, symbols), Coverage(machine) as coverage:
        seen: list[int] = []
        machine.breakpoint(symbols["work"], lambda vcpu, _: seen.append(vcpu.regs.rcx), hardware=False)
        machine.breakpoint(symbols["last"], hardware=True)
        assert machine.step(2).end is End.STOPPED
        for count in range(5, 0, -1):
            assert machine.run(SECONDS).end is End.BREAKPOINT
            assert seen[-1] == count
        assert machine.run(SECONDS) == ENDED_WELL
        assert by_name(coverage, symbols)["work"] == 5
        assert by_name(coverage, symbols)["last"] == 5


def test_port_and_memory_accesses_are_counted_once() -> None:
    source = """
    _start: mov ebx, 0xd0000000
    out_:   out 0x10, al
    in_:    in al, 0x10
    next:   nop
    store:  mov [ebx], al
    load:   mov al, [ebx]
    both:   inc dword ptr [ebx]
    string: mov ecx, 3
    rep_:   rep stosb
    done:   mov al, 0
    write:  out 0xf4, al
    """
    with loaded(source, 32) as (machine, symbols):
        machine.map_ports(0x10, 1, read=lambda *_: 7)
        machine.map_mmio(0xD000_0000, 0x1000, read=lambda *_: 5, write=lambda *_: None)
        machine.vcpus[0].regs.rdi = 0x8000
        with Coverage(machine) as coverage:
            assert machine.run(SECONDS) == ENDED_WELL
        counts = by_name(coverage, symbols)
        assert counts.pop("rep_") in (1, 2, 3)  # a step may come out after each round
        assert counts == dict.fromkeys(counts, 1)


@pytest.mark.parametrize("irqchip", [True, False])
@every_mode
def test_hlt_halts(bits: int, irqchip: bool) -> None:
    with loaded("_start: cli; halt: hlt; never: nop; ud2", bits, irqchip=irqchip) as (machine, symbols):
        with Coverage(machine) as coverage:
            assert machine.run(SECONDS).end is End.HALTED
        assert by_name(coverage, symbols) == {"_start": 1, "halt": 1, "never": 0}
        assert machine.vcpus[0].regs.rip == symbols["never"]


# Interrupts and exceptions

TIMER = """
_start: xor ax, ax
        mov ds, ax
        mov word ptr [0x20 * 4], offset handler
        mov word ptr [0x20 * 4 + 2], 0
        mov al, 0x11; out 0x20, al      # the PIC: its vectors from 0x20 on, the timer alone
        mov al, 0x20; out 0x21, al
        mov al, 4;    out 0x21, al
        mov al, 1;    out 0x21, al
        mov al, 0xfe; out 0x21, al
        mov al, 0x34; out 0x43, al      # the PIT: 1000 ticks a second
        mov al, 0xa9; out 0x40, al
        mov al, 0x04; out 0x40, al
        sti
again:  {wait}
after:  cmp byte ptr [0x3000], 3
        jb again
done:   cli
        mov al, 0
        out 0xf4, al
handler:
        push ax
        inc byte ptr [0x3000]
        mov al, 0x20
        out 0x20, al
        pop ax
return: iret
"""


@pytest.mark.parametrize("wait", ["hlt", "nop"])
def test_a_guest_that_waits_for_its_timer_gets_it(wait: str) -> None:
    pytest.importorskip("capstone")  # or the first instruction of the handler is not found
    with loaded(TIMER.format(wait=wait), 16) as (machine, symbols):
        with Coverage(machine) as coverage:
            assert machine.run(SECONDS) == ENDED_WELL
        counts = by_name(coverage, symbols)
        assert counts["handler"] >= 3
        assert counts["return"] == counts["handler"]
        assert counts["again"] >= 1
        if wait == "hlt":
            assert counts["again"] == counts["after"] <= counts["handler"]  # it slept until then


def test_the_first_instruction_of_an_exception_handler_is_counted() -> None:
    pytest.importorskip("capstone")
    source = """
    _start: mov ecx, 3
    fault:  ud2
    next:   dec ecx
            jnz fault
            mov al, 0
            out 0xf4, al
    never:  nop
    handler:
            add qword ptr [rsp], 2
    second: nop
    return: iretq
    """
    with loaded_with_handlers(source, {6: "handler", 13: "never"}) as (machine, symbols):
        with Coverage(machine) as coverage:
            assert machine.run(SECONDS) == ENDED_WELL
        assert by_name(coverage, symbols) == {
            "_start": 1, "fault": 3, "next": 3, "never": 0, "handler": 3, "second": 3, "return": 3,
        }  # fmt: skip


def test_ring_3_runs_on_unseen_where_steps_do_not_come_out_of_it() -> None:
    source = """
    _start: push rdx
            push 0x6000
            pushf
            push rcx
            lea rax, [rip + user]
            push rax
    enter:  iretq
    user:   nop
            out 0xe0, al
            ud2
    handler:
            nop
            out 0xe1, al
    seen:   nop
            mov al, 0
            out 0xf4, al
    """
    code, symbols = assemble_with_symbols(source, address=CODE, bits=64)
    with Machine() as machine:
        machine.add(DebugExit())
        machine.map_ports(0xE0, 2, write=lambda *_: None)
        machine.memory.write(CODE, code)
        idt = Idt()
        idt[6] = Gate("interrupt", symbols["handler"])
        states = [
            long_mode.prepare(
                machine.memory, entry=CODE, tables=TABLES, stack=STACK, ring=ring, idt=idt, ports=((0xE0, 2),)
            )
            for ring in (0, 3)
        ]
        kernel, user = states
        kernel.regs.rcx, kernel.regs.rdx = user.sregs.cs.selector, user.sregs.ss.selector
        machine.vcpus[0].set_cpu_state(kernel)
        with Coverage(machine) as coverage:
            assert machine.run(SECONDS) == ENDED_WELL
        counts = by_name(coverage, symbols)
        assert (counts["_start"], counts["enter"], counts["seen"]) == (1, 1, 1)
        if steps_in_ring3():
            assert (counts["user"], coverage.unseen) == (1, 0)
        else:
            assert (counts["user"], coverage.unseen) == (0, 1)


def test_a_guest_that_starts_in_ring_3_is_refused_where_steps_do_not_come_out_of_it() -> None:
    if steps_in_ring3():
        pytest.skip("here they do")
    with loaded_with_handlers("_start: nop; jmp _start", {}, ring=3) as (machine, _):
        with pytest.raises(UsageError, match="ring 3"), Coverage(machine):
            pass
        assert machine.run(0.01).end is End.TIMEOUT


# Code that changes, several processors, other ends


def test_code_that_a_guest_changes_is_stepped_as_it_is() -> None:
    source = """
    _start: mov ecx, 2
    again:  call work
            mov byte ptr [rip + turn], 0x90
            dec ecx
            jnz again
            mov al, 0
            out 0xf4, al
    work:   nop
    turn:   ret
    more:   inc ebx
            ret
    """
    with loaded(source, 64) as (machine, symbols):
        with Coverage(machine) as coverage:
            assert machine.run(SECONDS) == ENDED_WELL
        counts = by_name(coverage, symbols)
        assert (counts["work"], counts["turn"], counts["more"]) == (2, 2, 1)


def test_all_processors_count() -> None:
    code, symbols = assemble_with_symbols(working_twice(5), address=CODE, bits=16)
    with Machine(vcpus=2) as machine:
        machine.add(DebugExit())
        machine.load(FlatImage(code, CODE, "real", stack=STACK))
        machine.vcpus[1].set_real_mode(CODE, stack=0x6000)
        with Coverage(machine) as coverage:
            assert machine.run(SECONDS).end is End.EXITED
        counts = by_name(coverage, symbols)
        assert (counts["_start"], counts["again"], counts["work"]) == (2, 10, 10)
        assert machine.memory.read_u16(COUNTER) == 10


def test_a_guest_that_crashes_has_its_last_instruction_counted() -> None:
    with loaded("_start: nop; crash: ud2", 64) as (machine, symbols):
        with Coverage(machine) as coverage:
            assert machine.run(SECONDS).end is End.TRIPLE_FAULT
        assert by_name(coverage, symbols) == {"_start": 1, "crash": 1}


def test_a_deadline_and_stop_end_a_stepped_run() -> None:
    with loaded("_start: jmp _start", 64) as (machine, symbols), Coverage(machine) as coverage:
        assert machine.run(0.05).end is End.TIMEOUT
        machine.start(SECONDS)
        with machine.paused():
            assert machine.vcpus[0].regs.rip == symbols["_start"]
        assert machine.stop().end is End.STOPPED
        assert coverage.addresses == {symbols["_start"]}


def test_a_coverage_that_ends_while_the_guest_runs_lets_it_run_on() -> None:
    with loaded("_start: inc rbx; jmp _start", 64) as (machine, _):
        with Coverage(machine) as coverage:
            machine.start(SECONDS)
        with machine.paused():
            before = machine.vcpus[0].regs.rbx
        assert machine.running
        assert len(coverage.addresses) <= 2
        while True:  # until the deadline of the test
            time.sleep(0.005)
            with machine.paused():
                if machine.vcpus[0].regs.rbx > before:
                    break
        machine.stop()


def test_what_a_handler_raises_comes_out_and_the_access_is_presented_again() -> None:
    calls: list[int] = []

    def write(offset: int, size: int, value: int) -> None:
        calls.append(value)
        if len(calls) == 1:
            raise ValueError("once")

    with loaded("_start: mov al, 5; there: out 0x10, al; mov al, 0; out 0xf4, al", 64) as (machine, symbols):
        machine.map_ports(0x10, 1, write=write)
        with Coverage(machine) as coverage:
            with pytest.raises(ValueError, match="once"):
                machine.run(SECONDS)
            assert machine.run(SECONDS) == ENDED_WELL
        assert calls == [5, 5]
        assert by_name(coverage, symbols) == {"_start": 1, "there": 1}


def test_coverage_is_taken_once_at_a_time_and_begins_while_the_machine_stands() -> None:
    with loaded("_start: jmp _start", 64) as (machine, _):
        with Coverage(machine) as coverage, pytest.raises(UsageError, match="already"), Coverage(machine):
            pass
        with pytest.raises(UsageError, match="once"):
            coverage.start()
        machine.start(SECONDS)
        with pytest.raises(UsageError, match="stands"), Coverage(machine):
            pass
        machine.stop()
        with Coverage(machine):
            machine.run(0.01)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "magic"}, {"places": "pages"}, {"functions": ["f"]}, {"starts": [1]}, {"bits": 16},
        {"places": "lines"}, {"method": "breakpoints", "places": "lines", "starts": [1]},
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(options: dict[str, object]) -> None:
    with loaded("_start: nop", 64) as (machine, _), pytest.raises(UsageError):
        Coverage(machine, **options)  # type: ignore[arg-type]


# What hosts and installations differ in


QUIET = """
_start: mov ecx, 3
again:  lfence
fence:  mfence
behind: nop
        mov eax, ss
load:   mov ss, eax
shadow: nop
        swapgs
gs:     swapgs
        mov rax, rsp
        push 0
        push rax
        pushf
        mov eax, cs
        push rax
        lea rax, [rip + back]
        push rax
        mov eax, ss
        mov [rsp + 32], rax
return: iretq
back:   mfence
write:  out 0x80, al
        dec ecx
        jnz again
done:   mov al, 0
        mfence
last:   out 0xf4, al
never:  nop
"""


def test_instructions_behind_one_after_which_no_step_comes_are_counted() -> None:
    pytest.importorskip("capstone")
    with loaded(QUIET, 64) as (machine, symbols):
        with Coverage(machine) as coverage:
            assert machine.run(SECONDS) == ENDED_WELL
        counts = by_name(coverage, symbols)
        once = {"_start": 1, "done": 1, "last": 1, "never": 0}
        assert counts == dict.fromkeys(counts, 3) | once
        assert len(coverage.addresses) == QUIET.count("\n") - 2  # every line but the empty and the last one


@pytest.mark.parametrize("irqchip", [True, False])
def test_hlt_behind_one_after_which_no_step_comes_halts(irqchip: bool) -> None:
    pytest.importorskip("capstone")
    with loaded("_start: cli; lfence; halt: hlt; never: nop; ud2", 64, irqchip=irqchip) as (machine, symbols):
        with Coverage(machine) as coverage:
            assert machine.run(SECONDS).end is End.HALTED
        assert by_name(coverage, symbols) == {"_start": 1, "halt": 1, "never": 0}


def test_without_capstone_all_that_steps_tell_of_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Disassembler, "available", property(lambda _: False))
    with loaded(LOOP, 64) as (machine, symbols):
        with Coverage(machine) as coverage:
            assert machine.run(SECONDS) == ENDED_WELL
        assert by_name(coverage, symbols)["work"] == 5
        assert sum(coverage.counts.values()) == 1 + 5 * 3 + 5 * 4 + 1 + 2
    with loaded("_start: cli; halt: hlt; never: nop", 64) as (machine, symbols):
        with Coverage(machine) as coverage:
            assert machine.run(SECONDS).end is End.HALTED
        assert by_name(coverage, symbols) == {"_start": 1, "halt": 1, "never": 0}


@every_mode
def test_where_each_step_has_to_be_asked_for_the_counts_are_the_same(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stepping, "steps_go_on", lambda: False)
    with loaded(LOOP, bits) as (machine, symbols):
        with Coverage(machine) as coverage:
            assert machine.run(SECONDS) == ENDED_WELL
        assert by_name(coverage, symbols)["work"] == 5
        assert sum(coverage.counts.values()) == 1 + 5 * 3 + 5 * 4 + 1 + 2


class _Break(Exception):
    """Raised by a signal handler in the midst of a run."""


def test_what_a_signal_handler_raises_loses_no_step_and_counts_none_twice() -> None:
    def raise_break(*_: object) -> None:
        raise _Break

    previous = signal.signal(signal.SIGVTALRM, raise_break)
    try:
        with loaded("_start: inc rbx; jmp _start", 64) as (machine, symbols), Coverage(machine) as coverage:
            for attempt in range(30):
                signal.setitimer(signal.ITIMER_VIRTUAL, 0.004 + attempt * 0.0001)
                with pytest.raises(_Break):
                    machine.run(SECONDS)
            assert machine.vcpus[0].regs.rbx > 1000
            assert coverage.counts[symbols["_start"]] == machine.vcpus[0].regs.rbx
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


STARTS_ANOTHER = """
        .code64
_start: mov ebx, 0xfee00000
        mov dword ptr [rbx + 0xf0], 0x1ff     # software enable
        mov esi, offset other                 # the trampoline goes where the SIPI says: vector 8, 0x8000
        mov edi, 0x8000
        mov ecx, offset end - other
        rep movsb
        mov dword ptr [rbx + 0x300], 0xc4500  # INIT to all but self
        mov dword ptr [rbx + 0x300], 0xc4608  # SIPI
wait:   cmp dword ptr [0x2000], 1
        jne wait
        mov al, 0
        out 0xf4, al
never:  nop
        .code16
other:  xor ax, ax
        mov ds, ax
        inc dword ptr [0x2000]
        jmp stop
middle: nop
stop:   cli
halt:   hlt
end:
"""


def test_a_processor_that_the_guest_starts_itself_counts_from_its_first_instruction() -> None:
    code, symbols = assemble_with_symbols(STARTS_ANOTHER, address=CODE, bits=64)
    with Machine(vcpus=2) as machine:
        machine.add(DebugExit())
        machine.load(FlatImage(code, CODE, "long", stack=STACK))
        with Coverage(machine) as coverage:
            assert machine.run(SECONDS) == ENDED_WELL
        counts = by_name(coverage, symbols)
        assert (counts["_start"], counts["never"], counts["other"]) == (1, 0, 0)
        assert counts["wait"] >= 1
        copy = {name: coverage.counts.get(symbols[name] - symbols["other"] + 0x8000, 0) for name in ("other", "middle")}
        assert copy == {"other": 1, "middle": 0}
