"""A vCPU belongs to one thread at a time and a VM to one process: anything else is a typed error at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from bare_guest import PATIENCE, empty_vm, guest, next_exit, start
from kvmpy import Kvm, Vcpu
from kvmpy.errors import VcpuBusyError
from kvmpy.exits import Interrupted, IoOut

AT_ONCE = 0.01
"""Seconds."""


@contextmanager
def busy(vcpu: Vcpu) -> Iterator[None]:
    """Another thread is in KVM_RUN."""
    thread = threading.Thread(target=vcpu.run, daemon=True)
    thread.start()
    while not vcpu._owner:
        time.sleep(0.001)
    time.sleep(0.01)
    try:
        yield
    finally:
        vcpu.kick()
        thread.join(PATIENCE)
        assert not thread.is_alive()


def fastest(call: Callable[[], object], expected: type[Exception]) -> float:
    """Seconds that a refusal takes, the best of some."""
    best = PATIENCE
    for _ in range(5):
        started = time.perf_counter()
        with pytest.raises(expected):
            call()
        best = min(best, time.perf_counter() - started)
    return best


USES: dict[str, Callable[[Vcpu], object]] = {
    "read a register": lambda vcpu: vcpu.regs.rax,
    "read a system register": lambda vcpu: vcpu.sregs.cr0,
    "write a register": lambda vcpu: setattr(vcpu.regs, "rax", 1),
    "run": lambda vcpu: vcpu.run(),
    "settle": lambda vcpu: vcpu.settle(),
    "set a mode": lambda vcpu: vcpu.set_real_mode(entry=0),
    "get_msrs": lambda vcpu: vcpu.get_msrs([0x10]),
    "inject": lambda vcpu: vcpu.inject_exception(6),
    "ioctl": lambda vcpu: vcpu.ioctl("KVM_NMI"),
    "close": lambda vcpu: vcpu.close(),
    "close the VM": lambda vcpu: vcpu.vm.close(),
}


@pytest.mark.parametrize("use", USES)
def test_a_busy_vcpu_refuses_other_threads_at_once(use: str) -> None:
    with guest("1: jmp 1b") as vcpu:
        with busy(vcpu):
            assert fastest(lambda: USES[use](vcpu), VcpuBusyError) < AT_ONCE
        assert not vcpu.closed
        assert vcpu.run(timeout=0.01) == Interrupted(True)


def test_register_objects_taken_before_refuse_too() -> None:
    with guest("1: jmp 1b") as vcpu:
        regs, sregs = vcpu.regs, vcpu.sregs
        with busy(vcpu):
            assert fastest(lambda: regs.rax, VcpuBusyError) < AT_ONCE
            assert fastest(lambda: sregs.cs, VcpuBusyError) < AT_ONCE
            assert fastest(lambda: regs.copy(), VcpuBusyError) < AT_ONCE
            assert fastest(lambda: str(regs), VcpuBusyError) < AT_ONCE


def test_the_vm_of_a_busy_vcpu_can_be_used() -> None:
    with empty_vm() as vm:
        vcpu = start(vm, "1: jmp 1b")
        with busy(vcpu):
            vm.memory.write_u32(0x2000, 1)
            vm.add_ram(0x100_0000, size=0x1000)
            second = vm.create_vcpu()
            assert second.regs.rip == 0xFFF0
            second.close()


def test_of_many_threads_one_gets_the_vcpu() -> None:
    with guest("1: jmp 1b") as vcpu:
        barrier = threading.Barrier(8)
        outcomes: list[object] = []

        def try_it() -> None:
            barrier.wait()
            try:
                outcomes.append(vcpu.run(timeout=0.2))
            except VcpuBusyError:
                outcomes.append("busy")

        threads = [threading.Thread(target=try_it) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert outcomes.count("busy") == 7
        assert outcomes.count(Interrupted(True)) == 1


def test_a_failed_run_leaves_the_vcpu_free() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        vcpu = vm.create_vcpu()
        vcpu.sregs.cr0 = 1 << 63
        with pytest.raises(OSError, match="KVM_SET_SREGS"):
            vcpu.run()
        thread = threading.Thread(target=lambda: vcpu.regs.rax)
        thread.start()
        thread.join()
        assert not vcpu._owner


def test_threads_run_their_own_vcpus_at_the_same_time() -> None:
    with empty_vm() as vm:
        vcpus = [start(vm, "1: inc al; out 0x10, al; jmp 1b") for _ in range(4)]
        seen: dict[int, list[int]] = {vcpu.id: [] for vcpu in vcpus}

        def work(vcpu: Vcpu) -> None:
            for _ in range(200):
                event = next_exit(vcpu)
                assert isinstance(event, IoOut)
                seen[vcpu.id].append(event.value)

        threads = [threading.Thread(target=work, args=(vcpu,)) for vcpu in vcpus]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert seen == {vcpu.id: [number & 0xFF for number in range(1, 201)] for vcpu in vcpus}


# fork. In a process of its own: forking one that has threads is what the interpreter warns of.

FORK = """
import os, sys, time
sys.path.insert(0, {tests!r})
from bare_guest import empty_vm, next_exit, start
from kvmpy import Kvm
from kvmpy.errors import ForkedError
from kvmpy.exits import IoOut

