"""Characters written to the serial port, as a driver does it: read LSR, write THR; each goes to a file at once."""

from __future__ import annotations

from pathlib import Path

from kvmpy.bench.exit_cost import machine_result
from kvmpy.bench.rows import Row, Sampler, Target, alternate
from kvmpy.bench.session import Session
from kvmpy.devices import Uart16550

__all__ = ["measure"]

CHARACTERS = 1600


def measure(session: Session) -> list[Row]:
    """The 16550 of kvmpy against QEMU's."""
    count = session.count(CHARACTERS)
    rom, output = session.firmware("serial output", count), session.contenders.folder / "serial"
    samplers: dict[str, Sampler] = {"kvmpy": lambda: session.microseconds(_characters(rom, output)) / count}
    contenders = session.contenders
    if session.has_qemu():
        samplers["QEMU"] = lambda: session.microseconds(contenders.qemu_result(rom, serial=output)) / count
    taken = alternate(session.rounds, samplers)
    return [Row.of("16550 output, per character polled and written", "us", taken, ratios={"QEMU": Target(1.0)})]


def _characters(rom: Path, output: Path) -> int:
    with output.open("wb", buffering=0) as file:
        return machine_result(rom, Uart16550(sink=file))
