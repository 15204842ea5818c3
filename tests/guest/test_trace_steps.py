"""Traces with every instruction: what was executed, what it changed, and that the guest does what it does without."""

from __future__ import annotations

import threading

import pytest

from gnu_toolchain import assemble, assemble_with_symbols
from kvmpy import End, Machine
from kvmpy.boot import FlatImage
from kvmpy.debug.disassembly import Disassembler
from kvmpy.debug.symbols import SymbolTable
from kvmpy.debug.trace import TraceEvent, Tracer
from kvmpy.devices import DebugExit, PostPort
from kvmpy.exits import Debug
from waiting import wait_until

KIB = 1024
PATIENCE = 20.0
MODES = {16: "real", 32: "protected", 64: "long"}

needs_capstone = pytest.mark.skipif(not Disassembler().available, reason="needs capstone, of the extra `debug`")


def machine_with(source: str, *, bits: int = 16, irqchip: bool = False) -> Machine:
    machine = Machine(memory=512 * KIB, irqchip=irqchip)
    machine.load(FlatImage(assemble(source, bits=bits), mode=MODES[bits]))
    return machine


def steps(trace: Tracer) -> list[TraceEvent]:
    return [event for event in trace.events if event.kind == "step"]


@needs_capstone
@pytest.mark.parametrize("bits", [16, 32, 64])
def test_every_instruction_is_told_with_its_bytes_and_what_it_changed(bits: int) -> None:
    source = """
        mov ecx, 2
    1:  inc ebx
        loop 1b
        mov al, 7
        out 0x80, al
        in al, 0x80
        nop
        hlt"""
    code, symbols = assemble_with_symbols(source.replace("1:", "again: 1:"), bits=bits)
    with machine_with(source, bits=bits) as machine:
        machine.add(PostPort())
        machine.symbols = SymbolTable.from_dict(symbols)
        with machine.trace(steps=True) as trace:
            assert machine.run(PATIENCE).end is End.HALTED
        told = steps(trace)
        names = [event.name.split(" <")[0] for event in told]
        loop = f"loop {symbols['again']:#x}"
        if names[-1] == "hlt":  # where its step comes before its exit
            names.pop()
        assert names == [
            "mov ecx, 2", "inc ebx", loop, "inc ebx", loop, "mov al, 7", "out 0x80, al", "in al, 0x80", "nop",
        ]  # fmt: skip
        changed = [
            {name: value for name, value in event.registers.items() if name != "rflags"} for event in told[:9]
        ]  # fmt: skip
        assert changed == [{"rcx": 2}, {"rbx": 1}, {"rcx": 1}, {"rbx": 2}, {"rcx": 0}, {"rax": 7}, {}, {}, {}]
        assert told[1].text == "again"
        for event in told:
            assert event.address is not None
            offset = event.address - 0x1000
            assert event.value == code[offset : offset + (event.size or 0)]
            assert event.size
        # Accesses stand before the instruction that makes them is complete.
        order = [event.name for event in trace.events if event.kind in ("port", "step")]
        assert order.index("out 0x80") + 1 == order.index("out 0x80, al")
        assert order.index("in 0x80") + 1 == order.index("in al, 0x80")


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_the_guest_ends_as_it_does_without(bits: int) -> None:
    source = """
        mov ecx, 20; xor ebx, ebx
    1:  add ebx, ecx; pushf; popf; loop 1b
        mov al, 0xaa; out 0x80, al
        hlt"""

    def run(steps: bool) -> tuple[str, int, int, int, str]:
        with machine_with(source, bits=bits) as machine:
            machine.add(PostPort())
            if steps:
                with machine.trace(steps=True):
                    outcome = machine.run(PATIENCE)
            else:
                outcome = machine.run(PATIENCE)
            regs = machine.vcpus[0].regs
            return outcome.end, regs.rbx, regs.rip, regs.rflags, outcome.message

    assert run(steps=True) == run(steps=False)


TIMER = """
        cli; xor ax, ax; mov ds, ax; mov ss, ax; mov sp, 0x8000
        mov word ptr [0x20], offset tick; mov word ptr [0x22], 0
        mov al, 0x11; out 0x20, al; mov al, 8; out 0x21, al; mov al, 4; out 0x21, al; mov al, 1; out 0x21, al
        mov al, 0xfe; out 0x21, al
        mov al, 0x34; out 0x43, al; xor al, al; out 0x40, al; mov al, 0x10; out 0x40, al
        sti
1:      hlt
after:  cmp bl, 3; jb 1b
        cli; hlt
tick:   inc bl; mov al, 0x20; out 0x20, al; iret
"""


