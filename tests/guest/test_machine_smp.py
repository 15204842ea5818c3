"""Several processors: the guest starts the others itself, as on a PC."""

import sys
import threading

import pytest

from gnu_toolchain import assemble
from kvmpy import End, Kvm, Machine, UsageError
from kvmpy.boot import FlatImage

KIB = 1024

# Long mode, because the local APIC at 0xFEE00000 is beyond real mode. The others start at 0x8000, in real mode.
START_OTHERS = """
    .code64
    mov ebx, 0xfee00000
    mov dword ptr [rbx + 0xf0], 0x1ff           # spurious vector register: software enable
    mov dword ptr [rbx + 0x300], 0xc4500        # INIT to all but self
    mov dword ptr [rbx + 0x300], 0xc4608        # SIPI to all but self, vector 8: start at 0x8000
wait:
    cmp dword ptr [0x2000], {others}
    jne wait
    {then}
"""

OTHER = """
    .code16
    xor ax, ax
    mov ds, ax
    lock inc dword ptr [0x2000]
    {then}
"""


def smp_machine(vcpus: int, first: str, other: str) -> Machine:
    machine = Machine(memory=2048 * KIB, vcpus=vcpus)
    code = assemble(START_OTHERS.format(others=vcpus - 1, then=first), bits=64, address=0x10000)
    machine.load(FlatImage(code, address=0x10000, mode="long"))
    machine.memory.write(0x8000, assemble(OTHER.format(then=other), bits=16, address=0x8000))
    return machine


@pytest.mark.parametrize("vcpus", [2, 4])
def test_a_guest_starts_its_processors_by_init_and_sipi(vcpus: int) -> None:
    with smp_machine(vcpus, "cli; hlt", "cli; hlt") as machine:
        outcome = machine.run(timeout=20)
        assert outcome.end is End.HALTED
        assert machine.memory.read_u32(0x2000) == vcpus - 1


def test_processors_that_are_never_started_do_not_keep_the_machine_running() -> None:
    with Machine(memory=64 * KIB, vcpus=3) as machine:
        machine.load(FlatImage(assemble("cli; hlt")))
        assert machine.run(timeout=5).end is End.HALTED


def test_a_processor_halted_with_interrupts_off_is_woken_by_nmi_and_counts_as_running() -> None:
    # The first processor sends the second, halted one an NMI, whose handler says so; then both halt.
    handler = assemble("mov byte ptr cs:[0x2100], 1; iret", bits=16, address=0x9000)
    wake = "mov ecx, 200000; 1: dec ecx; jnz 1b; mov dword ptr [rbx + 0x300], 0xc4400; cli; hlt"
    with smp_machine(2, wake, "cli; 2: hlt; jmp 2b") as machine:
        machine.memory.write(0x9000, handler)
        machine.memory.write(2 * 4, (0x9000).to_bytes(4, "little"))  # IVT entry 2: 0000:9000
        outcome = machine.run(timeout=20)
        assert outcome.end is End.HALTED
        assert machine.memory.read_u8(0x2100) == 1


@pytest.mark.deadline(120)
def test_handlers_of_two_processors_never_run_at_the_same_time() -> None:
    body = "mov ecx, 400; 1: out 0x10, al; dec ecx; jnz 1b; cli; hlt"
    with smp_machine(2, body, body) as machine:
        inside = 0
        overlaps = 0
        calls: set[int] = set()
        total = 0

        def write(offset: int, size: int, value: int) -> None:
            nonlocal inside, overlaps, total
            inside += 1
            overlaps += inside != 1
            calls.add(threading.get_ident())
            for _ in range(50):  # room for a switch to the other thread
                pass
            total += 1
            inside -= 1

        machine.map_ports(0x10, 1, write=write)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            assert machine.run(timeout=60).end is End.HALTED
        finally:
            sys.setswitchinterval(interval)
        assert (overlaps, total, len(calls)) == (0, 800, 2)


def test_what_a_handler_raises_on_another_processor_comes_out_of_run() -> None:
    with smp_machine(2, "3: jmp 3b", "in al, 0x10") as machine:

        def read(offset: int, size: int) -> int:
            raise RuntimeError("on the second processor")

        machine.map_ports(0x10, 1, read=read)
        with pytest.raises(RuntimeError, match="on the second processor"):
            machine.run(timeout=20)
        assert not machine.running


def test_threads_are_named_after_their_processors() -> None:
    with Machine(memory=64 * KIB, vcpus=2) as machine:
        machine.load(FlatImage(assemble("1: jmp 1b")))
        machine.start()
        names = {thread.name for thread in threading.enumerate()}
        assert {"kvmpy vCPU 0", "kvmpy vCPU 1"} <= names
        machine.stop()
        names = {thread.name for thread in threading.enumerate()}
        assert not names & {"kvmpy vCPU 0", "kvmpy vCPU 1"}


def test_more_processors_than_the_host_gives_are_refused() -> None:
    with Kvm() as kvm, pytest.raises(UsageError, match="at most"):
        Machine(memory=64 * KIB, vcpus=kvm.max_vcpus + 1, kvm=kvm)


def test_a_mode_set_on_the_second_processor_makes_it_runnable_but_not_the_boot_processor() -> None:
    with Machine(memory=64 * KIB, vcpus=2) as machine:
        machine.load(FlatImage(assemble("cli; hlt")))
        machine.memory.write(0x4000, assemble("mov byte ptr [0x2000], 7; cli; hlt", address=0x4000))
        machine.vcpus[1].set_real_mode(0x4000)
        assert machine.vcpus[1].sregs.apic_base & 0x100 == 0
        assert machine.vcpus[0].sregs.apic_base & 0x100
        assert machine.run(timeout=5).end is End.HALTED
        assert machine.memory.read_u8(0x2000) == 7
