"""Where a guest spends its time: a sampling profile of its functions, and what the host's Python takes of it::

    with machine.profile() as profile:
        machine.run()
    print(profile)

A thread kicks every vCPU a hundred times a second and notes where it stands. Besides, the time that vCPUs are in
KVM_RUN is measured, entry by entry: what is left of the wall time is Python's, in the exit path, in devices, and in
instructions and ring-3 entries done in software. A sample costs the guest an exit; the clock around KVM_RUN costs some
0.2 µs an exit, and counts as Python.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from kvmpy.errors import ClosedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from kvmpy._exit import Exit
    from kvmpy.debug.symbols import SymbolTable
    from kvmpy.machine import Machine
    from kvmpy.machine.vcpu_runner import VcpuRunner

__all__ = ["FunctionShare", "Profile", "VcpuTimes"]

INTERVAL = 0.01
"""Seconds between two samples, unless told otherwise."""

_SHOWN = 30
_LONG_MODE_ACTIVE = 1 << 10  # EFER.LMA


@dataclass(frozen=True, slots=True)
class FunctionShare:
    """A function of the guest: in how many of the `samples` a vCPU stood in it, and which `share` of all that is."""

    name: str
    samples: int
    share: float


@dataclass(frozen=True, slots=True)
class VcpuTimes:
    """Where the time of one vCPU went, in seconds: `wall` from the first entry to the last return of KVM_RUN.

    `guest` is the time in KVM_RUN: the guest, and KVM's work for it; a halted guest is there too. `repairs` is what
    instructions and ring-3 entries done in software took, and whatever else was done for exits that are no device's.
    """

    vcpu: int
    wall: float
    guest: float
    repairs: float
    entries: int

    @property
    def python(self) -> float:
        """Seconds outside KVM_RUN."""
        return max(0.0, self.wall - self.guest)

    @property
    def python_share(self) -> float:
        """Which part of the wall time that is, from 0 to 1."""
        return self.python / self.wall if self.wall else 0.0


class _Sampled:
    """One vCPU under observation. All but `take` happens on its own thread."""

    def __init__(self, runner: VcpuRunner) -> None:
        self.runner = runner
        self.places: Counter[tuple[int, int]] = Counter()
        """(RIP, CPL) -> samples."""
        self.guest = self.repairs = 0.0
        self.entries = 0
        self.first = self.last = 0.0
        self._waiting = False
        self._plain: tuple[Callable[[int, int, int], int], Callable[[Exit], bool]] | None = None

    def begin(self) -> None:
        """Put a clock around KVM_RUN, and one around what is done for exits that are no device's."""
        vcpu, loop = self.runner.vcpu, self.runner.loop
        enter, other, clock = vcpu.enter, loop.other, perf_counter

        def timed_enter(fd: int, request: int, argument: int) -> int:
            began = clock()
            answer = enter(fd, request, argument)
            self.last = ended = clock()
            self.guest += ended - began
            self.entries += 1
            self.first = self.first or began
            return answer

        def timed_other(event: Exit) -> bool:
            began = clock()
            try:
                return other(event)
            finally:
                self.repairs += clock() - began

        self._plain = enter, other
        vcpu.enter, loop.other = timed_enter, timed_other

    def end(self) -> None:
        """Take the clocks away, unless the vCPU was closed meanwhile."""
        if self._plain is not None and not self.runner.vcpu.closed:
            self.runner.vcpu.enter, self.runner.loop.other = self._plain
        self._plain = None

    def take(self) -> None:
        """Have the vCPU note where it is; from another thread. One that does not run owes one sample at most."""
        if not self._waiting:
            self._waiting = True
            self.runner.post(self._note)

    def _note(self) -> None:
        self._waiting = False
        if self._plain is not None:
            vcpu = self.runner.vcpu
            self.places[vcpu.regs.rip, vcpu.sregs.ss.dpl if vcpu.sregs.efer & _LONG_MODE_ACTIVE else 0] += 1

    def times(self) -> VcpuTimes:
        """The sums so far."""
        return VcpuTimes(
            self.runner.vcpu.id, self.last - self.first if self.first else 0.0, self.guest, self.repairs, self.entries
        )


