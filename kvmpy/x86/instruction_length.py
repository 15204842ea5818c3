"""How long an instruction of 64-bit code is, and whether code of ring 0 that runs in ring 3 needs something else there.

Only lengths, from the opcode maps of SDM vol. 2, appendix A; what instructions do is nobody's business here. See
`kvmpy.machine.direct_execution` for what it is good for.
"""

from __future__ import annotations

__all__ = ["length_and_kind", "modrm_at", "sweep"]

_MODRM, _IMM8, _IMM16, _IMMZ, _BAD = 1, 2, 4, 8, 16  # IMMZ: two bytes with 66, else four


def _one_byte() -> list[int]:
    flags = [0] * 256
    for row in range(0, 0x40, 8):
        flags[row : row + 4] = [_MODRM] * 4
        flags[row + 4], flags[row + 5] = _IMM8, _IMMZ
        flags[row + 6] = flags[row + 7] = _BAD
    for opcode in (0x26, 0x2E, 0x36, 0x3E):
        flags[opcode] = 0  # prefixes
    for opcode in (0x60, 0x61, 0x62, 0x82, 0x9A, 0xC4, 0xC5, 0xCE, 0xD4, 0xD5, 0xD6, 0xEA):
        flags[opcode] = _BAD  # 62, C4 and C5 are looked at before
    flags[0x63] = _MODRM
    flags[0x68], flags[0x69], flags[0x6A], flags[0x6B] = _IMMZ, _MODRM | _IMMZ, _IMM8, _MODRM | _IMM8
    flags[0x70:0x80] = [_IMM8] * 16
    flags[0x80], flags[0x81], flags[0x83] = _MODRM | _IMM8, _MODRM | _IMMZ, _MODRM | _IMM8
    flags[0x84:0x90] = [_MODRM] * 12
    flags[0xA8], flags[0xA9] = _IMM8, _IMMZ
    flags[0xB0:0xB8] = [_IMM8] * 8
    flags[0xB8:0xC0] = [_IMMZ] * 8
    flags[0xC0] = flags[0xC1] = _MODRM | _IMM8
    flags[0xC2], flags[0xC6], flags[0xC7], flags[0xC8] = _IMM16, _MODRM | _IMM8, _MODRM | _IMMZ, _IMM16 | _IMM8
    flags[0xCA], flags[0xCD] = _IMM16, _IMM8
    flags[0xD0:0xD4] = [_MODRM] * 4
    flags[0xD8:0xE0] = [_MODRM] * 8
    flags[0xE0:0xE8] = [_IMM8] * 8
    flags[0xE8], flags[0xE9], flags[0xEB] = _IMMZ, _IMMZ, _IMM8
    flags[0xF6] = flags[0xF7] = flags[0xFE] = flags[0xFF] = _MODRM
    return flags


def _two_byte() -> list[int]:
    flags = [_MODRM] * 256
    for opcode in (
        0x05,
        0x06,
        0x07,
        0x08,
        0x09,
        0x0B,
        0x0E,
        *range(0x30, 0x38),
        0x77,
        0xA0,
        0xA1,
        0xA2,
        0xA8,
        0xA9,
        0xAA,
    ):
        flags[opcode] = 0
    flags[0xC8:0xD0] = [0] * 8  # BSWAP
    for opcode in (0x04, 0x0A, 0x0C, 0x24, 0x25, 0x26, 0x27, 0x36, 0x39, 0x3B, 0x3C, 0x3D, 0x3E, 0x3F, 0xA6, 0xA7):
        flags[opcode] = _BAD
    for opcode in (0x0F, 0x70, 0x71, 0x72, 0x73, 0xA4, 0xAC, 0xBA, 0xC2, 0xC4, 0xC5, 0xC6):
        flags[opcode] = _MODRM | _IMM8
    flags[0x80:0x90] = [_IMMZ] * 16
    return flags


_ONE, _TWO = _one_byte(), _two_byte()
_PREFIXES = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3))
_VEX_IMMEDIATE = frozenset((0x70, 0x71, 0x72, 0x73, 0xC2, 0xC4, 0xC5, 0xC6))

# What ring 3 does in silence and otherwise than ring 0: flags and selectors that read differently, CPUID, far control
# transfers, what takes the selectors that are there, and strings of ports. And what kernels do all the time: CLI, STI,
# STAC, CLAC, SWAPGS, and reading CR2.
_SENSITIVE_ONE = frozenset((0x6C, 0x6D, 0x6E, 0x6F, 0x8C, 0x8E, 0x9C, 0x9D, 0xCA, 0xCB, 0xCD, 0xCF, 0xFA, 0xFB))
_SENSITIVE_TWO = frozenset((0x00, 0x02, 0x03, 0x05, 0x07, 0x34, 0x35, 0xA0, 0xA1, 0xA2, 0xA8, 0xA9, 0xB2, 0xB4, 0xB5))


