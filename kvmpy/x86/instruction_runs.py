"""Going from instruction to instruction in 64-bit code quickly: what `instruction_length` says, by regular expression.

The expression knows the plain instructions, which most are; for all others the function is asked. A page of code takes
a tenth of a millisecond so.
"""

from __future__ import annotations

import re

from kvmpy.x86.instruction_length import length_and_kind

__all__ = ["PLAIN", "reaches", "starts_of", "sweep"]


def _class(*opcodes: int | range) -> bytes:
    """A set of bytes, as an expression."""
    members: set[int] = set()
    for each in opcodes:
        members.update(each if isinstance(each, range) else (each,))
    return b"[" + b"".join(b"\\x%02x" % byte for byte in sorted(members)) + b"]"


def _modrm(mod: int, *rm: int) -> bytes:
    return _class(*(mod << 6 | register << 3 | each for register in range(8) for each in rm))


_SIB_5, _SIB = _class(*range(5, 256, 8)), _class(*(byte for byte in range(256) if byte & 7 != 5))
_BUT_4 = (0, 1, 2, 3, 5, 6, 7)
_OPERAND = b"(?>" + b"|".join(
    (
        _class(range(0xC0, 0x100)), _modrm(1, *_BUT_4) + b".", _modrm(0, 0, 1, 2, 3, 6, 7), _modrm(1, 4) + b"..",
        _modrm(0, 5) + b".{4}", _modrm(2, *_BUT_4) + b".{4}", _modrm(0, 4) + b"(?>" + _SIB + b"|" + _SIB_5 + b".{4})",
        _modrm(2, 4) + b".{5}",
    )
) + b")"  # fmt: skip
"""A ModRM byte, with what it says that follows."""

_ROWS = range(0, 0x40, 8)
_WITH_OPERAND = _class(
    *(row + column for row in _ROWS for column in range(4)), 0x63, range(0x84, 0x8C), 0x8D, range(0xD0, 0xD4), 0xFE
)
_ALONE = _class(
    range(0x50, 0x60), range(0x90, 0x9A), *range(0xA4, 0xA8), range(0xAA, 0xB0), 0xC3, 0xC9, 0xCC, 0xF4, 0xFC, 0xFD
)
_BYTE = _class(*(row + 4 for row in _ROWS), 0x6A, range(0x70, 0x80), 0xA8, range(0xB0, 0xB8), 0xEB)
_WORD = _class(*(row + 5 for row in _ROWS), 0x68, 0xA9, 0xE8, 0xE9)
_TWO_WITH_OPERAND = _class(
    0x0D, range(0x10, 0x18), range(0x18, 0x20), range(0x28, 0x30), range(0x40, 0x70), 0x7E, 0x7F, range(0x90, 0xA0),
    0xA3, 0xA5, 0xAB, 0xAD, 0xAF, 0xB0, 0xB1, 0xB3, 0xB6, 0xB7, 0xB8, 0xBB, 0xBC, 0xBD, 0xBE, 0xBF, 0xC0, 0xC1, 0xD6,
    0xEF,
)  # fmt: skip
_NO_FF = b"(?![\\x18-\\x1f\\x28-\\x2f\\x58-\\x5f\\x68-\\x6f\\x98-\\x9f\\xa8-\\xaf\\xd8-\\xdf\\xe8-\\xef])"
"""Not far calls and jumps, /3 and /5."""
_F6 = b"(?=[\\x10-\\x3f\\x50-\\x7f\\x90-\\xbf\\xd0-\\xff])"
"""/2 to /7: not TEST, which has an immediate."""
_TEST = b"(?=[\\x00-\\x07\\x40-\\x47\\x80-\\x87\\xc0-\\xc7])"
_REX, _WIDE = b"[\\x40-\\x4f]?", b"[\\x48-\\x4f]"
_SEGMENTS = b"[\\x2e\\x3e\\x64\\x65\\xf0\\xf2\\xf3]*"

_PLAIN = b"(?>" + b"|".join(
    (
        _WITH_OPERAND + _OPERAND, _ALONE, _BYTE + b".", b"\\x83" + _OPERAND + b".", _WORD + b".{4}",
        b"[\\xc7\\x81\\x69]" + _OPERAND + b".{4}", b"\\x0f(?>" + _TWO_WITH_OPERAND + _OPERAND
        + b"|\\x0b|[\\x80-\\x8f].{4}|[\\xc8-\\xcf]|[\\xa4\\xac\\xba]" + _OPERAND + b".)",
        b"[\\xc0\\xc1\\xc6\\x6b\\x80]" + _OPERAND + b".",
        b"\\xff" + _NO_FF + _OPERAND, b"[\\xf6\\xf7]" + _F6 + _OPERAND,
        b"\\xf6" + _TEST + _OPERAND + b".", b"\\xf7" + _TEST + _OPERAND + b".{4}",
    )
) + b")"  # fmt: skip
_PREFIXED_16 = (
    b"(?>\\x66+\\x2e?\\x0f\\x1f" + _OPERAND + b"|\\x66" + _REX + b"(?>" + _WITH_OPERAND + _OPERAND
    + b"|\\x83" + _OPERAND + b".|\\x90|\\x0f[\\xb6\\xb7\\xbe\\xbf\\x6f\\x7f\\xef]" + _OPERAND + b"))"
)  # fmt: skip
_INSTRUCTION = (
    b"(?>" + _SEGMENTS + b"(?>" + _REX + _PLAIN + b"|[\\x40-\\x47]?[\\xb8-\\xbf].{4}|" + _WIDE + b"[\\xb8-\\xbf].{8})|"
    + _PREFIXED_16 + b")"
)  # fmt: skip
PLAIN = _INSTRUCTION
"""The expression for one plain instruction. Not all are known, and none that `length_and_kind` calls sensitive."""
_RUN = re.compile(b"(?:" + _INSTRUCTION + b")*+", re.DOTALL)


def sweep(code: bytes, at: int, end: int) -> tuple[int, list[int]]:
    """From `at`, where one begins, to the first that begins at `end` or behind: where that is, and the sensitive ones.

    A byte that begins none is passed over as one. Where `code` ends within an instruction, that is where it stops.
    """
    sensitive: list[int] = []
    match = _RUN.match
    try:
        while at < end and at < len(code):
            run = match(code, at, end)
            assert run is not None
            at = run.end()
            if at >= end:
                break
            length, special = length_and_kind(code, at)
            if special:
                sensitive.append(at)
            at += length or 1
    except IndexError:
        pass
    return at, sensitive


def reaches(code: bytes, at: int, target: int) -> bool:
    """Whether going from instruction to instruction from `at` comes to `target`."""
    return sweep(code, at, target)[0] == target


def starts_of(code: bytes, at: int, end: int) -> set[int]:
    """Where instructions begin from `at` up to `end`."""
    starts: set[int] = set()
    try:
        while at < end:
            starts.add(at)
            at += length_and_kind(code, at)[0] or 1
    except IndexError:
        pass
    return starts
