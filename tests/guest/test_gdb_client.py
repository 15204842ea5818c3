"""A real gdb debugs real guests: a C kernel by its symbols, and programs of 16, 32 and 64 bits."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gdb_remote import RemoteClient, gdb_command, run_gdb
from gnu_toolchain import GuestProgram, assemble_with_symbols, compile_c
from kvmpy import End, Machine
from kvmpy.boot import ElfImage, FlatImage
from kvmpy.debug.gdb.server import GdbServer
from kvmpy.devices import DebugConsole, DebugExit

pytestmark = pytest.mark.kvm

SECONDS = 30.0
CODE = 0x1000

KERNEL = r"""
typedef unsigned char u8;
struct task { int id; int ticks; const char *name; };

static void outb(unsigned short port, u8 value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }

static struct task tasks[2] = {{1, 0, "idle"}, {2, 0, "shell"}};
volatile int finish __attribute__((aligned(4096)));  // no code in its page, see docs/gdb.md
volatile int clock;

int square(int number)
{
    int product = number * number;
    return product;
}

void tick(struct task *task)
{
    task->ticks += square(clock);
    clock++;
}

void _start(void)
{
    while (!finish) {
        tick(&tasks[0]);
        tick(&tasks[1]);
    }
    outb(0xf4, 0);
    for (;;)
        __asm__ volatile("hlt");
}
"""


@pytest.fixture(scope="module", params=[64, 32])
def kernel(request: pytest.FixtureRequest) -> GuestProgram:
    return compile_c(KERNEL, bits=request.param, flags=("-g", "-O0"))


@contextmanager
def served(machine: Machine) -> Iterator[GdbServer]:
    """The machine waits, in threads of its own, for a gdb, and is stopped in the end."""
    with machine, GdbServer(machine, wait=True) as server:
        machine.start(SECONDS)
        yield server
        if machine.running:
            machine.stop()


@contextmanager
def gdb_in_background(
    server: GdbServer, *commands: str, program: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A gdb that has attached."""
    command = gdb_command(server.address, *commands, program=program)
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as gdb:
        try:
            end = time.monotonic() + SECONDS
            while not server.connected:
                assert time.monotonic() < end
                time.sleep(0.01)
            yield gdb
        finally:
            gdb.kill()


def kernel_machine(kernel: GuestProgram) -> Machine:
    machine = Machine(memory=4 << 20, irqchip=False)
    machine.add(DebugExit())
    machine.load(ElfImage(kernel.elf))
    return machine


def test_a_c_kernel_is_debugged_by_its_symbols(kernel: GuestProgram) -> None:
    with served(kernel_machine(kernel)) as server:
        said = run_gdb(
            server.address, "break tick", "continue", "backtrace", "p *task", "p tasks[1].name", "delete",
            "break square if number == 7", "continue", "p number", "info args", "finish", "step", "step",
            "p clock", "p tasks[0].id + tasks[1].id", "set var tasks[1].ticks = 1234", "p tasks[1]", "next", "detach",
            program=kernel.elf,
        )  # fmt: skip
    assert "Breakpoint 1, tick (task=" in said
    assert "#1 " in said
    assert "in _start () at" in said
    assert "$1 = {id = " in said
    assert '"shell"' in said
    assert "Breakpoint 2, square (number=7)" in said
    assert "number = 7" in said
    assert "Value returned is $4 = 49" in said
    assert "20\tin <stdin>" in said.partition("Value returned")[2]
    assert "$6 = 3\n" in said
    assert "{id = 2, ticks = 1234, name =" in said


def test_a_variable_is_watched(kernel: GuestProgram) -> None:
    with served(kernel_machine(kernel)) as server:
        said = run_gdb(
            server.address, "watch clock", "continue", "continue", "rwatch finish", "delete 1", "continue", "backtrace",
            "delete 2", "awatch clock", "continue", "continue", program=kernel.elf,
        )  # fmt: skip
    assert "Hardware watchpoint 1: clock" in said
    changes = [
        int(line.rpartition(" ")[2]) for line in said.splitlines() if line.startswith(("Old value", "New value"))
    ]
    assert changes[:4] == [0, 1, 1, 2]
    assert "Hardware read watchpoint 2: finish\n\nValue = 0\n" in said
    assert "#0 " in said
    assert "in _start () at" in said
    assert "Hardware access (read/write) watchpoint 3: clock\n\nValue = 2\n" in said