def test_interrupts_come_and_hlt_waits_for_them() -> None:
    _, symbols = assemble_with_symbols(TIMER)
    with machine_with(TIMER, irqchip=True) as machine:
        with machine.trace(steps=True) as trace:
            outcome = machine.run(PATIENCE)
        assert outcome.end is End.HALTED
        assert outcome.message == "halted with interrupts off"
        ticks = machine.vcpus[0].regs.rbx & 0xFF
        assert ticks >= 3  # on a busy host several come at once
        told = steps(trace)
        assert [event.value for event in told].count(b"\xf4") >= 2
        if not any(event.address == symbols["tick"] + 2 for event in told):
            return  # a processor whose delivery of an interrupt clears TF: it steps again behind the handler
        assert sum("rbx" in event.registers for event in told) == ticks
        # Where an interrupt came before an instruction, that one is not taken for the first one of the handler.
        at_after = [event for event in told if event.address == symbols["after"] and "interrupt" not in event.name]
        assert at_after
        assert all("rbx" not in event.registers for event in at_after)


def test_steps_can_be_filtered_and_kept_in_a_ring() -> None:
    with machine_with("mov cx, 1000; 1: inc bx; loop 1b; hlt") as machine:
        with machine.trace(steps=True, addresses=range(0x1003, 0x1004), ring=10) as trace:
            machine.run(PATIENCE)
        assert trace.count == 1000
        assert [event.registers["rbx"] for event in trace.events] == list(range(991, 1001))


def _wait_until_beyond(before: int, machine: Machine) -> None:
    """Until a running guest has counted further than that in RBX."""

    def is_beyond() -> bool:
        with machine.paused():
            return bool(machine.vcpus[0].regs.rbx > before)

    wait_until(is_beyond)


def test_stepping_begins_and_ends_while_the_guest_runs() -> None:
    with machine_with("1: inc ebx; jmp 1b", bits=32) as machine:
        machine.start(timeout=PATIENCE)
        for _ in range(3):
            with machine.trace(steps=True, kinds="step") as trace:
                while len(trace.events) < 20:
                    threading.Event().wait(0.01)
            changes = [event.registers["rbx"] for event in trace.events if "rbx" in event.registers]
            assert changes == list(range(changes[0], changes[0] + len(changes)))
            with machine.paused():
                before = machine.vcpus[0].regs.rbx
            told = trace.count
            _wait_until_beyond(before, machine)
            assert trace.count == told
        assert machine.stop().end is End.STOPPED


def test_nothing_of_the_steps_is_left_on_the_vcpu() -> None:
    with machine_with("nop; nop; hlt") as machine:
        with machine.trace(steps=True):
            machine.run(PATIENCE)
        vcpu = machine.vcpus[0]
        vcpu.regs.rip = 0x1000
        assert not isinstance(vcpu.run(PATIENCE), Debug)
        assert not machine.runners[0].exit_handlers


def test_a_handler_of_ones_own_for_debug_exits_stays() -> None:
    seen: list[int] = []
    with machine_with("nop; nop; nop; hlt") as machine:
        machine.on_exit(Debug, lambda vcpu, event: seen.append(event.pc))
        with machine.trace(steps=True) as trace:
            machine.run(timeout=1)
        assert seen[:2] == [0x1001, 0x1002]
        assert len(steps(trace)) >= 3
        assert Debug in machine.runners[0].exit_handlers


def test_breakpoints_stop_while_steps_are_traced() -> None:
    code, symbols = assemble_with_symbols("mov cx, 3; again: inc bx; loop again; mov dx, 1; hlt")
    with machine_with("mov cx, 3; again: inc bx; loop again; mov dx, 1; hlt") as machine:
        hits: list[int] = []
        machine.breakpoint(symbols["again"], lambda vcpu, point: hits.append(vcpu.regs.rcx))
        with machine.trace(steps=True, kinds="step") as trace:
            assert machine.run(PATIENCE).end is End.HALTED
        assert hits == [3, 2, 1]
        assert [event.address for event in trace.events].count(symbols["again"]) == 3
        assert machine.memory.read(0x1000, len(code)) == code


def test_a_processor_that_the_guest_starts_is_traced_from_its_start_on() -> None:
    source = """
        mov edi, 0xfee00300
        mov dword ptr [edi], 0x000c4500  # INIT to all others
        mov dword ptr [edi], 0x000c4602  # SIPI: start at 0x2000
    1:  cmp byte ptr [0x5000], 0; je 1b
        cli; hlt
    """
    with Machine(memory=512 * KIB, vcpus=2) as machine:
        machine.load(FlatImage(assemble(source, bits=32), mode="protected"))
        other = assemble("xor ax, ax; mov ds, ax; mov byte ptr [0x5000], 1; cli; hlt", address=0x2000)
        machine.memory.write(0x2000, other)
        with machine.trace(steps=True) as trace:
            assert machine.run(PATIENCE).end is End.HALTED
        of_other = [event for event in trace.events if event.vcpu == 1 and event.kind in ("step", "other")]
        assert [event.name for event in of_other][:1] == ["started by INIT and SIPI"]
        values = [event.value for event in of_other[1:]]
        program = [b"\x31\xc0", b"\x8e\xd8", b"\xc6\x06\x00\x50\x01", b"\xfa", b"\xf4"]
        assert values
        assert values == program[-len(values) :]  # its first instruction may go unseen