with empty_vm() as vm:
    vcpu = start(vm, "1: inc al; out 0x10, al; jmp 1b")
    assert next_exit(vcpu) == IoOut(0x10, b"\\1")
    regs = vcpu.regs
    uses = [
        lambda: vcpu.regs.rax, lambda: regs.rax, lambda: vcpu.run(), lambda: vcpu.kick(), lambda: vcpu.get_events(),
        lambda: vcpu.settle(), lambda: vm.add_ram(0x1000000, size=0x1000), lambda: vm.create_vcpu(),
        lambda: vm.check_extension(0), lambda: vm.kvm.create_vm(), lambda: vcpu.fileno(), lambda: vm.__enter__(),
    ]
    child = os.fork()
    if child == 0:
        code = 0
        for number, use in enumerate(uses):
            best = 1.0
            for _ in range(5):  # the machine may be busy
                started = time.perf_counter()
                try:
                    use()
                    code = 100 + number
                except ForkedError as error:
                    best = min(best, time.perf_counter() - started)
                    if "after fork" not in str(error):
                        code = 200
                except BaseException as error:
                    print(type(error), error, flush=True)
                    code = 50 + number
            if best > 0.01:
                code = code or 150 + number
            if code:
                break
        {child}
        os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, status
    for number in range(2, 50):
        assert next_exit(vcpu) == IoOut(0x10, bytes([number]))
print("parent is fine")
"""

CHILD_DOES = {
    "nothing": "",
    "closes its copies": "vcpu.close(); vm.close()",
    "drops its copies": "import gc; del vcpu, vm, regs, uses, use; gc.collect()",
    "makes a VM of its own": """
        with empty_vm() as own:
            assert next_exit(start(own, "mov al, 9; out 0x10, al")) == IoOut(0x10, b"\\x09")
            assert start(own, "1: jmp 1b").run(timeout=0.02).timed_out
    """,
}


@pytest.mark.parametrize("what", CHILD_DOES)
def test_a_forked_child_gets_a_typed_error_and_the_parent_goes_on(what: str) -> None:
    tests = os.path.dirname(os.path.dirname(__file__))
    program = FORK.format(tests=tests, child=CHILD_DOES[what].strip())
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("parent is fine\n", 0), done.stdout + done.stderr


def test_a_child_forked_while_a_thread_runs_the_vcpu_is_told_of_the_fork() -> None:
    tests = os.path.dirname(os.path.dirname(__file__))
    program = f"""
import os, sys, threading, time, warnings
sys.path.insert(0, {tests!r})
warnings.simplefilter("ignore", DeprecationWarning)
from bare_guest import guest
from kvmpy.errors import ForkedError

with guest("1: jmp 1b") as vcpu:
    thread = threading.Thread(target=vcpu.run)
    thread.start()
    while not vcpu._owner:
        time.sleep(0.001)
    child = os.fork()
    if child == 0:
        try:
            vcpu.regs.rax
        except ForkedError:
            try:
                vcpu.run()
            except ForkedError:
                os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert thread.is_alive()
    vcpu.kick()
    thread.join()
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stdout + done.stderr
