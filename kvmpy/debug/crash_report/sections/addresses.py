"""The stack with symbols, and the page walks of the addresses that matter."""

from __future__ import annotations

from typing import Any

from kvmpy.debug.crash_report.case import Case
from kvmpy.debug.crash_report.sections.section import Contents, SectionBuilder
from kvmpy.x86.flags import Cr0
from kvmpy.x86.page_walk import Access, FailureKind, Walk, page_fault
from kvmpy.x86.paging import PagingMode

__all__ = ["PAGES", "STACK"]

_WORDS = 16
_BELOW = 2
"""Words below the stack pointer, where what was popped last still stands."""


def _fill_stack(case: Case, contents: Contents) -> None:
    execution = case.execution
    size = execution.bits // 8
    contents.data = []
    for index in range(-_BELOW, _WORDS):
        offset = execution.stack_offset(index * size)
        address = execution.linear("ss", offset)
        data = execution.read("ss", offset, size)
        if data is None:
            if index >= 0:
                contents.add(f"{'sp->' if index == 0 else '    '} {address:#010x}  cannot be read", mark=index == 0)
                break
            continue
        value = int.from_bytes(data, "little")
        found = _symbol(case, value)
        name = f"  <{found}>" if found is not None else ""
        note = "  (below the stack pointer)" if index < 0 else ""
        contents.add(f"{'sp->' if index == 0 else '    '} {address:#010x}  {value:0{2 * size}x}{name}{note}")
        contents.data.append({"address": address, "value": value, "symbol": str(found) if found is not None else None})


def _symbol(case: Case, value: int) -> object | None:
    """The symbol of a code address; none for numbers that lead to nothing that was loaded."""
    symbols = case.evidence.symbols
    if symbols is None:
        return None
    address = case.execution.linear("cs", value)
    physical = case.physical(address)
    if case.evidence.ranges and (physical is None or case.loaded_range(physical) in ("", "tables")):
        return None
    return symbols.at(address)


def _fill_pages(case: Case, contents: Contents) -> None:
    if not case.sregs.cr0 & Cr0.PG:
        return
    contents.data = []
    below = case.execution.linear("ss", case.execution.stack_offset(-8))
    wanted = [("RIP", case.rip, Access.FETCH), ("the stack, 8 bytes below RSP", below, Access.WRITE)]
    if case.sregs.cr2:
        wanted.append(("CR2", case.sregs.cr2, Access.READ))
    candidate = case.first.candidate if case.first is not None else None
    address = candidate.values.get("address") if candidate is not None else None
    if address is not None and address not in (entry[1] for entry in wanted):
        wanted.append(("the address of the fault", address, Access.READ))
    for what, linear, access in wanted:
        walked = case.walk(linear)
        verdict, bad = _verdict(case, walked, access)
        lines = str(walked).split("\n")
        contents.heading(f"{what} {case.describe(linear)}: {verdict}")
        if bad:
            contents.lines[-1] = type(contents.lines[-1])(contents.lines[-1].text, True)
        contents.indented(line.strip() for line in lines[1:])
        contents.data.append(_walk_data(what, walked, verdict))


def _verdict(case: Case, walked: Walk, access: Access) -> tuple[str, bool]:
    """Whether the access is allowed, and whether that is bad news."""
    if walked.mode is PagingMode.NONE:
        return "no paging", False
    failure = walked.failure
    if failure is not None and failure.kind is FailureKind.NOT_CANONICAL:
        return "not canonical", True
    code = page_fault(walked, case.sregs, access, user=case.execution.cpl == 3, rflags=case.regs.rflags)
    if code is not None:
        names = " ".join(flag.name or "" for flag in type(code) if flag & code) or "0"
        why = f" ({failure})" if failure is not None else ""
        return f"a {access.value} faults, #PF error code {int(code):#x} {names}{why}", True
    if walked.physical is not None and not case.memory.contains(walked.physical):
        return f"a {access.value} is allowed, and leads to where no memory is", True
    return f"a {access.value} is allowed", False


def _walk_data(what: str, walked: Walk, verdict: str) -> dict[str, Any]:
    return {
        "what": what,
        "virtual": walked.virtual,
        "mode": walked.mode.value,
        "physical": walked.physical,
        "page_size": walked.page_size,
        "writable": walked.writable,
        "user": walked.user,
        "executable": walked.executable,
        "failure": str(walked.failure) if walked.failure is not None else None,
        "verdict": verdict,
        "entries": [{"level": entry.level, "address": entry.address, "value": entry.value} for entry in walked.entries],
    }


STACK = SectionBuilder("stack", "Stack", _fill_stack)
PAGES = SectionBuilder("pages", "Page walks", _fill_pages)
