"""Characters printed on a virtio console, in buffers as drivers use them; all of them go to a file at once."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from kvmpy.bench.contenders import BenchError
from kvmpy.bench.exit_cost import machine_result
from kvmpy.bench.rom_programs import VIRTIO_MMIO, rom_program
from kvmpy.bench.rows import Row, Sampler, Target, alternate
from kvmpy.bench.session import Session
from kvmpy.virtio import VirtioConsole, VirtioMmio

__all__ = ["measure"]


class Work(NamedTuple):
    """Buffers of `size` characters, `depth` of them under way."""

    name: str
    size: int
    depth: int
    requests: int


WORKS = (
    Work("16 bytes, one at a time", 16, 1, 2000),  # as Linux prints its messages
    Work("80 bytes, 16 under way", 80, 16, 4000),
    Work("4 KiB, 8 under way", 0x1000, 8, 1000),
)


def measure(session: Session) -> list[Row]:
    """Against QEMU's virtconsole on virtio-mmio, with the same guest."""
    if not session.has_c():
        return []
    return [_row(session, work) for work in WORKS]


def _row(session: Session, work: Work) -> Row:
    count = session.count(work.requests)
    contenders = session.contenders
    rom = rom_program(
        contenders, "console_output", BYTES=work.size, DEPTH=work.depth, REQUESTS=count, CONSOLE=VIRTIO_MMIO
    )
    output = contenders.folder / "console"

    def rate(ticks: int) -> float:
        """MiB per second."""
        written = output.stat().st_size
        if not ticks or written != work.size * (count + 2 * work.depth):
            raise BenchError(f"the guest printed {written} bytes ({work.name})")
        return count * work.size / (1 << 20) / (session.microseconds(ticks) / 1e6)

    samplers: dict[str, Sampler] = {"kvmpy": lambda: rate(_printed(rom, output))}
    if session.has_qemu():
        console = (
            "-global", "virtio-mmio.force-legacy=false",
            "-chardev", f"file,id=console,path={output}",
            "-device", "virtio-serial-device,bus=virtio-mmio-bus.0", "-device", "virtconsole,chardev=console",
        )  # fmt: skip
        samplers["QEMU"] = lambda: rate(contenders.qemu_result(rom, *console))
    taken = alternate(session.rounds, samplers)
    return Row.of(f"virtio console output, {work.name}", "MiB/s", taken, ratios={"QEMU": Target(1.0, at_least=True)})


def _printed(rom: Path, output: Path) -> int:
    with output.open("wb", buffering=0) as file:
        return machine_result(rom, VirtioMmio(VirtioConsole(sink=file), address=VIRTIO_MMIO))
