"""Traces of real guests: every exit, by whom it was answered, how long it took, and that nothing changes by tracing."""

from __future__ import annotations

import threading
from collections import Counter
from itertools import pairwise
from pathlib import Path
from time import perf_counter_ns

import pytest

from gnu_toolchain import assemble
from kvmpy import End, Kvm, Machine
from kvmpy.abi.capabilities import Cap
from kvmpy.boot import FlatImage
from kvmpy.debug.trace import TraceError, TraceEvent, Tracer
from kvmpy.devices import Device, Region, Uart16550
from kvmpy.exits import RdMsr, WrMsr
from waiting import wait_until

KIB = 1024
PATIENCE = 20.0


def machine_with(source: str, *, bits: int = 16, irqchip: bool = False, vcpus: int = 1) -> Machine:
    machine = Machine(memory=128 * KIB, irqchip=irqchip, vcpus=vcpus)
    mode = {16: "real", 32: "protected", 64: "long"}[bits]
    machine.load(FlatImage(assemble(source, bits=bits), mode=mode))
    return machine


def exits(trace: Tracer) -> list[TraceEvent]:
    """The events without those of kvmpy's own kicks and ticks."""
    return [event for event in trace.events if event.kind != "interrupted"]


def test_port_and_memory_accesses_are_told_with_value_and_device() -> None:
    source = """
        mov al, 0x41; mov dx, 0x3ff; out dx, al; in al, dx
        mov dx, 0x2f0; in ax, dx
        mov bx, 0xf000; mov ds, bx; mov word ptr [8], 0x1234; mov ax, [8]; mov ds:[0xfff0], al
        hlt"""
    with machine_with(source) as machine:
        machine.add(Uart16550())
        machine.map_mmio(0xF0000, 0x100, read=lambda offset, size: 0x5678, write=lambda *_: None, name="registers")
        with machine.trace() as trace:
            assert machine.run(PATIENCE).end is End.HALTED
        told = [(event.name, event.value, event.size, event.device) for event in exits(trace)]
        assert told == [
            ("out 0x3ff", 0x41, 1, "uart16550"),
            ("in 0x3ff", 0x41, 1, "uart16550"),
            ("in 0x2f0", 0xFFFF, 2, "nobody"),
            ("write 0xf0008", 0x1234, 2, "registers"),
            ("read 0xf0008", 0x5678, 2, "registers"),
            ("write 0xffff0", 0x78, 1, "nobody"),
            ("hlt", None, None, None),
        ]
        assert {event.vcpu for event in exits(trace)} == {0}


def test_times_are_those_of_guest_and_handler() -> None:
    spent: list[int] = []

    def slow(offset: int, size: int, value: int) -> None:
        began = perf_counter_ns()
        threading.Event().wait(0.02)
        spent.append(perf_counter_ns() - began)

    source = "mov cx, 5; 1: mov al, cl; out 0x10, al; loop 1b; hlt"
    with machine_with(source) as machine:
        machine.map_ports(0x10, 1, write=slow, name="slow")
        began = perf_counter_ns()
        with machine.trace() as trace:
            machine.run(PATIENCE)
        all_of_it = perf_counter_ns() - began
        outs = [event for event in trace.events if event.kind == "port"]
        assert [event.duration >= taken for event, taken in zip(outs, spent, strict=True)] == [True] * 5
        assert all(event.guest > 0 for event in outs)
        assert sum(event.guest + event.duration for event in trace.events) < all_of_it
        times = [event.time for event in trace.events]
        assert times == sorted(times)
        assert all(one.time + one.duration <= two.time - two.guest for one, two in pairwise(outs))


def test_what_is_traced_is_what_happens_without() -> None:
    """The same exits, statistics, and state of the guest."""
    source = """
        mov cx, 300; 1: in al, 0x10; add bl, al; mov al, cl; out 0x11, al; in al, 0x99; loop 1b
        mov si, 0x1000; mov dx, 0x12; mov cx, 40; rep outsb
        mov ax, 0; mov es, ax; mov di, 0x3000; mov cx, 50; rep insb
        hlt"""

    def run(traced: bool) -> tuple[list[tuple[str, int, int]], str, int, bytes]:
        seen: list[tuple[str, int, int]] = []
        with machine_with(source) as machine:
            answers = iter(range(1_000_000))

            def read(offset: int, size: int) -> int:
                seen.append(("read", offset, size))
                return next(answers) & 0xFF

            machine.map_ports(0x10, 3, read=read, write=lambda *call: seen.append(("write", *call[:2])))
            if traced:
                with machine.trace() as trace:
                    assert machine.run(PATIENCE).end is End.HALTED
                counted = Counter(
                    (event.address, event.direction) for event in trace.events if event.kind == "port"
                )  # fmt: skip
                assert counted[0x10, "read"] == counted[0x11, "write"] == counted[0x99, "read"] == 300
                written = b"".join(as_bytes(event) for event in trace.events if event.name == "out 0x12")
                assert written == machine.memory.read(0x1000, 40)
                strings = b"".join(as_bytes(event) for event in trace.events if event.name == "in 0x12")
                assert strings == machine.memory.read(0x3000, 50)
            else:
                assert machine.run(PATIENCE).end is End.HALTED
            return seen, str(machine.statistics()), machine.vcpus[0].regs.rbx, machine.memory.read(0x3000, 50)

    assert run(traced=True) == run(traced=False)


