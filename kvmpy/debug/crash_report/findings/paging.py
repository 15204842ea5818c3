"""Mistakes with page tables (SDM vol. 3, chapter 4)."""

from __future__ import annotations

from kvmpy.debug.crash_report.case import Case
from kvmpy.debug.crash_report.findings.finding import Rule, Suspicion, by_cause, cause, sentence
from kvmpy.debug.crash_report.findings.stacks import stack_fault
from kvmpy.debug.crash_report.first_event import Cause
from kvmpy.errors import GuestMemoryError
from kvmpy.x86.flags import Cr0, Efer
from kvmpy.x86.page_walk import FailureKind
from kvmpy.x86.paging import paging_mode

__all__ = ["RULES"]

_XD = 1 << 63
_TABLE_CAUSES = (Cause.NOT_PRESENT, Cause.TABLE_OUTSIDE_MEMORY, Cause.RESERVED_BITS)


def _cr3_wrong(case: Case) -> Suspicion | None:
    """The walk of RIP fails in the top table: this cannot be the table that the guest built."""
    if not case.sregs.cr0 & Cr0.PG or (case.blamed(*_TABLE_CAUSES) is None and not case.fetch_failed):
        return None
    walked = case.walk(case.rip)
    failure = walked.failure
    if failure is None or len(walked.entries) > 1:
        return None
    mode = paging_mode(case.sregs)
    if not mode.levels or failure.level != mode.levels[0].name:
        return None
    cr3 = case.sregs.cr3
    if failure.kind is FailureKind.OUTSIDE_MEMORY:
        return cause(f"CR3 is {cr3:#x}, and there is no guest memory: no address has a translation")
    size = mode.entry_size << mode.levels[0].bits
    first = walked.entries[0].address & -size
    try:
        table = case.memory.read(first, size)
    except GuestMemoryError:  # it begins in memory, but is not wholly inside
        return None
    present = sum(1 for at in range(0, len(table), mode.entry_size) if table[at] & 1)
    if not present:
        return cause(f"CR3 is {cr3:#x}, and the table there has no present entry: no address has a translation")
    return None


def _nxe_not_set(case: Case) -> Suspicion | None:
    candidate = case.blamed(Cause.RESERVED_BITS)
    if candidate is None or case.sregs.efer & Efer.NXE:
        return None
    walked = case.walk(candidate.values.get("address", case.rip))
    if walked.failure is None or walked.failure.reserved != _XD:
        return None
    return cause(f"{sentence(candidate.text)}. The bit is XD, and EFER.NXE is 0")


def _code_not_mapped(case: Case) -> Suspicion | None:
    candidate = case.blamed(Cause.NOT_PRESENT)
    if candidate is None or not candidate.values.get("fetch"):
        return None
    return cause(f"{sentence(candidate.text)}. The page tables do not map the code that is to run")


def _page_not_present(case: Case) -> Suspicion | None:
    """What neither the code nor the stack has a rule of its own for."""
    candidate = case.blamed(Cause.NOT_PRESENT)
    if candidate is None or candidate.values.get("fetch") or candidate.event.address == stack_fault(case):
        return None
    return cause(sentence(candidate.text))


