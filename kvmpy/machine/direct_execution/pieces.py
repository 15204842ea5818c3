"""What stands in for single instructions of ring 0 in ring 3, and where the guest is in the midst of it.

See `kvmpy.machine.direct_execution.stand_ins`. A piece of code does what an instruction of ring 0 would do, with the
registers of the guest's processor in memory: cells at `Cells`. It may be interrupted anywhere, and each instruction of
it says by a `State` how to get from there to the state before the guest's instruction, or behind it.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from kvmpy.machine.direct_execution.context import AC, IF, IOPL, TF
from kvmpy.x86.instruction_length import length_and_kind, modrm_at

__all__ = ["BEFORE", "Cells", "Line", "State", "assembled", "moved", "replacement"]

_MASK = (1 << 64) - 1
_NT = 0x4000
_CS3, _SS3 = 0x33, 0x2B  # of the host: its selectors are what ring 3 has


class State(NamedTuple):
    """Where the guest is before an instruction of a piece.

    `done`: the guest's instruction has happened. `popped` bytes on top of the stack are the piece's own. The registers
    in `saved` are in cells: a, c, d for RAX, RCX, RDX. `returning`: an IRETQ has happened but for RIP, RFLAGS and RSP,
    which are on the stack. `gs`: all but that RCX goes into the base of GS.
    """

    done: bool = False
    popped: int = 0
    saved: str = ""
    returning: bool = False
    gs: bool = False


BEFORE, DONE = State(), State(done=True)


class Line(NamedTuple):
    """An instruction of a piece: its bytes, with the distance to a `cell` between `code` and `tail`."""

    code: bytes
    state: State = BEFORE
    cell: int | None = None
    tail: bytes = b""

    @property
    def size(self) -> int:
        return len(self.code) + (0 if self.cell is None else 4) + len(self.tail)


class Cells(NamedTuple):
    """Linear addresses."""

    flags: int
    """Eight bytes with IF and AC of the guest, at their places in RFLAGS."""
    pending: int
    """A byte that is not zero when an interrupt waits for IF."""
    kernel_gs_base: int
    cr2: int
    saved: int
    """Eight bytes each for RAX, RCX, RDX. The stack is not used: SYSCALL leaves that of the program, and what is below
    its top."""
    selectors: int
    """Four bytes for each segment register, in the order of instructions: ES, CS, SS, DS, FS, GS."""


def _line(code: str, state: State = BEFORE, cell: int | None = None, tail: str = "") -> Line:
    return Line(bytes.fromhex(code), state, cell, bytes.fromhex(tail))


def assembled(lines: list[Line], address: int) -> bytes:
    """The bytes of a piece at a linear address."""
    out = b""
    for line in lines:
        out += line.code
        if line.cell is not None:
            out += struct.pack("<i", line.cell - (address + len(out) + 4 + len(line.tail)))
        out += line.tail
    return out


def replacement(code: bytes, at: int, cells: Cells) -> tuple[int, list[Line]] | None:
    """How long the sensitive instruction at `at` is, with a POP behind a PUSHF, and what stands in for it, if known."""
    byte = code[at]
    if byte == 0xFA:
        return 1, [_line("c605", BEFORE, cells.flags + 1, "00")]
    if byte == 0xFB:
        return None if code[at + 1] == 0xF4 else (1, _sti(cells))
    if byte == 0x9C:
        return _pushf(code, at, cells)
    if code[at : at + 2] == b"\x48\xcf":
        return 2, _iretq(cells)
    return _move_selector(code, at, cells) or _two_bytes(code, at, cells)


def _two_bytes(code: bytes, at: int, cells: Cells) -> tuple[int, list[Line]] | None:
    three = code[at : at + 3]
    if three == b"\x0f\x01\xca":
        return 3, [_line("c605", BEFORE, cells.flags + 2, "00")]
    if three == b"\x0f\x01\xcb":
        return 3, [_line("c605", BEFORE, cells.flags + 2, "04")]
    if three == b"\x0f\x01\xf8":
        return 3, _swapgs(cells)
    extended = int(code[at] & 0xF0 == 0x40)
    if code[at + extended : at + extended + 2] == b"\x0f\x20":  # from CR2
        modrm = code[at + extended + 2]
        rex = 0x48 | (code[at] & 1) << 2 if extended else 0x48
        if modrm >> 3 & 7 == 2 and not (extended and code[at] & 6):
            return 3 + extended, [Line(bytes((rex, 0x8B, 5 | (modrm & 7) << 3)), BEFORE, cells.cr2)]
    return None


def _save(register: int, cells: Cells, state: State = BEFORE) -> Line:
    """MOV of RAX, RCX or RDX, numbers 0 to 2, to its cell."""
    return Line(bytes((0x48, 0x89, 5 | register << 3)), state, cells.saved + 8 * register)


def _restore(register: int, cells: Cells, state: State) -> Line:
    return Line(bytes((0x48, 0x8B, 5 | register << 3)), state, cells.saved + 8 * register)


def _sti(cells: Cells) -> list[Line]:
    done = State(True, saved="c")
    return [
        _save(1, cells),
        _line("c605", State(saved="c"), cells.flags + 1, "02"),
        _line("0fb60d", done, cells.pending),  # movzx ecx, byte
        _line("e308", done),  # jrcxz, which needs no flags
        _restore(1, cells, done),
        _line("f4", DONE),
        _restore(1, cells, done),
    ]


def _pushf(code: bytes, at: int, cells: Cells) -> tuple[int, list[Line]]:
    """The processor's IF is on in ring 3, AC and IOPL are 0: LEA makes what the guest has of that, without flags."""
    extended = int(code[at + 1] == 0x41)
    pop = code[at + 1 + extended]
    if pop & 0xF8 == 0x58 and (extended or pop != 0x5C):
        register = pop & 7 | extended << 3
        other = 0 if register == 1 else 1
        state = State(saved="ac"[other])
        # lea register, [register + other - 0x200]
        rex = 0x48 | extended << 2 | extended
        lea = bytes((rex, 0x8D, 0x84 | (register & 7) << 3, other << 3 | register & 7)) + struct.pack("<i", -IF)
        return 2 + extended, [
            _line("9c"),
            Line(code[at + 1 : at + 2 + extended], State(popped=8)),
            _save(other, cells),
            Line(bytes((0x48, 0x8B, 5 | other << 3)), state, cells.flags),
            Line(lea, state),
            _restore(other, cells, State(True, saved="ac"[other])),
        ]
    undone = State(popped=8)
    return 1, [
        _line("9c"),
        _save(1, cells, undone),
        _save(2, cells, undone),
        _line("488b0c24", undone),  # mov rcx, [rsp]
        _line("488b15", State(popped=8, saved="c"), cells.flags),
        _line("488d8c11" + struct.pack("<i", -IF).hex(), State(popped=8, saved="cd")),  # lea rcx, [rcx + rdx - 0x200]
        _line("48890c24", State(popped=8, saved="cd")),
        _restore(2, cells, State(True, saved="cd")),
        _restore(1, cells, State(True, saved="c")),
    ]


