"""Whether bytes look like code of another width than the one that they are executed as.

Code of one width read as another one makes little sense: immediate operands become instructions, mostly `add [..], al`
(zero bytes), and REX prefixes become DEC and INC. The same bytes read in their own width show none of that.
"""

from __future__ import annotations

from kvmpy.debug.crash_report.case import Case
from kvmpy.debug.crash_report.first_event import read_linear
from kvmpy.debug.crash_report.first_event.decoder import decode
from kvmpy.x86.register_text import code_bits

__all__ = ["looks_like"]

_LOOKED_AT = 64
"""Bytes."""
_NEAR = 0x400
_FEWEST = 4
"""Instructions that must make sense in the other width."""
_LEAVE = frozenset((0xC2, 0xC3, 0xCB, 0xCF, 0xE9, 0xEA, 0xEB, 0xF4))
"""After these other code, or data, begins."""


def looks_like(case: Case) -> int | None:
    """The width that the code makes sense in, when it makes none in the present one; else None."""
    for start in _starts(case):
        code = read_linear(case.memory, case.state, start, _LOOKED_AT)
        found = _better_width(code, case.execution.bits, 2)
        if found is not None:
            return found
    return _looks_back(case)


def _better_width(code: bytes, bits: int, fewest: int, *, end: int | None = None) -> int | None:
    """The width in which the code shows no oddity, when it has at least `fewest` of them as it is.

    With `end`, the other width must also have an instruction end there.
    """
    if not any(code) or _oddities(code, bits)[0] < fewest:
        return None
    best: tuple[int, int] | None = None
    for other in (64, 32, 16):
        if other == bits:
            continue
        strange, count, at = _oddities(code, other)
        fits = strange == 0 and count >= _FEWEST and (end is None or at == end)
        if fits and (best is None or count < best[1]):
            best = other, count
    return best[0] if best is not None else None


def _starts(case: Case) -> list[int]:
    """Addresses where instructions begin: of the entry, of the symbol, and RIP."""
    starts = []
    entry, symbols = case.evidence.entry_state, case.evidence.symbols
    if entry is not None and code_bits(entry.sregs) == case.execution.bits:
        first = entry.regs.rip + (0 if case.execution.bits == 64 else entry.sregs.cs.base)
        starts.append(first)
    found = symbols.at(case.rip) if symbols is not None else None
    if found is not None:
        starts.append(case.rip - found.offset)
    return [start for start in starts if 0 <= case.rip - start < _NEAR] + [case.rip]


def _looks_back(case: Case) -> int | None:
    """The same for code before RIP, whose start is a guess: more must be odd, and the other width must lead to RIP."""
    for distance in range(_LOOKED_AT, 8, -1):
        code = read_linear(case.memory, case.state, max(case.rip - distance, 0), distance)
        if len(code) == distance and (found := _better_width(code, case.execution.bits, 3, end=distance)):
            return found
    return None


def _oddities(code: bytes, bits: int) -> tuple[int, int, int]:
    """(strange instructions, all instructions, where they end) of the code read as `bits` wide, up to a jump away."""
    at = strange = count = 0
    while at < len(code):
        decoded = decode(code[at : at + 15], bits)
        if decoded is None:
            if len(code) - at >= 15:
                strange += 1
            break
        count += 1
        if decoded.data[:2] == b"\0\0" or (
            bits != 64 and decoded.opcode in range(0x48, 0x50) and _like_rex(code[at : at + 3])
        ):
            strange += 1
        elif decoded.opcode in (0x06, 0x0E, 0x16, 0x1E, 0x27, 0x2F, 0x37, 0x3F, 0x63, 0xD6, 0xF1):
            strange += bits != 16
        at += decoded.length
        if decoded.opcode in _LEAVE:
            break
    return strange, count, at


def _like_rex(data: bytes) -> bool:
    """48 to 4F before an opcode that 64-bit code has there all the time."""
    return len(data) > 1 and data[1] in (
        0x01, 0x03, 0x0F, 0x21, 0x23, 0x29, 0x2B, 0x31, 0x33, 0x39, 0x3B, 0x63, 0x81, 0x83, 0x85, 0x87, 0x89, 0x8B,
        0x8D, 0xB8, 0xB9, 0xBA, 0xBB, 0xBE, 0xBF, 0xC1, 0xC7, 0xD1, 0xD3, 0xF7, 0xFF,
    )  # fmt: skip
