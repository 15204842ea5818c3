"""From `vcpu.kick()` in one thread to the return of `vcpu.run()` in another, while the guest computes for ever."""

from __future__ import annotations

import statistics
import threading
import time

from kvmpy.bench.rows import Row, Sampler, Target, alternate
from kvmpy.bench.session import Session
from kvmpy.kvm import Kvm, Vcpu

__all__ = ["measure"]

KICKS = 60
_ADDRESS = 0x1000
_JUMP_TO_ITSELF = b"\xeb\xfe"
_SETTLE_SECONDS = 300e-6
"""After so long the guest runs; as in the C program."""


class _Runner:
    """A thread that runs a vCPU and notes when it came back."""

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self._started, self._returned = threading.Semaphore(0), threading.Semaphore(0)
        self._returned_at = 0
        self._ends = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ends:
            self._started.release()
            self._vcpu.run()
            self._returned_at = time.perf_counter_ns()
            self._returned.release()

    def kick(self) -> float:
        """One kick, in microseconds."""
        self._started.acquire()
        time.sleep(_SETTLE_SECONDS)
        kicked_at = time.perf_counter_ns()
        self._vcpu.kick()
        self._returned.acquire()
        return (self._returned_at - kicked_at) / 1e3

    def close(self) -> None:
        self._ends = True
        self.kick()
        self._thread.join()


def measure(session: Session) -> list[Row]:
    """The median of many kicks in each round, and the slowest kick of all."""
    count = session.count(KICKS)
    slowest = {"kvmpy": 0.0, "C loop": 0.0}

    def median(contender: str, latencies: list[float]) -> float:
        slowest[contender] = max(slowest[contender], *latencies)
        return statistics.median(latencies)

    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=0x10000)
        vm.memory.write(_ADDRESS, _JUMP_TO_ITSELF)
        vcpu = vm.create_vcpu()
        vcpu.set_real_mode(entry=_ADDRESS)
        runner = _Runner(vcpu)
        samplers: dict[str, Sampler] = {"kvmpy": lambda: median("kvmpy", [runner.kick() for _ in range(count)])}
        if session.has_c():
            program = session.contenders.program("kick_loop")
            samplers["C loop"] = lambda: median("C loop", [int(ns) / 1e3 for ns in program.ask(count).split()])
        taken = alternate(session.rounds, samplers)
        runner.close()
    worst = ", ".join(f"{contender} {us:.0f} us" for contender, us in slowest.items() if contender in taken)
    return [Row.of("kick of a busy guest, to its return", "us", taken, target=Target(100), note=f"slowest: {worst}")]