def _move_selector(code: bytes, at: int, cells: Cells) -> tuple[int, list[Line]] | None:
    """MOV to a register from a segment register."""
    start, rex = at, 0
    small = code[at] == 0x66
    at += small
    if code[at] & 0xF0 == 0x40:
        rex = code[at]
        at += 1
    modrm = code[at + 1]
    number = modrm >> 3 & 7
    if code[at] != 0x8C or modrm < 0xC0 or number > 5:
        return None
    head = b"\x66" * small + (b"\x44" if rex & 1 else b"") + bytes((0x8B, 5 | (modrm & 7) << 3))
    return at + 2 - start, [Line(head, BEFORE, cells.selectors + 4 * number)]


def _swapgs(cells: Cells) -> list[Line]:
    """By RDGSBASE and WRGSBASE; where these are not to be had, they fault before anything has happened."""
    saved, done = State(saved="c"), State(True, saved="c")
    return [
        _save(1, cells),
        _line("f3480faec9", saved),  # rdgsbase rcx
        _line("48870d", saved, cells.kernel_gs_base),  # xchg
        _line("f3480faed9", done._replace(gs=True)),  # wrgsbase rcx
        _restore(1, cells, done),
    ]


def _iretq(cells: Cells) -> list[Line]:
    """IRETQ to ring 0 with nothing special about it, by IRETQ in ring 3."""
    begun = State(saved="a")
    returning = State(saved="a", returning=True)
    kept, special = (struct.pack("<I", bits).hex() for bits in (0xFFFF_FFFF & ~(AC | IOPL), TF | _NT))
    lines = [
        _save(0, cells),
        _line("8b05", begun, cells.selectors + 4),
        _line("4839442408", begun),  # cmp [rsp + 8], rax
        _line("7500", begun),
        _line("f7442410" + special, begun),  # test dword [rsp + 16], ...
        _line("7500", begun),
        _line("8b442410", begun),  # mov eax, [rsp + 16]
        _line("25" + struct.pack("<I", IF | AC).hex(), begun),
        _line("f6c402", begun),  # test ah, 2: IF
        _line("7409", begun),  # jz, past the next two
        _line("803d", begun, cells.pending, "00"),
        _line("7500", begun),
        _line("488905", begun, cells.flags),
        _line("81642410" + kept, returning),  # and dword [rsp + 16], ...
        _line("48c7442408" + struct.pack("<I", _CS3).hex(), returning),
        _line("48c7442420" + struct.pack("<I", _SS3).hex(), returning),
        _restore(0, cells, returning),
        _line("48cf", State(returning=True)),
        _restore(0, cells, begun),  # the slow way
        _line("f4"),
    ]
    slow = sum(line.size for line in lines[:-2])
    at = 0
    for index, line in enumerate(lines):
        at += line.size
        if line.code == b"\x75\0":
            lines[index] = Line(bytes((0x75, slow - at)), line.state)
    return lines


