"""Ctrl-C, kicks and pauses of a Machine: asynchronous stops surface only between exits."""

import _thread
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from gnu_toolchain import assemble
from kvmpy import End, Machine, UsageError, VcpuBusyError
from kvmpy.boot import FlatImage

KIB = 1024
COUNT_OUT = "1: inc al; out 0x10, al; jmp 1b"


def machine_with(source: str, *, irqchip: bool = True, vcpus: int = 1) -> Machine:
    machine = Machine(memory=64 * KIB, vcpus=vcpus, irqchip=irqchip)
    machine.load(FlatImage(assemble(source)))
    return machine


INTERRUPTED_RUNS = """
import random, signal, sys, threading, time
from kvmpy import Machine
from kvmpy.boot import FlatImage

seen = []
main = threading.main_thread().ident
go = threading.Event()

def send():
    go.wait()
    for _ in range(3000):
        time.sleep(random.random() * 0.004)
        signal.pthread_kill(main, signal.SIGINT)

with Machine(memory=0x10000) as machine:
    machine.load(FlatImage(bytes.fromhex(sys.argv[1])))
    machine.map_ports(0x10, 1, write=lambda offset, size, value: seen.append(value))
    interrupts = 0
    sender = threading.Thread(target=send)
    sender.start()
    while True:
        # One that falls between two runs is the program's and not the machine's: the outer except has it.
        try:
            go.set()
            while sender.is_alive():
                try:
                    machine.run(timeout=0.5)
                except KeyboardInterrupt:
                    interrupts += 1
            break
        except KeyboardInterrupt:
            interrupts += 1

wrong = [index for index in range(len(seen)) if seen[index] != (index + 1) & 0xFF]
print(interrupts, len(seen), wrong[:3])
"""


@pytest.mark.deadline(120)
def test_3000_interrupts_lose_and_double_no_value() -> None:
    program = [sys.executable, "-c", INTERRUPTED_RUNS, assemble(COUNT_OUT).hex()]
    result = subprocess.run(program, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stderr
    interrupts, values, wrong = result.stdout.split(maxsplit=2)
    assert wrong.strip() == "[]"
    assert int(interrupts) > 1000
    assert int(values) > 3000


def test_ctrl_c_returns_while_the_guest_never_exits() -> None:
    with machine_with("1: jmp 1b") as machine:
        threading.Timer(0.05, _thread.interrupt_main).start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            machine.run(timeout=5)
        assert time.monotonic() - started < 2  # the timeout would have taken 5
        assert machine.run(timeout=0.02).end is End.TIMEOUT


def test_ctrl_c_sent_to_the_process_reaches_a_halted_guest() -> None:
    with machine_with("sti; 1: hlt; jmp 1b") as machine:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            machine.run(timeout=5)


def test_the_second_ctrl_c_leaves_a_handler_that_never_returns_and_its_exit_stays() -> None:
    with machine_with("mov al, 5; out 0x10, al; hlt", irqchip=False) as machine:
        calls: list[int] = []
        stuck = True

        def write(offset: int, size: int, value: int) -> None:
            calls.append(value)
            while stuck:
                time.sleep(0.01)

        machine.map_ports(0x10, 1, write=write)
        for delay in (0.05, 0.15):
            threading.Timer(delay, _thread.interrupt_main).start()
        with pytest.raises(KeyboardInterrupt):
            machine.run(timeout=5)
        stuck = False
        assert machine.run(timeout=5).end is End.HALTED
        assert calls == [5, 5]


def test_a_programs_own_sigint_handler_stays() -> None:
    caught: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        with machine_with("1: jmp 1b") as machine:
            threading.Timer(0.03, _thread.interrupt_main).start()
            assert machine.run(timeout=0.2).end is End.TIMEOUT
    finally:
        signal.signal(signal.SIGINT, previous)
    assert caught == [signal.SIGINT]


def test_interrupts_stop_all_processors() -> None:
    with machine_with("1: jmp 1b", vcpus=2) as machine:
        threading.Timer(0.05, _thread.interrupt_main).start()
        with pytest.raises(KeyboardInterrupt):
            machine.run(timeout=5)
        assert not machine.running


# Pausing


def test_while_paused_the_guest_stands_and_its_registers_are_open() -> None:
    with machine_with("mov ax, 0x200; mov ds, ax; 1: inc dword ptr [0]; inc ebx; jmp 1b") as machine:
        machine.start()
        time.sleep(0.02)
        with pytest.raises(VcpuBusyError):
            machine.vcpus[0].regs.copy()
        with machine.paused():
            before = machine.memory.read_u32(0x2000)
            ebx = machine.vcpus[0].regs.rbx
            time.sleep(0.02)
            assert machine.memory.read_u32(0x2000) == before > 0
            assert machine.vcpus[0].regs.rbx == ebx
            machine.vcpus[0].regs.rbx = 0x1000_0000
        time.sleep(0.02)
        machine.stop()
        assert machine.memory.read_u32(0x2000) > before
        assert machine.vcpus[0].regs.rbx > 0x1000_0000


def test_a_pause_completes_a_pending_read_first() -> None:
    # Whenever the guest stands, every value that was read has arrived: eax equals the last one given.
    with machine_with("1: in eax, 0x10; jmp 1b") as machine:
        given = [0]

        def read(offset: int, size: int) -> int:
            given[0] += 1
            return given[0]

        machine.map_ports(0x10, 4, read=read)
        machine.start()
        for _ in range(200):
            with machine.paused():
                assert machine.vcpus[0].regs.rax & 0xFFFF_FFFF == given[0]
        machine.stop()


def test_a_handler_cannot_pause_its_own_machine() -> None:
    with machine_with("out 0x10, al; hlt", irqchip=False) as machine:

        def write(offset: int, size: int, value: int) -> None:
            with machine.paused():
                pass

        machine.map_ports(0x10, 1, write=write)
        with pytest.raises(UsageError, match="cannot pause"):
            machine.run(timeout=5)


def test_pausing_a_machine_that_does_not_run_is_no_trouble() -> None:
    with machine_with("hlt", irqchip=False) as machine:
        with machine.paused(), machine.paused():
            assert machine.vcpus[0].regs.rip == 0x1000
        assert machine.run(timeout=5).end is End.HALTED


def test_many_pauses_and_stops_of_two_processors() -> None:
    with machine_with("1: jmp 1b", vcpus=2) as machine:
        for _ in range(100):
            machine.start()
            with machine.paused():
                assert machine.vcpus[0].regs.rip in (0x1000, 0x1002)
            machine.stop()
