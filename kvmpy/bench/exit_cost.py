"""The cost of an exit to a Python device, through `Machine`, with the guest's own instructions between."""

from __future__ import annotations

from pathlib import Path

from kvmpy.bench import guests
from kvmpy.bench.rows import Row, Sampler, Target, alternate
from kvmpy.bench.session import Session
from kvmpy.boot import FirmwareImage
from kvmpy.devices import DebugExit, Device
from kvmpy.machine import Machine

__all__ = ["Register", "machine_result", "measure"]

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


def machine_result(rom: Path, *devices: Device, queued: bool = False) -> int:
    """What the firmware's guest wrote to its result port, run by a Machine. With `queued`, KVM queues port writes."""
    register, result = Register(), bytearray()
    with Machine() as machine:
        machine.map_ports(guests.RESULT_PORT, 1, write=lambda offset, size, value: result.append(value), name="result")
        machine.map_ports(guests.DEVICE_PORT, 4, read=register.read, write=register.write, name="register")
        machine.map_mmio(guests.DEVICE_MMIO, 0x1000, read=register.read, write=register.write, name="register")
        machine.board.queue_writes(guests.DEVICE_PORT, queued)
        for device in (DebugExit(guests.EXIT_PORT), *devices):
            machine.add(device)
        machine.load(FirmwareImage(rom))
        machine.run(check=True)
    return int.from_bytes(result, "little")


def measure(session: Session) -> list[Row]:
    """Port and memory accesses, each against the C loop and QEMU; and writes for which KVM does not come out."""
    rows = []
    for name in ("port write", "port read", "MMIO write", "MMIO read"):
        count = session.count(ACCESSES)
        samplers = _samplers(session, session.firmware(name, count), count)
        ratios = _TARGETS if name == "port write" else None
        rows.append(
            Row.of(f"{name}, exit to a Python device", "us", alternate(session.rounds, samplers), ratios=ratios)
        )
    count = session.count(ACCESSES)
    rom = session.firmware("port write", count)
    samplers = {
        "kvmpy": lambda: session.microseconds(machine_result(rom, queued=True)) / count,
        "an exit each": lambda: session.microseconds(machine_result(rom)) / count,
    }
    rows.append(Row.of("port write that KVM queues", "us", alternate(session.rounds, samplers)))
    return rows


def _samplers(session: Session, rom: Path, count: int) -> dict[str, Sampler]:
    samplers: dict[str, Sampler] = {"kvmpy": lambda: session.microseconds(machine_result(rom)) / count}
    if session.has_c():
        loop = session.contenders.program("exit_loop")
        samplers["C loop"] = lambda: session.microseconds(int(loop.ask(str(rom)))) / count
    if session.has_qemu():
        samplers["QEMU"] = lambda: session.microseconds(session.contenders.qemu_result(rom)) / count
    return samplers