def length_and_kind(code: bytes, at: int) -> tuple[int, bool]:
    """The length in bytes of the instruction at `at`, 0 when there is none, and whether it is sensitive.

    Sensitive is what ring 3 executes without a fault but not as ring 0 does (PUSHF, POPF, CPUID, moves of selectors,
    far returns, SMSW, XGETBV and others), and what faults so often that it is worth a replacement. Raises IndexError
    when `code` ends too soon.
    """
    start = at
    small = False
    wide = False
    byte = code[at]
    repeat = 0
    short_address = False
    while True:
        if byte in _PREFIXES:
            if byte == 0x66:
                small = True
            elif byte == 0x67:
                short_address = True
            elif byte >= 0xF2:
                repeat = byte
            wide = False  # a REX before another prefix does not count
        elif byte & 0xF0 == 0x40:
            wide = byte & 8 != 0
        else:
            break
        at += 1
        byte = code[at]
    sensitive = False
    if byte == 0x0F:
        at += 1
        byte = code[at]
        if byte == 0x38:
            at += 1
            flags = _MODRM
        elif byte == 0x3A:
            at += 1
            flags = _MODRM | _IMM8
        else:
            flags = _TWO[byte]
            sensitive = byte in _SENSITIVE_TWO
            modrm = code[at + 1] if flags & _MODRM else 0
            if byte == 0x01:
                # SMSW and LMSW; VMCALL, XGETBV, VMMCALL; CLAC, STAC; SWAPGS, RDTSCP
                sensitive = modrm >> 3 & 7 in (4, 6) or modrm in (0xC1, 0xCA, 0xCB, 0xD0, 0xD9, 0xF8, 0xF9)
            elif 0x20 <= byte <= 0x23:  # to and from control and debug registers: never memory
                return at + 2 - start, byte == 0x20 and modrm >> 3 & 7 == 2
            elif byte == 0xC7:
                sensitive = repeat == 0xF3 and modrm >= 0xF8  # RDPID
            elif byte == 0xAE:
                sensitive = repeat == 0xF3 and modrm >= 0xC0 and modrm >> 3 & 7 < 4  # RDFSBASE ... WRGSBASE
            elif byte == 0x78 and (small or repeat == 0xF2):
                flags |= _IMM16  # EXTRQ and INSERTQ of SSE4a
            if flags & _IMMZ:
                small = False  # near jumps have four bytes whatever the prefix: AMD would take two, compilers none
    elif byte in (0xC4, 0xC5):
        if byte == 0xC5:
            kind, at = 1, at + 2
        else:
            kind, at = code[at + 1] & 31, at + 3
        byte = code[at]
        flags = 0 if kind == 1 and byte == 0x77 else _MODRM
        if kind == 3 or (kind == 1 and byte in _VEX_IMMEDIATE):
            flags |= _IMM8
        elif kind not in (1, 2):
            return 0, False
    elif byte == 0x62:
        kind, at = code[at + 1] & 7, at + 4
        byte = code[at]
        flags = _MODRM | _IMM8 if kind == 3 or (kind == 1 and byte in _VEX_IMMEDIATE) else _MODRM
    else:
        flags = _ONE[byte]
        sensitive = byte in _SENSITIVE_ONE
        if byte & 0xF8 == 0xB8 and wide:
            return at + 9 - start, False
        if byte & 0xFC == 0xA0:
            return at + (5 if short_address else 9) - start, False
        if byte & 0xFE == 0xF6 and code[at + 1] & 0x38 < 0x10:
            flags |= _IMM8 if byte == 0xF6 else _IMMZ
        elif byte == 0xFF:
            sensitive = code[at + 1] >> 3 & 7 in (3, 5)
        elif byte in (0xE8, 0xE9):
            small = False
        elif byte == 0x8F and code[at + 1] & 0x38:
            return 0, False  # XOP
        if wide:
            small = False
    if flags & _BAD:
        return 0, False
    at += 1
    if flags & _MODRM:
        modrm = code[at]
        at += 1
        if modrm < 0xC0:
            rm = modrm & 7
            if rm == 4:
                if code[at] & 7 == 5 and modrm < 0x40:
                    at += 4
                at += 1
            elif rm == 5 and modrm < 0x40:
                at += 4
            if modrm >= 0x80:
                at += 4
            elif modrm >= 0x40:
                at += 1
    if flags & _IMM8:
        at += 1
    if flags & _IMM16:
        at += 2
    if flags & _IMMZ:
        at += 2 if small else 4
    return at - start, sensitive


def modrm_at(code: bytes, at: int) -> int:
    """Where the ModRM byte of an instruction without VEX or EVEX is, or 0 if it has none."""
    while (byte := code[at]) in _PREFIXES or byte & 0xF0 == 0x40:
        at += 1
    if byte != 0x0F:
        return at + 1 if _ONE[byte] & _MODRM else 0
    at += 1
    byte = code[at]
    if byte in (0x38, 0x3A):
        return at + 2
    return at + 1 if _TWO[byte] & _MODRM else 0


def sweep(code: bytes, at: int, end: int) -> tuple[set[int], list[int]]:
    """Go from instruction to instruction, from `at` up to `end`: where they begin, and which are sensitive.

    A byte that begins none is passed over as one. Stops early when `code` ends within an instruction.
    """
    starts: set[int] = set()
    sensitive: list[int] = []
    add, note = starts.add, sensitive.append
    try:
        while at < end:
            length, special = length_and_kind(code, at)
            add(at)
            if special:
                note(at)
            at += length or 1
    except IndexError:
        pass
    return starts, sensitive