def test_breakpoints_can_be_in_debug_registers(kernel: GuestProgram) -> None:
    with served(kernel_machine(kernel)) as server:
        said = run_gdb(
            server.address, "hbreak square", "tbreak tick", "continue", "continue", "info breakpoints", "p number",
            program=kernel.elf,
        )  # fmt: skip
    assert "Hardware assisted breakpoint 1 at" in said
    assert "Breakpoint 1, square (number=" in said
    assert "hw breakpoint  keep y" in said


def test_the_guest_goes_on_after_detaching_and_gdb_can_come_back(kernel: GuestProgram) -> None:
    machine = kernel_machine(kernel)
    with served(machine) as server:
        first = run_gdb(server.address, "break tick", "continue", "p clock", "detach", program=kernel.elf)
        time.sleep(0.05)
        second = run_gdb(
            server.address, "info breakpoints", "p clock", "set var finish = 1", "continue", program=kernel.elf
        )
        before, after = (int(said.partition("$1 = ")[2].partition("\n")[0]) for said in (first, second))
        assert after > before
        assert "No breakpoints or watchpoints." in second
        assert "[Inferior 1 (Remote target) exited normally]" in second
        assert "kvmpy: exited with code 1: debug exit at port 0xf4" in second
        assert machine.wait(SECONDS).code == 1


def test_ctrl_c_stops_the_guest_and_it_goes_on(kernel: GuestProgram) -> None:
    commands = ("continue", "info threads", "backtrace", "p clock > 0", "stepi")
    machine = kernel_machine(kernel)
    with served(machine) as server, gdb_in_background(server, *commands, program=kernel.elf) as gdb:
        while not machine.memory.read_u32(kernel.symbols["clock"]):
            time.sleep(0.01)
        gdb.send_signal(signal.SIGINT)
        said, _ = gdb.communicate(timeout=SECONDS)
    assert "received signal SIGINT, Interrupt." in said
    assert 'Thread 1 "vCPU 0"' in said
    assert "$1 = 1\n" in said


def test_a_run_that_has_not_begun_begins_before_gdb(kernel: GuestProgram) -> None:
    with kernel_machine(kernel) as machine, GdbServer(machine) as server:
        commands = ("p $pc == &_start", "break square", "continue", "p number", "set var finish = 1", "delete", "cont")
        with gdb_in_background(server, *commands, program=kernel.elf) as gdb:
            assert machine.run(SECONDS).end is End.EXITED
            said, _ = gdb.communicate(timeout=SECONDS)
    assert "$1 = 1\n" in said
    assert "Breakpoint 1, square (number=0)" in said
    assert "exited normally" in said


def test_a_run_can_wait_for_gdb_in_the_thread_that_began_it(kernel: GuestProgram) -> None:
    commands = ("p $pc == &_start", "set var finish = 1", "continue")
    with (
        kernel_machine(kernel) as machine,
        GdbServer(machine, wait=True) as server,
        gdb_in_background(server, *commands, program=kernel.elf) as gdb,
    ):
        assert machine.run(SECONDS).end is End.EXITED
        assert "$1 = 1\n" in gdb.communicate(timeout=SECONDS)[0]


def test_a_run_that_waits_for_gdb_goes_on_when_the_server_closes(kernel: GuestProgram) -> None:
    with kernel_machine(kernel) as machine:
        server = GdbServer(machine, wait=True)
        machine.memory.write_u32(kernel.symbols["finish"], 1)
        machine.start(SECONDS)
        time.sleep(0.05)
        assert machine.running
        server.close()
        assert machine.wait(SECONDS).end is End.EXITED


