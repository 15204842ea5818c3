"""One guest program, the same work in three ways: emulated hardware, paravirtual devices, cooperation.

Exits are counted by the machine and are exact; what KVM does by itself inside the kernel (its PIC, PIT and local APIC,
HLT, ioeventfd, irqfd) is no exit. Time is the guest's, from the beginning of a job to its end.
"""

from __future__ import annotations

import os
import struct
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from kvmpy import End, Machine, MiB
from kvmpy.bench.contenders import BenchError
from kvmpy.boot import ElfImage
from kvmpy.devices import AcpiPm, AtaDisk, DebugExit, Device, HypercallChannel, Region, Uart16550
from kvmpy.devices.device import Board
from kvmpy.guest.toolchain import GnuToolchain
from kvmpy.virtio import Block, VirtioConsole, VirtioMmio

__all__ = ["WAYS", "WORKLOADS", "Amounts", "Figures", "Results", "as_data", "run_way", "three_ways"]

WAYS = ("emulated", "paravirtual", "cooperative")
WORKLOADS = ("print", "disk", "timestamps", "ticks", "messages")

SOURCE = Path(__file__).parent / "guest_programs" / "three_ways.c"
RESULT, RING, DATA = 0x8000, 0x20_0000, 0x100_0000
MARK_PORT, MESSAGE_PORT, CONSOLE, DISK = 0x5D0, 0x5E0, 0xD000_0000, 0xD000_1000
CONSOLE_IRQ, DISK_IRQ, RING_IRQ = 5, 6, 7
_64_BITS = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Amounts:
    """How much of each work there is. `disk` is in bytes, and a multiple of 64 KiB."""

    print: int = 20_000
    disk: int = 16 << 20
    timestamps: int = 1_000
    ticks: int = 1_000
    messages: int = 10_000

    def bytes_of(self, workload: str) -> int:
        """What is moved: characters, the disk's data, 8 bytes a timestamp, 8 bytes a message and 8 its answer."""
        return {
            "print": self.print, "disk": self.disk, "timestamps": 8 * self.timestamps, "ticks": 0,
            "messages": 16 * self.messages,
        }[workload]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Figures:
    """What one work took in one way: how often the guest left, seconds, and bytes moved."""

    exits: int
    seconds: float
    bytes: int


Results = dict[str, dict[str, Figures]]
"""Way -> workload -> figures."""


def three_ways(amounts: Amounts | None = None, *, began: Callable[[str], None] = lambda way: None) -> Results:
    """Do all work in all ways; `began` is told each way. Raises BenchError when a guest's result is not right.

    Raises ToolMissingError without gcc and binutils, KvmUnavailableError without KVM.
    """
    amounts = amounts or Amounts()
    results = {}
    with tempfile.TemporaryDirectory(prefix="kvmpy-ways-") as folder:
        image = Path(folder, "disk.img")
        image.write_bytes(os.urandom(amounts.disk))
        toolchain = GnuToolchain(Path(folder, "guests"))
        for way in WAYS:
            began(way)
            results[way] = run_way(way, amounts, image, toolchain)
    return results


def as_data(results: Results) -> dict[str, dict[str, dict[str, float]]]:
    """The same in dicts, for JSON."""
    return {way: {name: asdict(figures) for name, figures in works.items()} for way, works in results.items()}


def run_way(way: str, amounts: Amounts, image: Path, toolchain: GnuToolchain) -> dict[str, Figures]:
    """Run the guest once; `image` is its disk, of `amounts.disk` bytes."""
    with Machine(memory=DATA + amounts.disk + 4 * MiB) as machine:  # page tables and stack are at the end
        program = toolchain.compile_c(SOURCE, flags=_flags(way, amounts, machine.vcpus[0].get_tsc_khz()))
        marks = machine.add(Marks(lambda: machine.statistics().total))
        machine.add(DebugExit())
        printed = _PLUG_IN[way](machine, image, amounts)
        machine.load(ElfImage(program.elf))
        outcome = machine.run(timeout=300)
        if outcome.end != End.EXITED or outcome.code != 1 or machine.host_errors:
            raise BenchError(f"the guest of the {way} way failed: {outcome} {machine.host_errors}")
        _check(machine, way, amounts, image, printed())
    return {
        name: Figures(marks.exits[number], marks.seconds[number], amounts.bytes_of(name))
        for number, name in enumerate(WORKLOADS, 1)
    }


def _flags(way: str, amounts: Amounts, tsc_khz: int) -> list[str]:
    numbers = {
        "WAY": WAYS.index(way) + 1, "CHARACTERS": amounts.print, "BYTES": amounts.disk,
        "TIMESTAMPS": amounts.timestamps, "TICKS": amounts.ticks, "MESSAGES": amounts.messages, "TSC_KHZ": tsc_khz,
        "MARK": MARK_PORT, "RESULT": RESULT, "RING": RING, "DATA": DATA, "MESSAGE_PORT": MESSAGE_PORT,
        "CONSOLE": CONSOLE, "DISK": DISK,
    }  # fmt: skip
    return ["-O2", *(f"-D{name}={number}" for name, number in numbers.items())]


