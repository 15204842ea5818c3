"""Ring 0 that runs directly does what it does when KVM runs it, and interrupts come when they should."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from gnu_toolchain import assemble_with_symbols
from kvmpy import End, Machine
from kvmpy.boot import FlatImage
from kvmpy.devices import DebugExit
from kvmpy.machine.ring3_entry import needs_repair
from kvmpy.x86.flags import Efer
from kvmpy.x86.gates import Gate, Idt
from kvmpy.x86.long_mode import prepare, tables_size
from kvmpy.x86.msrs import Msr
from kvmpy.x86.page_tables import PageTables
from kvmpy.x86.paging import PagingMode

pytestmark = pytest.mark.kvm

SECONDS = 30.0
HIGH = 0xFFFF_FFFF_8100_0000
"""Where kernels like to be, and stand-ins for their instructions are in reach."""
HIGH_TABLES = 0x7_0000
KERNEL, USER, USER_STACK, TABLES, STACK = 0x1000, 0x20_0000, 0x20_3000, 0x4_0000, 0x3_0000
MAPPED = 0x40_0000
TABLE, FIRST, SECOND = 0x6_0000, 0x6_1000, 0x6_2000
"""A page table of the guest's own, and two pages that it maps in turn."""
KERNEL_CS, USER_CS, USER_SS = 0x08, 0x2B, 0x23  # of the GDT that kvmpy.x86.long_mode.prepare writes
X2APIC = """
        mov ecx, 0x1b                             # IA32_APIC_BASE: x2APIC
        rdmsr
        or eax, 0xc00
        wrmsr
        mov ecx, 0x80f                            # spurious vector, APIC on
        mov eax, 0x1ff
        xor edx, edx
        wrmsr
        mov ecx, 0x83e                            # divide by 1
        mov eax, 0xb
        wrmsr
        mov ecx, 0x832                            # timer: periodic, vector 0x40
        mov eax, 0x20040
        wrmsr
        mov ecx, 0x838                            # 2 ms
        mov eax, 2000000
        wrmsr
"""
TIMER = """
timer:  push rax
        push rcx
        push rdx
        test qword ptr [rsp + 0x28], 0x200        # it must not come while interrupts are off
        jz bad
        inc dword ptr [rip + ticks]
        xor eax, eax
        xor edx, edx
        mov ecx, 0x80b                            # EOI
        wrmsr
        pop rdx
        pop rcx
        pop rax
        iretq
"""

