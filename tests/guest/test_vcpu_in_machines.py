"""One vCPU run by turns by a Machine, whose loop has the kick signal unblocked, and by `Vcpu.run`, which does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from bare_guest import PATIENCE, guest
from gnu_toolchain import assemble
from interrupted_runs import values_lost_or_doubled
from kvmpy import End, Machine, Vcpu
from kvmpy.boot import FlatImage
from kvmpy.exits import Exit, Interrupted, IoOut
from kvmpy.kvm import kick

SPIN = "1: jmp 1b"
COUNT_OUT = "1: inc al; out 0x10, al; jmp 1b"
GUARD = 5.0
"""Seconds after which a kick counts as lost."""


def machine_with(source: str, *, vcpus: int = 1, irqchip: bool = True) -> Machine:
    machine = Machine(memory=0x10000, vcpus=vcpus, irqchip=irqchip)
    machine.load(FlatImage(assemble(source)))
    return machine


def here(work: Callable[[], object]) -> object:
    return work()


def in_thread(work: Callable[[], object]) -> object:
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(work()), daemon=True)
    thread.start()
    thread.join(GUARD)
    return answers[0]


@contextmanager
def later(call: Callable[[], object], seconds: float = 0.003) -> Iterator[None]:
    """Have something called in a moment, and wait until that was done."""
    timer = threading.Timer(seconds, call)
    timer.start()
    yield
    timer.join()


def stop(machine: Machine) -> None:
    """Stop a run that is about to begin."""
    while not machine.running:
        time.sleep(0.0005)
    machine.stop()


@contextmanager
def stopped_at_last(machine: Machine) -> Iterator[None]:
    """Have a run without a timeout stopped, should it hang."""
    timer = threading.Timer(GUARD, machine.stop)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def blocked() -> bool:
    return kick.KICK_SIGNAL in signal.pthread_sigmask(signal.SIG_BLOCK, ())


# The two ways by turns


def test_a_machine_and_run_take_turns_in_several_threads() -> None:
    with machine_with(SPIN) as machine:
        vcpu = machine.vcpus[0]

        def run_and_stop() -> object:
            with later(lambda: stop(machine)):
                return machine.run().end

        def start_and_stop() -> object:
            machine.start()
            return machine.stop().end

        def kicked_at_once() -> object:  # by the stop before, too
            vcpu.kick()
            return vcpu.run(timeout=PATIENCE)

        def kicked() -> object:
            with later(vcpu.kick):
                return vcpu.run(timeout=PATIENCE)

        def timed_out() -> object:
            event = vcpu.run(timeout=0.003)
            # A kick is seen twice by whoever looks between its first and its last step.
            return vcpu.run(timeout=0.003) if event == interrupted else event

        stopped, interrupted = End.STOPPED, Interrupted(False)
        for _ in range(5):
            for call in (here, in_thread):
                for machines_way in (run_and_stop, start_and_stop):
                    ways = machines_way, kicked_at_once, kicked, timed_out
                    assert [call(way) for way in ways] == [stopped, interrupted, interrupted, Interrupted(True)]


def test_a_signal_at_the_worst_moment_counts_after_a_machine_has_run_the_vcpu() -> None:
    """As in test_vcpu_kicks: the thread is signalled right before KVM_RUN, and nobody stores immediate_exit."""
    with machine_with(SPIN) as machine:
        vcpu = machine.vcpus[0]
        rounds = 300
        entering, signalled = threading.Semaphore(0), threading.Semaphore(0)
        results: list[Exit] = []
        enter = vcpu.enter

        def enter_late(*arguments: int) -> int:
            entering.release()
            signalled.acquire()
            return enter(*arguments)

        def work() -> None:
            for _ in range(3):
                with later(lambda: stop(machine)):
                    machine.run()
                vcpu.enter = enter_late
                results.extend(vcpu.run() for _ in range(rounds))
                vcpu.enter = enter

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        for number in range(3 * rounds):
            assert entering.acquire(timeout=GUARD), f"signal {number} was lost"
            assert vcpu._thread is not None
            kick.send(vcpu._thread.tid)
            signalled.release()
        thread.join(GUARD)
        assert results == [Interrupted(False)] * (3 * rounds)


def test_a_pause_in_which_another_thread_runs_the_vcpu_leaves_the_machine_stoppable() -> None:
    with machine_with(COUNT_OUT) as machine:
        values: list[int] = []
        written = threading.Event()

        def write(offset: int, size: int, value: int) -> None:
            values.append(value)
            written.set()

        machine.map_ports(0x10, 1, write=write)
        machine.start()
        for _ in range(50):
            written.clear()
            assert written.wait(GUARD)
            with machine.paused():
                while (event := machine.vcpus[0].run(timeout=PATIENCE)) == Interrupted(False):
                    pass  # by the pause itself, if it came before the machine's thread
                assert isinstance(event, IoOut)
                values.append(event.value)
        machine.stop()
        assert values == [number & 0xFF for number in range(1, len(values) + 1)]
        assert len(values) >= 100


# Runs of a machine without a deadline: nothing but the kick itself brings the guest out


@pytest.mark.parametrize("source", [SPIN, COUNT_OUT, "sti; 1: hlt; jmp 1b"], ids=["spins", "exits", "halts"])
def test_of_two_thousand_pauses_none_waits_for_ever(source: str) -> None:
    with machine_with(source) as machine:
        paused = 0

        def pause() -> None:
            nonlocal paused
            while paused < 2000:
                with machine.paused():
                    paused += 1

        machine.start()
        thread = threading.Thread(target=pause, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        assert paused == 2000
        assert machine.stop().end is End.STOPPED


def test_the_signal_is_unblocked_in_the_loop_only_and_not_where_there_is_a_deadline() -> None:
    with machine_with("out 0x10, al; cli; hlt", irqchip=False) as machine:
        seen: list[bool] = []
        machine.map_ports(0x10, 1, write=lambda offset, size, value: seen.append(blocked()))
        for timeout in (None, PATIENCE, None):
            machine.load(FlatImage(assemble("out 0x10, al; cli; hlt")))
            assert machine.run(timeout=timeout).end is End.HALTED
            assert blocked()
        assert seen == [False, True, False]


def test_cli_hlt_is_halted_without_a_deadline() -> None:
    with machine_with("mov cx, 200; 1: out 0x10, al; loop 1b; cli; hlt") as machine, stopped_at_last(machine):
        assert machine.run().end is End.HALTED


def test_a_deadline_does_not_wait_for_a_guest_that_is_hardly_ever_in_kvm_run() -> None:
    with machine_with("1: in al, 0x10; jmp 1b") as machine:
        reads: list[int] = []

        def read(offset: int, size: int) -> int:
            reads.append(offset)
            time.sleep(0.02)
            return 0

        machine.map_ports(0x10, 1, read=read)
        for _ in range(3):
            reads.clear()
            assert machine.run(timeout=0.1).end is End.TIMEOUT
            assert len(reads) <= 7  # five take as long as the timeout


def interrupted(run: Callable[[], object], thread: int) -> None:
    """Call `run`, with a SIGINT to a thread a moment later; on a busy machine that may be before its begin."""
    threading.Timer(0.03, signal.pthread_kill, (thread, signal.SIGINT)).start()
    run()


@pytest.mark.parametrize("source", [SPIN, COUNT_OUT], ids=["spins", "exits"])
def test_ctrl_c_that_another_thread_receives_ends_a_run_without_a_deadline(source: str) -> None:
    with machine_with(source) as machine, stopped_at_last(machine):
        machine.map_ports(0x10, 1, write=lambda offset, size, value: None)
        stop = threading.Event()
        other = threading.Thread(target=stop.wait, args=(PATIENCE,))
        other.start()
        for _ in range(5):
            with pytest.raises(KeyboardInterrupt):
                interrupted(machine.run, other.ident or 0)
        stop.set()
        other.join()


def test_a_thousand_interrupts_of_runs_without_a_deadline_lose_and_double_no_value() -> None:
    assert values_lost_or_doubled(1000, timeout=None) == "[]"


# Runs in handlers of a run


def test_a_handler_may_run_another_vcpu_with_a_timeout_and_kicks() -> None:
    with machine_with("1: out 0x10, al; jmp 1b") as machine, guest(SPIN) as other:
        events: list[Exit] = []

        def write(offset: int, size: int, value: int) -> None:
            assert not blocked()
            events.append(other.run(timeout=0.003))
            other.kick()
            events.append(other.run(timeout=PATIENCE))
            with pytest.raises(OSError, match="KVM_SET_SREGS"):
                refused(other)
            assert not blocked()
            if len(events) == 10:
                machine.stop()

        machine.map_ports(0x10, 1, write=write)
        with stopped_at_last(machine):
            assert machine.run().end is End.STOPPED
        assert events == [Interrupted(True), Interrupted(False)] * 5
        assert blocked()
        assert other.run(timeout=0.003) == Interrupted(True)


def refused(vcpu: Vcpu) -> None:
    """A run that raises."""
    before = vcpu.sregs.cr0
    vcpu.sregs.cr0 = 1 << 63
    try:
        vcpu.run(timeout=PATIENCE)
    finally:
        vcpu.sregs.cr0 = before


def test_a_handler_may_run_another_machine_and_both_can_be_stopped() -> None:
    with machine_with("1: out 0x10, al; jmp 1b") as machine, machine_with(SPIN) as inner:
        ends: list[End] = []

        def write(offset: int, size: int, value: int) -> None:
            if len(ends) < 2:
                with later(lambda: stop(inner)):
                    ends.append(inner.run().end)
                ends.append(inner.run(timeout=0.003).end)

        machine.map_ports(0x10, 1, write=write)
        with later(lambda: stop(machine), 0.1):
            assert machine.run().end is End.STOPPED
        assert ends == [End.STOPPED, End.TIMEOUT]
        assert blocked()


FORK_IN_A_HANDLER = """
import os, sys
sys.path.insert(0, {tests!r})
from bare_guest import guest
from kvmpy import End, Machine
from kvmpy.boot import FlatImage

