"""Runs, stops, pauses and closings of a machine from several threads, and errors in the midst of them."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from gnu_toolchain import assemble
from kvmpy import ClosedError, End, Machine, UsageError, VcpuBusyError
from kvmpy.boot import FlatImage
from kvmpy.devices.device import Board, Device, Region
from kvmpy.machine.bus import Bus
from kvmpy.machine.vcpu_runner import VcpuRunner
from kvmpy.machine.vcpu_threads import run_in_thread

PATIENCE = 20.0
FOR_EVER = "1: jmp 1b"


def machine_with(source: str, *, vcpus: int = 1, irqchip: bool = True) -> Machine:
    machine = Machine(memory=1 << 20, vcpus=vcpus, irqchip=irqchip)
    machine.load(FlatImage(assemble(source, address=0x1000), address=0x1000))
    return machine


# Long mode, because the local APIC is beyond real mode: INIT and SIPI to all but self, start at 0x8000.
START_OTHER = """
    mov ebx, 0xfee00000
    mov dword ptr [rbx + 0xf0], 0x1ff
    mov dword ptr [rbx + 0x300], 0xc4500
    mov dword ptr [rbx + 0x300], 0xc4608
"""
NMI_OTHER = "mov dword ptr [rbx + 0x300], 0xc4400"


def two_processors(first: str, other: str) -> Machine:
    """The first one starts the other and runs `first` in long mode; the other runs in real mode."""
    machine = Machine(memory=2 << 20, vcpus=2)
    code = assemble(f"{START_OTHER}; {first}", bits=64, address=0x10000)
    machine.load(FlatImage(code, address=0x10000, mode="long"))
    machine.memory.write(0x8000, assemble(other, bits=16, address=0x8000))
    return machine


class Latch:
    """A port handler that says that the guest came, and answers only when it is let go."""

    def __init__(self) -> None:
        self.came, self.go = threading.Event(), threading.Event()

    def write(self, offset: int, size: int, value: int) -> None:
        self.came.set()
        assert self.go.wait(PATIENCE)


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


# Starting


def test_a_machine_that_was_started_is_running_before_its_threads_are() -> None:
    with machine_with(FOR_EVER, vcpus=2) as machine:
        for _ in range(30):
            machine.start()
            assert machine.running
            with pytest.raises(UsageError, match="running already"):
                machine.run(timeout=1)
            machine.stop()
            assert not machine.running


def test_a_thread_that_cannot_be_started_leaves_no_other_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    with machine_with(FOR_EVER, vcpus=3) as machine:
        real = run_in_thread

        def refuse(runner: VcpuRunner, *arguments: object) -> threading.Thread:
            if runner.vcpu.id == 2:
                raise RuntimeError("can't start new thread")
            return real(runner, *arguments)  # type: ignore[arg-type]

        before = threading.active_count()
        with monkeypatch.context() as patch:
            patch.setattr("kvmpy.machine.running.run_in_thread", refuse)
            for begin in (machine.start, machine.run):
                with pytest.raises(RuntimeError):
                    begin(5)
                assert threading.active_count() == before
                assert not machine.running
        assert machine.run(timeout=0.05).end is End.TIMEOUT


def test_run_in_the_pause_of_the_same_thread_is_refused() -> None:
    with machine_with(FOR_EVER) as machine:
        with machine.paused():
            with pytest.raises(UsageError, match="paused"):
                machine.run(timeout=0.1)
            machine.start(timeout=0.1)
            with pytest.raises(UsageError, match="paused"):
                machine.wait()
        assert machine.wait(PATIENCE).end is End.TIMEOUT


# Waiting and stopping


def test_wait_waits_for_a_run_of_another_thread_too() -> None:
    with machine_with("out 0x10, al; 1: jmp 1b") as machine:
        came = threading.Event()
        machine.map_ports(0x10, 1, write=lambda offset, size, value: came.set())
        thread = in_thread(lambda: machine.run(timeout=PATIENCE))
        assert came.wait(PATIENCE)
        with pytest.raises(TimeoutError):
            machine.wait(0.02)
        machine.stop()
        thread.join()
        assert machine.wait().end is End.STOPPED


def test_wait_in_a_handler_is_refused() -> None:
    with machine_with("out 0x10, al; 1: jmp 1b") as machine:

        def write(offset: int, size: int, value: int) -> None:
            machine.wait()

        machine.map_ports(0x10, 1, write=write)
        with pytest.raises(UsageError, match="handler"):
            machine.run(timeout=5)


def test_stop_returns_although_the_next_run_has_begun_already() -> None:
    # Whoever runs the machine again and again must not catch the one that stops it.
    with machine_with(FOR_EVER) as machine:
        stopped = threading.Event()
        runs = 0

        def run() -> None:
            nonlocal runs
            while not stopped.is_set():
                machine.start(timeout=PATIENCE)
                machine.wait()
                runs += 1

        thread = in_thread(run)
        began = time.monotonic()
        stops = 0
        while stops < 200 and time.monotonic() < began + PATIENCE / 2:
            machine.stop()
            stops += 1
        stopped.set()
        while thread.is_alive():
            machine.stop()
            thread.join(0.001)
        assert stops == 200


def test_the_second_ctrl_c_leaves_although_another_processor_is_in_a_handler() -> None:
    latch = Latch()
    with two_processors(FOR_EVER, "out 0x10, al; 1: jmp 1b") as machine:
        machine.map_ports(0x10, 1, write=latch.write)

        def interrupt() -> None:
            latch.came.wait(PATIENCE)
            for _ in range(2):
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                time.sleep(0.2)

        thread = in_thread(interrupt)
        with pytest.raises(KeyboardInterrupt):
            machine.run(timeout=PATIENCE)
        thread.join()
        assert machine.running
        with pytest.raises(UsageError, match="running already"):
            machine.run(timeout=1)
        latch.go.set()
        machine.wait(PATIENCE)
        assert machine.run(timeout=0.05).end is End.TIMEOUT


def test_run_async_needs_no_thread_of_the_loops_executor() -> None:
    async def both(endless: Machine, short: Machine) -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        first = asyncio.ensure_future(endless.run_async())
        await asyncio.sleep(0.01)
        outcome = await asyncio.wait_for(short.run_async(), PATIENCE / 2)
        assert outcome.end is End.HALTED
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first

    with machine_with(FOR_EVER) as endless, machine_with("hlt", irqchip=False) as short:
        asyncio.run(both(endless, short))
        assert not endless.running


def test_load_leaves_the_memory_of_a_running_guest_alone() -> None:
    with machine_with("1: out 0x10, al; jmp 1b") as machine:
        before = machine.memory.read(0x1000, 16)
        came = threading.Event()
        machine.map_ports(0x10, 1, write=lambda offset, size, value: came.set())
        machine.start()
        assert came.wait(PATIENCE)
        with pytest.raises(VcpuBusyError):
            machine.load(FlatImage(bytes(16), address=0x1000))
        assert machine.memory.read(0x1000, 16) == before
        machine.stop()


def test_runs_stops_and_pauses_of_many_threads_never_meet() -> None:
    # Handlers stop, raise and dawdle; two threads run, one stops, two pause. In a pause nothing moves, and nobody
    # finds a processor busy.
    first = f"1: out 0x50, al; in eax, 0x54; {NMI_OTHER}; cli; hlt; jmp 1b"
    with two_processors(first, "1: out 0x51, al; jmp 1b") as machine:
        machine.memory.write(0x9000, assemble("iret", address=0x9000))
        machine.memory.write(2 * 4, (0x9000).to_bytes(4, "little"))
        chance = random.Random(5)
        reads = 0
        pauses: list[bool] = []
        end = time.monotonic() + 2

        def write(offset: int, size: int, value: int) -> None:
            match chance.randrange(500):
                case 0:
                    machine.stop()
                case 1:
                    raise ZeroDivisionError
                case 2:
                    time.sleep(0.01)

        def read(offset: int, size: int) -> int:
            nonlocal reads
            reads += 1
            return reads

        def run() -> None:
            while time.monotonic() < end:
                try:
                    if chance.randrange(2):
                        machine.run(timeout=chance.random() / 20)
                    else:
                        machine.start(timeout=chance.random() / 20)
                        machine.wait()
                except ZeroDivisionError:
                    pass
                except UsageError as error:
                    if type(error) is not UsageError:
                        raise
                    time.sleep(0.001)

        def stop() -> None:
            while time.monotonic() < end:
                time.sleep(chance.random() / 50)
                machine.stop()

        def pause() -> None:
            while time.monotonic() < end:
                time.sleep(chance.random() / 100)
                with machine.paused():
                    before = reads, [vcpu.regs.rip for vcpu in machine.vcpus]
                    time.sleep(chance.random() / 1000)
                    pauses.append(before == (reads, [vcpu.regs.rip for vcpu in machine.vcpus]))

        machine.map_ports(0x50, 2, write=write)
        machine.map_ports(0x54, 4, read=read)
        with ThreadPoolExecutor(5) as pool:
            for done in [pool.submit(work) for work in (run, run, stop, pause, pause)]:
                done.result(PATIENCE)
        assert not machine.running
        assert reads > 0
        assert all(pauses)


# Pausing


def test_an_exception_while_waiting_for_the_pause_ends_the_pause() -> None:
    class Alarm(Exception):
        pass

    def ring(*_: object) -> None:
        raise Alarm

    latch = Latch()
    with machine_with("1: out 0x10, al; jmp 1b") as machine:
        machine.map_ports(0x10, 1, write=latch.write)
        machine.start(timeout=0.5)
        assert latch.came.wait(PATIENCE)
        previous = signal.signal(signal.SIGUSR1, ring)
        try:
            threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            with pytest.raises(Alarm), machine.paused():
                pass
        finally:
            signal.signal(signal.SIGUSR1, previous)
        latch.go.set()
        assert machine.wait(5).end is End.TIMEOUT


def test_an_exception_inside_a_pause_ends_it() -> None:
    with machine_with(FOR_EVER) as machine:
        machine.start(timeout=0.05)
        with pytest.raises(ZeroDivisionError), machine.paused():
            raise ZeroDivisionError
        assert machine.wait(PATIENCE).end is End.TIMEOUT


def test_two_threads_pause_at_the_same_time_and_neither_sees_the_guest_move() -> None:
    with machine_with("1: inc ebx; jmp 1b", vcpus=2) as machine:
        machine.start()
        moved = []

        def pause() -> None:
            for _ in range(50):
                with machine.paused(), machine.paused():
                    before = machine.memory.read_u32(0)
                    moved.append(machine.memory.read_u32(0) - before)

        threads = [in_thread(pause) for _ in range(2)]
        for thread in threads:
            thread.join()
        assert machine.stop().end is End.STOPPED
        assert moved == [0] * 100


def test_a_deadline_survives_that_another_thread_used_the_processor_in_a_pause() -> None:
    with machine_with(FOR_EVER, irqchip=False) as machine:
        machine.start(timeout=0.2)
        with machine.paused():
            machine.vcpus[0].settle()
        assert machine.wait(5).end is End.TIMEOUT


def test_stop_during_a_pause_takes_no_register_from_the_one_who_paused() -> None:
    with machine_with(FOR_EVER) as machine:
        for _ in range(50):
            machine.start()
            with machine.paused():
                thread = in_thread(machine.stop)
                while thread.is_alive():
                    assert machine.vcpus[0].regs.rip == 0x1000
            assert machine.wait(PATIENCE).end is End.STOPPED


# Closing


def test_close_from_another_thread_ends_a_run_that_is_not_in_a_thread_of_the_machine() -> None:
    for _ in range(10):
        machine = machine_with("1: out 0x10, al; jmp 1b", vcpus=2)
        came = threading.Event()

        def close(machine: Machine = machine, came: threading.Event = came) -> None:
            came.wait(PATIENCE)
            machine.close()

        def write(offset: int, size: int, value: int, came: threading.Event = came) -> None:
            came.set()

        machine.map_ports(0x10, 1, write=write)
        thread = in_thread(close)
        assert machine.run(timeout=PATIENCE).end is End.STOPPED
        thread.join()
        assert machine.vm.closed
        with pytest.raises(ClosedError):
            machine.run()


def test_a_handler_cannot_close_its_own_machine() -> None:
    with machine_with("out 0x10, al; hlt", irqchip=False) as machine:
        machine.map_ports(0x10, 1, write=lambda offset, size, value: machine.close())
        with pytest.raises(UsageError, match="handler"):
            machine.run(timeout=5)
        assert not machine.vm.closed
    assert machine.vm.closed


def test_a_device_that_fails_to_close_keeps_nothing_else_open() -> None:
    class Broken(Device):
        def close(self) -> None:
            raise OSError("no")

    before = len(os.listdir("/proc/self/fd"))
    machine = machine_with("hlt")
    machine.add(Broken())
    with pytest.raises(OSError, match="no"):
        machine.close()
    assert machine.vm.closed
    assert len(os.listdir("/proc/self/fd")) == before


def test_machines_that_could_not_be_made_leave_no_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for arguments in ({"memory": 123}, {"memory": -4096}, {"vcpus": 0}, {"vcpus": 1 << 20}, {"cpuid": 5}):
        with pytest.raises((UsageError, AttributeError, TypeError)):
            Machine(**arguments)  # type: ignore[arg-type]
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_device_whose_input_cannot_be_listened_to_is_not_plugged_in() -> None:
    class Input(Device):
        def __init__(self, fd: int) -> None:
            super().__init__()
            self.fd = fd

        def regions(self) -> tuple[Region, ...]:
            return (Region("port", 0x10, 1, "input", self.read, self.write),)

        def attach(self, board: Board) -> None:
            super().attach(board)
            board.listen(self)

        def fileno(self) -> int:
            return self.fd

        def ready(self) -> bool:
            return False

    with machine_with("hlt") as machine:
        with pytest.raises(OSError, match="descriptor"):
            machine.add(Input(1 << 20))
        assert machine.devices == []
        assert machine.ports.regions == ()
    with pytest.raises(ClosedError):
        machine.add(Device())


def test_host_input_that_cannot_be_started_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    class Input:
        def __init__(self, fd: int) -> None:
            self.fd = fd
            self.came = threading.Event()

        def fileno(self) -> int:
            return self.fd

        def ready(self) -> bool:
            self.came.set()
            return False

    reader, writer = os.pipe()
    with machine_with("hlt") as machine:
        before = len(os.listdir("/proc/self/fd"))
        source = Input(reader)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError):
                machine.listen(source)
        assert len(os.listdir("/proc/self/fd")) == before
        machine.listen(source)
        os.write(writer, b"x")
        assert source.came.wait(PATIENCE)
    os.close(reader)
    os.close(writer)


def test_memory_goes_with_the_machine_and_not_with_the_next_garbage_collection() -> None:
    gc.collect()
    gc.disable()
    try:
        machine = machine_with("out 0x10, al; hlt", irqchip=False)
        machine.add(Device())
        machine.map_ports(0x10, 1, write=lambda offset, size, value: None)
        machine.run(timeout=5)
        kept = weakref.ref(machine), weakref.ref(machine.vm), weakref.ref(machine.devices[0])
        machine.close()
        del machine
        assert [reference() for reference in kept] == [None, None, None]
    finally:
        gc.enable()


def test_a_child_of_fork_can_close_its_copy_and_the_parent_runs_on() -> None:
    with machine_with(FOR_EVER, vcpus=2) as machine:
        reader, writer = os.pipe()

        class Input:
            def fileno(self) -> int:
                return reader

            def ready(self) -> bool:
                return True

        machine.listen(Input())
        machine.start(timeout=PATIENCE)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                signal.alarm(5)
                machine.close()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        thread = machine._host_events._thread
        assert thread is not None
        used = _cpu_time(thread)
        time.sleep(0.1)
        assert _cpu_time(thread) - used <= 2  # ticks of 10 ms: it sleeps, nobody woke it for good
        assert machine.stop().end is End.STOPPED
    os.close(reader)
    os.close(writer)


def _cpu_time(thread: threading.Thread) -> int:
    with open(f"/proc/self/task/{thread.native_id}/stat") as file:
        fields = file.read().rsplit(") ", 1)[1].split()
    return int(fields[11]) + int(fields[12])


# Looking up devices while others come


def test_a_device_is_found_while_others_come_and_go() -> None:
    bus = Bus("port", 1 << 16)
    region = Region("port", 0x8000, 1, "here", None, None)
    bus.add(region)
    others = [Region("port", port, 1, "other", None, None) for port in range(40)]
    missed = 0
    done = threading.Event()

    def plug() -> None:
        for _ in range(40):
            for other in others:
                bus.add(other)
            for other in others:
                bus.remove(other)
        done.set()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread = in_thread(plug)
        while not done.is_set():
            try:
                missed += bus.find(0x8000) is not region
            except IndexError:
                missed += 1
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert missed == 0
