"""Machine.stop() from wherever it may be called: another thread, or a handler of any processor."""

import threading
from collections.abc import Callable

import pytest

from gnu_toolchain import assemble
from kvmpy import End, Machine, Outcome
from kvmpy.boot import FlatImage

# Long mode, because the local APIC is beyond real mode: INIT and SIPI to all but self, start at 0x8000.
START_OTHER = """
    mov ebx, 0xfee00000
    mov dword ptr [rbx + 0xf0], 0x1ff
    mov dword ptr [rbx + 0x300], 0xc4500
    mov dword ptr [rbx + 0x300], 0xc4608
1:  out 0x50, al
    jmp 1b
"""


def test_stop_from_another_thread_returns_when_the_guest_stands() -> None:
    with Machine() as machine:
        machine.load(FlatImage(assemble("1: out 0x50, al; jmp 1b")))
        reached = threading.Event()
        machine.map_ports(0x50, 1, write=lambda offset, size, value: reached.set())
        running: list[bool] = []

        def stop() -> None:
            reached.wait(10)
            machine.stop()
            running.append(machine.running)

        for _ in range(20):  # the run used to be left a little later, most of the time
            reached.clear()
            thread = threading.Thread(target=stop)
            thread.start()
            assert machine.run(timeout=10).end is End.STOPPED
            thread.join()
        assert running == [False] * 20


def run_here(machine: Machine) -> Outcome:
    return machine.run(timeout=20)


def run_in_threads(machine: Machine) -> Outcome:
    machine.start()
    return machine.wait(20)


@pytest.mark.parametrize("port", [0x50, 0x51])
@pytest.mark.parametrize("start", [run_here, run_in_threads])
def test_stop_in_a_handler_waits_for_no_processor_that_waits_for_the_handler(
    port: int, start: Callable[[Machine], Outcome]
) -> None:
    # Both processors use ports all the time, so the other one waits for the lock that this handler holds.
    with Machine(vcpus=2) as machine:
        machine.load(FlatImage(assemble(START_OTHER, bits=64, address=0x10000), address=0x10000, mode="long"))
        machine.memory.write(0x8000, assemble("1: out 0x51, al; jmp 1b", address=0x8000))
        other_came = threading.Event()

        def write(offset: int, size: int, value: int) -> None:
            if other_came.is_set():
                threading.Event().wait(0.02)
                machine.stop()

        machine.map_ports(port, 1, write=write)
        machine.map_ports(0x50 ^ 0x51 ^ port, 1, write=lambda offset, size, value: other_came.set())
        assert start(machine).end is End.STOPPED
        assert not machine.running
