"""Coverage of a running guest: `Machine.coverage`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal
from weakref import WeakSet

from kvmpy.boot.elf.image import ElfImage
from kvmpy.boot.flat import FlatImage
from kvmpy.debug.coverage.basic_blocks import BasicBlock, find_blocks
from kvmpy.debug.coverage.covered_code import CoveredCode, Module
from kvmpy.debug.coverage.executed_blocks import blocks_of_steps
from kvmpy.debug.coverage.one_shot import OneShotBreakpoints, Place
from kvmpy.debug.coverage.program import Program
from kvmpy.debug.coverage.step_support import breaks_in_ring3, steps_in_ring3
from kvmpy.debug.coverage.stepping import VcpuSteps
from kvmpy.debug.symbols import LineTable, SymbolTable
from kvmpy.errors import UsageError
from kvmpy.x86.flags import Efer

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from kvmpy.machine import Machine

__all__ = ["Coverage"]

_covered: WeakSet[Machine] = WeakSet()
"""Machines whose coverage is being taken."""


class Coverage(CoveredCode):
    """Takes the coverage of a machine's guest from `start` (or the beginning of a `with` block) to `stop` (its end).

    With `method="steps"` every vCPU comes out after each instruction: exact, with counts, and slow. It needs nothing
    but steps that come out of the guest. With `method="breakpoints"` the loaded program gets a breakpoint at the start
    of each basic block, or with `places="lines"` at the first address of each line (DWARF), which goes when the guest
    reaches it. `functions` are the only functions to look at, by name or address, `starts` further places where code
    starts, `bits` how wide it is: see `kvmpy.debug.coverage.basic_blocks`.

    The machine must stand when it begins; it may run as often as one likes then, and results can be read at any time.
    Raises UsageError when it runs, for what the program does not have, and where steps or breakpoints do not come out
    of the guest on this host.
    """

    def __init__(
        self,
        machine: Machine,
        method: Literal["steps", "breakpoints"] = "steps",
        *,
        places: Literal["blocks", "lines"] = "blocks",
        functions: Iterable[int | str] | None = None,
        starts: Iterable[int | str] = (),
        bits: int | None = None,
    ) -> None:
        if method not in ("steps", "breakpoints"):
            raise UsageError(f'coverage is taken by "steps" or "breakpoints", not {method!r}')
        if places not in ("blocks", "lines"):
            raise UsageError(f'breakpoints are at the start of "blocks" or "lines", not {places!r}')
        starts = tuple(starts)
        if method == "steps" and (places != "blocks" or functions is not None or starts or bits is not None):
            raise UsageError("places, functions, starts and bits say where breakpoints go; steps go everywhere")
        if places == "lines" and starts:
            raise UsageError('starts are for places="blocks"; the line numbers say where lines start')
        super().__init__()
        self.machine = machine
        self.method = method
        self._wanted = places, functions, starts, bits
        self._steps: list[VcpuSteps] = []
        self._breakpoints: OneShotBreakpoints | None = None
        self._all: list[BasicBlock] = []
        """What has a breakpoint."""
        self._on = False

    def start(self) -> Self:
        """Begin. A coverage starts once."""
        if self._steps or self._breakpoints is not None:
            raise UsageError("a coverage starts once; make another one with machine.coverage()")
        self._check()
        self._modules = tuple(_modules(self.machine))
        if self.method == "steps":
            breakpoints = self.machine.debugger.software
            self._steps = [VcpuSteps(runner, breakpoints) for runner in self.machine.runners]
            for vcpu in self._steps:
                vcpu.begin()
        else:
            self._set_breakpoints()
        _covered.add(self.machine)
        self._on = True
        return self

    def stop(self) -> None:
        """End: the guest's memory is as it would be without. A machine that runs is paused for it."""
        if not self._on:
            return
        if self.machine.running:
            with self.machine.paused():
                self._end()
        else:
            self._end()

    def _end(self) -> None:
        self._on = False
        _covered.discard(self.machine)
        for vcpu in self._steps:
            vcpu.end()
        if self._breakpoints is not None:
            self._breakpoints.end()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _check(self) -> None:
        if self.machine.running:
            raise UsageError("coverage begins while the machine stands: stop() it, or wait() for its end")
        if self.machine in _covered:
            raise UsageError("the coverage of this machine is being taken already")
        if self.method == "steps" and any(runner.debug.traced for runner in self.machine.runners):
            raise UsageError("the steps of this machine are being traced; end that first")
        sregs = self.machine.vcpus[0].sregs
        comes_out = steps_in_ring3 if self.method == "steps" else breaks_in_ring3
        if sregs.ss.dpl == 3 and sregs.efer & Efer.LMA and not comes_out():
            raise UsageError(f"on this host {self.method} do not come out of ring 3, in which this guest starts")

    def _set_breakpoints(self) -> None:
        places, functions, starts, bits = self._wanted
        program = Program(self.machine, bits)
        if places == "lines":
            self._all = program.lines(functions)
        else:
            self._all = find_blocks(program.functions(functions, starts), program.read)
        self._breakpoints = OneShotBreakpoints(
            self.machine,
            [
                Place(block.start, physical, block.bits)
                for block in self._all
                if (physical := program.physical(block.start)) is not None
            ],
            program.read,
        )
        self._breakpoints.begin()

    # Results

    @property
    def counts(self) -> Mapping[int, int]:
        """See `CoveredCode.counts`."""
        counts: Counter[int] = Counter()
        for vcpu in self._steps:
            counts.update(vcpu.counts())
        for block in self.blocks if self._breakpoints is not None else ():
            counts.update(dict.fromkeys(block.instructions, 1))
        return counts

    @property
    def blocks(self) -> tuple[BasicBlock, ...]:
        """See `CoveredCode.blocks`. From steps: stretches that were entered at their start and left at their end."""
        if self._breakpoints is not None:
            return tuple(block for block in self._all if block.start in self._breakpoints.reached)
        sizes: dict[int, int] = {}
        pairs: set[tuple[int, int]] = set()
        for vcpu in self._steps:
            sizes.update(vcpu.sizes)
            pairs |= vcpu.pairs()
        return tuple(blocks_of_steps(self.addresses, sizes, pairs))

    @property
    def missed(self) -> tuple[BasicBlock, ...]:
        """See `CoveredCode.missed`."""
        if self._breakpoints is None:
            return ()
        return tuple(block for block in self._all if block.start not in self._breakpoints.reached)

    @property
    def unseen(self) -> int:
        """How often a vCPU went where steps do not come out of the guest, and ran on unseen until its next exit."""
        return sum(vcpu.unseen for vcpu in self._steps)


class _Loaded:
    """The debug information of what a machine has loaded now, read when it is asked for."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._image = machine.image

    def lines(self) -> LineTable | None:
        if self._machine.image is self._image:
            return self._machine.lines
        return LineTable.of_image(self._image) if self._image is not None else None

    def symbols(self) -> SymbolTable:
        if self._machine.image is self._image or self._image is None:
            return self._machine.symbols
        return SymbolTable.of_image(self._image)


def _modules(machine: Machine) -> list[Module]:
    """What the machine has loaded: an ELF file is one module, other images have put several things into memory."""
    image, entry = machine.image, machine.entry
    if image is None or entry is None:
        return []
    if isinstance(image, ElfImage):
        start = min(segment.virtual for segment in image.segments)
        end = max(segment.virtual + segment.size for segment in image.segments)
        return [Module(image.source.name, start, end, _Loaded(machine))]
    names = {image.address: image.source.name} if isinstance(image, FlatImage) else {}
    return [Module(names.get(part.address, part.name), part.address, part.end) for part in entry.ranges]
