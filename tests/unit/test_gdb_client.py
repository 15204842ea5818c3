"""A real gdb talks to the server; the machine is a toy, so only the protocol and the descriptions are tried."""

from __future__ import annotations

import pytest

from gdb_remote import run_gdb
from gdb_toy_target import CODE, ToyTarget
from kvmpy.debug.gdb.architecture import Architecture
from kvmpy.debug.gdb.socket_server import SocketServer
from kvmpy.debug.gdb.target import RunEnded, Signal

COUNT = b"\x48\xff\xc0\x90\xeb\xfa"  # again: inc rax; nop; jmp again


def gdb(target: ToyTarget, *commands: str) -> str:
    with SocketServer(target) as server:
        return run_gdb(server.address, *commands)


@pytest.mark.parametrize(
    ("mode", "name", "instruction", "pc"),
    [
        (Architecture.X86_64, "i386:x86-64", "inc    %rax", "$rip"),
        (Architecture.I386, "i386", "dec    %eax", "$eip"),
        (Architecture.I8086, "i8086", "dec    %ax", "$eip"),
    ],
)
def test_gdb_takes_the_description_and_disassembles(mode: Architecture, name: str, instruction: str, pc: str) -> None:
    target = ToyTarget(COUNT)
    target.mode = mode
    said = gdb(target, "show architecture", "x/i $pc", f"p/x (long){pc}", "info registers cr0", "p sizeof($esp)")
    assert f'(currently "{name}")' in said
    assert f"=> {CODE:#x}:\t{instruction}" in said
    assert f"$1 = {CODE:#x}" in said
    assert "warning: A handler for the OS ABI" not in said


def test_registers_are_read_and_written() -> None:
    target = ToyTarget()
    target.registers[1].update(rax=0x1234, efer=0x501, rflags=0x3246, xmm0=0x3F80_0000, fstat=0, mxcsr=0x1F80)
    said = gdb(
        target, "info registers rax eflags efer", "p $xmm0.v4_float[0]", "info registers k_gs_base", "p $mxcsr",
        "set $rbx = 0x42", "set $efer |= 0x800", "set $st0 = 2.5", "info registers",
    )  # fmt: skip
    assert "rax            0x1234" in said
    assert "[ PF ZF IF IOPL=3 ]" in said
    assert "[ SCE LME LMA ]" in said
    assert "$1 = 1\n" in said
    assert "k_gs_base      <unavailable>" in said
    assert "[ IM DM ZM OM UM PM RC=0 ]" in said
    assert target.registers[1]["rbx"] == 0x42
    assert target.registers[1]["efer"] == 0x501 | 0x800
    assert target.registers[1]["st0"] == 0x4000_A000_0000_0000_0000
    assert "idtr_limit" in said


def test_a_register_that_cannot_be_set_is_explained() -> None:
    assert "cr0 is carved in stone" in gdb(ToyTarget(), "set $cr0 |= 1")


def test_breakpoints_steps_and_the_list_of_threads() -> None:
    target = ToyTarget(COUNT)
    said = gdb(
        target, "info threads", f"break *{CODE + 3:#x}", "continue", "stepi", f"hbreak *{CODE:#x}", "continue",
        "p $rax", "stepi 30", "p $rax", "monitor foo bar",
    )  # fmt: skip
    assert 'Thread 1 "toy 1" (standing)' in said
    assert "Breakpoint 1, 0x0000000000001003" in said or "hit Breakpoint 1" in said
    assert "hit Breakpoint 2" in said or "Breakpoint 2, " in said
    assert "foo bar of thread" in said
    assert "$1 = 1\n" in said
    assert "$2 = 2\n" in said, "the steps end at the first breakpoint"


def test_memory_is_read_written_and_searched() -> None:
    target = ToyTarget()
    said = gdb(
        target, "set {int}0x2000 = 0x11223344", "x/4xb 0x2000", "find /b 0x1f00, 0x2100, 0x33, 0x22", "x/x 0x20000",
    )  # fmt: skip
    assert "0x44\t0x33\t0x22\t0x11" in said
    assert "0x2001" in said
    assert "Cannot access memory at address 0x20000" in said


def test_a_mode_switch_is_followed_when_gdb_reads_the_description_again() -> None:
    class Switching(ToyTarget):
        def monitor(self, thread: int, command: str) -> str:
            self.mode = Architecture(command)
            return ""

    target = Switching(b"\x90" + COUNT)
    target.mode = Architecture.I8086
    said = gdb(
        target, "break *0x1001", "x/i 0x1001", "monitor i386:x86-64", "unset tdesc filename", "show architecture",
        "x/i 0x1001", "continue", "p $r15", "stepi", "x/i $pc",
    )  # fmt: skip
    assert "0x1001:\tdec    %ax" in said
    assert '(currently "i386:x86-64")' in said
    assert "0x1001:\tinc    %rax" in said
    assert "=> 0x1004:\tnop" in said
    assert "No symbol" not in said


@pytest.mark.parametrize(
    ("ended", "text"),
    [
        (RunEnded(0), "exited normally"),
        (RunEnded(3, message="exit code 3"), "exited with code 03"),
        (RunEnded(signal=Signal.SEGV), "terminated with signal SIGSEGV"),
    ],
)
def test_the_end_of_the_run_is_the_end_of_the_program(ended: RunEnded, text: str) -> None:
    target = ToyTarget(b"\x90\xf4")
    target.outcome = ended
    said = gdb(target, "continue")
    assert text in said
    assert ("kvmpy: exit code 3" in said) == bool(ended.message)


def test_quitting_detaches_and_killing_kills() -> None:
    target = ToyTarget()
    gdb(target, "quit")
    assert target.log == ["connect", "disconnect"]
    gdb(target, "kill")
    assert target.log[-1] == "kill"


def test_a_second_gdb_is_told_why_it_cannot() -> None:
    with SocketServer(ToyTarget()) as server:
        said = run_gdb(server.address, "python import subprocess", f"shell true && gdb -nx -batch -ex 'target remote "
                       f"{server.address[0]}:{server.address[1]}' 2>&1")  # fmt: skip
    assert "another gdb is attached" in said
