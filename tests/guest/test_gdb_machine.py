"""The gdb server on a real machine, by bare packets: registers, stops, several vCPUs, ends, and how sessions end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gdb_remote import RemoteClient
from gnu_toolchain import assemble_with_symbols
from kvmpy import End, Machine
from kvmpy.boot import FlatImage
from kvmpy.debug.gdb import machine_target
from kvmpy.debug.gdb.architecture import Architecture
from kvmpy.debug.gdb.server import GdbServer
from kvmpy.debug.gdb.target_description import describe
from kvmpy.devices import DebugExit
from kvmpy.errors import KvmError, UsageError

pytestmark = pytest.mark.kvm

SECONDS = 20.0
CODE, COUNTERS, STACK = 0x1000, 0x8000, 0x7000
WIDE = describe(Architecture.X86_64)
NAMES = [register.name for register in WIDE.registers]

COUNT = f"""
_start: inc dword ptr [{COUNTERS:#x} + 4 * rbx]
        call work
        jmp _start
work:   inc rax
        ret
"""


def loaded(source: str, *, vcpus: int = 1, irqchip: bool = False, mode: str = "long") -> tuple[Machine, dict[str, int]]:
    """A machine whose vCPUs all run `source`, with their number in RBX."""
    code, symbols = assemble_with_symbols(source, address=CODE, bits={"long": 64, "real": 16}[mode])
    machine = Machine(memory=1 << 20, vcpus=vcpus, irqchip=irqchip)
    machine.add(DebugExit())
    machine.load(FlatImage(code, CODE, mode, stack=STACK))
    for vcpu in machine.vcpus[1:]:
        state = machine.vcpus[0].cpu_state()
        state.regs.rsp -= 0x100 * vcpu.id
        state.regs.rbx = vcpu.id
        vcpu.set_cpu_state(state)
    return machine, symbols


@contextmanager
def attached(
    source: str, *, vcpus: int = 1, irqchip: bool = False, mode: str = "long"
) -> Iterator[tuple[Machine, RemoteClient, dict[str, int]]]:
    """A running machine that stands before a client."""
    machine, symbols = loaded(source, vcpus=vcpus, irqchip=irqchip, mode=mode)
    with machine, GdbServer(machine, wait=True) as server, RemoteClient(server.address) as client:
        machine.start(SECONDS)
        client.stop_acknowledging()
        yield machine, client, symbols


def register(client: RemoteClient, name: str) -> int:
    return int.from_bytes(bytes.fromhex(client.ask(b"p%x" % NAMES.index(name)).decode()), "little")


def set_register(client: RemoteClient, name: str, value: int) -> bytes:
    index = NAMES.index(name)
    return client.ask(b"P%x=%s" % (index, value.to_bytes(WIDE.sizes[index], "little").hex().encode()))


def stop_of(answer: bytes) -> tuple[bytes, dict[bytes, bytes]]:
    return answer[:3], dict(part.split(b":") for part in answer[3:].split(b";") if part)


def thread_of(answer: bytes) -> int:
    return int(stop_of(answer)[1][b"thread"], 16)


def counters(machine: Machine) -> list[int]:
    return [machine.memory.read_u32(COUNTERS + 4 * vcpu.id) for vcpu in machine.vcpus]


# Registers and memory


def test_all_registers_come_at_once_and_go_back() -> None:
    with attached(COUNT) as (_, client, _):
        values = client.ask(b"g")
        assert len(values) == 2 * sum(WIDE.sizes)
        assert client.ask(b"G" + values) == b"OK"
        assert client.ask(b"g") == values
        assert register(client, "rip") == CODE
        assert register(client, "cr0") & 0x8000_0001 == 0x8000_0001
        assert register(client, "fctrl") == 0x37F
        assert register(client, "mxcsr") == 0x1F80


def test_what_gdb_writes_is_what_the_guest_sees() -> None:
    source = f"""
    _start: mov [{COUNTERS:#x}], r9
            movups [{COUNTERS:#x} + 16], xmm3
            fxsave [{COUNTERS:#x} + 0x200]
            pushf
            hlt
    """
    with attached(source) as (machine, client, _):
        assert set_register(client, "r9", 0x1122_3344_5566_7788) == b"OK"
        assert set_register(client, "xmm3", 0xFEDC << 112 | 1) == b"OK"
        assert set_register(client, "st2", 0x4000_C90F_DAA2_2168_C235) == b"OK"
        assert set_register(client, "fctrl", 0x27F) == b"OK"
        assert set_register(client, "eflags", 0x8D7) == b"OK"
        assert client.ask(b"c") == b"W00"
        memory = machine.memory
        assert memory.read_u64(COUNTERS) == 0x1122_3344_5566_7788
        assert int.from_bytes(memory.read(COUNTERS + 16, 16), "little") == 0xFEDC << 112 | 1
        assert memory.read_u16(COUNTERS + 0x200) == 0x27F
        assert memory.read(COUNTERS + 0x240, 10) == (0x4000_C90F_DAA2_2168_C235).to_bytes(10, "little")
        assert memory.read_u64(STACK - 8) & 0x8D5 == 0x8D5


def test_a_register_value_that_kvm_refuses_is_explained_and_harms_nothing() -> None:
    with attached(COUNT) as (machine, client, _):
        before = client.ask(b"g")
        refused = set_register(client, "cr0", 0x8000_0000)  # PG without PE
        assert refused.startswith(b"E.")
        assert b"cr0" in refused.lower()
        assert set_register(client, "tr", 0xFFF8).startswith(b"E.selector 0xfff8 is beyond")
        assert client.ask(b"g") == before
        client.send(b"c")
        client_waits_for_running_guest(machine)
        client.interrupt()
        assert client.answer().startswith(b"T02")


def test_memory_is_that_of_the_guest_without_breakpoints() -> None:
    with attached(COUNT) as (machine, client, symbols):
        work = symbols["work"]
        code = client.ask(b"m%x,4" % work)
        assert client.ask(b"Z0,%x,1" % work) == b"OK"
        assert client.ask(b"m%x,4" % work) == code
        assert machine.memory.read(work, 4).hex().encode() != code
        assert client.ask(b"M%x,4:4883c002" % work) == b"OK"  # add rax, 2
        assert client.ask(b"m%x,4" % work) == b"4883c002"
        assert stop_of(client.ask(b"c"))[1][b"swbreak"] == b""
        assert client.ask(b"z0,%x,1" % work) == b"OK"
        assert machine.memory.read(work, 4).hex() == "4883c002"


def test_memory_that_is_not_mapped_is_an_error_and_a_read_ends_before_it() -> None:
    with attached(COUNT) as (machine, client, _):
        end = machine.memory.regions[0].end
        assert client.ask(b"m%x,100" % (end - 16)) == machine.memory.read(end - 16, 16).hex().encode()
        assert client.ask(b"m%x,1" % end) == b"E0e"
        assert client.ask(b"mffff800000000000,8") == b"E0e"
        assert client.ask(b"M7fff00000000,1:00").startswith(b"E.")


def test_read_only_memory_is_written() -> None:
    machine, _ = loaded("_start: jmp _start", mode="real")
    machine.vm.add_rom(0x100000, bytes(0x1000))
    with machine, GdbServer(machine, wait=True) as server, RemoteClient(server.address) as client:
        machine.start(SECONDS)
        assert client.ask(b"X100000,3:abc") == b"OK"
        assert client.ask(b"m100000,3") == b"616263"


# Stops


def test_steps_go_through_every_instruction() -> None:
    with attached(COUNT) as (_, client, symbols):
        places = []
        for _ in range(5):
            head, told = stop_of(client.ask(b"vCont;s:1"))
            assert head == b"T05"
            assert b"swbreak" not in told
            places.append(int.from_bytes(bytes.fromhex(told[b"10"].decode()), "little"))
            assert register(client, "rip") == places[-1]
        assert places[1] == symbols["work"]
        assert places[4] == CODE


@pytest.mark.parametrize(("kind", "word"), [(0, b"swbreak"), (1, b"hwbreak")])
def test_a_breakpoint_is_hit_again_and_again(kind: int, word: bytes) -> None:
    with attached(COUNT) as (machine, client, symbols):
        assert client.ask(b"Z%d,%x,1" % (kind, symbols["work"])) == b"OK"
        for count in range(1, 6):
            head, told = stop_of(client.ask(b"vCont;c"))
            assert (head, told[word]) == (b"T05", b"")
            assert counters(machine) == [count]
            assert register(client, "rip") == symbols["work"]


@pytest.mark.parametrize(("kind", "word"), [(2, b"watch"), (3, b"rwatch"), (4, b"awatch")])
def test_a_watchpoint_tells_the_address_of_the_data(kind: int, word: bytes) -> None:
    with attached(COUNT) as (machine, client, _):
        assert client.ask(b"Z%d,%x,4" % (kind, COUNTERS)) == b"OK"
        head, told = stop_of(client.ask(b"vCont;c"))
        assert (head, told[word]) == (b"T05", b"%x" % COUNTERS)
        assert client.ask(b"z%d,%x,4" % (kind, COUNTERS)) == b"OK"
        client.ask(b"Z1,%x,1" % CODE)
        client.ask(b"c")
        assert counters(machine) == [1]


def test_where_nothing_is_mapped_a_software_breakpoint_becomes_a_hardware_one() -> None:
    with attached(COUNT) as (_, client, symbols):
        for number in range(4):
            assert client.ask(b"Z0,%x,1" % (0x7FFF_0000_0000 + number)) == b"OK"
        assert client.ask(b"Z0,%x,1" % 0x7FFF_0000_1000).startswith(b"E."), "there are four"
        assert client.ask(b"Z0,%x,1" % symbols["work"]) == b"OK"
        assert client.ask(b"c").startswith(b"T05")
        assert register(client, "rip") == symbols["work"]


def test_a_breakpoint_of_the_program_itself_stops_too_and_one_with_a_handler_does_not() -> None:
    hits = []
    machine, symbols = loaded(COUNT)
    machine.breakpoint(symbols["work"], lambda vcpu, point: hits.append(vcpu.regs.rax))
    machine.breakpoint(CODE + 7)
    with machine, GdbServer(machine, wait=True) as server, RemoteClient(server.address) as client:
        machine.start(SECONDS)
        head, told = stop_of(client.ask(b"c"))
        assert head == b"T05"
        assert b"swbreak" not in told, "gdb would pass over a breakpoint that it does not know"
        assert client.ask(b"c").startswith(b"T05")
        assert hits == [0]
        assert client.ask(b"D") == b"OK"
        assert machine.wait(SECONDS).end is End.BREAKPOINT


def test_ctrl_c_stops_a_guest_that_computes_and_one_that_sleeps() -> None:
    for source in (COUNT, "_start: sti; hlt; jmp _start"):
        with attached(source, irqchip=True) as (_, client, _):
            for _ in range(3):
                client.send(b"vCont;c")
                time.sleep(0.02)
                client.interrupt()
                assert client.answer().startswith(b"T02")


# Several vCPUs


def test_threads_are_vcpus() -> None:
    with attached(COUNT, vcpus=3) as (_, client, _):
        assert client.ask(b"qfThreadInfo") == b"m1,2,3"
        assert bytes.fromhex(client.ask(b"qThreadExtraInfo,3").decode()) == b"vCPU 2 [running]"
        client.ask(b"Hg3")
        assert register(client, "rbx") == 2
        client.ask(b"Hg1")
        assert register(client, "rbx") == 0


def test_a_vcpu_that_was_not_started_is_listed_as_that() -> None:
    machine = Machine(memory=1 << 20, vcpus=2)
    machine.load(FlatImage(b"\xf4\xeb\xfd"))
    with machine, GdbServer(machine, wait=True) as server, RemoteClient(server.address) as client:
        machine.start(SECONDS)
        assert bytes.fromhex(client.ask(b"qThreadExtraInfo,2").decode()) == b"vCPU 1 [waits for INIT]"


def test_the_others_run_during_a_step_when_gdb_says_so_and_stand_when_not() -> None:
    with attached(COUNT, vcpus=2) as (machine, client, _):
        for _ in range(50):
            assert thread_of(client.ask(b"vCont;s:1")) == 1
        assert counters(machine)[1] == 0
        for _ in range(50):
            assert thread_of(client.ask(b"vCont;s:1;c")) == 1
        assert counters(machine)[0] == 100 // 5
        while not counters(machine)[1]:  # on a busy host the other one has hardly run
            assert thread_of(client.ask(b"vCont;s:1;c")) == 1


def test_one_vcpu_goes_on_alone() -> None:
    with attached(COUNT, vcpus=2) as (machine, client, symbols):
        client.ask(b"Z1,%x,1" % symbols["work"])
        for count in range(1, 10):
            assert thread_of(client.ask(b"vCont;c:2")) == 2
            assert counters(machine) == [0, count]


def test_some_of_several_cannot_go_on() -> None:
    with attached(COUNT, vcpus=3) as (_, client, _):
        assert client.ask(b"vCont;c:1;c:2").startswith(b"E.all vCPUs go on, or one")
        assert client.ask(b"vCont;s:2").startswith(b"T05")


@pytest.mark.parametrize("kind", [0, 1])
def test_no_vcpu_passes_a_breakpoint_unseen(kind: int) -> None:
    with attached(COUNT, vcpus=2) as (machine, client, symbols):
        client.ask(b"Z%d,%x,1" % (kind, symbols["work"]))
        stops = {1: 0, 2: 0}
        for _ in range(60):
            stops[thread_of(client.ask(b"vCont;c"))] += 1
        client.ask(b"z%d,%x,1" % (kind, symbols["work"]))
        seen = counters(machine)
        for thread, count in stops.items():
            # One that stopped beside the other has not been told yet.
            assert seen[thread - 1] - count in (0, 1)


def test_a_stop_that_gdb_was_not_told_of_is_dropped_with_its_breakpoint() -> None:
    with attached(COUNT, vcpus=2) as (_, client, symbols):
        client.ask(b"Z0,%x,1" % symbols["work"])
        client.ask(b"vCont;c")
        client.ask(b"z0,%x,1" % symbols["work"])
        client.send(b"vCont;c")
        time.sleep(0.05)
        client.interrupt()
        assert client.answer().startswith(b"T02")


# The end of the run


@pytest.mark.parametrize(
    ("source", "answers"),
    [
        ("_start: hlt", [b"W00"]),
        ("_start: mov al, 0\nout 0xf4, al\nhlt", [b"W00"]),
        ("_start: mov al, 3\nout 0xf4, al\nhlt", [b"W07"]),
        ("_start: ud2", [b"T0b", b"X0b"]),
    ],
)
def test_the_end_is_told_and_a_bad_one_stops_first(source: str, answers: list[bytes]) -> None:
    with attached(source) as (machine, client, _):
        told = [client.ask(b"c")[:3]]
        while told[-1][:1] == b"T":
            assert register(client, "cr0")
            told.append(client.ask(b"c")[:3])
        assert told == answers
        assert not machine.wait(SECONDS).ok or told == [b"W00"]


def test_a_guest_that_leaves_memory_stops_before_the_run_ends() -> None:
    with attached("_start: ljmp 0xffff, 0x4000", mode="real") as (machine, client, _):
        assert client.ask(b"c").startswith(b"T04")
        assert client.ask(b"?").startswith(b"T04")
        assert client.ask(b"c") == b"X04"
        assert machine.wait(SECONDS).end is End.FAILED


def test_the_deadline_and_a_stop_are_told() -> None:
    machine, _ = loaded(COUNT)
    with machine, GdbServer(machine, wait=True) as server, RemoteClient(server.address) as client:
        machine.start(0.2)
        client.ask(b"?")
        time.sleep(0.3)
        assert machine.running, "the deadline waits for the debugger"
        client.send(b"c")
        assert client.answer() == b"X0e"
        assert machine.wait(SECONDS).end is End.TIMEOUT
    machine, _ = loaded(COUNT)
    with machine, GdbServer(machine, wait=True) as server, RemoteClient(server.address) as client:
        machine.start(SECONDS)
        client.send(b"c")
        client_waits_for_running_guest(machine)
        machine.stop()
        assert client.answer() == b"X0f"


def client_waits_for_running_guest(machine: Machine) -> None:
    end = time.monotonic() + SECONDS
    while not counters(machine)[0]:
        assert time.monotonic() < end
        time.sleep(0.002)


def test_the_next_run_is_debugged_by_the_next_session() -> None:
    machine, _ = loaded("_start: inc rax\nhlt\njmp _start")
    with machine, GdbServer(machine) as server:
        for _ in range(3):
            with RemoteClient(server.address) as client:
                client.ask(b"?")
                machine.start(SECONDS)
                assert client.ask(b"c") == b"W00"
            assert machine.wait(SECONDS).end is End.HALTED
            while server.connected:
                time.sleep(0.002)


# The end of the session


@pytest.mark.parametrize("last", [b"vCont;c", b"vCont;s:1", b"vCont;r0,ffffffff:1", b"?", b"m1000,4"])
def test_a_disconnect_at_any_moment_leaves_the_guest_running_without_breakpoints(last: bytes) -> None:
    machine, symbols = loaded(COUNT, vcpus=2)
    code = machine.memory.read(CODE, 32)
    with machine, GdbServer(machine, wait=True) as server:
        machine.start(SECONDS)
        with RemoteClient(server.address) as client:
            client.ask(b"Z0,%x,1" % (symbols["work"] + 3))
            client.ask(b"Z2,%x,4" % (COUNTERS + 0x1000))
            client.send(last)
        while server.connected:
            time.sleep(0.002)
        assert machine.memory.read(CODE, 32) == code
        before = counters(machine)
        end = time.monotonic() + SECONDS
        while not all(now > old for now, old in zip(counters(machine), before, strict=True)):
            assert time.monotonic() < end, "the guest stands"
            time.sleep(0.002)
        assert machine.running


def test_detaching_from_a_bad_end_lets_the_run_end() -> None:
    with attached("_start: ud2") as (machine, client, _):
        assert client.ask(b"c").startswith(b"T0b")
        assert client.ask(b"D") == b"OK"
        assert machine.wait(SECONDS).end is End.TRIPLE_FAULT


def test_killing_ends_the_run() -> None:
    with attached(COUNT, vcpus=2) as (machine, client, _):
        client.send(b"k")
        assert client.is_closed()
        outcome = machine.wait(SECONDS)
        assert (outcome.end, outcome.message) == (End.STOPPED, "killed by gdb")


def test_closing_the_server_lets_the_guest_go_on_and_tells_gdb() -> None:
    machine, _ = loaded(COUNT)
    with machine:
        server = GdbServer(machine, wait=True)
        machine.start(SECONDS)
        with RemoteClient(server.address) as client:
            client.ask(b"?")
            client.send(b"c")
            client_waits_for_running_guest(machine)
            server.close()
            assert client.answer() == b"X09"
        assert machine.running


@pytest.mark.parametrize("running", [True, False])
def test_closing_the_machine_ends_the_session_and_the_server(running: bool) -> None:
    before = threading.active_count()
    machine, symbols = loaded(COUNT, vcpus=2)
    server = GdbServer(machine)
    with RemoteClient(server.address) as client:
        client.ask(b"Z0,%x,1" % (symbols["work"] + 0x100))
        machine.start(SECONDS)
        if running:
            client.send(b"c")
            client_waits_for_running_guest(machine)
        machine.close()
        if running:
            assert client.answer() == b"X09"
        assert client.is_closed()
    server.close()
    assert threading.active_count() == before


def test_one_debugger_at_a_time() -> None:
    machine, _ = loaded(COUNT)
    with machine:
        machine.debugger.attach(lambda stop: None)
        with GdbServer(machine) as server, RemoteClient(server.address) as client:
            assert client.ask(b"qSupported").startswith(b"E.a debugger is attached")
        with pytest.raises(UsageError):
            GdbServer(machine, wait=True)
        machine.debugger.detach()


def test_a_handler_that_does_not_return_does_not_hang_gdb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_target, "_PATIENCE", 0.1)
    entered, leave = threading.Event(), threading.Event()

    def write(offset: int, size: int, value: int) -> None:
        entered.set()
        leave.wait(SECONDS)

    machine, _ = loaded("_start: out 0x10, al\njmp _start")
    machine.map_ports(0x10, 1, write=write)
    with machine, GdbServer(machine, wait=True) as server, RemoteClient(server.address) as client:
        machine.start(SECONDS)
        client.ask(b"Z0,1002,1")
        client.send(b"c")
        assert entered.wait(SECONDS)
        client.interrupt()
        assert client.answer().startswith(b"T02")
        assert set(client.ask(b"g")) == {ord("x")}
        assert bytes.fromhex(client.ask(b"qThreadExtraInfo,1").decode()) == b"vCPU 0 [in a device handler]"
        assert client.ask(b"P0=0000000000000000").startswith(b"E.")
        assert client.ask(b"Z1,2000,1").startswith(b"E.")
        client.close()
        while server.connected:
            time.sleep(0.002)
        leave.set()
        time.sleep(0.02)
        assert machine.running, "it ran past the breakpoint that could not be removed"


def test_nothing_is_left_behind() -> None:
    machine, _ = loaded(COUNT)
    with machine:
        machine.start(SECONDS)
        threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
        for _ in range(10):
            with GdbServer(machine) as server, RemoteClient(server.address) as client:
                client.ask(b"Z0,1000,1")
                client.ask(b"c")
        assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, files)
        assert machine.running


def test_the_upper_halves_of_ymm_registers_are_there_when_the_guest_has_avx() -> None:
    machine, _ = loaded("_start: jmp _start")
    vcpu = machine.vcpus[0]
    area = bytearray(vcpu.get_xsave())
    area[512] |= 7  # XSTATE_BV: x87, SSE, AVX
    area[576:592] = bytes(range(16))
    try:
        vcpu.set_xsave(bytes(area))
    except KvmError:
        machine.close()
        pytest.skip("this host gives its guests no AVX")
    description = describe(Architecture.X86_64, avx=True)
    number = [register.name for register in description.registers].index("ymm0h")
    with machine, GdbServer(machine, wait=True) as server, RemoteClient(server.address) as client:
        assert b"org.gnu.gdb.i386.avx" in client.ask(b"qXfer:features:read:target.xml:0,ffff")
        assert client.ask(b"p%x" % number) == bytes(range(16)).hex().encode()
        assert client.ask(b"P%x=%s" % (number, b"5a" * 16)) == b"OK"
        assert vcpu.get_xsave()[576:592] == b"\x5a" * 16