def as_bytes(event: TraceEvent) -> bytes:
    return event.value if isinstance(event.value, bytes) else bytes((event.value or 0,))


def test_msr_accesses_are_told_with_their_answer() -> None:
    source = """
        mov ecx, 0x12345; rdmsr; mov esi, eax
        mov ecx, 0x12346; mov eax, 7; xor edx, edx; wrmsr
        hlt"""
    with machine_with(source, bits=32) as machine:
        machine.vm.enable_cap(Cap.X86_USER_SPACE_MSR, 7)
        machine.on_exit(RdMsr, lambda vcpu, event: event.reply(0x1_0000_0042))
        machine.on_exit(WrMsr, lambda vcpu, event: event.reply())
        with machine.trace(kinds="msr") as trace:
            assert machine.run(PATIENCE).end is End.HALTED
        told = [(event.name, event.direction, event.value, event.text) for event in trace.events]
        assert told == [
            ("rdmsr 0x12345", "read", 0x1_0000_0042, ""),
            ("wrmsr 0x12346", "write", 7, ""),
        ]
        assert machine.vcpus[0].regs.rsi == 0x42


def test_an_msr_access_that_is_refused_says_gp() -> None:
    with machine_with("mov ecx, 0x12345; rdmsr; hlt", bits=32) as machine:
        machine.vm.enable_cap(Cap.X86_USER_SPACE_MSR, 7)
        machine.on_exit(RdMsr, lambda vcpu, event: event.reject())
        with machine.trace() as trace:
            assert not machine.run(PATIENCE).ok
        told = [(event.name, event.text) for event in exits(trace)]
        assert told == [("rdmsr 0x12345", "#GP"), ("shutdown", "")]


class Interrupting(Device):
    """Raises its line when 1 is written and lowers it when 0 is."""

    name = "interrupting"
    irq = 5

    def regions(self) -> tuple[Region, ...]:
        return (Region("port", 0x10, 1, self.name, self.read, self.write),)

    def write(self, offset: int, size: int, value: int) -> None:
        (self.line.raise_line if value else self.line.lower_line)()


def test_interrupt_lines_are_told_between_the_accesses_that_move_them() -> None:
    source = "mov al, 1; out 0x10, al; out 0x10, al; dec al; out 0x10, al; cli; hlt"
    with machine_with(source, irqchip=True) as machine:
        device = machine.add(Interrupting())
        with machine.trace() as trace:
            later = machine.interrupt_line(6)
            assert machine.run(PATIENCE).end is End.HALTED
            later.raise_line()
        device.line.raise_line()  # nobody listens any more
        told = [(event.name, event.vcpu, event.device) for event in exits(trace)]
        assert told == [
            ("irq 5 raise", None, "interrupting"),
            ("out 0x10", 0, "interrupting"),
            ("out 0x10", 0, "interrupting"),
            ("irq 5 lower", None, "interrupting"),
            ("out 0x10", 0, "interrupting"),
            ("irq 6 raise", None, None),
        ]


def test_queued_writes_are_told_and_marked() -> None:
    with Kvm() as kvm:
        if not kvm.check_extension(Cap.COALESCED_PIO):
            pytest.skip("this host's KVM queues no port writes (KVM_CAP_COALESCED_PIO)")
    source = "mov cx, 500; mov dx, 0x3f8; 1: mov al, cl; out dx, al; loop 1b; in al, 0x10; hlt"
    with machine_with(source) as machine:
        console = machine.add(Uart16550())
        with machine.trace() as trace:
            assert machine.run(PATIENCE).end is End.HALTED
        written = [event for event in trace.events if event.name == "out 0x3f8"]
        assert [event.value for event in written] == list(console.output) == [cx & 0xFF for cx in range(500, 0, -1)]
        queued = [event for event in written if event.queued]
        assert len(queued) > 400
        assert {event.device for event in queued} == {"uart16550"}
        assert machine.statistics().count("port", 0x3F8, "write") == 500
        # Time in the guest is counted once, before the first write of each turn; on a busy host ticks make turns, too.
        assert sum(event.guest > 0 for event in queued) < 100