class Profile:
    """A profile of `machine`'s guest, from `start` (or the beginning of a `with` block) to `stop` (its end).

    `interval` is in seconds. `symbols` name the functions, by default those of the machine's image; for a kernel
    without any, `SymbolTable.from_system_map`. Raises UsageError when the machine runs already.
    """

    def __init__(self, machine: Machine, *, interval: float = INTERVAL, symbols: SymbolTable | None = None) -> None:
        if not interval > 0:
            raise UsageError(f"the interval between two samples is a number of seconds above 0, not {interval!r}")
        self._machine = machine
        self._interval = interval
        self._symbols = symbols
        self._vcpus: list[_Sampled] = []
        self._stopped = threading.Event()
        self._sampler: threading.Thread | None = None

    def start(self) -> Self:
        """Begin. A profile starts once, and while the machine stands."""
        if self._sampler is not None:
            raise UsageError("a profile starts once; make another one with machine.profile()")
        if self._machine.running:
            raise UsageError("a profile starts while the machine stands: its clock sits around every entry")
        self._vcpus = [_Sampled(runner) for runner in self._machine.runners]
        for vcpu in self._vcpus:
            vcpu.begin()
        self._sampler = threading.Thread(target=self._sample, name="kvmpy-profile", daemon=True)
        self._sampler.start()
        return self

    def _sample(self) -> None:
        while not self._stopped.wait(self._interval):
            try:
                for vcpu in self._vcpus:
                    vcpu.take()
            except ClosedError:  # there is nothing left to look at
                return

    def stop(self) -> None:
        """End; the guest may go on."""
        self._stopped.set()
        if self._sampler is not None:
            self._sampler.join()
        for vcpu in self._vcpus:
            vcpu.end()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def samples(self) -> int:
        """How often a vCPU was looked at."""
        return sum(vcpu.places.total() for vcpu in self._vcpus)

    def functions(self, vcpu: int | None = None) -> list[FunctionShare]:
        """The functions in which samples were taken, of one vCPU (by its place) or all, the largest share first.

        Ring 3 counts as one function, "(ring 3)"; addresses without a symbol are "(unknown)".
        """
        chosen = self._vcpus if vcpu is None else [self._vcpus[vcpu]]
        symbols = self._machine.symbols if self._symbols is None else self._symbols
        counts: Counter[str] = Counter()
        for sampled in chosen:
            for (rip, ring), samples in list(sampled.places.items()):
                found = symbols.at(rip) if ring != 3 else None
                counts["(ring 3)" if ring == 3 else found.symbol.name if found else "(unknown)"] += samples
        total = counts.total()
        return [FunctionShare(name, samples, samples / total) for name, samples in counts.most_common()]

    def times(self) -> tuple[VcpuTimes, ...]:
        """For each vCPU, how long it was in the guest and how long not."""
        return tuple(vcpu.times() for vcpu in self._vcpus)

    @property
    def python_share(self) -> float:
        """Which part of the vCPUs' wall time went by outside KVM_RUN, from 0 to 1."""
        times = self.times()
        wall = sum(each.wall for each in times)
        return sum(each.python for each in times) / wall if wall else 0.0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the whole report to a file: `folded` when its name ends in .folded, else text.

        Raises OSError as `open` does.
        """
        with open(path, "w", encoding="utf-8") as file:
            file.write(self.folded() if os.fspath(path).endswith(".folded") else self.text(None))

    def folded(self) -> str:
        """The samples as folded stacks, which flame graphs are drawn from: "vCPU 0;function 12" on each line."""
        return "".join(
            f"vCPU {sampled.runner.vcpu.id};{each.name} {each.samples}\n"
            for place, sampled in enumerate(self._vcpus)
            for each in self.functions(place)
        )

    def text(self, shown: int | None = _SHOWN) -> str:
        """The report: the times of each vCPU, and the first `shown` functions (None: all)."""
        lines = []
        for each in self.times():
            if not each.entries:
                lines.append(f"vCPU {each.vcpu}: never entered")
                continue
            lines.append(
                f"vCPU {each.vcpu}: {each.wall:.3f} s, in KVM_RUN {each.guest:.3f} s; Python {each.python:.3f} s"
                f" ({each.python_share:.1%}), of that repairs {each.repairs:.3f} s; {each.entries} entries,"
                f" {each.python / each.entries * 1e6:.1f} us of Python each"
            )
        lines.append(f"{self.samples} samples")
        lines += [f"{each.share:7.1%} {each.samples:7}  {each.name}" for each in self.functions()[:shown]]
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        return self.text().rstrip("\n")

    def __repr__(self) -> str:
        return f"<Profile of {self.samples} samples, {self.python_share:.1%} Python>"
