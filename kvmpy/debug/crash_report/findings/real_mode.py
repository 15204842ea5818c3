"""Mistakes of real mode: vectors that are not there, addresses above 1 MiB (SDM vol. 3, chapter 20)."""

from __future__ import annotations

from kvmpy.debug.crash_report.case import Case
from kvmpy.debug.crash_report.findings.finding import Rule, Suspicion, cause
from kvmpy.debug.crash_report.first_event import read_linear
from kvmpy.errors import GuestMemoryError
from kvmpy.x86.flags import Cr0

__all__ = ["RULES"]

_MEGABYTE = 1 << 20
_TABLE_END = 0x400
_SCRIBBLED = 0x500
"""Below, a processor that runs through the vector table may have written anything."""
_STACK_LOOKED_AT = 0x100
_LAST = 0xFFF0


def _null_vector(case: Case) -> Suspicion | None:
    """A live frame on the stack whose return address is at an instruction that went through a vector of 0:0."""
    if case.sregs.cr0 & Cr0.PE or case.evidence.registers_lost:
        return None
    for distance in range(0, _STACK_LOOKED_AT, 2):
        frame = case.execution.stack_items(3, 2, skip=distance)
        if frame is None:
            break
        ip, cs, flags = frame
        if not flags & 2 or flags & 0x8028:
            continue
        found = _vector_behind(case, cs, ip)
        if found is None:
            continue
        vector, what = found
        if _was_null(case, vector):
            return cause(
                f"{what} at {cs:04x}:{ip:04x} was taken through IVT entry {vector:#04x}, which is 0000:0000. The "
                f"processor went on at address 0, in the vector table itself, and came to {case.rip:#x}"
            )
    if case.rip < _TABLE_END:
        return cause(f"The processor executes the interrupt vector table (at {case.rip:#x}): a vector was 0000:0000")
    return None


def _was_null(case: Case, vector: int) -> bool:
    """Whether the vector is, or was when the guest was loaded, 0000:0000."""
    place = case.sregs.idt.base + 4 * vector
    if read_linear(case.memory, case.state, place, 4) == bytes(4):
        return True
    loaded = case.evidence.loaded
    if loaded is None or case.rip >= _SCRIBBLED:
        return False
    try:
        return loaded.read(place, 4) == bytes(4)
    except GuestMemoryError:
        return False


def _vector_behind(case: Case, cs: int, ip: int) -> tuple[int, str] | None:
    """The vector of what pushed a return address, by the instruction there."""
    before = read_linear(case.memory, case.state, (cs << 4) + ip - 2, 2) if ip >= 2 else b""
    if len(before) == 2 and before[0] == 0xCD:
        return before[1], f"INT {before[1]:#04x} before the return address"
    if len(before) == 2 and before[1] == 0xCC:
        return 3, "INT3 before the return address"
    if ip > _LAST:
        return 13, "#GP of an instruction that crosses the end of its segment,"
    code = read_linear(case.memory, case.state, (cs << 4) + ip, 4).lstrip(b"\x66\x67")
    if len(code) >= 2 and code[0] in (0xF6, 0xF7) and code[1] >> 3 & 7 in (6, 7):
        return 0, "#DE of the division"
    if code[:2] in (b"\x0f\x0b", b"\x0f\xff", b"\x0f\xb9"):
        return 6, "#UD of the instruction"
    return None


def _a20(case: Case) -> Suspicion | None:
    if case.sregs.cr0 & Cr0.PE or not _MEGABYTE <= case.rip < _MEGABYTE + 0xFFF0:
        return None
    wrapped = case.rip - _MEGABYTE
    if not any(read_linear(case.memory, case.state, wrapped, 4)):
        return None
    cs, ip = case.sregs.cs.selector, case.regs.rip
    return cause(
        f"CS:IP {cs:#06x}:{ip:#06x} is {case.rip:#x}, above 1 MiB; there is code at {wrapped:#x}, where it would be on "
        "a processor whose addresses wrap"
    )


RULES = (
    Rule(
        "ivt-entry-null",
        "An interrupt vector of real mode is 0000:0000",
        "In real mode interrupt n goes to the address in the table at 4 * n, whatever it is; a table of zeros sends "
        "everything to address 0.",
        "SDM vol. 3, 20.1.4",
        "Write the handler's offset and segment to 4 * n before. There is no BIOS in this machine unless a firmware "
        "image is loaded, so INT 10h and its like have no handler.",
        _null_vector,
    ),
    Rule(
        "a20-wrap",
        "An address above 1 MiB that was meant to wrap",
        "The 8086 wrapped addresses at 1 MiB. Later processors reach up to FFFF:FFFF = 0x10FFEF while A20 is on, and "
        "in KVM it always is.",
        "SDM vol. 3, 20.1.1; vol. 1, 19.1 (A20M#)",
        "Use a segment and an offset whose sum stays below 1 MiB, such as 0000:0500 for FFFF:0510.",
        _a20,
    ),
)
