"""What has changed in memory since the image was loaded: code, and page tables on the way to RIP."""

from __future__ import annotations

from kvmpy.debug.crash_report.case import Case
from kvmpy.debug.crash_report.findings.finding import Rule, Suspicion, cause, possible
from kvmpy.debug.crash_report.first_event import Cause
from kvmpy.errors import GuestMemoryError

__all__ = ["RULES", "overwritten_code", "overwritten_entries"]

_SET_BY_PROCESSOR = 0x60
"""Accessed and dirty."""
_FRAME = 0x000F_FFFF_FFFF_F000


def overwritten_code(case: Case) -> tuple[int, bytes, bytes] | None:
    """(physical address, bytes as loaded, bytes now) of the instruction at RIP, when they differ."""
    loaded, physical = case.evidence.loaded, case.physical(case.rip)
    if (
        case.evidence.registers_lost
        or loaded is None
        or physical is None
        or case.loaded_range(physical) in ("", "tables")
    ):
        return None
    decoded = case.execution.decoded
    length = decoded.length if decoded is not None else 4
    try:
        then, now = loaded.read(physical, length), case.memory.read(physical, length)
    except GuestMemoryError:
        return None
    return (physical, then, now) if then != now else None


def overwritten_entries(case: Case) -> list[tuple[int, int, int]]:
    """(physical address, value as loaded, value now) of page-table entries that changed, on the way to RIP and CR2."""
    loaded = case.evidence.loaded
    if loaded is None:
        return []
    found = {}
    for address in (case.rip, case.sregs.cr2, case.stack):
        for entry in case.walk(address).entries:
            size = 4 if case.walk(address).mode.entry_size == 4 else 8
            try:
                then = int.from_bytes(loaded.read(entry.address, size), "little")
            except GuestMemoryError:
                continue
            if (then ^ entry.value) & ~_SET_BY_PROCESSOR and then:
                found[entry.address] = (entry.address, then, entry.value)
    return list(found.values())


def _code_overwritten(case: Case) -> Suspicion | None:
    found = overwritten_code(case)
    if found is None:
        return None
    physical, then, now = found
    return cause(
        f"At {case.describe(case.rip)} (physical {physical:#x}) stands {now.hex(' ')}, where {then.hex(' ')} was loaded"
    )


def _page_tables_overwritten(case: Case) -> Suspicion | None:
    faulted = case.blamed(Cause.NOT_PRESENT, Cause.RESERVED_BITS, Cause.TABLE_OUTSIDE_MEMORY)
    if faulted is None and not case.fetch_failed:
        return None
    for where, then, now in overwritten_entries(case):
        text = (
            f"The page-table entry at physical {where:#x} was {then:#x} when the image was loaded and is {now:#x} now"
        )
        # A guest that takes a page away changes the rights; one that overwrites its tables changes everything.
        garbage = (then ^ now) & _FRAME and case.blamed(Cause.RESERVED_BITS) is None
        return cause(text) if garbage else possible(text)
    return None


RULES = (
    Rule(
        "code-overwritten",
        "The code was overwritten",
        "The processor executes what is in memory now.",
        "SDM vol. 3, 11.6",
        "Look who writes there: a buffer or .bss behind the image, a relocation, a copy loop with a wrong count. "
        "Machine.watchpoint finds the instruction.",
        _code_overwritten,
    ),
    Rule(
        "page-tables-overwritten",
        "The page tables were overwritten",
        "The processor walks the tables as they are in memory now.",
        "SDM vol. 3, 4.10.2",
        "Look who writes there: a stack or buffer that grows into the tables. `Entry.ranges` says where kvmpy put "
        "them.",
        _page_tables_overwritten,
    ),
)