# Instructions that do the same wherever they are

_ONE_BYTE = frozenset(
    (
        *(opcode for opcode in range(0x40) if opcode & 7 < 6 and opcode != 0x0F),
        *range(0x50, 0x60), 0x63, 0x68, 0x69, 0x6A, 0x6B, *range(0x70, 0x82), *range(0x83, 0x8C), 0x8D, 0x8F,
        *range(0x90, 0x9A), *range(0xA0, 0xB0), *range(0xB0, 0xC4), 0xC6, 0xC7, 0xC9, *range(0xD0, 0xD4),
        0xF5, 0xF6, 0xF7, 0xF8, 0xF9, 0xFC, 0xFD, 0xFE, 0xFF,
    )
)  # fmt: skip
_TWO_BYTE = frozenset(
    (
        0x0D, *range(0x18, 0x20), *range(0x40, 0x50), *range(0x90, 0xA0), 0xA3, 0xA4, 0xA5, 0xAB, 0xAC, 0xAD, 0xAF,
        0xB0, 0xB1, 0xB3, 0xB6, 0xB7, 0xB8, *range(0xBA, 0xC2), *range(0xC8, 0xD0),
    )
)  # fmt: skip
_PUSHF_POP_RAX = b"\x9c\x58"
_RETURNS = frozenset((0xC2, 0xC3))
_COMPARED = (b"\x0f\x1f\x44\x00\x00", b"\x66\x90", b"\x66\x66")
"""NOPs in whose place kernels put jumps and calls, and look before what is there; so they do with jumps and calls."""


def moved(code: bytes, at: int, address: int, linear: int) -> tuple[int, bytes, bool] | None:
    """How long the instruction at `at` is, what does the same at `address`, and whether it is a RET.

    `linear` is where it is. None for what cannot be moved, or must stay to be seen.
    """
    length, sensitive = length_and_kind(code, at)
    raw = code[at : at + length]
    if raw == _COMPARED[0] and code[at - 2 : at] == _PUSHF_POP_RAX:
        return length, b"", False  # as Linux leaves it where a paravirtual call was
    if not length or sensitive or raw.startswith(_COMPARED):
        return None
    opcode = at
    while code[opcode] in (0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0xF0, 0xF2, 0xF3) or code[opcode] & 0xF0 == 0x40:
        opcode += 1
    byte = code[opcode]
    modrm = modrm_at(code, at)
    digit = code[modrm] >> 3 & 7
    if byte == 0x0F:
        if code[opcode + 1] not in _TWO_BYTE:
            return None
    elif byte not in _ONE_BYTE or (byte == 0xFF and digit not in (0, 1, 6)):
        return None
    if byte & 0xF0 == 0x70:
        if opcode != at:
            return None
        target = linear + length + (raw[1] ^ 0x80) - 0x80
        return length, bytes((0x0F, byte + 0x10)) + struct.pack("<i", target - (address + 6)), False
    if modrm and code[modrm] & 0xC7 == 5:
        place = modrm + 1 - at
        (distance,) = struct.unpack_from("<i", raw, place)
        raw = raw[:place] + struct.pack("<i", distance + linear - address) + raw[place + 4 :]
    elif raw == b"\x90" or (code[opcode : opcode + 2] == b"\x0f\x1f" and raw[0] != 0xF3):
        raw = b""
    return length, raw, byte in _RETURNS