status = []

def write(offset, size, value):
    child = os.fork()
    if child == 0:
        with guest("1: jmp 1b") as own:
            os._exit(0 if own.run(timeout=0.01).timed_out and own.run(timeout=0.01).timed_out else 1)
    status.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

with Machine(memory=0x10000, irqchip=False) as machine:
    machine.load(FlatImage(bytes.fromhex({code!r})))
    machine.map_ports(0x10, 1, write=write)
    assert machine.run().end is End.HALTED
print(status)
"""


def test_a_child_forked_in_a_handler_runs_vcpus_of_its_own() -> None:
    tests = os.path.dirname(os.path.dirname(__file__))
    program = FORK_IN_A_HANDLER.format(tests=tests, code=assemble("out 0x10, al; hlt").hex())
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert (done.stdout, done.returncode) == ("[0]\n", 0), done.stderr


# Somebody else's handler


FOREIGN_HANDLER = """
import signal, threading, time
from kvmpy import Machine
from kvmpy.boot import FlatImage
from kvmpy.kvm import kick

if {before}:
    signal.signal(kick.KICK_SIGNAL, lambda *_: print("called"))
with Machine(memory=0x10000) as machine:
    machine.load(FlatImage(b"\\xeb\\xfe"))
    threading.Timer(0.1, machine.stop).start()
    print(machine.run().end.name)
    if not {before}:
        signal.signal(kick.KICK_SIGNAL, lambda *_: print("called"))
    threading.Timer(0.1, machine.stop).start()
    print(machine.run().end.name)
"""


@pytest.mark.parametrize("before", [True, False])
def test_somebody_elses_handler_of_the_signal_is_not_called_for_kicks_and_ticks(before: bool) -> None:
    program = FOREIGN_HANDLER.format(before=before)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert (done.stdout, done.returncode) == ("STOPPED\nSTOPPED\n", 0), done.stderr