def test_a_handler_that_raises_is_told_and_its_access_comes_again() -> None:
    calls = 0

    def write(offset: int, size: int, value: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ValueError("not now")

    with machine_with("mov al, 1; out 0x10, al; mov al, 2; out 0x10, al; mov al, 3; out 0x10, al; hlt") as machine:
        machine.map_ports(0x10, 1, write=write, name="moody")
        with machine.trace() as trace:
            with pytest.raises(ValueError, match="not now"):
                machine.run(PATIENCE)
            assert machine.run(PATIENCE).end is End.HALTED
        told = [(event.value, event.text) for event in exits(trace)]
        assert told == [(1, ""), (None, "raised ValueError: not now"), (2, ""), (3, ""), (None, "")]
        assert calls == 4


def test_a_queued_write_whose_handler_raises_is_told_and_comes_again() -> None:
    with Kvm() as kvm:
        if not kvm.check_extension(Cap.COALESCED_PIO):
            pytest.skip("this host's KVM queues no port writes (KVM_CAP_COALESCED_PIO)")
    with machine_with("mov dx, 0x3f8; mov al, 'a'; out dx, al; mov al, 'b'; out dx, al; in al, 0x10; hlt") as machine:
        failures = iter([True])

        def sink(data: bytes) -> None:
            if data == b"b" and next(failures, False):
                raise OSError("the sink is full")

        console = machine.add(Uart16550(sink=sink))
        with machine.trace() as trace:
            with pytest.raises(OSError, match="the sink is full"):
                machine.run(PATIENCE)
            assert machine.run(PATIENCE).end is End.HALTED
        told = [(event.name, event.value, event.text) for event in exits(trace)]
        assert told == [
            ("out 0x3f8", 0x61, ""),
            ("out 0x3f8", None, "raised OSError: the sink is full"),
            ("out 0x3f8", 0x62, ""),
            ("in 0x10", 0xFF, ""),
            ("hlt", None, ""),
        ]
        assert console.output.startswith(b"ab")


def test_an_exit_that_was_pending_when_the_trace_began_is_told() -> None:
    failures = iter([True])

    def read(offset: int, size: int) -> int:
        if next(failures, False):
            raise ValueError
        return 7

    with machine_with("in al, 0x10; out 0x11, al; hlt") as machine:
        machine.map_ports(0x10, 1, read=read)
        with pytest.raises(ValueError):  # noqa: PT011
            machine.run(PATIENCE)
        with machine.trace() as trace:
            assert machine.run(PATIENCE).end is End.HALTED
        assert [(event.name, event.value) for event in exits(trace)] == [("in 0x10", 7), ("out 0x11", 7), ("hlt", None)]


def test_a_triple_fault_and_a_failure_are_told() -> None:
    with machine_with("ud2", bits=32) as machine, machine.trace() as trace:
        assert machine.run(PATIENCE).end is End.TRIPLE_FAULT
        assert [event.kind for event in exits(trace)] == ["shutdown"]


def test_a_timeout_and_a_pause_are_told_as_interruptions() -> None:
    with machine_with("1: jmp 1b") as machine:
        with machine.trace() as trace:
            machine.start(timeout=PATIENCE)
            with machine.paused():
                threading.Event().wait(0.05)
            machine.stop()
        longest = max(trace.events, key=lambda event: event.duration)
        assert longest.kind == "interrupted"
        assert longest.duration > 40_000_000


# Several processors, switching on and off

TALKING = "1: mov al, 1; out 0x10, al; in al, 0x11; jmp 1b"


def two_talking(machine: Machine) -> None:
    """Both processors run TALKING, the second with other ports."""
    machine.memory.write(0x1000, assemble(TALKING))
    machine.memory.write(0x2000, assemble(TALKING.replace("0x10", "0x20").replace("0x11", "0x21"), address=0x2000))
    for vcpu, entry in zip(machine.vcpus, (0x1000, 0x2000), strict=True):
        vcpu.set_real_mode(entry)


def test_events_of_two_processors_are_told_apart_and_complete() -> None:
    counts: Counter[tuple[int, int]] = Counter()
    with Machine(memory=64 * KIB, vcpus=2, irqchip=False) as machine:
        two_talking(machine)
        for port in (0x10, 0x20):
            machine.map_ports(port, 1, write=lambda *_, port=port: counts.update([(port, 0)]))
        with machine.trace(ring=1_000_000) as trace:
            machine.start(timeout=PATIENCE)
            while min(counts[0x10, 0], counts[0x20, 0]) < 3_000:
                threading.Event().wait(0.01)
            machine.stop()
        seen = Counter((event.vcpu, event.address) for event in trace.events if event.kind == "port")
        assert seen.keys() == {(0, 0x10), (0, 0x11), (1, 0x20), (1, 0x21)}
        assert seen[0, 0x10] == counts[0x10, 0] == machine.statistics().count("port", 0x10)
        assert seen[1, 0x20] == counts[0x20, 0] == machine.statistics().count("port", 0x20)
        for vcpu in (0, 1):
            times = [event.time for event in trace.events if event.vcpu == vcpu]
            assert times == sorted(times)


@pytest.mark.parametrize("vcpus", [1, 2])
def test_tracing_is_switched_on_and_off_while_the_guest_runs(vcpus: int) -> None:
    """No access is lost, doubled or answered wrongly at the seams."""
    told: list[int] = []
    number = 0

    def read(offset: int, size: int) -> int:
        nonlocal number
        number += 1
        return number & 0xFF

    source = "1: in al, 0x10; out 0x11, al; jmp 1b"
    with Machine(memory=64 * KIB, vcpus=vcpus, irqchip=False) as machine:
        machine.memory.write(0x1000, assemble(source))
        machine.memory.write(0x2000, assemble("1: in al, 0x20; jmp 1b", address=0x2000))
        for vcpu, entry in zip(machine.vcpus, (0x1000, 0x2000), strict=False):
            vcpu.set_real_mode(entry)
        machine.map_ports(0x10, 2, read=read, write=lambda offset, size, value: told.append(value))
        machine.start(timeout=PATIENCE)
        traced = 0
        for _ in range(20):
            with machine.trace(ports=0x11) as trace:
                while len(trace.events) < 50:
                    threading.Event().wait(0.001)
            values = [event.value for event in trace.events if isinstance(event.value, int)]
            assert len(values) == trace.count
            assert all((one + 1) & 0xFF == two for one, two in pairwise(values))
            traced += len(values)
        machine.stop()
    assert told == [value & 0xFF for value in range(1, len(told) + 1)]
    assert traced <= len(told)


def test_a_guest_that_sleeps_in_kvm_is_traced_from_the_start_of_the_trace() -> None:
    source = "sti; 1: hlt; jmp 1b"
    with machine_with(source, irqchip=True) as machine:
        machine.start(timeout=PATIENCE)
        threading.Event().wait(0.05)
        with machine.trace() as trace:
            wait_until(lambda: trace.events)
        machine.stop()
        assert all(event.time >= 0 for event in trace.events)


def test_a_machine_is_traced_by_one_at_a_time_and_again_later() -> None:
    with machine_with("1: mov cx, 20; 2: out 0x10, al; loop 2b; out 0x11, al; jmp 1b") as machine:

        def stop(offset: int, size: int, value: int) -> None:
            machine.stop()

        machine.map_ports(0x11, 1, write=stop)
        for _ in range(3):
            with machine.trace(ring=10) as trace:
                assert machine.run(PATIENCE).end is End.STOPPED
                with pytest.raises(ValueError, match="traced already"):
                    machine.trace().start()
            assert len(trace.events) == 10
        assert machine.run(PATIENCE).end is End.STOPPED
        assert len(trace.events) == 10


def test_a_trace_may_outlive_its_machine(tmp_path: Path) -> None:
    machine = machine_with("out 0x10, al; hlt")
    trace = machine.trace(tmp_path / "trace.html").start()
    machine.run(PATIENCE)
    machine.close()
    trace.close()
    assert "out 0x10" in (tmp_path / "trace.html").read_text()


def test_a_full_disk_harms_the_trace_and_not_the_guest() -> None:
    with machine_with("mov cx, 5000; 1: out 0x10, al; loop 1b; mov al, 3; out 0xf4, al; hlt") as machine:
        trace = machine.trace("/dev/full", format="jsonl").start()
        assert machine.run(PATIENCE).end is End.HALTED
        assert machine.statistics().exits == {"HLT": 1}
        with pytest.raises(TraceError, match="No space left on device"):
            trace.close()
        assert trace.count > 5_000
        assert trace.written == 0


def test_filters_choose_what_is_told() -> None:
    source = "mov cx, 100; 1: out 0x10, al; in al, 0x70; in al, 0x71; loop 1b; hlt"
    with machine_with(source) as machine:
        machine.map_ports(0x70, 2, read=lambda *_: 0, name="clock")
        with machine.trace(ports=range(0x70, 0x71), devices="clock") as trace:
            machine.run(PATIENCE)
        assert Counter(event.name for event in trace.events) == {"in 0x70": 100}
        with machine.trace(kinds="hlt") as trace:
            machine.vcpus[0].regs.rip = 0x1000
            machine.run(PATIENCE)
        assert [event.kind for event in trace.events] == ["hlt"]
