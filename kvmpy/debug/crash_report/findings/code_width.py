"""Whether bytes look like code of another width than the one that they are executed as.

Code of one width read as another one makes little sense: immediate operands become instructions, mostly `add [..], al`
(zero bytes), and REX prefixes become DEC and INC. The same bytes read in their own width show none of that.
"""

from __future__ import annotations

from typing import NamedTuple

from kvmpy.debug.crash_report.case import Case
from kvmpy.debug.crash_report.first_event import read_linear
from kvmpy.debug.crash_report.first_event.decoder import Decoded, decode
from kvmpy.x86.register_text import code_bits

__all__ = ["looks_like"]

_LOOKED_AT = 64
"""Bytes."""
_NEAR = 0x400
_FEWEST = 4
"""Instructions that must make sense in the other width."""
_SHORTEST = 8
_RARE = frozenset((0x06, 0x0E, 0x16, 0x1E, 0x27, 0x2F, 0x37, 0x3F, 0x63, 0xD6, 0xF1))
"""Pushes and pops of segments, decimal arithmetic, ARPL, INT1."""
_LEAVE = frozenset((0xC2, 0xC3, 0xCB, 0xCF, 0xE9, 0xEA, 0xEB, 0xF4))
"""After these other code, or data, begins."""


def looks_like(case: Case) -> int | None:
    """The width that the code makes sense in, when it makes none in the present one; else None."""
    for start in _starts(case):
        code = read_linear(case.memory, case.state, start, _LOOKED_AT)
        found = _better_width(_Readings(code), case.execution.bits, 2)
        if found is not None:
            return found
    return _looks_back(case)


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
    size = min(_LOOKED_AT, case.rip)
    code = read_linear(case.memory, case.state, case.rip - size, size)
    if len(code) < size:
        return None
    readings = _Readings(code)
    for start in range(size - _SHORTEST):
        found = _better_width(readings, case.execution.bits, 3, start=start, to_the_end=True)
        if found is not None:
            return found
    return None


class _Instruction(NamedTuple):
    length: int
    strange: bool
    leaves: bool


class _Readings:
    """Some bytes, read as code of each width from each offset; every instruction is decoded once."""

    def __init__(self, code: bytes) -> None:
        self.code = code
        self._known: dict[tuple[int, int], _Instruction | None] = {}

    def at(self, offset: int, bits: int) -> _Instruction | None:
        """The instruction at an offset; None when there is none, or it does not end here."""
        key = offset, bits
        if key not in self._known:
            data = self.code[offset : offset + 15]
            decoded = decode(data, bits)
            self._known[key] = (
                _Instruction(decoded.length, _strange(decoded, data), decoded.opcode in _LEAVE) if decoded else None
            )
        return self._known[key]

    def walk(self, start: int, bits: int) -> tuple[int, int, int]:
        """(strange instructions, all instructions, where they end) from an offset on, up to a jump away."""
        at, strange, count = start, 0, 0
        while at < len(self.code):
            instruction = self.at(at, bits)
            if instruction is None:
                strange += len(self.code) - at >= 15
                break
            count += 1
            strange += instruction.strange
            at += instruction.length
            if instruction.leaves:
                break
        return strange, count, at


def _better_width(
    readings: _Readings, bits: int, fewest: int, *, start: int = 0, to_the_end: bool = False
) -> int | None:
    """The width in which the code shows no oddity, when it has at least `fewest` of them as it is.

    `to_the_end`: the last instruction of the other width must also end with the bytes.
    """
    if not any(readings.code) or readings.walk(start, bits)[0] < fewest:
        return None
    best: tuple[int, int] | None = None
    for other in (64, 32, 16):
        if other == bits:
            continue
        strange, count, end = readings.walk(start, other)
        fits = strange == 0 and count >= _FEWEST and not (to_the_end and end != len(readings.code))
        if fits and (best is None or count < best[1]):
            best = other, count
    return best[0] if best is not None else None


def _strange(decoded: Decoded, data: bytes) -> bool:
    """Whether compilers and people hardly ever write this: zeros, and what 64-bit code looks like in other widths."""
    if data[:2] == b"\0\0":
        return True
    if decoded.bits != 64 and 0x48 <= decoded.opcode < 0x50:
        return _like_rex(data)
    return decoded.bits != 16 and decoded.opcode in _RARE


def _like_rex(data: bytes) -> bool:
    """48 to 4F before an opcode that 64-bit code has there all the time."""
    return len(data) > 1 and data[1] in (
        0x01, 0x03, 0x0F, 0x21, 0x23, 0x29, 0x2B, 0x31, 0x33, 0x39, 0x3B, 0x63, 0x81, 0x83, 0x85, 0x87, 0x89, 0x8B,
        0x8D, 0xB8, 0xB9, 0xBA, 0xBB, 0xBE, 0xBF, 0xC1, 0xC7, 0xD1, 0xD3, 0xF7, 0xFF,
    )  # fmt: skip
