"""Whether an access to memory faults: segment, canonical address, alignment, page tables (SDM vol. 3, 5.3 and 4.6)."""

from __future__ import annotations

from kvmpy.debug.crash_report.first_event.candidate import Candidate, Cause
from kvmpy.debug.crash_report.first_event.execution import Execution
from kvmpy.debug.crash_report.first_event.memory_access import MemoryAccess
from kvmpy.x86.flags import Cr4
from kvmpy.x86.page_walk import Access, FailureKind, Walk, page_fault, walk

__all__ = ["access_fault", "fetch_fault", "is_canonical", "page_cause", "page_fault_at"]

_PAGE = 0x1000


def is_canonical(execution: Execution, address: int) -> bool:
    """Whether bits 63 up from the highest translated one are all equal (SDM vol. 1, 3.3.7.1)."""
    width = 57 if execution.sregs.cr4 & Cr4.LA57 else 48
    return address >> width - 1 in (0, (1 << 65 - width) - 1)


def access_fault(execution: Execution, access: MemoryAccess) -> Candidate | None:
    """The fault of an access, or None when it goes through. Alignment of RFLAGS.AC is not judged."""
    name, offset = access.segment, access.offset
    address = execution.linear(name, offset)
    verb = "write to" if access.access is Access.WRITE else "read from"
    place = f"{verb} {access.what} at {name.upper()}:{offset:#x}"
    if execution.bits == 64:
        for at in (address, address + access.size - 1 & 0xFFFF_FFFF_FFFF_FFFF):
            if not is_canonical(execution, at):
                text = f"{place}: the address {at:#x} is not canonical"
                make = Candidate.stack if name == "ss" else Candidate.protection
                return make(Cause.NOT_CANONICAL, text).noting(address=at, write=int(access.access is Access.WRITE))
    else:
        fault = _segment_fault(execution, access, place)
        if fault is not None:
            return fault
    if access.aligned and address % access.aligned:
        text = f"{place}: the address {address:#x} is not a multiple of {access.aligned}"
        return Candidate.protection(Cause.MISALIGNED, text).noting(address=address, aligned=access.aligned)
    return page_fault_at(execution, address, access.size, access.access, f"{place} (linear {address:#x})")


def page_fault_at(execution: Execution, address: int, size: int, access: Access, place: str) -> Candidate | None:
    """The #PF of an access to `size` bytes at a linear address, judged with the CPL of the moment."""
    last = address + max(size, 1) - 1
    wide = execution.long_mode
    user = execution.cpl == 3
    for here in dict.fromkeys((address, max(address, last & -_PAGE))):
        linear = here & (0xFFFF_FFFF_FFFF_FFFF if wide else 0xFFFF_FFFF)
        walked = walk(execution.memory, execution.sregs, linear)
        if walked.failure is not None and walked.failure.kind is FailureKind.NOT_CANONICAL:
            return Candidate.protection(Cause.NOT_CANONICAL, f"{place}: not canonical").noting(address=linear)
        code = page_fault(walked, execution.sregs, access, user=user, rflags=execution.regs.rflags)
        if code is not None:
            cause = page_cause(walked, execution, access, user)
            text = f"{place}: {_page_text(cause, walked, access)}"
            return Candidate.page_fault(cause, text, linear, int(code)).noting(
                write=int(access is Access.WRITE), fetch=int(access is Access.FETCH)
            )
    return None


def page_cause(walked: Walk, execution: Execution, access: Access, user: bool) -> Cause:
    """Which rule of paging an access breaks that `page_fault` does not allow."""
    if walked.failure is not None:
        return {
            FailureKind.RESERVED: Cause.RESERVED_BITS,
            FailureKind.OUTSIDE_MEMORY: Cause.TABLE_OUTSIDE_MEMORY,
        }.get(walked.failure.kind, Cause.NOT_PRESENT)
    if user and not walked.user:
        return Cause.SUPERVISOR_PAGE
    if access is Access.FETCH:
        return Cause.NO_EXECUTE if not walked.executable else Cause.SMEP
    if not user and walked.user and execution.sregs.cr4 & Cr4.SMAP and not execution.regs.rflags >> 18 & 1:
        return Cause.SMAP
    return Cause.READ_ONLY


