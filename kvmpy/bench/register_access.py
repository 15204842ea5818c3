"""What it costs a handler to look at the guest's registers, with KVM_CAP_SYNC_REGS and without."""

from __future__ import annotations

import time

from kvmpy.bench.rows import Row, Sampler, alternate
from kvmpy.bench.session import Session
from kvmpy.kvm import Kvm, Vcpu

__all__ = ["measure"]

EXITS = 1000
_ADDRESS = 0x1000
_CODE = bytes([0xE6, 0x80,  # out 0x80, al
               0xEB, 0xFC])  # jmp 0x1000  # fmt: skip


def measure(session: Session) -> list[Row]:
    """An exit through `Vcpu.exits()` in which `regs.rip` is read, less one in which nothing is."""
    count = session.count(EXITS)
    with Kvm() as kvm, kvm.create_vm() as with_sync, kvm.create_vm() as without_sync:
        synced = _vcpu(with_sync.create_vcpu())
        unsynced = _vcpu(without_sync.create_vcpu(sync_regs=False))
        samplers: dict[str, Sampler] = {
            "exits": lambda: _exits(synced, count),
            "synced": lambda: _exits_with_registers(synced, count),
            "unsynced exits": lambda: _exits(unsynced, count),
            "unsynced": lambda: _exits_with_registers(unsynced, count),
        }
        taken = alternate(session.rounds, samplers)
    return [
        Row("port write, exit object through Vcpu.exits()", "us", taken["exits"]),
        Row("reading registers in it, with SYNC_REGS, adds", "us", taken["synced"].minus(taken["exits"])),
        Row(
            "reading registers in it, by ioctl, adds", "us", taken["unsynced"].minus(taken["unsynced exits"]),
            note="create_vcpu(sync_regs=False)",
        ),
    ]  # fmt: skip


def _vcpu(vcpu: Vcpu) -> Vcpu:
    vcpu.vm.add_ram(0, size=0x10000)
    vcpu.vm.memory.write(_ADDRESS, _CODE)
    vcpu.set_real_mode(entry=_ADDRESS)
    return vcpu


def _exits(vcpu: Vcpu, count: int) -> float:
    exits = vcpu.exits()
    start = time.perf_counter_ns()
    for _ in range(count):
        next(exits)
    return (time.perf_counter_ns() - start) / 1e3 / count


def _exits_with_registers(vcpu: Vcpu, count: int) -> float:
    exits = vcpu.exits()
    start = time.perf_counter_ns()
    for _ in range(count):
        next(exits)
        _ = vcpu.regs.rip
    return (time.perf_counter_ns() - start) / 1e3 / count
