"""The gallery of classic mistakes: one tiny guest in assembly for each, in tests/crash_gallery/*.s.

The comment at the top of a file says what it is and what the report must find::

    # A selector beyond the end of the GDT
    # mode: protected                   real, protected or long, as kvmpy.boot.FlatImage has them
    # finds: selector-beyond-limit      the first finding
    # contributes: idt-not-loaded       another finding that must be there
    # says: 0x0100                      in the text of the first finding
    # ends: timeout                     the end; a triple fault or a failure, if nothing is said
    # weight: possible                  how much the first finding explains; else it is the cause

`memory`, `stack`, `ring` and `irqchip` set the machine up. The source is in Intel syntax, linked for 0x1000.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gnu_toolchain import assemble_with_symbols
from kvmpy import Machine
from kvmpy.boot import FlatImage
from kvmpy.debug.crash_report import CrashReport
from kvmpy.debug.symbols import SymbolTable
from kvmpy.machine.outcome import Outcome

__all__ = ["GUESTS", "CrashGuest", "crashed"]

CODE = 0x1000
PATIENCE = 5.0
"""Seconds for a guest that ends by itself."""
GLANCE = 0.1
"""Seconds for one that does not."""

_BITS = {"real": 16, "protected": 32, "long": 64}


@dataclass(frozen=True)
class CrashGuest:
    """One mistake: the guest, and what its report says."""

    name: str
    title: str
    settings: dict[str, str]
    source: str

    @property
    def mode(self) -> str:
        return self.settings["mode"]

    @property
    def finds(self) -> str:
        return self.settings["finds"]

    @property
    def ends(self) -> tuple[str, ...]:
        return (self.settings["ends"],) if "ends" in self.settings else ("triple fault", "failed")

    @property
    def endless(self) -> bool:
        return self.ends == ("timeout",)

    def image(self) -> tuple[FlatImage, SymbolTable]:
        code, symbols = assemble_with_symbols(self.source, address=CODE, bits=_BITS[self.mode])
        stack = self.settings.get("stack")
        image = FlatImage(
            code, CODE, self.mode, ring=int(self.settings.get("ring", "0")), stack=int(stack, 0) if stack else None
        )
        return image, SymbolTable.from_dict(symbols)

    def machine(self) -> Machine:
        """A machine with the guest loaded."""
        irqchip = self.settings.get("irqchip") == "yes"
        machine = Machine(memory=int(self.settings.get("memory", "0x100000"), 0), irqchip=irqchip)
        try:
            image, symbols = self.image()
            machine.load(image)
            machine.symbols = symbols
        except BaseException:
            machine.close()
            raise
        return machine


@contextmanager
def crashed(guest: CrashGuest) -> Iterator[tuple[Machine, Outcome, CrashReport]]:
    """The machine after its guest has crashed, and the report."""
    with guest.machine() as machine:
        outcome = machine.run(timeout=GLANCE if guest.endless else PATIENCE)
        for _ in range(20):
            if not guest.endless or machine.vcpus[0].regs.rip != CODE:
                break
            outcome = machine.run(timeout=GLANCE)  # on a busy host it may not even have begun
        yield machine, outcome, CrashReport.capture(machine, outcome)


def _read(path: Path) -> CrashGuest:
    source = path.read_text(encoding="utf-8")
    title, settings = "", {}
    for line in source.splitlines():
        if not line.startswith("# "):
            break
        key, found, value = line[2:].partition(": ")
        if found and title:
            settings[key.strip()] = value.strip()
        else:
            title = line[2:]
    return CrashGuest(path.stem, title, settings, source)


GUESTS = tuple(_read(path) for path in sorted((Path(__file__).parent / "crash_gallery").glob("*.s")))
