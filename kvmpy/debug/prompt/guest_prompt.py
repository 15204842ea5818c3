"""The commands of a prompt before a guest: run it, stop it, look at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvmpy.debug.disassembly import Disassembler, annotate
from kvmpy.debug.program_counter import linear_pc
from kvmpy.debug.prompt.addresses import resolve
from kvmpy.debug.prompt.command_list import CommandList
from kvmpy.debug.prompt.disassembly_listing import DisassemblyListing
from kvmpy.debug.prompt.exit_listing import ExitListing
from kvmpy.debug.prompt.guest_memory_view import physical_cells, virtual_bytes, virtual_cells
from kvmpy.debug.prompt.hex_dump import HexDump
from kvmpy.debug.prompt.register_changes import register_changes
from kvmpy.debug.prompt.stack_listing import StackListing
from kvmpy.debug.prompt.stopped import Place, Stopped
from kvmpy.debug.source_place import is_source_line
from kvmpy.debug.symbols import SymbolTable
from kvmpy.errors import ImageError, UsageError
from kvmpy.exits import Debug
from kvmpy.machine.outcome import End
from kvmpy.x86.register_text import code_bits

if TYPE_CHECKING:
    from kvmpy.debug.breakpoint import Breakpoint, Condition, Handler, Point, Watchpoint
    from kvmpy.debug.crash_report import CrashReport
    from kvmpy.debug.symbols import SourceLine
    from kvmpy.devices.device import ReadHandler, Region, WriteHandler
    from kvmpy.kvm import Vcpu
    from kvmpy.machine import Machine, Outcome
    from kvmpy.x86.page_walk import Walk
    from kvmpy.x86.registers import CpuState

__all__ = ["COMMANDS", "GuestPrompt"]

_LONGEST_INSTRUCTION = 15

COMMANDS = (
    "step", "run", "cont", "until", "start", "pause", "where", "br", "watch", "points", "handle",
    "dump", "walk", "dis", "stack", "exits", "report", "cpu",
)  # fmt: skip
"""The methods that are functions at the prompt of `kvmpy shell`."""


class GuestPrompt:
    """Commands for one machine. Those that need a guest which stands raise UsageError while it runs.

    Addresses are linear ones; a str is a symbol or a register, with a distance if need be, or a source line:
    "main+0x10", "rsp-8", "main.c:12".
    `vcpu` is the processor that they are about: the one that stopped last, or that `cpu` chose. `explain` may say more
    about the outcome of a run.
    """

    def __init__(self, machine: Machine, explain: Callable[[Outcome], Outcome] | None = None) -> None:
        self.machine = machine
        self._explain = explain
        self._turn_to(machine.vcpus[0])
        self.outcome: Outcome | None = None
        """How the last run or step ended."""
        self._before: dict[Vcpu, CpuState] = {}
        """The state of each vCPU when the present, or last, run began."""
        self._in_background = False
        self._interruptible = False
        """A run or step was begun in this thread, and its end was not told yet."""
        self._disassembler = Disassembler()
        self._without_lines: object = None
        """The image whose source lines cannot be read."""
        self.trouble = ""
        """Why the symbols of the image could not be read; empty when nothing is wrong with them."""
        try:
            _ = machine.symbols
        except ImageError as error:
            self.trouble = str(error)
            machine.symbols = SymbolTable()

    def _turn_to(self, vcpu: Vcpu) -> None:
        # The live registers are one object for good; asking the vCPU for them is refused while it runs.
        self.vcpu, self.regs, self.sregs = vcpu, vcpu.regs, vcpu.sregs

    # Running

    def step(self, n: int = 1, timeout: float | None = 10.0) -> Stopped:
        """Execute n instructions; show where the guest is then, and what changed. Other vCPUs stand."""
        place = self.machine.vcpus.index(self.vcpu)
        with self._going_on(self.vcpu):
            outcome = self.machine.step(n, vcpu=place, timeout=timeout)
        return self._stopped(outcome, "" if _is_plain_step(outcome) else str(outcome))

    def run(self, timeout: float | None = None) -> Stopped:
        """Run until a breakpoint, the end, `timeout` in seconds, or Ctrl-C."""
        with self._going_on(*self.machine.vcpus):
            outcome = self.machine.run(timeout)
        return self._stopped(outcome)

    cont = run

    def until(self, where: int | str, timeout: float | None = None) -> Stopped:
        """Run until the guest comes to a place, again if it is there now."""
        address = self._address(where)
        with self._going_on(*self.machine.vcpus):
            if linear_pc(self.vcpu) == address:
                outcome = self.machine.step(vcpu=self.machine.vcpus.index(self.vcpu), timeout=timeout)
                if not _is_plain_step(outcome):
                    return self._stopped(outcome)
            with self.machine.breakpoint(address, temporary=True) as point:
                outcome = self.machine.run(timeout)
        reached = outcome.end is End.BREAKPOINT and point.hits
        return self._stopped(outcome, "" if reached else str(outcome))

    def start(self, timeout: float | None = None) -> None:
        """Run in the background; pause() stops the guest."""
        with self._going_on(*self.machine.vcpus):
            self.machine.start(timeout)
        self._in_background, self._interruptible = True, False

    def pause(self) -> Stopped:
        """Stop the guest that runs in the background, and show where it is."""
        if self.machine.running:
            self.machine.stop()
        elif not self._in_background:
            raise UsageError("the guest does not run; start() has it run in the background")
        return self._background_ended()

    def ended(self) -> Stopped | None:
        """How a run in the background ended, once it has; None as long as there is nothing new."""
        if not self._in_background or self.machine.running:
            return None
        return self._background_ended()

    def _background_ended(self) -> Stopped:
        self._in_background = False
        return self._stopped(self.machine.wait())

    def where(self) -> Stopped:
        """Show where the guest is."""
        self._check_stands()
        return Stopped(self._place(), self.vcpu.cpu_state(), others=len(self.machine.vcpus) > 1)

    def interrupted(self) -> Stopped | None:
        """Where the guest is, and what changed until then, when KeyboardInterrupt came out of `run` or `step`."""
        return self._stopped(None, "interrupted") if self._interruptible else None

    def cpu(self, number: int) -> Stopped:
        """Turn to another vCPU, by its number from 0.

        The commands, `vcpu`, `regs` and `sregs` are about it then. A vCPU that stops the guest is turned to, too.
        """
        vcpus = self.machine.vcpus
        if not isinstance(number, int) or not 0 <= number < len(vcpus):
            raise UsageError(f"there are vCPUs 0 to {len(vcpus) - 1}, no {number!r}")
        self._check_stands()
        self._turn_to(vcpus[number])
        return self.where()

    @contextmanager
    def _going_on(self, *vcpus: Vcpu) -> Iterator[None]:
        """The guest goes on: note what it is to be compared with when it stops."""
        self._check_stands()
        self._before = {vcpu: vcpu.cpu_state() for vcpu in vcpus}
        self._renew_handlers()
        self._interruptible = True
        try:
            yield
        except Exception:
            self._interruptible = False
            raise

    def _check_stands(self) -> None:
        if self.machine.running:
            raise UsageError("the guest runs; pause() it first")

    def _stopped(self, outcome: Outcome | None, reason: str | None = None) -> Stopped:
        vcpus = self.machine.vcpus
        self._interruptible = False
        if outcome is not None:
            outcome = outcome if self._explain is None else self._explain(outcome)
            self.outcome = outcome
            if outcome.vcpu is not None:
                self._turn_to(next(vcpu for vcpu in vcpus if vcpu.id == outcome.vcpu))
        after = self.vcpu.cpu_state()
        before = self._before.get(self.vcpu, after)
        return Stopped(
            self._place(),
            after,
            register_changes(before, after),
            str(outcome) if reason is None else reason,
            outcome,
            len(vcpus) > 1,
        )

    # Stopping

    def br(
        self, where: int | str, handler: Handler | None = None, *, condition: Condition | None = None, **options: bool
    ) -> Breakpoint:
        """Set a breakpoint. remove() takes it out.

        handler(vcpu, breakpoint) is called there: None goes on, an Outcome ends the run. Without a handler it stops.
        condition(vcpu) decides whether it counts; `temporary` and `hardware` are those of machine.breakpoint().
        """
        self._check_stands()
        return self.machine.breakpoint(self._named(where), handler, condition=condition, **options)

    def watch(
        self, where: int | str, length: int = 1, handler: Handler | None = None, *, access: str = "write",
        condition: Condition | None = None,
    ) -> Watchpoint:  # fmt: skip
        """Stop when the guest has written to `length` bytes of memory.

        access="access" watches reads too. Handler and condition are as with br().
        """
        self._check_stands()
        return self.machine.watchpoint(self._named(where), length, handler, access=access, condition=condition)

    def points(self) -> list[Point]:
        """The breakpoints and watchpoints that there are."""
        return list(self.machine.debugger.points)

    # Devices

    def handle(
        self, place: Region | int, *, read: ReadHandler | None = None, write: WriteHandler | None = None,
        mmio: bool = False,
    ) -> Region:  # fmt: skip
        """Give a device other functions, at once, also while the guest runs.

        `place` is what map_ports() or map_mmio() gave, or a port, or with `mmio` an address of the device.
        read(offset, size) -> int and write(offset, size, value); None leaves the one that is there.
        """
        region: Region | None
        if isinstance(place, int):
            region = (self.machine.mmio if mmio else self.machine.ports).find(place)
        else:
            region = place if hasattr(place, "overlaps") else None
        if region is None:
            raise UsageError(f"no device is at {place:#x}" if isinstance(place, int) else f"{place!r} is no device")
        for handler in (read, write):
            if handler is not None and not callable(handler):
                raise UsageError(f"a handler is a function, not {handler!r}")

        def change() -> None:
            region.read = read or region.read
            region.write = write or region.write
            self._renew_handlers()

        if self.machine.running:
            with self.machine.paused():
                change()
        else:
            change()
        return region

    def _renew_handlers(self) -> None:
        """Have the run loops look again at who answers where, for somebody may have assigned to `Region.read`."""
        self.machine.ports.changes += 1
        self.machine.mmio.changes += 1

    # Looking

    def dump(self, address: int | str, length: int = 64, physical: bool = False) -> HexDump:
        """Memory as hex and ASCII; ?? is what is not there. The address is virtual, or `physical`."""
        if physical:
            at = self._address(address)
            return HexDump(at, tuple(physical_cells(self.machine, at, length)))
        self._check_stands()
        at = self._address(address)
        return HexDump(at, tuple(virtual_cells(self.machine, self.vcpu, at, length)))

    def walk(self, address: int | str) -> Walk:
        """Where an address leads through the page tables, or why it leads nowhere."""
        self._check_stands()
        return self.vcpu.walk(self._address(address))

    def dis(self, address: int | str | None = None, count: int = 10) -> DisassemblyListing:
        """Disassemble, by default from the next instruction on."""
        self._check_stands()
        if not isinstance(count, int) or not 0 < count <= 0x1000:
            raise UsageError(f"dis() shows 1 to {0x1000:#x} instructions, not {count!r}")
        pc = linear_pc(self.vcpu)
        at = pc if address is None else self._address(address)
        code = virtual_bytes(self.machine, self.vcpu, at, count * _LONGEST_INSTRUCTION)
        instructions = self._disassembler.disassemble(code, at, code_bits(self.vcpu.sregs), count)
        return DisassemblyListing(tuple(instructions), self.machine.symbols, pc, self._disassembler.advice)

    def stack(self, n: int = 8) -> StackListing:
        """The last n words that were pushed, with symbols: return addresses are among them."""
        self._check_stands()
        if not isinstance(n, int) or not 0 < n <= 0x1000:
            raise UsageError(f"stack() shows 1 to {0x1000:#x} words, not {n!r}")
        bits = code_bits(self.vcpu.sregs)
        width = bits // 8
        address = self._address("rsp")
        cells = virtual_cells(self.machine, self.vcpu, address, n * width)
        words: list[int | None] = []
        for at in range(0, len(cells) - width + 1, width):
            word = [cell for cell in cells[at : at + width] if cell is not None]
            words.append(int.from_bytes(word, "little") if len(word) == width else None)
        return StackListing(address, width, tuple(words), self.machine.symbols)

    def exits(self, n: int = 16) -> ExitListing:
        """The last n exits to Python, the oldest first.

        64 of each vCPU are kept. Those of breakpoints and steps are left out.
        """
        if not isinstance(n, int) or n < 1:
            raise UsageError(f"exits() shows one exit or more, not {n!r}")
        recent = self.machine.recent_exits(self.machine.vcpus.index(self.vcpu))
        return ExitListing([event for event in recent if not isinstance(event, Debug)][-n:])

    def report(self) -> CrashReport:
        """Everything about the guest, and after a bad end what most likely went wrong."""
        self._check_stands()
        return self.machine.crash_report(self.outcome)

    def _address(self, where: int | str) -> int:
        return resolve(where, self.machine, self.vcpu)

    def _named(self, where: int | str) -> int | str:
        """What a breakpoint is set at: by name where a symbol has just that name, so that it is called so."""
        if isinstance(where, str) and (where in self.machine.symbols or is_source_line(where)):
            return where
        return self._address(where)

    def _place(self) -> Place:
        vcpu = self.vcpu
        pc = linear_pc(vcpu)
        sregs = vcpu.sregs
        found = self.machine.symbols.at(pc)
        code = virtual_bytes(self.machine, vcpu, pc, _LONGEST_INSTRUCTION)
        decoded = self._disassembler.disassemble(code, pc, code_bits(sregs), 1)
        return Place(
            vcpu.id,
            pc,
            str(found) if found is not None else "",
            f"{sregs.cs.selector:04x}:{vcpu.regs.rip:04x}" if pc != vcpu.regs.rip else "",
            self._source_line(pc),
            annotate(decoded[0], self.machine.symbols) if decoded else "",
        )

    def _source_line(self, address: int) -> SourceLine | None:
        image = self.machine.image
        if image is None or image is self._without_lines:
            return None
        try:
            lines = self.machine.lines
            return lines.at(address) if lines else None
        except ImageError:  # of a line table that is not sound; the rest of the place is worth having
            self._without_lines = image
            return None

    def names(self) -> dict[str, Any]:
        """What a prompt calls by name: the machine and its parts, and the commands."""
        functions: dict[str, Callable[..., Any]] = {name: getattr(self, name) for name in COMMANDS}
        things = {"machine": self.machine, "memory": self.machine.memory, "commands": CommandList(functions)}
        return {**things, **functions, **self.present()}

    def present(self) -> dict[str, Any]:
        """The names whose meaning changes: those of the present vCPU, and the symbols."""
        return {"vcpu": self.vcpu, "regs": self.regs, "sregs": self.sregs, "symbols": self.machine.symbols}


def _is_plain_step(outcome: Outcome) -> bool:
    """Whether the steps ended as planned."""
    return outcome.end is End.STOPPED
