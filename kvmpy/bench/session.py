"""What a benchmark gets: how long it may measure, and against whom."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kvmpy.bench import guests
from kvmpy.bench.contenders import Contenders
from kvmpy.kvm import Kvm

__all__ = ["Session"]


@dataclass(slots=True)
class Session:
    """One run of `kvmpy bench`.

    `rounds` is how often the contenders take turns, `scale` multiplies the work of each sample (1 is made for a quiet
    machine, tests take less). What cannot be measured here goes into `missing`: contender -> why.
    """

    contenders: Contenders
    rounds: int = 15
    scale: float = 1.0
    missing: dict[str, str] = field(default_factory=dict)
    _tsc_khz: int = 0

    def count(self, number: int) -> int:
        """How often to do what a quiet machine does `number` times."""
        return max(round(number * self.scale), 1)

    def has_c(self) -> bool:
        """Whether C programs can be built; otherwise it is noted why not."""
        return self._note("C loop", self.contenders.no_c)

    def has_qemu(self) -> bool:
        """Whether there is a QEMU to compare with; otherwise it is noted why not."""
        return self._note("QEMU", self.contenders.no_qemu)

    def microseconds(self, ticks: int) -> float:
        """What a guest measured by the TSC."""
        if not self._tsc_khz:
            with Kvm() as kvm, kvm.create_vm() as vm:
                self._tsc_khz = vm.create_vcpu().get_tsc_khz()
        return ticks / self._tsc_khz * 1e3

    def firmware(self, name: str, count: int = 0) -> Path:
        """A file with the guest program `name`."""
        path = self.contenders.folder / f"{name.replace(' ', '_')}-{count}.rom"
        path.write_bytes(guests.firmware(name, count))
        return path

    def _note(self, contender: str, reason: str) -> bool:
        if reason:
            self.missing[contender] = reason
        return not reason