# Ring 3


RING_3 = """
        mov rsp, 0x8000
        mov ecx, 3
    1:  inc ebx; out 0x80, al; loop 1b
        in al, 0x80
        movd xmm0, ebx; paddd xmm0, xmm0; movd eax, xmm0
        pushf; popf
        mov [0x5000], eax
        mov al, 7; out 0xf4, al
        jmp .
"""


def ring_3(source: str) -> Machine:
    machine = Machine(memory=1024 * KIB, irqchip=False)
    machine.add(PostPort())
    machine.add(DebugExit())
    machine.load(FlatImage(assemble(source, bits=64), mode="long", ring=3))
    return machine


@needs_capstone
def test_a_program_in_ring_3_is_traced_instruction_by_instruction() -> None:
    with ring_3(RING_3) as machine:
        before = (machine.memory.regions, machine.ports.regions, machine.vcpus[0].sregs.idt)
        with machine.trace(steps=True) as trace:
            assert machine.run(PATIENCE).end is End.EXITED
        names = [event.name.split(" ")[0] for event in steps(trace)]
        assert names == [
            "mov", "mov", *("inc", "out", "loop") * 3, "in", "movd", "paddd", "movd", "pushfq", "popfq", "mov", "mov",
            "out",
        ]  # fmt: skip
        assert [event.registers.get("rax") for event in steps(trace) if event.name == "movd eax, xmm0"] == [6]
        assert all("rip" not in event.registers for event in steps(trace))
        assert [event.name for event in trace.events if event.kind == "port"] == ["out 0x80"] * 3 + [
            "in 0x80",
            "out 0xf4",
        ]
        assert machine.memory.read_u32(0x5000) == 6
        # Nothing is left of what it took.
        assert (machine.memory.regions, machine.ports.regions, machine.vcpus[0].sregs.idt) == before
        assert not machine.vcpus[0].regs.rflags & 0x100
        assert [access.address for access in machine.statistics().accesses] == [0x80, 0x80, 0xF4]
        assert machine.statistics().unclaimed == ()


def test_steps_in_ring_3_begin_and_end_while_the_program_runs() -> None:
    with ring_3("1: inc rbx; jmp 1b") as machine:
        machine.start(timeout=PATIENCE)
        for _ in range(3):
            with machine.trace(steps=True, kinds="step") as trace:
                while len(trace.events) < 50:
                    threading.Event().wait(0.01)
            changes = [event.registers["rbx"] for event in trace.events if "rbx" in event.registers]
            assert changes == list(range(changes[0], changes[0] + len(changes)))
            with machine.paused():
                vcpu = machine.vcpus[0]
                assert vcpu.regs.rip in (0x1000, 0x1003)
                assert vcpu.sregs.cs.dpl == 3
                before = vcpu.regs.rbx
            _wait_until_beyond(before, machine)
        assert machine.stop().end is End.STOPPED
        assert len(machine.memory.regions) == 1


def test_a_program_in_ring_3_with_an_idt_of_its_own_runs_as_it_does_without() -> None:
    """Where the trap would be the guest's, it is left alone, and the trace says so."""
    from kvmpy.debug.trace.ring3_steps import steps_come_out
    from kvmpy.x86 import long_mode
    from kvmpy.x86.gates import Gate, Idt

    idt = Idt()
    idt[6] = Gate("interrupt", 0x3000)
    with ring_3("nop; ud2") as machine:
        machine.memory.write(0x3000, assemble("mov al, 3; out 0xf4, al; hlt", bits=64))
        state = long_mode.prepare(machine.memory, entry=0x1000, tables=0x20000, stack=0x8000, ring=3, idt=idt)
        machine.vcpus[0].set_cpu_state(state)
        with machine.trace(steps=True) as trace:
            outcome = machine.run(PATIENCE)
        assert (outcome.end, outcome.code) == (End.EXITED, 7)
        told = [event.name for event in trace.events if event.kind in ("other", "step")]
        assert told[0] == "nop" if steps_come_out() else told[0].startswith("no steps: ring 3 with an IDT of its own")


@pytest.mark.parametrize(
    "source",
    [
        "mov rdi, 0xfefe0000; mov ecx, 0x200; xor eax, eax; rep stosq; 1: jmp 1b",  # the IDT and its code
        "mov rdi, 0xfefe0800; mov rax, 0xfeebfeebfeebfeeb; mov [rdi], rax; 1: jmp 1b",  # a loop in ring 0
        "mov rax, 0xfefe0802; jmp rax",  # in the stub's code
        "mov rdi, [0x0]; hlt",
    ],
)
def test_a_hostile_program_in_ring_3_harms_itself_only(source: str) -> None:
    with ring_3(source) as machine:
        with machine.trace(steps=True):
            assert machine.run(timeout=0.5).end in (End.TIMEOUT, End.TRIPLE_FAULT, End.FAILED, End.HALTED)
        assert len(machine.memory.regions) == 1