def _page_text(cause: Cause, walked: Walk, access: Access) -> str:
    if walked.failure is not None:
        return str(walked.failure)
    return {
        Cause.SUPERVISOR_PAGE: "the page belongs to the supervisor (US=0), and this is ring 3",
        Cause.NO_EXECUTE: "the page is marked not executable (XD=1)",
        Cause.SMEP: "the page belongs to the user (US=1), and CR4.SMEP forbids ring 0 to execute it",
        Cause.SMAP: "the page belongs to the user (US=1), and CR4.SMAP forbids ring 0 to touch it",
        Cause.READ_ONLY: "the page is read-only (RW=0)",
    }.get(cause, "not allowed")


def fetch_fault(execution: Execution) -> Candidate | None:
    """The fault of fetching the instruction at RIP, as far as it reaches."""
    rip, sregs = execution.regs.rip, execution.sregs
    if execution.bits == 64:
        if not is_canonical(execution, rip):
            text = f"RIP {rip:#x} is not canonical: there is no instruction at such an address"
            return Candidate.protection(Cause.NOT_CANONICAL, text).noting(address=rip, fetch=1)
    elif rip > sregs.cs.limit:
        text = f"RIP {rip:#x} is beyond the limit {sregs.cs.limit:#x} of CS"
        return Candidate.protection(Cause.TARGET_BEYOND_LIMIT, text).noting(offset=rip, limit=sregs.cs.limit)
    address = execution.rip
    # What is not decoded may be so because the rest of it cannot be read.
    size = execution.decoded.length if execution.decoded is not None else min(len(execution.code) + 1, 15)
    fault = page_fault_at(execution, address, 1, Access.FETCH, f"fetch of the instruction at {address:#x}")
    if fault is None and size > 1:
        place = f"fetch of the end of the instruction at {address:#x}"
        fault = page_fault_at(execution, address, size, Access.FETCH, place)
    return fault


def _segment_fault(execution: Execution, access: MemoryAccess, place: str) -> Candidate | None:
    """Segment rights and limits: what is checked outside 64-bit mode."""
    name, segment = access.segment, execution.segment(access.segment)
    write = access.access is Access.WRITE
    if execution.protected:
        if segment.unusable or not segment.present:
            text = f"{place}: {name.upper()} is null or not present (selector {segment.selector:#06x})"
            return Candidate.protection(Cause.SEGMENT_NULL, text).noting(selector=segment.selector)
        code = bool(segment.type & 8)
        if write and segment.s and (code or not segment.type & 2):
            kind = "a code segment" if code else "read-only data"
            text = f"{place}: {name.upper()} ({segment.selector:#06x}) is {kind}"
            return Candidate.protection(Cause.SEGMENT_NOT_WRITABLE, text).noting(selector=segment.selector)
        if not write and segment.s and code and not segment.type & 2:
            text = f"{place}: {name.upper()} ({segment.selector:#06x}) is execute-only code"
            return Candidate.protection(Cause.SEGMENT_NOT_READABLE, text).noting(selector=segment.selector)
    first, last = access.offset, access.offset + access.size - 1
    if segment.s and segment.type & 0xC == 4 and execution.protected:  # expand-down
        top = 0xFFFF_FFFF if segment.db else 0xFFFF
        outside = first <= segment.limit or last > top
    else:
        outside = last > segment.limit
    if not outside:
        return None
    text = f"{place}: offset {last:#x} is beyond the limit {segment.limit:#x} of {name.upper()}"
    make = Candidate.stack if name == "ss" else Candidate.protection
    return make(Cause.SEGMENT_LIMIT, text).noting(offset=last, limit=segment.limit, selector=segment.selector)
