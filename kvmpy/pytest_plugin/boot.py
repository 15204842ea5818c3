"""The fixture `kvm_boot`: one guest, from its image to its end."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from kvmpy.boot import ElfImage, FlatImage
from kvmpy.guest.program import GuestProgram
from kvmpy.machine import Outcome
from kvmpy.pytest_plugin.machines import FixtureMachine, KvmMachine

if TYPE_CHECKING:
    from kvmpy.boot import Image
    from kvmpy.devices import Device
    from kvmpy.machine.cpu_model import Cpu

__all__ = ["BootResult", "KvmBoot", "image_of"]

_ELF = b"\x7fELF"
_MODES = {16: "real", 32: "protected", 64: "long"}


@dataclass(frozen=True, slots=True, repr=False)
class BootResult:
    """How a guest ended, and what it said."""

    outcome: Outcome
    """How the run ended; `outcome.end` is an `End`."""
    exit_code: int | None
    """What the guest wrote to the debug-exit port 0xF4; None when it ended in another way."""
    console: str
    """What it wrote to the serial port."""
    debug_console: str
    """What it wrote to port 0xE9."""
    seconds: float
    """How long it ran."""
    machine: FixtureMachine
    """The machine, open until the end of the test: its memory and registers can be looked at."""

    def __repr__(self) -> str:
        last = self.console.rstrip().rpartition("\n")[2]
        said = f"; the console ends with {last[-100:]!r}" if last else ""
        return f"<BootResult {self.outcome}{said}>"


class KvmBoot:
    """Runs images in machines of their own."""

    def __init__(self, machines: KvmMachine) -> None:
        self._machines = machines

    def __call__(
        self,
        image: Image | GuestProgram | bytes | str | os.PathLike[str],
        *,
        memory: int = 16 << 20,
        vcpus: int = 1,
        irqchip: bool = True,
        cpu: Cpu = "host",
        devices: Iterable[Device] = (),
        timeout: float | None = None,
        until: str | bytes | None = None,
        **options: Any,
    ) -> BootResult:
        """Boot `image` and run it to its end.

        `image` is an image of `kvmpy.boot`, a program of `kvm_guest_asm` or `kvm_guest_c`, or the bytes or the path of
        an ELF file or a flat binary (a boot sector, or code for 0x1000). `options` go to the image that is made of
        them: `mode`, `ring`, `stack`, `entry`, `address` and so on. `memory`, `vcpus`, `irqchip` and `cpu` are those
        of `kvmpy.Machine`; `devices` are plugged in besides those of `kvm_machine`.

        With `timeout`, a run of so many seconds is an outcome like any other (End.TIMEOUT). The test's own deadline,
        which is always there, fails the test. With `until` the guest is stopped when its serial port has shown this
        text (what it wrote meanwhile may follow); a guest that ends without fails the test.
        """
        __tracebackhide__ = True
        guest = self._machines(memory, vcpus, irqchip=irqchip, cpu=cpu)
        for device in devices:
            guest.add(device)
        guest.load(image_of(image, **options))
        awaited = None if until is None else _Awaited(until, guest)
        if awaited is not None:
            guest.console.connect_sink(awaited)
        began = time.monotonic()
        outcome = guest.run(timeout)
        took = time.monotonic() - began
        if awaited is not None and not awaited.seen:
            pytest.fail(f"the guest never wrote {until!r} to its serial port; it ended: {outcome}")
        return BootResult(outcome, guest.exit_code, guest.console.text, guest.debug_console.text, took, guest)


class _Awaited:
    """A sink of the console that stops the machine when a text has come."""

    def __init__(self, text: str | bytes, machine: FixtureMachine) -> None:
        self._text = text.encode() if isinstance(text, str) else text
        self._machine = machine
        self._tail = b""
        self.seen = not self._text

    def __call__(self, data: bytes) -> None:
        self._tail = (self._tail + data)[-len(self._text) :]
        if self._tail == self._text and not self.seen:
            self.seen = True
            self._machine.stop()


def image_of(source: Image | GuestProgram | bytes | str | os.PathLike[str], **options: Any) -> Image:
    """The image that `source` is, or that the class for its format makes of it with `options`."""
    if isinstance(source, GuestProgram):
        options.setdefault("mode", _MODES[source.bits])
        if source.bits == 16:
            return FlatImage(source.image, source.address, entry=source.entry, **options)
        return ElfImage(source.elf, **options)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return ElfImage(source, **options) if source[:4] == _ELF else FlatImage(bytes(source), **options)
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            magic = file.read(4)
        return ElfImage(source, **options) if magic == _ELF else FlatImage(source, **options)
    if options:
        raise TypeError(f"{', '.join(options)}: an image that is made already takes no options")
    return source
