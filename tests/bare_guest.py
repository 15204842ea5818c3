"""A guest on a bare vCPU for one test: some RAM, a program in assembly, registers set, nothing else.

RAM lies from 0 to `RAM`, the program at `CODE`, the prepared tables of long mode at `TABLES`. `MMIO` is an address
where nothing is, `DATA` a page that is free for the test.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gnu_toolchain import assemble
from kvmpy import Kvm, Vcpu, Vm
from kvmpy.abi.flags import KVM_MP_STATE_HALTED
from kvmpy.exits import Exit, Hlt, Interrupted, IoOut

CODE = 0x1000
DATA = 0x8000
TABLES = 0x4_0000
RAM = 0x8_0000
MMIO = 0x10_0000
PATIENCE = 20.0
"""Seconds until a guest that should have exited counts as hanging."""


@contextmanager
def empty_vm() -> Iterator[Vm]:
    """A VM with RAM and no vCPU."""
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=RAM)
        yield vm


def start(vm: Vm, source: str, bits: int = 16, *, sync_regs: bool = True, ring: int = 0, cpuid: bool = False) -> Vcpu:
    """A new vCPU of `vm` about to run `source` in real (16), protected (32) or long mode (64)."""
    vcpu = vm.create_vcpu(sync_regs=sync_regs)
    if cpuid:
        vcpu.set_cpuid(vm.kvm.supported_cpuid())
    enter(vcpu, source, bits, ring=ring)
    return vcpu


def enter(vcpu: Vcpu, source: str, bits: int = 16, *, ring: int = 0) -> None:
    """Have `vcpu` run `source` next."""
    vcpu.vm.memory.write(CODE, assemble(source, address=CODE, bits=bits))
    if bits == 16:
        vcpu.set_real_mode(entry=CODE)
    elif bits == 32:
        vcpu.set_protected_mode(entry=CODE)
    else:
        vcpu.set_long_mode(entry=CODE, tables=TABLES, stack=DATA, ring=ring)


@contextmanager
def guest(source: str, bits: int = 16, *, sync_regs: bool = True, ring: int = 0, cpuid: bool = False) -> Iterator[Vcpu]:
    """A vCPU in a VM of its own, about to run `source`."""
    with empty_vm() as vm:
        yield start(vm, source, bits, sync_regs=sync_regs, ring=ring, cpuid=cpuid)


def next_exit(vcpu: Vcpu) -> Exit:
    """The next exit, which must come before anybody loses patience."""
    return vcpu.run(timeout=PATIENCE)


def run_until_halted(vcpu: Vcpu) -> None:
    """Run until the processor waits inside KVM, as it does where there is an irqchip; a busy host takes its time."""
    while vcpu.get_mp_state() != KVM_MP_STATE_HALTED:
        assert vcpu.run(timeout=0.02) == Interrupted(True)


def run_to_hlt(vcpu: Vcpu) -> list[Exit]:
    """All exits up to HLT, which is left out."""
    seen: list[Exit] = []
    while (event := next_exit(vcpu)) != Hlt():
        seen.append(event)
        assert len(seen) < 10_000
        assert event.reason != 10, f"no HLT after {seen}"
    return seen


def bytes_out(vcpu: Vcpu) -> bytes:
    """What the guest writes to ports until HLT; there must be no other exits."""
    seen = run_to_hlt(vcpu)
    outs = [event.data for event in seen if isinstance(event, IoOut)]
    assert len(outs) == len(seen), seen
    return b"".join(outs)