def test_two_vcpus_are_two_threads(kernel: GuestProgram) -> None:
    machine = Machine(memory=4 << 20, vcpus=2, irqchip=False)
    machine.load(ElfImage(kernel.elf))
    state = machine.vcpus[0].cpu_state()
    state.regs.rsp -= 0x4000
    machine.vcpus[1].set_cpu_state(state)
    with served(machine) as server:
        said = run_gdb(
            server.address, "break square", *["continue"] * 12, "info threads", "thread apply all -s p $pc != 0",
            "next", "next", "finish", "set scheduler-locking on", "next", "next", "set scheduler-locking off",
            "thread 2", "delete", "stepi", "next", "p $_thread", "info threads", program=kernel.elf,
        )  # fmt: skip
    hits = [line for line in said.splitlines() if "hit Breakpoint 1, square" in line]
    assert len(hits) >= 12
    assert {line.partition('"')[2].partition('"')[0] for line in hits} == {"vCPU 0", "vCPU 1"}
    assert 'Thread 1 "vCPU 0" (running)' in said
    assert 'Thread 2 "vCPU 1" (running)' in said
    assert "rror" not in said


@pytest.mark.slow
def test_the_time_of_a_thousand_single_steps(capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = assemble_with_symbols("_start: inc rax\njmp _start", address=CODE, bits=64)

    def seconds(*commands: str) -> float:
        machine = Machine(memory=1 << 20, irqchip=False)
        machine.load(FlatImage(code, CODE, "long"))
        with served(machine) as server:
            began = time.perf_counter()
            said = run_gdb(server.address, *commands, "p $rax")
            assert f"$1 = {500 * len(commands)}\n" in said
            return time.perf_counter() - began

    without = seconds()
    stepping = seconds("stepi 1000") - without
    machine = Machine(memory=1 << 20, irqchip=False)
    machine.load(FlatImage(code, CODE, "long"))
    with served(machine) as server, RemoteClient(server.address) as client:
        client.stop_acknowledging()
        began = time.perf_counter()
        for _ in range(1000):
            assert client.ask(b"vCont;s:1").startswith(b"T05")
        bare = time.perf_counter() - began
    with capsys.disabled():
        print(f"1,000 single steps: {stepping:.2f} s by stepi in gdb, {bare:.2f} s by bare packets")


# Assembly


def test_a_real_mode_guest_is_seen_at_linear_addresses() -> None:
    source = """
    _start: ljmp 0x07c0, offset next - 0x7c00
    next:   mov ax, 0xb800
            mov ds, ax
            xor cx, cx
    again:  inc cx
            mov [0x20], cx
            call func
            jmp again
    func:   mov dx, cx
            ret
    """
    code, symbols = assemble_with_symbols(source, address=0x7C00)
    machine = Machine(memory=1 << 20, irqchip=False)
    machine.load(FlatImage(code, address=0x7C00, mode="real"))
    with served(machine) as server:
        said = run_gdb(
            server.address, "show architecture", f"break *{symbols['func']:#x}", "continue", "x/2i $pc", "stepi",
            "p $dx == $cx", "info registers cs cs_base ds_base", "x/hx $ss_base + $esp", "delete",
            "watch *(short *)0xb8020", "continue", f"set $pc = {symbols['_start']:#x}", "stepi 2", "p/x $ax",
            "set $ds = 0x1234", "p/x $ds_base", "monitor registers",
        )  # fmt: skip
    func = symbols["func"]
    assert '(currently "i8086")' in said
    assert f"Breakpoint 1, {func:#010x}" in said
    assert f"=> {func:#x}:\tmov    %cx,%dx\n   {func + 2:#x}:\tret" in said
    assert "$1 = 1\n" in said
    assert "cs_base        0x7c00" in said
    assert "ds_base        0xb8000" in said
    assert f"\t{symbols['again'] + 8 - 0x7C00:#06x}\n" in said, "the return address"
    assert "Hardware watchpoint 2: *(short *)0xb8020" in said
    assert "New value = " in said
    assert "$2 = 0xb800\n" in said
    assert "$3 = 0x12340\n" in said
    assert "mode real mode" in said


@pytest.mark.parametrize(
    ("bits", "mode", "architecture", "counter"),
    [(32, "protected", "i386", "$ebx"), (64, "long", "i386:x86-64", "$rbx")],
)
def test_assembly_of_32_and_64_bits(bits: int, mode: str, architecture: str, counter: str) -> None:
    source = """
    _start: inc ebx
            call work
            jmp _start
    work:   mov dword ptr [0x8000], ebx
            ret
    """
    code, symbols = assemble_with_symbols(source, address=CODE, bits=bits)
    machine = Machine(memory=1 << 20, irqchip=False)
    machine.load(FlatImage(code, CODE, mode, stack=0x7000))
    with served(machine) as server:
        said = run_gdb(
            server.address, "show architecture", f"hbreak *{symbols['work']:#x}", "continue", "x/i $pc",
            f"set {counter} = 0x42", "stepi", "x/wx 0x8000", "info registers cr0 efer", "stepi 10", "stepi",
            "set $cr3 |= 0x1000", "p/x (long)$cr3", "set $cr4 |= 0x40000000", "p $idtr_limit",
        )  # fmt: skip
    assert f'(currently "{architecture}")' in said
    assert f"=> {symbols['work']:#x}:\tmov    %ebx,0x8000" in said
    assert "0x8000:\t0x00000042" in said
    assert ("[ LME LMA" in said) == (bits == 64)
    assert "cr0            0x" in said
    assert "ET" in said


def test_a_guest_that_changes_its_mode_is_followed() -> None:
    source = """
    .code16
    _start: cli
            lgdt [pointer]
            mov eax, cr0
            or eax, 1
            mov cr0, eax
            ljmp 8, offset protected
    .code32
    protected:
            mov eax, 0x12345678
    again:  inc eax
            jmp again
    .balign 8
    gdt:    .quad 0, 0x00cf9b000000ffff
    pointer: .word 15
            .long gdt
    """
    code, symbols = assemble_with_symbols(source, address=CODE)
    machine = Machine(memory=1 << 20, irqchip=False)
    machine.load(FlatImage(code, CODE, "real"))
    with served(machine) as server:
        said = run_gdb(
            server.address, "show architecture", "x/i $pc", f"hbreak *{symbols['protected']:#x}", "continue",
            "unset tdesc filename", "show architecture", "x/i $pc", "stepi", "p/x $eax",
        )  # fmt: skip
    before, _, after = said.partition("hit Breakpoint 1" if "hit Breakpoint 1" in said else "Breakpoint 1, ")
    assert '(currently "i8086")' in before
    assert f"=> {CODE:#x}:\tcli" in before
    assert '(currently "i386")' in after
    assert f"=> {symbols['protected']:#x}:\tmov    $0x12345678,%eax" in after
    assert "$1 = 0x12345678" in after


def test_a_triple_fault_can_be_looked_at_before_the_end() -> None:
    code, symbols = assemble_with_symbols("_start: mov ecx, 77\nfault: ud2", address=CODE, bits=64)
    with Machine(memory=1 << 20, irqchip=False) as machine, GdbServer(machine) as server:
        machine.load(FlatImage(code, CODE, "long"))
        with gdb_in_background(server, "continue", "p $ecx", "p $pc", "continue") as gdb:
            assert machine.run(SECONDS).end is End.TRIPLE_FAULT
            said, _ = gdb.communicate(timeout=SECONDS)
    assert "kvmpy: triple fault: vCPU 0 shut down at rip 0x1005" in said
    assert "received signal SIGSEGV" in said
    assert f"(void (*)()) {symbols['fault']:#x}" in said
    assert "$1 = 77\n" in said
    assert "Program terminated with signal SIGSEGV" in said


def test_what_monitor_commands_say() -> None:
    code, _ = assemble_with_symbols(
        "_start: mov al, 65\n1: out 0xe9, al\ninc dword ptr [0x2000]\njmp 1b", address=CODE, bits=64
    )
    machine = Machine(memory=1 << 20, irqchip=False)
    machine.add(DebugConsole())
    machine.load(FlatImage(code, CODE, "long"))
    with served(machine) as server:
        said = run_gdb(
            server.address, "watch *(int *)0x2000", "continue", "monitor help", "monitor registers",
            "monitor walk 0x1000", "monitor walk far",
            "monitor walk", "monitor exits", "monitor devices", "monitor memory", "monitor frobnicate",
        )  # fmt: skip
    assert "walk ADDRESS" in said
    assert "mode 64-bit mode, ring 0" in said
    assert "physical 0x1000, page of " in said
    assert "'far' is no number" in said
    assert "usage: monitor walk ADDRESS" in said
    assert "port write 0xe9" in said
    assert "<port write 0xe9 <- 0x41>" in said
    assert "(port 0xe9..0xe9)" in said
    assert "0x0000000000000000 .. 0x00000000000fffff  RAM" in said
    assert "no command 'frobnicate'" in said
