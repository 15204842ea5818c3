"""A machine without KVM for tests of the tracer: buses with two devices, and runners that only remember who observes.

`notes` makes what a run loop would tell an observer.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from kvmpy.devices.device import Region
from kvmpy.machine.bus import Bus

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmpy.debug.trace.subject import Note, Record
    from kvmpy.machine import Machine

__all__ = ["fake_machine", "notes", "records"]


class _Runner:
    def __init__(self, id: int) -> None:
        self.vcpu = SimpleNamespace(id=id, closed=False)
        self.observer: object = None

    def observe(self, observer: object) -> None:
        self.observer = observer


class _Board:
    def __init__(self) -> None:
        self.observer: Callable[[int, int], None] | None = None

    def observe_levels(self, observer: Callable[[int, int], None] | None) -> None:
        self.observer = observer

    def change(self, gsi: int, level: int) -> None:
        """As when a device changes the level of an interrupt input."""
        assert self.observer is not None
        self.observer(gsi, level)


def fake_machine(vcpus: int = 2) -> Machine:
    """What a `Tracer` needs of a machine: uart16550 at 0x3F8 with IRQ 4, "100% \\"odd\\"" at 0x70, hpet in memory."""
    ports, mmio = Bus("port", 1 << 16), Bus("mmio", 1 << 52)
    ports.add(Region("port", 0x3F8, 8, "uart16550", None, None))
    ports.add(Region("port", 0x70, 2, '100% "odd" <b>', None, None))
    mmio.add(Region("mmio", 0xFED0_0000, 0x1000, "hpet", None, None))
    runners = tuple(_Runner(id) for id in range(vcpus))
    machine = SimpleNamespace(
        ports=ports, mmio=mmio, devices=[SimpleNamespace(name="uart16550", irq=4)], runners=runners,
        vcpus=tuple(runner.vcpu for runner in runners), board=_Board(), image=None,
    )  # fmt: skip
    return cast("Machine", machine)


PLACES = (
    ("port", "write", 0x3F8, 1),
    ("port", "read", 0x3FD, 1),
    ("port", "write", 0x70, 1),
    ("port", "read", 0x1F7, 1),
    ("mmio", "read", 0xFED0_00F0, 4),
    ("mmio", "write", 0xFED0_00F0, 4),
)


def notes(count: int, *, start: int = 0, vcpus: int = 2) -> list[Note]:
    """Exits of the vCPUs in turns, each 8 microseconds in the guest and 1 to 3 with its handler, from `start` on."""
    made: list[Note] = []
    now = [start] * vcpus
    for number in range(count):
        vcpu = number % vcpus
        entered = now[vcpu]
        left = entered + 8_000 + number % 7
        handled = now[vcpu] = left + 1_000 + number % 2_000
        made.append((vcpu, entered, left, handled, PLACES[number % len(PLACES)], number & 0xFF))
    return made


def records(*made: Any, machine: Machine | None = None, start: int = 0) -> list[Record]:
    """Notes as the formats get them."""
    from kvmpy.debug.trace.subject import Subjects

    machine = machine or fake_machine()
    return Subjects((machine.ports, machine.mmio), machine.devices).records(made, start)
