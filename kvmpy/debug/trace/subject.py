"""What events are about. A guest does the same few things over and over, so each is described once and then found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmpy import exits
from kvmpy._exit import Exit
from kvmpy.debug.trace.event import TraceEvent
from kvmpy.debug.trace.port_names import usual_owner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Protocol

    from kvmpy.debug.disassembly import Disassembler
    from kvmpy.debug.symbols import SymbolTable
    from kvmpy.machine.bus import Bus

    class InterruptingDevice(Protocol):
        name: str
        irq: int | None

    What = tuple[Any, ...] | Exit
    Note = tuple[int | None, int, int, int, What, Any]
    """As `kvmpy.machine.observed_loop.Observer.note` is told it."""

    Record = tuple[int, int, int, int | None, "Subject", Any, str]
    """Time since the start, time in the guest, time in the handler (all ns), vCPU, subject, value, text."""

__all__ = ["NOBODY", "Subject", "Subjects", "event_of"]

NOBODY = "nobody"

_KEPT = 1 << 16
"""Distinct subjects that are remembered; a guest that touches more addresses has them described anew."""


class Subject:
    """What an event is about, apart from its time and its value.

    `remark` is more about the place: what a PC usually has at a port that nobody claims, the symbol of an instruction.
    """

    __slots__ = (
        "address", "code", "device", "direction", "kind", "name", "number", "queued", "remark", "rendered", "selected",
        "size",
    )  # fmt: skip

    def __init__(
        self, kind: str, direction: str | None, address: int | None, size: int | None, name: str, *,
        device: str | None = None, remark: str = "", queued: bool = False, code: bytes = b"",
    ) -> None:  # fmt: skip
        self.kind = kind
        self.direction = direction
        self.address = address
        self.size = size
        self.name = name
        self.device = device
        self.remark = remark
        self.queued = queued
        self.code = code
        """The bytes of the instruction, of steps."""
        self.selected = True
        """Whether the filters let it through."""
        self.number = -1
        """For writers that number the subjects."""
        self.rendered: Any = None
        """For writers: what all events of this subject have in common, ready to be written."""

    @property
    def label(self) -> str:
        """Name, device, and the remark: "out 0x1f0 nobody (ATA, primary channel)"."""
        words = [self.name]
        if self.device:
            words.append(self.device)
        if self.remark:
            words.append(f"({self.remark})")
        return " ".join(words)


class Subjects:
    """Finds the subject of what the observer was told; `select` decides, once for each, whether it is wanted."""

    def __init__(
        self,
        buses: Iterable[Bus] = (),
        devices: Iterable[InterruptingDevice] = (),
        select: Callable[[Subject], bool] | None = None,
        symbols: SymbolTable | None = None,
    ) -> None:
        self._buses = {bus.kind: bus for bus in buses}
        self._devices = devices
        self._select = select
        self._symbols = symbols
        self._disassembler: Disassembler | None = None
        self._known: dict[tuple[Any, ...], Subject] = {}
        self._changes: tuple[int, ...] = ()

    def records(self, notes: Iterable[Note], start: int) -> list[Record]:
        """The wanted ones of what was noted, with times from `start` on."""
        changes = tuple(bus.changes for bus in self._buses.values())
        if changes != self._changes:  # devices have come or gone: others answer now
            self._changes = changes
            self._known.clear()
        known = self._known
        records: list[Record] = []
        append = records.append
        for vcpu, entered, left, handled, what, value in notes:
            text = ""
            subject = known.get(what) if type(what) is tuple else None
            if subject is None:
                subject, value, text = self._find(what, value)
            if subject.selected:
                if isinstance(value, BaseException):
                    value, text = None, f"raised {type(value).__name__}: {value}"
                append((left - start, left - entered, handled - left, vcpu, subject, value, text))
        return records

    def _find(self, what: What, value: Any) -> tuple[Subject, Any, str]:
        if isinstance(what, tuple):
            return self._remembered(what), value, ""
        key, value, text = _apart(what, value)
        return self._remembered(key), value, text

    def _remembered(self, key: tuple[Any, ...]) -> Subject:
        subject = self._known.get(key)
        if subject is None:
            subject = self._instruction(*key[1:]) if key[0] == "step" else self._describe(*key)
            subject.selected = self._select is None or self._select(subject)
            if len(self._known) >= _KEPT:
                self._known.clear()
            self._known[key] = subject
        return subject

    def _describe(
        self, kind: str, direction: str | None, address: Any = None, size: int | None = None, queued: bool = False
    ) -> Subject:
        if kind in ("port", "mmio"):
            verb = direction if kind == "mmio" else "in" if direction == "read" else "out"
            device = self._owner(kind, address, size or 1)
            remark = usual_owner(address) if kind == "port" and device == NOBODY else ""
            name = f"{verb} {address:#x}"
            return Subject(kind, direction, address, size, name, device=device, remark=remark, queued=queued)
        if kind == "irq":
            wired = [device.name for device in self._devices if device.irq == address]
            name = f"irq {address} {direction}"
            return Subject(kind, direction, address, None, name, device=" and ".join(wired) or None)
        if kind == "msr":
            return Subject(kind, direction, address, size, f"{'rd' if direction == 'read' else 'wr'}msr {address:#x}")
        if kind == "hypercall":
            return Subject(kind, None, address, None, f"hypercall {address}")
        return Subject(kind, None, None, None, address or kind)

    def _instruction(self, event: str | None, address: int, code: bytes, bits: int) -> Subject:
        """An instruction that was executed; with `event`, one that an interrupt or exception came before."""
        from kvmpy.debug.disassembly import Disassembler, annotate

        if self._disassembler is None:
            self._disassembler = Disassembler()
        found = self._disassembler.disassemble(code, address, bits, 1)
        if not found:
            return Subject("step", None, address, None, "not in memory")
        instruction = found[0]
        symbol = self._symbols.at(address) if self._symbols else None
        text, data = annotate(instruction, self._symbols), instruction.bytes
        if event:
            return Subject(
                "step", None, address, None, f"interrupt or exception before {text}", remark=str(symbol or "")
            )
        return Subject("step", None, address, len(data), text, remark=str(symbol or ""), code=data)

    def _owner(self, kind: str, address: int, size: int) -> str:
        """The names of all whom an access reaches, lowest address first."""
        bus = self._buses.get(kind)
        names: list[str] = []
        for at in range(address, address + size):
            region = bus.find(at) if bus is not None else None
            name = region.name if region is not None else NOBODY
            if name not in names:
                names.append(name)
        return " and ".join(names)


def _apart(event: Exit, value: Any) -> tuple[tuple[Any, ...], Any, str]:
    """An exit that is no access: the key of its subject, its value, and what else there is to say."""
    match event:
        case exits.RdMsr(index=index):
            return ("msr", "read", index, 8), value, "#GP" if value is None else ""
        case exits.WrMsr(index=index, value=written):
            return ("msr", "write", index, 8), written, "#GP" if value is None else ""
        case exits.Hypercall(number=number, arguments=arguments):
            return ("hypercall", None, number), value, f"({', '.join(map(hex, arguments))})"
        case exits.Hlt():
            return ("hlt", None), None, ""
        case exits.Shutdown():
            return ("shutdown", None), None, ""
        case exits.Interrupted():
            return ("interrupted", None), None, ""
        case exits.Debug():
            return ("debug", None), None, repr(event)
    return ("other", None, type(event).__name__), None, repr(event)


def event_of(record: Record) -> TraceEvent:
    """A record as the value that users get."""
    time, guest, duration, vcpu, subject, value, text = record
    registers = value if isinstance(value, dict) else {}
    return TraceEvent(
        time=time,
        guest=guest,
        duration=duration,
        vcpu=vcpu,
        kind=subject.kind,
        name=subject.name,
        direction=subject.direction,
        address=subject.address,
        size=subject.size,
        value=subject.code if subject.kind == "step" else value,
        device=subject.device,
        queued=subject.queued,
        text=text or subject.remark,
        registers=registers,
    )