KERNEL_SOURCE = f"""
_start: {X2APIC}
        sti
        mov ecx, 600000                           # long enough for the machine to notice
1:      dec ecx
        jnz 1b
        mov ebx, 10
again:
        # The interrupt flag, in the forms of kernels: with NOPs behind, and without
        sti
        .byte 0x66, 0x0f, 0x1f, 0x44, 0, 0
        pushfq
        pop rax
        .byte 0x0f, 0x1f, 0x44, 0, 0
        test eax, 0x200
        jz wrong
        xor edx, edx
        cmp edx, 1                                # CF, which must not change
        cli
        .byte 0x66, 0x0f, 0x1f, 0x44, 0, 0
        jnc wrong
        pushfq
        pop rax
        .byte 0x0f, 0x1f, 0x44, 0, 0
        jnc wrong
        test eax, 0x201
        jz wrong
        test eax, 0x200
        jnz wrong
        mov esi, dword ptr [rip + ticks]
        call wait                                 # for more than a tick, if it were on
        cmp esi, dword ptr [rip + ticks]
        jne wrong
        pushfq
        or qword ptr [rsp], 0x200
        popfq
        pushfq
        pop rax
        test eax, 0x200
        jz wrong
1:      cmp esi, dword ptr [rip + ticks]          # the tick that waited comes now
        je 1b

        # Selectors
        mov eax, cs
        cmp eax, {KERNEL_CS}
        jne wrong
        mov ecx, ss
        cmp ecx, dword ptr [rip + stack_selector]
        jne wrong

        # Exceptions
        mov ebp, 0
        mov eax, dword ptr [{MAPPED:#x}]
        nop
        cmp ebp, 1
        jne wrong
        ud2
        cmp ebp, 0x101
        jne wrong

        # Page tables that change
        mov rdi, {TABLE:#x}
        mov rax, {FIRST + 3:#x}
        mov qword ptr [rdi], rax
        invlpg [0x200000]
        mov qword ptr [0x200000], rbx
        mov rax, {SECOND + 3:#x}
        mov qword ptr [rdi], rax
        invlpg [0x200000]
        mov qword ptr [0x200000], 77
        cmp qword ptr [{FIRST:#x}], rbx
        jne wrong
        mov rax, {FIRST + 3:#x}
        mov qword ptr [rdi], rax
        mov rax, cr3
        mov cr3, rax
        cmp qword ptr [0x200000], rbx
        jne wrong

        # Code that changes: in this page, and in another
        mov dword ptr [rip + number + 1], ebx
number: mov eax, 0
        cmp eax, ebx
        jne wrong
        mov dword ptr [rip + away + 1], ebx
        call away
        cmp eax, ebx
        jne wrong

        mov ecx, 100
1:      call beside
        dec ecx
        jnz 1b

        # GS
        mov ecx, 0xc0000102
        mov eax, {FIRST:#x}
        xor edx, edx
        wrmsr
        swapgs
        cmp qword ptr gs:[0], rbx
        jne wrong
        swapgs

        # Back to itself, and waiting
        mov eax, ss
        push rax
        push rsp
        add qword ptr [rsp], 8
        pushfq
        mov eax, cs
        push rax
        push offset 1f
        iretq
1:      mov esi, dword ptr [rip + ticks]
        sti
        hlt
        cmp esi, dword ptr [rip + ticks]
        je wrong

        dec ebx
        jnz again
        mov al, 0
        out 0xf4, al
wrong:  mov al, 1
        out 0xf4, al
bad:    mov al, 2
        out 0xf4, al

wait:   rdtsc                                     # 10 ms or so
        shl rdx, 32
        lea rdi, [rax + rdx + 30000000]
1:      rdtsc
        shl rdx, 32
        add rax, rdx
        cmp rax, rdi
        jb 1b
        ret

fault:  add rsp, 8                                # error code
        mov rax, cr2
        cmp rax, {MAPPED:#x}
        jne wrong
        inc ebp
        add qword ptr [rsp], 7                    # the MOV that faults
        iretq
illegal:
        add ebp, 0x100
        add qword ptr [rsp], 2                    # the UD2
        iretq
{TIMER}
        .balign 4096
away:   mov eax, 0
        ret
        .balign 4096
ticks:  .quad 0
stack_selector:
        .quad 0
beside: mov dword ptr [rip + ticks + 4], ebx      # code that writes to its own page again and again
        ret
"""

INT3S = 2000
HALTS = 3000
NUMBER = 0x1234_5678
USER_SOURCE = f"""
_start: {X2APIC}
        mov ecx, 200000                           # long enough for the machine to look after SYSCALL once
1:      dec ecx
        jnz 1b
        push {USER_SS}
        push {USER_STACK}
        push 0x202
        push {USER_CS}
        push {USER:#x}
        iretq
entry:  add eax, 1000
        sysretq
{TIMER}
bad:    mov al, 2
        out 0xf4, al
        .balign 8
ticks:  .quad 0

        .org {USER - KERNEL:#x}
        mov ebx, 2000
        xor eax, eax
again:  syscall
        dec ebx
        jnz again
        cmp eax, 2000 * 1000
        jne wrong
        mov al, 0
        out 0xf4, al
wrong:  mov al, 1
        out 0xf4, al
"""