RULES = (
    Rule(
        "cr3-wrong",
        "CR3 does not point to page tables",
        "CR3 holds the physical address of the top page table, which must be in memory before CR0.PG is set.",
        "SDM vol. 3, 4.5 and 9.8.5",
        "Load CR3 with the physical (not virtual, not segment-relative) address of your PML4 or page directory, 4 KiB "
        "aligned, and fill that table first.",
        _cr3_wrong,
    ),
    Rule(
        "nxe-not-set",
        "A page is marked not executable while that is not enabled",
        "With EFER.NXE=0 bit 63 of page-table entries is reserved: setting it makes every access a #PF with RSVD.",
        "SDM vol. 3, 4.6.2 and 2.2.1",
        "Set EFER.NXE (bit 11) before using XD, or clear bit 63 of the entries.",
        _nxe_not_set,
    ),
    Rule(
        "page-reserved-bits",
        "A page-table entry sets reserved bits",
        "Reserved bits of an entry that is present must be 0, else every access through it is a #PF with RSVD.",
        "SDM vol. 3, 4.5, tables 4-14 to 4-20",
        "Look at the entry in the page walk below: the frame must be aligned to the page's size, PS is allowed only "
        "where pages of that size exist, and addresses end at MAXPHYADDR.",
        by_cause(Cause.RESERVED_BITS),
    ),
    Rule(
        "page-table-outside-memory",
        "A page table lies where there is no memory",
        "Entries hold physical addresses of the next table.",
        "SDM vol. 3, 4.5",
        "Look at the page walk below: the last entry shown points outside of guest memory.",
        by_cause(Cause.TABLE_OUTSIDE_MEMORY),
    ),
    Rule(
        "code-not-mapped",
        "The code is not mapped",
        "From the moment CR0.PG is set, and after every load of CR3, the next instruction is fetched through the page "
        "tables; so is the target of every jump.",
        "SDM vol. 3, 9.8.5 and 4.6",
        "Map the code that switches paging on one to one, and everything that it jumps to.",
        _code_not_mapped,
    ),
    Rule(
        "page-not-present",
        "An access to a page that is not mapped",
        "An access through an entry with P=0 raises #PF; CR2 holds the address.",
        "SDM vol. 3, 4.7",
        "Map the page, or look where the address comes from: a null or stale pointer, or an index out of range.",
        _page_not_present,
    ),
    Rule(
        "page-read-only",
        "A write to a read-only page",
        "A write needs RW=1 in the entries of all levels; in ring 0 only if CR0.WP is set.",
        "SDM vol. 3, 4.6.1",
        "Set RW in every level of the walk below, or do not write there.",
        by_cause(Cause.READ_ONLY),
    ),
    Rule(
        "page-no-execute",
        "Execution of a page that is marked not executable",
        "An instruction is fetched only from pages with XD=0 in all levels, once EFER.NXE is set.",
        "SDM vol. 3, 4.6.1",
        "Clear bit 63 in the entries that map code, or look why the processor jumped into data.",
        by_cause(Cause.NO_EXECUTE),
    ),
    Rule(
        "smep",
        "Ring 0 executes a page of the user (SMEP)",
        "With CR4.SMEP=1 ring 0 must not fetch instructions from pages with US=1.",
        "SDM vol. 3, 4.6.1",
        "Clear US in some level of the mapping of kernel code, or return to ring 3 before running this code.",
        by_cause(Cause.SMEP),
    ),
    Rule(
        "smap",
        "Ring 0 touches a page of the user (SMAP)",
        "With CR4.SMAP=1 ring 0 must not read or write pages with US=1 unless RFLAGS.AC is set.",
        "SDM vol. 3, 4.6.1",
        "Bracket accesses to user memory with STAC and CLAC, or clear US in the mapping of kernel data.",
        by_cause(Cause.SMAP),
    ),
    Rule(
        "supervisor-page",
        "Ring 3 touches a page of the supervisor",
        "Ring 3 needs US=1 in the entries of all levels.",
        "SDM vol. 3, 4.6.1",
        "Set US in every level that maps user code, data and stack.",
        by_cause(Cause.SUPERVISOR_PAGE),
    ),
    Rule(
        "non-canonical-address",
        "An address is not canonical",
        "In 64-bit mode bits 63 to 48 of an address must all equal bit 47 (63 to 57 and bit 56 with 5-level paging), "
        "else #GP(0), or #SS(0) by the stack.",
        "SDM vol. 1, 3.3.7.1",
        "Look where the address comes from: a pointer that was overwritten, or an upper half computed without sign "
        "extension (0x0000800000000000 instead of 0xFFFF800000000000).",
        by_cause(Cause.NOT_CANONICAL, Cause.TARGET_NOT_CANONICAL),
    ),
)
