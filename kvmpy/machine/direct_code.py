"""Code of ring 0 made fit to run in ring 3: instructions replaced, and what stands in for them.

Ring 3 executes some instructions in silence but not as ring 0 does: PUSHF shows another interrupt flag, POPF does not
change it, CPUID and moves of selectors tell of the host. HLT takes the first byte of each, and faults. What a kernel
does most, PUSHF with POP RAX, CLI and STI, is done without leaving the guest where there are five bytes for a jump:
by stand-ins that keep IF in memory.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvmpy.x86.instruction_length import length_and_kind, sweep

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Code", "StandIns", "find_instructions", "ways_into"]

_PAGE = 0x1000
_MASK = (1 << 64) - 1
HLT = 0xF4
_MOV_SELECTOR = 0x8C
# mov eax, ss; push rax; push rsp; add qword [rsp], 8; pushf; mov eax, cs; push rax; push next; iretq: how Linux makes
# a processor forget what it has fetched. It goes on behind that, with CS in EAX.
_RETURN_TO_SELF = bytes.fromhex("8cd0 50 54 4883042408 9c 8cc8 50 68 00000000 48cf")
_PUSHF, _CLI, _STI, _POP_RAX, _JMP = 0x9C, 0xFA, 0xFB, 0x58, 0xE9
_JMP_SHORT = 0xEB
_FILLERS = {0xCC, 0x90}
_SLOT = 32
_NOT_KEPT = 0xFFFF_FFFF & ~(0x4_0200 | 0x3000)  # all flags but AC, IF, IOPL


class Code:
    """A copy of one page of code: the bytes that it was made from, where instructions begin, and what was replaced.

    `first` and `end` are where the first instruction begins in the page and the last one ends behind it (-1: unknown).
    With `uncertain`, bytes before `first` were left out.
    """

    __slots__ = ("copy", "end", "first", "inside", "original", "slot", "stand_ins", "starts", "uncertain")

    def __init__(self, original: bytes, starts: set[int], first: int, end: int, uncertain: bool) -> None:
        self.original = original
        self.copy = bytearray(original)
        self.starts = starts
        self.first = first
        self.end = end
        self.uncertain = uncertain
        self.slot = 0
        self.stand_ins: list[int] = []
        self.inside: set[int] = set()
        """Where instructions began that a jump to a stand-in is in the place of, but the first one."""


def ways_into(code: bytes, border: int) -> set[int]:
    """Where instructions may begin behind `border`: ways that begin before it at different bytes mostly agree."""
    ways = set()
    for start in range(16 if border else 1):
        at = start
        while at < border:
            at += length_and_kind(code, at)[0] or 1
        ways.add(at)
    return ways


def find_instructions(code: bytes, border: int, ways: set[int], entry: int | None) -> tuple[set[int], list[int]] | None:
    """Instructions that begin from `border` on for a page, and the sensitive ones of them; None if it is not certain.

    Where `ways` differ, what comes before they fall into step is left out. `entry`, if it is known, is where the
    processor goes on in the page: the ways that miss it are wrong.
    """
    end = border + _PAGE
    swept = [sweep(code, way, end) for way in sorted(ways)]
    if entry is not None:
        swept = [found for found in swept if border + entry in found[0]] or [sweep(code, border + entry, end)]
    if len(swept) == 1:
        return swept[0]
    common = set.intersection(*(found[0] for found in swept))
    return sweep(code, min(common), end) if common else None


class StandIns:
    """Short pieces of code at linear address `base`, written through `data`; 32 bytes each.

    `flags` is the linear address of eight bytes in which IF and AC of the guest are, at their places in RFLAGS, and
    `pending` of a byte that is not zero when an interrupt waits for IF.
    """

    def __init__(self, base: int, data: memoryview, flags: int, pending: int) -> None:
        self.base = base
        self.end = base + len(data)
        self._data = data
        self._flags, self._pending = flags, pending
        self.selector = 0x10
        """CS of the guest."""
        self.null_selectors = False
        """Whether the guest has 0 in DS, ES, FS and GS."""
        self._free = list(range(len(data) // _SLOT - 1, -1, -1))
        self._sites: dict[int, tuple[int, int, int]] = {}
        """Slot -> opcode, linear address of what it stands in for, and of what comes next."""

    def replace(self, code: Code, at: int, linear: int, entry: int | None) -> None:
        """Put a jump to a stand-in, or HLT, in the place of the sensitive instruction at offset `at` of a page.

        No jump where the processor goes on at `entry` in the midst of it.
        """
        if self.null_selectors and _reads_data_selector(code.original, at):
            return  # ring 3 reads 0, too
        place = self._room(code, at, linear) if self._is_near(linear) else None
        if place is None or not self._free or not self._is_near(place[0]):
            code.copy[at] = HLT
            return
        following, size, jump = place
        inside = {start for start in range(at + 1, at + size) if start in code.starts}
        if entry in inside:
            code.copy[at] = HLT
            return
        code.inside |= inside
        slot = self._free.pop()
        opcode = code.original[at]
        address = self.base + slot * _SLOT
        body = self._body(opcode, address, following)
        self._data[slot * _SLOT : slot * _SLOT + len(body)] = body
        self._sites[slot] = (opcode, linear + at, following)
        code.stand_ins.append(slot)
        code.copy[at : at + size] = bytes((HLT,)) * size
        if jump != at:
            code.copy[at : at + 2] = bytes((_JMP_SHORT, jump - at - 2))
        code.copy[jump : jump + 5] = bytes((_JMP,)) + _relative(address - (linear + jump + 5))

    def release(self, code: Code) -> None:
        """The copy is no longer used."""
        for slot in code.stand_ins:
            del self._sites[slot]
            self._free.append(slot)
        code.stand_ins = []

    def _is_near(self, linear: int) -> bool:
        """Whether relative jumps reach there."""
        return abs(linear - self.base) < 0x7FF0_0000

    @staticmethod
    def _room(code: Code, at: int, linear: int) -> tuple[int, int, int] | None:
        """Where the guest goes on behind the instruction, how many bytes it takes with the NOPs that follow, and where
        in the page the jump goes; None if there is no room for one.

        What is no NOP must be readable still: kernels look at the jumps at the ends of their functions.
        """
        original = code.original
        opcode = original[at]
        if opcode == _MOV_SELECTOR:
            end = at + len(_RETURN_TO_SELF)
            found = bytearray(original[at:end])
            found[14:18] = bytes(4)
            return (linear + end, len(found), at) if found == _RETURN_TO_SELF else None
        if opcode not in (_PUSHF, _CLI, _STI):
            return None
        end = at + 1
        if opcode == _PUSHF:
            if original[end : end + 1] != bytes((_POP_RAX,)):
                return None
            end += 1
        behind = end + 5
        if opcode == _PUSHF and at % 16 == 0 and original[end] == _JMP:  # a function of its own, and what fills it up
            if {*original[behind : at + 16]} <= _FILLERS and behind + 5 <= _PAGE:
                (offset,) = struct.unpack_from("<i", original, end + 1)
                return linear + behind + offset & _MASK, end - at, behind
            return None
        while end < _PAGE - 16 and (length := _nop(original, end)):
            end += length
        return (linear + end, end - at, at) if end - at >= 5 else None

    def _body(self, opcode: int, address: int, following: int) -> bytes:
        def relative(target: int, end: int) -> bytes:
            return _relative(target - (address + end))

        if opcode == _PUSHF:  # pushf; pushf; pop rax; and eax, ...; or eax, [flags]; popf; jmp
            return (
                b"\x9c\x9c\x58\x25" + struct.pack("<I", _NOT_KEPT) + b"\x0b\x05" + relative(self._flags, 14)
                + b"\x9d\xe9" + relative(following, 20)
            )  # fmt: skip
        if opcode == _MOV_SELECTOR:  # push rax; push rsp; add qword [rsp], 8; lea rsp, [rsp + 16]; mov eax, CS; jmp
            return (
                bytes.fromhex("50 54 4883042408 488d642410 b8")
                + self.selector.to_bytes(4, "little")
                + b"\xe9"
                + (relative(following, 22))
            )
        if opcode == _CLI:  # mov byte [flags + 1], 0; jmp
            return b"\xc6\x05" + relative(self._flags + 1, 7) + b"\0\xe9" + relative(following, 12)
        # pushf; mov byte [flags + 1], 2; cmp byte [pending], 0; jne +6; popf; jmp; popf; hlt
        return (
            b"\x9c\xc6\x05" + relative(self._flags + 1, 8) + b"\x02\x80\x3d" + relative(self._pending, 15)
            + b"\0\x75\x06\x9d\xe9" + relative(following, 23) + b"\x9d\xf4"
        )  # fmt: skip

    def settle(self, rip: int, rsp: int, rflags: int, read: Callable[[int, int], bytes]) -> tuple[int, int, int, bool]:
        """From within a stand-in to where the guest would be: RIP, RSP, RFLAGS, and whether IF is set now.

        `read(linear, size)` reads guest memory. Where nothing has happened yet, that is before the instruction.
        """
        opcode, site, following = self._sites[(rip - self.base) // _SLOT]
        at = (rip - self.base) % _SLOT
        if at == 0:
            return site, rsp, rflags, False
        if opcode == _CLI:
            return following, rsp, rflags, False
        if opcode == _MOV_SELECTOR:
            return (following if at == 17 else site), rsp + {1: 8, 2: 16, 7: 16}.get(at, 0), rflags, False
        if opcode == _PUSHF:
            if at == 15:
                return following, rsp, rflags, False
            if at in (8, 14):
                rflags = int.from_bytes(read(rsp, 8), "little")
            return site, rsp + (16 if at == 2 else 8), rflags, False
        if at in (18, 24):
            return following, rsp, rflags, True
        return following, rsp + 8, int.from_bytes(read(rsp, 8), "little"), True


def _reads_data_selector(code: bytes, at: int) -> bool:
    """MOV to a register from DS, ES, FS or GS."""
    while code[at] == 0x66 or code[at] & 0xF0 == 0x40:
        at += 1
        if at >= _PAGE - 1:
            return False
    return code[at] == _MOV_SELECTOR and code[at + 1] >= 0xC0 and code[at + 1] >> 3 & 7 in (0, 3, 4, 5)


def _relative(distance: int) -> bytes:
    return struct.pack("<i", distance)


def _nop(code: bytes, at: int) -> int:
    """The length of a NOP, one or more bytes, or 0."""
    start = at
    while code[at] in (0x66, 0x2E):
        at += 1
    if code[at] == 0x90 or code[at : at + 2] == b"\x0f\x1f":
        return length_and_kind(code, start)[0]
    return 0