@contextmanager
def prepared(source: str, at: int, gates: dict[int, str]) -> Iterator[tuple[Machine, dict[str, int]]]:
    """A machine whose guest begins at KERNEL, mapped at `at`, in ring 0, and the symbols of its program."""
    code, symbols = assemble_with_symbols(source, address=at + KERNEL, bits=64)
    idt = Idt()
    for vector, name in gates.items():
        idt[vector] = Gate("interrupt", symbols[name], selector=KERNEL_CS)
    with Machine(vcpus=1, memory=16 << 20) as machine:
        machine.add(DebugExit())
        machine.load(FlatImage(code, KERNEL, "long"))
        state = prepare(machine.memory, entry=KERNEL, tables=TABLES, stack=STACK, identity_map=MAPPED, idt=idt)
        directory = state.sregs.cr3 + 0x2000
        assert machine.memory.read_u64(directory + 8) & ~0xFFF == 0x20_0000
        machine.memory.write_u64(directory + 8, TABLE | 3)
        for table, shift, entry in (
            (state.sregs.cr3, 39, HIGH_TABLES + 3),
            (HIGH_TABLES, 30, HIGH_TABLES + 0x1003),
            (HIGH_TABLES + 0x1000, 21, 0x83),
        ):
            machine.memory.write_u64(table + (HIGH >> shift & 511) * 8, entry)
        state.regs.rip = at + KERNEL
        machine.vcpus[0].set_cpu_state(state)
        machine.runners[0].runs_ring_0_directly = True
        yield machine, symbols


@pytest.mark.parametrize("directly", [True, False], ids=["directly", "by KVM"])
@pytest.mark.parametrize("at", [0, HIGH], ids=["low", "high"])
def test_a_kernel_finds_everything_as_it_should_be(at: int, directly: bool) -> None:
    with prepared(KERNEL_SOURCE, at, {6: "illegal", 14: "fault", 0x40: "timer"}) as (machine, symbols):
        machine.memory.write_u32(symbols["stack_selector"] - at, machine.vcpus[0].sregs.ss.selector)
        runner = machine.runners[0]
        runner.runs_ring_0_directly = directly
        outcome = machine.run(SECONDS)
        assert (outcome.end, outcome.code) == (End.EXITED, 1), str(outcome.report)
        if directly and needs_repair():
            direct = runner.direct_execution
            assert direct is not None
            assert direct.counts["instructions"] > 100
            assert direct.counts["interrupts"] > 10
        else:
            assert runner.direct_execution is None


def test_no_interrupt_comes_twice_or_while_they_are_off() -> None:
    code, symbols = assemble_with_symbols(USER_SOURCE, address=KERNEL, bits=64)
    with Machine(vcpus=1, memory=16 << 20) as machine:
        machine.add(DebugExit())
        machine.load(FlatImage(code, KERNEL, "long"))
        idt = Idt()
        for vector, name in ((14, "bad"), (0x40, "timer")):
            idt[vector] = Gate("interrupt", symbols[name], selector=KERNEL_CS)
        state = prepare(machine.memory, entry=KERNEL, tables=TABLES, stack=STACK, identity_map=MAPPED, idt=idt)
        pages = PageTables(machine.memory, PagingMode.LEVEL4, state.sregs.cr3, size=tables_size(MAPPED) - 0x4000)
        pages.map(0, 0, 0x20_0000, page_size=0x20_0000)
        pages.map(USER, USER, 0x20_0000, user=True, page_size=0x20_0000)
        state.sregs.efer |= Efer.SCE
        vcpu = machine.vcpus[0]
        vcpu.set_cpu_state(state)
        star = KERNEL_CS << 32 | (USER_SS - 8 & ~3 | 3) << 48
        vcpu.set_msrs({Msr.STAR: star, Msr.LSTAR: symbols["entry"], Msr.SFMASK: 0x200})
        outcome = machine.run(SECONDS)
        assert (outcome.end, outcome.code) == (End.EXITED, 1), str(outcome.report)


BREAKPOINT_SOURCE = f"""
_start: {X2APIC}
        sti
        mov ecx, 600000
1:      dec ecx
        jnz 1b
        mov ebx, {INT3S}
        xor ebp, ebp
again:  int3
        dec ebx
        jnz again
        cmp dword ptr [rip + ticks], 10
        jb wrong
        cmp ebp, {INT3S}
        jne wrong
        mov al, 0
        out 0xf4, al
wrong:  mov al, 1
        out 0xf4, al
bad:    mov al, 2
        out 0xf4, al
breakpoint:
        inc ebp
        iretq
{TIMER}
        .balign 4096                              # code that writes to its own page is KVM's
ticks:  .quad 0
"""


