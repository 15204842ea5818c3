"""Mistakes with devices: waiting for one that is not there, ports that may not be used."""

from __future__ import annotations

from kvmpy.debug.crash_report.case import Case
from kvmpy.debug.crash_report.findings.finding import Rule, Suspicion, by_cause, cause, possible
from kvmpy.debug.crash_report.first_event import Cause
from kvmpy.debug.crash_report.first_event.memory_access import memory_accesses
from kvmpy.machine.recent_exits import DeviceAccess
from kvmpy.x86.page_walk import Access

__all__ = ["RULES", "polled"]

_PATIENT = 100
"""Reads. A guest that looks whether a device is there gives up sooner."""
_IN_BY_IMMEDIATE, _IN_BY_DX = (0xE4, 0xE5), (0xEC, 0xED)


def polled(case: Case) -> tuple[str, int] | None:
    """("port" or "mmio", address) of what the loop reads from outside memory."""
    for located in case.loop:
        decoded = located.decoded
        if decoded.opcode in _IN_BY_IMMEDIATE:
            return "port", decoded.immediate
        if decoded.opcode in _IN_BY_DX:
            return "port", case.regs.rdx & 0xFFFF
        for access in memory_accesses(case.execution, decoded):
            if access.access is Access.READ and access.segment != "ss":
                physical = case.physical(case.execution.linear(access.segment, access.offset))
                if physical is not None and not case.memory.contains(physical):
                    return "mmio", physical
    return None


def _owner(case: Case, kind: str, address: int) -> str:
    """The device that answers there."""
    for name, bus, first, count in case.evidence.devices:
        if bus == kind and first <= address < first + count:
            return name
    return ""


def _unclaimed_reads(case: Case, kind: str, address: int) -> int:
    return sum(
        access.count
        for access in case.evidence.unclaimed
        if access.kind == kind and access.direction == "read" and access.address == address
    )


def _polls_absent_device(case: Case) -> Suspicion | None:
    if not case.timed_out:
        return None
    place = polled(case)
    if place is None or _owner(case, *place):
        return None
    reads = _unclaimed_reads(case, *place)
    if not reads:
        return None  # KVM's own controllers, for instance
    kind, address = place
    what = "port" if kind == "port" else "physical address"
    text = (
        f"The loop at {case.describe(case.rip)} reads {what} {address:#x}, where no device is: {reads} reads gave all "
        "ones"
    )
    return cause(text) if reads >= _PATIENT else possible(text)


def _waits_for_device(case: Case) -> Suspicion | None:
    if not case.timed_out:
        return None
    place = polled(case)
    if place is None or not (name := _owner(case, *place)):
        return None
    kind, address = place
    answers = [
        access.value
        for access in case.evidence.exits
        if isinstance(access, DeviceAccess) and (access.direction, access.address) == ("read", address)
    ]
    last = f"; it answered {answers[-1]:#x} last" if answers else ""
    return possible(f"The loop at {case.describe(case.rip)} reads {kind} {address:#x} of {name}{last}")


RULES = (
    Rule(
        "polls-absent-device",
        "The guest waits for a device that is not there",
        "A read where no device answers gives all ones, as on a PC's bus, so a bit that shall become 0 never does.",
        "KVM API, chapter 5, KVM_EXIT_IO and KVM_EXIT_MMIO",
        "Plug the device in (Machine.add, map_ports, map_mmio), or have the guest give up after some tries.",
        _polls_absent_device,
    ),
    Rule(
        "waits-for-device",
        "The guest waits for a device",
        "",
        "the code at RIP",
        "Look which bit the loop tests, and what the device needs before it sets it.",
        _waits_for_device,
    ),
    Rule(
        "port-denied",
        "Ring 3 may not use the port",
        "Above IOPL a port needs a 0 in the I/O bitmap of the TSS, else #GP(0). Some hosts ignore IOPL.",
        "SDM vol. 1, 18.5.2",
        "Set IOPL to 3 and clear the port's bits in the TSS's I/O bitmap (`kvmpy.x86.task_state.IoBitmap`).",
        by_cause(Cause.PORT_DENIED),
    ),
)
