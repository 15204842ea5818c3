"""The cost of an exit to a Python device, through `Machine`, with the guest's own instructions between."""

from __future__ import annotations

import time
from pathlib import Path

from kvmpy.bench import guests
from kvmpy.bench.rows import Row, Sampler, Target, alternate
from kvmpy.bench.session import Session
from kvmpy.boot import FirmwareImage
from kvmpy.devices import DebugExit, Device
from kvmpy.machine import Machine

__all__ = ["Register", "machine_markers", "measure"]

ACCESSES = 6000
_TARGETS = {"C loop": Target(1.10), "QEMU": Target(1.05)}


class Register:
    """A device in Python, the simplest that does something: it keeps what was written and gives it back."""

    def __init__(self) -> None:
        self.value = 0

    def read(self, offset: int, size: int) -> int:
        return self.value

    def write(self, offset: int, size: int, value: int) -> None:
        self.value = value


def machine_markers(rom: Path, *devices: Device) -> float:
    """Microseconds between the two markers that the firmware writes, run by a Machine."""
    register = Register()
    times: list[int] = []

    def marker(offset: int, size: int, value: int) -> None:
        times.append(time.perf_counter_ns())

    with Machine() as machine:
        machine.map_ports(guests.MARKER_PORT, 1, write=marker, name="marker")
        machine.map_ports(guests.DEVICE_PORT, 4, read=register.read, write=register.write, name="register")
        machine.map_mmio(guests.DEVICE_MMIO, 0x1000, read=register.read, write=register.write, name="register")
        for device in (DebugExit(guests.EXIT_PORT), *devices):
            machine.add(device)
        machine.load(FirmwareImage(rom))
        machine.run(check=True)
    start, end = times
    return (end - start) / 1e3


def measure(session: Session) -> list[Row]:
    """Port and memory accesses, each against the C loop and QEMU."""
    rows = []
    for name in ("port write", "port read", "MMIO write", "MMIO read"):
        count = session.count(ACCESSES)
        samplers = _samplers(session, session.firmware(name, count), count)
        ratios = _TARGETS if name == "port write" else None
        rows.append(
            Row.of(f"{name}, exit to a Python device", "us", alternate(session.rounds, samplers), ratios=ratios)
        )
    return rows


def _samplers(session: Session, rom: Path, count: int) -> dict[str, Sampler]:
    samplers: dict[str, Sampler] = {"kvmpy": lambda: machine_markers(rom) / count}
    if session.has_c():
        loop = session.contenders.program("exit_loop")
        samplers["C loop"] = lambda: int(loop.ask(str(rom))) / 1e3 / count
    if session.has_qemu():
        samplers["QEMU"] = lambda: session.contenders.qemu_markers(rom) / count
    return samplers