def run_with_kicks(machine: Machine, *, change: bool = False) -> None:
    """Run to the end that the guest chooses, code 0, while KVM_RUN comes back all the time, as ticks do now and then.

    With `change`, KVM's emulator goes on in two of three cases.
    """
    done = threading.Event()
    runner = machine.runners[0]

    def kick() -> None:
        for number in itertools.count():
            if done.wait(0.0003):
                return
            if machine.running:
                if change and runner.direct_execution is not None:
                    runner.runs_ring_0_directly = number % 3 == 0
                machine.vcpus[0].kick()

    kicks = threading.Thread(target=kick)
    kicks.start()
    try:
        outcome = machine.run(SECONDS)
    finally:
        done.set()
        kicks.join()
    assert (outcome.end, outcome.code) == (End.EXITED, 1), str(outcome.report)


@pytest.mark.parametrize("at", [0, HIGH], ids=["low", "high"])
def test_no_breakpoint_is_lost_or_comes_twice_when_the_machine_ticks(at: int) -> None:
    with prepared(BREAKPOINT_SOURCE, at, {3: "breakpoint", 0x40: "timer"}) as (machine, _):
        run_with_kicks(machine)
        direct = machine.runners[0].direct_execution
        assert not needs_repair() or (direct is not None and direct.counts["INT3"] > INT3S // 4)


HALT_SOURCE = f"""
_start: {X2APIC}
        mov ecx, 0x832                            # timer: once, vector 0x40
        mov eax, 0x40
        wrmsr
        sti
        mov ecx, 600000
1:      dec ecx
        jnz 1b
        mov dword ptr [rip + ticks], 0
        mov ebx, {HALTS}
again:  cli
        mov ecx, 0x838
        mov eax, 20000                            # 20 us: mostly before STI
        xor edx, edx
        wrmsr
        rdtsc
        mov esi, eax
2:      rdtsc
        sub eax, esi
        cmp eax, 300000
        jb 2b
        sti
        hlt
        dec ebx
        jnz again
        cmp dword ptr [rip + ticks], {HALTS}
        jne bad
        mov al, 0
        out 0xf4, al
bad:    mov al, 2
        out 0xf4, al
{TIMER}
        .balign 4096
ticks:  .quad 0
"""


@pytest.mark.parametrize("at", [0, HIGH], ids=["low", "high"])
def test_no_interrupt_that_a_halted_guest_waits_for_is_lost_when_the_way_to_run_it_changes(at: int) -> None:
    with prepared(HALT_SOURCE, at, {0x40: "timer"}) as (machine, _):
        run_with_kicks(machine, change=True)
        direct = machine.runners[0].direct_execution
        assert not needs_repair() or (direct is not None and direct.counts["interrupts"] > HALTS // 20)


EVERYWHERE_SOURCE = f"""
_start: {X2APIC}
        mov ecx, 0xc0000102
        mov eax, {FIRST:#x}
        xor edx, edx
        wrmsr
        mov qword ptr [{FIRST:#x}], 0x1234
        sti
        mov ecx, 600000
1:      dec ecx
        jnz 1b
        mov r15d, dword ptr [rip + rounds]
        mov rbp, rsp
        mov r12d, ss
        movabs rax, 0x1111111111111111
        movabs rcx, 0x2222222222222222
        movabs rdx, 0x3333333333333333
again:  pushfq
        pop rbx
        mov r8, r8
        test ebx, 0x200
        jz wrong
        cli
        mov r8, r8
        mov r8, r8
        mov qword ptr [rsp - 8], rbp              # SYSCALL leaves the program's stack: nobody may write below its top
        swapgs
        mov r8, qword ptr gs:[0]
        swapgs
        mov r9, r9
        cmp qword ptr [rsp - 8], rbp
        jne wrong
        cmp r8, 0x1234
        jne wrong
        cmp edx, 0x33333334                       # CF, which must not change
        pushfq
        mov r8, r8
        mov r8, r8
        pop r9
        jnc wrong
        test r9d, 0x200
        jnz wrong
        test r9d, 1
        jz wrong
        pushfq
        pop rcx
        mov r8, r8
        test ecx, 0x200
        jnz wrong
        movabs rcx, 0x2222222222222222
        mov r8d, ss
        mov r9, r9
        cmp r8d, r12d
        jne wrong
        test r9d, 0x8000
        jz over
        sti                                       # jumped over, or not
over:   mov r8, r8
        sti
        mov r8, r8
        mov r8, r8
        mov r8d, ss
        push r8
        push rbp
        pushfq
        mov r8d, cs
        push r8
        push offset back
        iretq
back:   cmp rsp, rbp
        jne wrong
        movabs r8, 0x1111111111111111
        cmp rax, r8
        jne wrong
        movabs r8, 0x2222222222222222
        cmp rcx, r8
        jne wrong
        movabs r8, 0x3333333333333333
        cmp rdx, r8
        jne wrong
        dec r15d
        jnz again
        cmp dword ptr [rip + ticks], 3
        jb wrong
        mov al, 0
        out 0xf4, al
wrong:  mov al, 1
        out 0xf4, al
bad:    mov al, 2
        out 0xf4, al
{TIMER}
        .balign 4096
ticks:  .quad 0
rounds: .quad 0
"""


@pytest.mark.parametrize(("at", "rounds"), [(0, 200), (HIGH, 300_000)], ids=["low", "high"])
def test_instructions_may_be_interrupted_anywhere(at: int, rounds: int) -> None:
    with prepared(EVERYWHERE_SOURCE, at, {0x40: "timer"}) as (machine, symbols):
        machine.memory.write_u32(symbols["rounds"] - at, rounds)
        run_with_kicks(machine)
        direct = machine.runners[0].direct_execution
        if needs_repair():
            assert direct is not None
            if at == HIGH:  # by stand-ins
                assert direct.counts["instructions"] < rounds // 10


FAR_SOURCE = f"""
_start: mov ecx, 600000
1:      dec ecx
        jnz 1b
        mov al, 5
        out 0x77, al
        in al, 0x77
        cmp al, 9
        jne wrong
again:  call away
        cmp eax, {NUMBER}
        jne again
        cmp dword ptr [rip + data], {NUMBER}
        jne wrong
        mov al, 0
        out 0xf4, al
wrong:  mov al, 1
        out 0xf4, al
        .balign 4096
away:   mov eax, 0
        ret
        .balign 4096
data:   .quad 0
"""


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("at", [0, HIGH], ids=["low", "high"])
def test_what_the_host_writes_in_a_pause_is_seen_and_an_access_whose_handler_raised_comes_again(at: int) -> None:
    calls: list[tuple[str, int]] = []

    def access(name: str, value: int) -> int:
        calls.append((name, value))
        if len(calls) % 2:
            raise ValueError(name)
        return 9

    def write(offset: int, size: int, value: int) -> None:
        access("out", value)

    with prepared(FAR_SOURCE, at, {}) as (machine, symbols):
        machine.map_ports(0x77, 1, read=lambda offset, size: access("in", 0), write=write)
        for name in ("out", "in"):
            with pytest.raises(ValueError, match=name):
                machine.run(SECONDS)
        runner = machine.runners[0]
        assert (runner.direct_execution is not None) == needs_repair()
        machine.start()
        if needs_repair():
            wait_for(lambda: runner.direct_execution is not None and runner.direct_execution.counts["#PF"] > 2)
        with machine.paused():
            assert runner.vcpu.regs.rip - at in range(KERNEL, symbols["data"] - at)
            machine.memory.write_u32(symbols["data"] - at, NUMBER)
            machine.memory.write_u32(symbols["away"] - at + 1, NUMBER)
        outcome = machine.wait(SECONDS)
        assert (outcome.end, outcome.code) == (End.EXITED, 1), str(outcome.report)
        assert calls == [("out", 5), ("out", 5), ("in", 0), ("in", 0)]