def _check(machine: Machine, way: str, amounts: Amounts, image: Path, printed: bytes) -> None:
    """Compare what the guest printed and read with what it should have."""
    content = image.read_bytes()
    first_words = struct.iter_unpack("<Q504x", content)
    total, backwards, wrong = struct.unpack("<3Q", machine.memory.read(RESULT, 24))
    text = bytes(b"\n"[0] if at % 80 == 79 else b"a"[0] + at % 26 for at in range(amounts.print))
    right = {
        "text": printed == text,
        "sum of the sectors": total == sum(word for (word,) in first_words) & _64_BITS,
        "content of the disk": machine.memory.read(DATA, len(content)) == content,
        "clock": backwards == 0,
        "answers": wrong == 0,
    }
    if not all(right.values()):
        raise BenchError(f"wrong in the {way} way: {', '.join(name for name, fine in right.items() if not fine)}")


# What is plugged in. Each answers a function that gives what the guest has printed.


def _emulated(machine: Machine, image: Path, amounts: Amounts) -> Callable[[], bytes]:
    serial = machine.add(Uart16550(history=amounts.print))
    machine.add(AtaDisk(image, read_only=True))
    machine.add(AcpiPm())
    machine.add(MessagePorts())
    return lambda: serial.output


def _paravirtual(machine: Machine, image: Path, amounts: Amounts) -> Callable[[], bytes]:
    machine.add(HypercallChannel()).on(1, lambda call: answer(call.arguments[0]))
    return _virtio(machine, image, amounts, cooperative=False)


def _cooperative(machine: Machine, image: Path, amounts: Amounts) -> Callable[[], bytes]:
    machine.add(MessageRing())
    return _virtio(machine, image, amounts, cooperative=True)


def _virtio(machine: Machine, image: Path, amounts: Amounts, cooperative: bool) -> Callable[[], bytes]:
    console = VirtioConsole(history=amounts.print)
    for device, address, irq in (
        (console, CONSOLE, CONSOLE_IRQ), (Block(image, read_only=True), DISK, DISK_IRQ),
    ):  # fmt: skip
        machine.add(VirtioMmio(device, address=address, irq=irq, ioeventfd=cooperative, irqfd=cooperative))
    return lambda: console.output


_PLUG_IN = dict(zip(WAYS, (_emulated, _paravirtual, _cooperative), strict=True))


def answer(message: int) -> int:
    """What the host says to a message."""
    return ~message & _64_BITS


class Marks(Device):
    """A port that is told when a job begins, by its number, and when it ends: `exits` and `seconds` of each."""

    name = "marks"

    def __init__(self, exits: Callable[[], int]) -> None:
        super().__init__()
        self._count = exits
        self._job, self._exits, self._start = 0, 0, 0
        self.exits: dict[int, int] = {}
        self.seconds: dict[int, float] = {}

    def regions(self) -> tuple[Region, ...]:
        return (Region("port", MARK_PORT, 4, self.name, None, self.write, width=4),)

    def write(self, offset: int, size: int, value: int) -> None:
        now = time.perf_counter_ns()
        # The exit of this very write is not counted yet: that of the beginning is, when the job ends.
        exits = self._count()
        if value == 0:
            self.exits[self._job] = exits - self._exits - 1
            self.seconds[self._job] = (now - self._start) / 1e9
        else:
            self._job, self._exits, self._start = value, exits, time.perf_counter_ns()


class MessagePorts(Device):
    """A device as they were: a message is written in two halves, and its answer is read in two."""

    name = "message ports"

    def __init__(self) -> None:
        super().__init__()
        self._low = self._answer = 0

    def regions(self) -> tuple[Region, ...]:
        return (Region("port", MESSAGE_PORT, 8, self.name, self.read, self.write, width=4),)

    def read(self, offset: int, size: int) -> int:
        return self._answer >> 8 * offset & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0:
            self._low = value
        else:
            self._answer = answer(value << 32 | self._low)


class MessageRing(Device):
    """Messages in guest memory, any number for a notification; they are answered in place, with one interrupt."""

    name = "message ring"

    def regions(self) -> tuple[Region, ...]:
        return (Region("port", MESSAGE_PORT, 4, self.name, None, self.write, width=4),)

    def attach(self, board: Board) -> None:
        super().attach(board)
        self._written = board.write_event("port", MESSAGE_PORT, 4, 0, self.answer_all)
        self._interrupt = board.interrupt_event(RING_IRQ)
        self._board = board

    def write(self, offset: int, size: int, value: int) -> None:
        """Where the host has no ioeventfd, the notification is an exit."""
        self.answer_all()

    def answer_all(self) -> None:
        memory = self._board.memory
        count = min(memory.read_u64(RING), 500)
        form = f"<{count}Q"
        messages = struct.unpack(form, memory.read(RING + 8, 8 * count))
        memory.write(RING + 8, struct.pack(form, *map(answer, messages)))
        if self._interrupt is not None:
            self._interrupt.signal()
        else:
            line = self._board.interrupt_line(RING_IRQ)
            line.raise_line()
            line.lower_line()

    def close(self) -> None:
        for event in (self._written, self._interrupt):
            if event is not None:
                event.close()
