"""VMs that come and go, and VMs that stay: their rate, and the memory that one costs."""

from __future__ import annotations

import time
from contextlib import ExitStack

from kvmpy.bench.contenders import CProgram
from kvmpy.bench.rows import Row, Sampler, Samples, Target, alternate
from kvmpy.bench.session import Session
from kvmpy.exits import Hlt
from kvmpy.kvm import Kvm, Vm

__all__ = ["measure_memory", "measure_rate"]

CYCLES = 60
IDLE_VMS = 100
_RAM = 16 << 20
_PAGE_KIB = 4
_ADDRESS = 0x1000


def _run_to_hlt(vm: Vm) -> None:
    vm.add_ram(0, size=_RAM)
    vm.memory.write(_ADDRESS, b"\xf4")
    vcpu = vm.create_vcpu()
    vcpu.set_real_mode(entry=_ADDRESS)
    if not isinstance(vcpu.run(), Hlt):
        raise AssertionError("a guest of one hlt did something else")


def measure_rate(session: Session) -> list[Row]:
    """Create a VM with 16 MiB and a vCPU, run to the first exit, close: how often a second.

    From the second VM on there is another one on the host: `Kvm` keeps an idle VM where VMs come and go. So the C loop
    is measured both ways, as one writes it and with a VM beside it.
    """
    count = session.count(CYCLES)

    def cycles() -> float:
        start = time.perf_counter_ns()
        with Kvm() as kvm:
            for _ in range(count):
                with kvm.create_vm() as vm:
                    _run_to_hlt(vm)
        return count / (time.perf_counter_ns() - start) * 1e9

    samplers: dict[str, Sampler] = {"kvmpy": cycles}
    if session.has_c():
        program = session.contenders.program("vm_lifecycle")
        samplers["C loop"] = lambda: count / int(program.ask(f"{count} 0")) * 1e9
        samplers["C loop beside a VM"] = lambda: count / int(program.ask(f"{count} 1")) * 1e9
    taken = alternate(session.rounds, samplers)
    ratios = {"C loop": Target(0.9, at_least=True)}
    return [Row.of("create VM, 16 MiB, vCPU, first exit, close", "a second", taken, ratios=ratios)]


def measure_memory(session: Session) -> list[Row]:
    """Resident memory of this process for each idle VM, less the one page that its guest has touched."""
    count = session.count(IDLE_VMS)
    with ExitStack() as stack:
        kvm = stack.enter_context(Kvm())

        def resident_with(more: int) -> int:
            for _ in range(more):
                _run_to_hlt(stack.enter_context(kvm.create_vm()))
            return _resident_kib()

        samples = Samples((_each(resident_with(count), resident_with(count), count),))
    note = f"{count} VMs"
    if session.has_c():
        program = CProgram(session.contenders.build("idle_vms"))
        try:
            in_c = _each(int(program.ask(count)), int(program.ask(count)), count)
        finally:
            program.close()
        note += f"; in C {in_c:.2g} KiB"
    return [Row("memory of an idle VM beyond its guest's pages", "KiB", samples, target=Target(64), note=note)]


def _each(before: int, after: int, count: int) -> float:
    """KiB of one VM. Some were there before: what the first one costs once is not counted."""
    return (after - before) / count - _PAGE_KIB


def _resident_kib() -> int:
    with open("/proc/self/smaps_rollup") as rollup:
        return next(int(line.split()[1]) for line in rollup if line.startswith("Rss:"))
