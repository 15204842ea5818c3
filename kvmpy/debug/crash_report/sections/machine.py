"""What the machine around the processor shows: the last exits, controllers, devices, consoles, counts."""

from __future__ import annotations

from typing import Any

from kvmpy.debug.crash_report.case import Case
from kvmpy.debug.crash_report.evidence import InterruptControllers
from kvmpy.debug.crash_report.sections.section import Contents, SectionBuilder
from kvmpy.machine.recent_exits import DeviceAccess

__all__ = ["CONSOLES", "DEVICES", "EXITS", "MEMORY", "STATISTICS"]

_MOST_UNCLAIMED = 12
_MOST_COUNTS = 24


def _fill_exits(case: Case, contents: Contents) -> None:
    exits = case.evidence.exits
    if not exits:
        return
    contents.add(f"the last {len(exits)}, oldest first:")
    repeated = 1
    for index, event in enumerate(exits):
        if index + 1 < len(exits) and exits[index + 1] == event:
            repeated += 1
            continue
        contents.indented([_exit_text(case, event) + (f"   ({repeated} times)" if repeated > 1 else "")])
        repeated = 1
    contents.data = [_exit_data(event) for event in exits]


def _exit_text(case: Case, event: object) -> str:
    if not isinstance(event, DeviceAccess):
        return repr(event)
    owner = next(
        (
            name
            for name, kind, first, count in case.evidence.devices
            if kind == event.kind and first <= event.address < first + count
        ),
        "nobody there",
    )
    return f"{event}  {owner}"


def _exit_data(event: object) -> dict[str, Any]:
    if isinstance(event, DeviceAccess):
        return {name: getattr(event, name) for name in event.__match_args__}
    return {"exit": repr(event)}


def _fill_devices(case: Case, contents: Contents) -> None:
    evidence = case.evidence
    contents.data = {}
    if evidence.controllers is not None:
        contents.heading("interrupt controllers in KVM:")
        lines = _controller_lines(evidence.controllers)
        contents.indented(lines)
        contents.data["controllers"] = lines
    if evidence.device_counters:
        contents.heading("what the guest did wrong to devices:")
        contents.indented(
            f"{name}: {', '.join(f'{what} {count}' for what, count in counts.items())}"
            for name, counts in evidence.device_counters.items()
        )
        contents.data["counters"] = {name: dict(counts) for name, counts in evidence.device_counters.items()}
    if evidence.unclaimed:
        contents.heading("accesses where no device is:")
        contents.indented(access.line() for access in evidence.unclaimed[:_MOST_UNCLAIMED])
        if len(evidence.unclaimed) > _MOST_UNCLAIMED:
            contents.indented([f"and at {len(evidence.unclaimed) - _MOST_UNCLAIMED} more addresses"])
        contents.data["unclaimed"] = [
            {name: getattr(access, name) for name in access.__match_args__} for access in evidence.unclaimed
        ]
    if evidence.others:
        contents.heading("other processors:")
        contents.indented(f"vCPU {other.id}: {other.text}" for other in evidence.others)
        contents.data["processors"] = {other.id: other.text for other in evidence.others}


def _controller_lines(controllers: InterruptControllers) -> list[str]:
    lines = []
    for name, pic in zip(("PIC", "slave PIC"), controllers.pics, strict=False):
        state = "" if pic.initialized else ", never initialized"
        lines.append(
            f"{name}: vectors from {pic.base:#04x}, requested {pic.requested:#04x}, masked {pic.masked:#04x}, "
            f"in service {pic.in_service:#04x}{state}"
        )
    if controllers.pics:
        pins = ", ".join(f"pin {pin} to {vector:#04x}" for pin, vector in controllers.ioapic) or "all pins masked"
        waits = f", waits for EOI: {controllers.ioapic_waits_for_eoi}" if controllers.ioapic_waits_for_eoi else ""
        lines.append(f"IOAPIC: {pins}{waits}")
        lines.append(f"PIT: {'programmed' if controllers.pit_programmed else 'never programmed'}")
    if controllers.apic is not None:
        apic = controllers.apic
        timer = "masked" if apic.timer_masked else f"to vector {apic.timer_vector:#04x}, count {apic.timer_count:#x}"
        lines.append(
            f"local APIC {apic.id}: {'enabled' if apic.enabled else 'disabled'}, in service "
            f"{_vectors(apic.in_service)}, requested {_vectors(apic.requested)}, timer {timer}, task priority "
            f"{apic.task_priority:#x}"
        )
    return lines


def _vectors(vectors: tuple[int, ...]) -> str:
    return ", ".join(f"{vector:#04x}" for vector in vectors) or "none"


def _fill_consoles(case: Case, contents: Contents) -> None:
    for console in case.evidence.consoles:
        contents.heading(f"{console.name} ends with:")
        contents.indented(_printable(console.tail).split("\n")[-20:])
    contents.data = {console.name: console.tail for console in case.evidence.consoles}


def _printable(text: str) -> str:
    """Without what would upset a terminal."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "�" for letter in text.replace("\r\n", "\n"))


def _fill_statistics(case: Case, contents: Contents) -> None:
    lines = case.evidence.statistics.split("\n") if case.evidence.statistics else []
    if not lines:
        return
    contents.indented(lines[:_MOST_COUNTS])
    if len(lines) > _MOST_COUNTS:
        contents.indented([f"and {len(lines) - _MOST_COUNTS} more"])
    contents.data = lines


def _fill_memory(case: Case, contents: Contents) -> None:
    evidence = case.evidence
    contents.data = {
        "memory": [{"address": address, "size": size, "name": name} for address, size, name in evidence.memory_map],
        "loaded": [{"address": address, "size": size, "name": name} for address, size, name in evidence.ranges],
    }
    contents.indented(f"{address:#010x}..{address + size - 1:#x} {name}" for address, size, name in evidence.memory_map)
    for address, size, name in evidence.ranges:
        contents.indented([f"  {address:#010x}..{address + size - 1:#x} {name}"])


EXITS = SectionBuilder("exits", "Exits", _fill_exits)
DEVICES = SectionBuilder("devices", "Devices", _fill_devices)
CONSOLES = SectionBuilder("consoles", "Consoles", _fill_consoles)
STATISTICS = SectionBuilder("statistics", "Counts", _fill_statistics)
MEMORY = SectionBuilder("memory", "Guest memory, and what was loaded", _fill_memory)
