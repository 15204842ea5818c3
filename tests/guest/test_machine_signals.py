"""Ctrl-C, kicks and pauses of a Machine: asynchronous stops surface only between exits."""

import _thread
import os
import signal
import threading
import time

import pytest

from gnu_toolchain import assemble
from interrupted_runs import values_lost_or_doubled
from kvmpy import End, Machine, UsageError, VcpuBusyError
from kvmpy.boot import FlatImage
from waiting import wait_until

KIB = 1024
PATIENCE = 20.0
"""Seconds after which a guest that should have been stopped has not been."""


def machine_with(source: str, *, irqchip: bool = True, vcpus: int = 1) -> Machine:
    machine = Machine(memory=64 * KIB, vcpus=vcpus, irqchip=irqchip)
    machine.load(FlatImage(assemble(source)))
    return machine


@pytest.mark.deadline(120)
def test_3000_interrupts_lose_and_double_no_value() -> None:
    assert values_lost_or_doubled(3000, timeout=0.5) == "[]"


def test_ctrl_c_returns_while_the_guest_never_exits() -> None:
    with machine_with("1: jmp 1b") as machine:
        threading.Timer(0.05, _thread.interrupt_main).start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            machine.run(timeout=PATIENCE)
        assert time.monotonic() - started < PATIENCE / 2
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
            interrupt = threading.Timer(0.03, _thread.interrupt_main)
            interrupt.start()
            assert machine.run(timeout=0.2).end is End.TIMEOUT
            interrupt.join()  # on a busy machine it may come after the run
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
        wait_until(lambda: machine.memory.read_u32(0x2000) > 0)
        with pytest.raises(VcpuBusyError):
            machine.vcpus[0].regs.copy()
        with machine.paused():
            before = machine.memory.read_u32(0x2000)
            ebx = machine.vcpus[0].regs.rbx
            time.sleep(0.02)
            assert machine.memory.read_u32(0x2000) == before
            assert machine.vcpus[0].regs.rbx == ebx
            machine.vcpus[0].regs.rbx = 0x1000_0000
        wait_until(lambda: machine.memory.read_u32(0x2000) > before)
        machine.stop()
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
