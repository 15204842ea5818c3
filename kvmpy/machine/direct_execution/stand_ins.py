"""Code that does in ring 3, without leaving the guest, what instructions of ring 0 would have done.

An instruction of its own is mostly too short for a jump. So the jump also takes the place of those that follow, which
are done in the stand-in, too (`kvmpy.machine.direct_execution.pieces`). Nobody knows who jumps to these; so the bytes
of the jump behind its opcode are such that each of them, executed, faults: then the guest goes on in the stand-in. With
its distance fixed so, the jump arrives where nothing is that a kernel would use, at a further jump to the stand-in.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from kvmpy.machine.direct_execution.pieces import BEFORE, Cells, Line, State, assembled, moved, replacement
from kvmpy.x86.instruction_length import length_and_kind
from kvmpy.x86.instruction_runs import reaches

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmpy.machine.direct_execution.code import Code

__all__ = ["HLT", "HOLE", "Place", "StandIns"]

_PAGE = 0x1000
_MASK = (1 << 64) - 1
HLT = 0xF4
_JMP = 0xE9
_JUMP = bytes((_JMP, HLT, HLT, HLT, 0x9A))  # 9A, a far call, is undefined in 64-bit code
_DISTANCE = 0x9AF4_F4F4 - (1 << 32)
HOLE = 0xFFFF_FFFF_0000_0000
"""From here up to our own memory Linux uses nothing, and these jumps arrive."""
_SLOT = 192
_IRETQ = b"\x48\xcf"
_FILLERS = frozenset((0xCC, 0x90))
_FAULTS = frozenset((0xFA, 0xFB))


class Place(NamedTuple):
    """Where the guest is in a stand-in: in the instruction at `here`, with `following` behind it."""

    here: int
    following: int
    state: State


class StandIns:
    """Stand-ins at linear address `base`, written through `data`; `cells` is where they keep the guest's registers.

    `jump_at(linear, code)` writes `code` in the guest's memory between `HOLE` and `top`. False: there is no room.
    """

    def __init__(
        self, base: int, data: memoryview, cells: Cells, top: int, jump_at: Callable[[int, bytes], bool]
    ) -> None:
        self.base = base
        self.end = base + len(data)
        self._top = top
        self._data = data
        self._cells = cells
        self._jump_at = jump_at
        self.has_gs_base_instructions = False
        """Whether the guest has enabled RDFSBASE and its like."""
        self._free = list(range(len(data) // _SLOT - 1, -1, -1))
        self._arrivals: set[int] = set()
        """Where jumps from code arrive."""
        self._sites: dict[int, dict[int, Place]] = {}
        """Slot -> offset in it -> where the guest is there."""

    def contains(self, rip: int) -> bool:
        """Whether an address is one of a stand-in, or on the way to one."""
        return HOLE <= rip < self.end

    def place(self, rip: int) -> Place:
        """Where the guest is, which runs at such an address: right there, if nothing of ours is at it."""
        if rip in self._arrivals:
            site = rip - 5 - _DISTANCE & _MASK
            return Place(site, site, BEFORE)
        slot, offset = divmod(rip - self.base, _SLOT)
        return self._sites.get(slot, {}).get(offset) or Place(rip, rip, BEFORE)

    def fit(self, code: Code, sensitive: list[int], linear: int) -> None:
        """Put jumps to stand-ins in the place of sensitive instructions of the page at `linear`.

        Where that cannot be, HLT; CLI and STI fault themselves.
        """
        original, copy = code.original, code.copy
        code.sensitive = set(sensitive)
        known = code.first
        for at in sensitive:
            byte = original[at]
            is_gs_base = byte == 0xF3 and _is_gs_base_instruction(original, at)
            code.has_gs_base |= is_gs_base
            if at < code.replaced:
                continue
            if is_gs_base and self.has_gs_base_instructions:
                continue  # ring 3 does them as well
            earlier = _earlier(original, at)
            starts_earlier = code.replaced <= earlier < at and reaches(original, known, earlier)
            known = at
            if starts_earlier and self._put(code, earlier, linear, at):
                continue
            if self._put(code, at, linear) or self._put_behind(code, at, linear):
                continue
            if byte not in _FAULTS or at > _PAGE - 16:
                copy[at] = HLT

    def _put(self, code: Code, at: int, linear: int, last: int = 0) -> bool:
        """Have a stand-in do what is at `at` and behind, at least up to the instruction at `last`."""
        original = code.original
        arrival = linear + at + 5 + _DISTANCE & _MASK
        if at > _PAGE - 32 or not self._free or not HOLE <= arrival < self._top - 16:
            return False
        slot = self._free[-1]
        start = self.base + slot * _SLOT
        end = at
        body = b""
        places: dict[int, Place] = {}
        begins: dict[int, int] = {}
        jumps: list[tuple[int, int]] = []
        returns = False
        try:
            while (end - at < 5 or end <= last or original[end : end + 2] == _IRETQ) and not returns:
                here, address = linear + end, start + len(body)
                begins[end] = address
                other = moved(original, end, address, here)
                if other is not None:
                    length, raw, returns = other
                    places[len(body)] = Place(here, here + length, BEFORE)
                    if raw[:1] == b"\x0f" and raw[1] & 0xF0 == 0x80:
                        jumps.append((len(body), end + length + (original[end + 1] ^ 0x80) - 0x80))
                    body += raw
                else:
                    found = replacement(original, end, self._cells) or self._as_it_is(original, end)
                    if found is None:
                        return False
                    length, lines = found
                    offset = len(body)
                    for line in lines:
                        places[offset] = Place(here, here + length, line.state)
                        offset += line.size
                    body += assembled(lines, address)
                end += length
            if returns:
                if not _are_fillers(original, end, at + 5):
                    return False
            else:
                places[len(body)] = Place(linear + end, linear + end, BEFORE)
                body += _jump(start + len(body), linear + end)
            for place, target in jumps:
                if target in begins:  # within the stand-in
                    distance = begins[target] - (start + place + 6)
                    body = body[: place + 2] + struct.pack("<i", distance) + body[place + 6 :]
            jump = _jump(arrival, start)
        except struct.error:  # too far
            return False
        end = max(end, at + 5)
        if len(body) > _SLOT or end > _PAGE or not self._jump_at(arrival, jump):
            return False
        self._arrivals.add(arrival)
        del begins[at]
        self._free.pop()
        self._data[slot * _SLOT : slot * _SLOT + len(body)] = body
        self._sites[slot] = places
        code.stand_ins.append(slot)
        code.moved.update(begins)
        code.copy[at:end] = _JUMP + bytes((HLT,)) * (end - at - 5)
        code.replaced = end
        return True

    def _as_it_is(self, code: bytes, at: int) -> tuple[int, list[Line]] | None:
        """RDFSBASE and its like, which ring 3 does as well if the guest has enabled them."""
        if not self.has_gs_base_instructions or code[at] != 0xF3 or not _is_gs_base_instruction(code, at):
            return None
        length = length_and_kind(code, at)[0]
        return length, [Line(code[at : at + length])]

    def _put_behind(self, code: Code, at: int, linear: int) -> bool:
        """For PUSHF, POP RAX at the end of a function, with a jump to a common RET: kernels look at that.

        The jump goes where there are only fillers, and a short one to it takes two bytes, of which the second is no
        instruction either.
        """
        original = code.original
        found = replacement(original, at, self._cells) if at < _PAGE - 32 and self._free else None
        if original[at : at + 3] != b"\x9c\x58\xe9" or not {*original[at + 7 : at + 13]} <= _FILLERS or found is None:
            return False
        slot = self._free[-1]
        start = self.base + slot * _SLOT
        length, lines = found
        body = assembled(lines, start)
        end = linear + at + length
        try:
            body += _jump(start + len(body), end)
            jump = _jump(linear + at + 8, start)
        except struct.error:
            return False
        places: dict[int, Place] = {}
        offset = 0
        for line in lines:
            places[offset] = Place(linear + at, end, line.state)
            offset += line.size
        places[offset] = Place(end, end, BEFORE)
        self._free.pop()
        self._data[slot * _SLOT : slot * _SLOT + len(body)] = body
        self._sites[slot] = places
        code.stand_ins.append(slot)
        code.copy[at : at + 2] = b"\xeb\x06"
        code.copy[at + 8 : at + 13] = jump
        code.detours[at + 8] = at
        return True

    def release(self, code: Code) -> None:
        """The copy is no longer used."""
        for slot in code.stand_ins:
            del self._sites[slot]
            self._free.append(slot)
        code.stand_ins = []


def _earlier(code: bytes, at: int) -> int:
    """Where a stand-in better begins than at the instruction at `at`, so that it need not do those behind.

    With a jump over this one instruction, which goes to the next; and with what pushes the address that IRETQ goes to,
    which in Linux is that of the next.
    """
    if at >= 2 and code[at - 2] & 0xF0 == 0x70 and code[at - 1] == 1:
        return at - 2
    return at - 5 if at >= 5 and code[at - 5] == 0x68 and code[at : at + 2] == _IRETQ else at


def _jump(address: int, target: int) -> bytes:
    return bytes((_JMP,)) + struct.pack("<i", target - (address + 5))


def _are_fillers(code: bytes, at: int, end: int) -> bool:
    """Whether what is behind a RET is nothing that anybody comes to."""
    while at < end:
        if code[at] in (0xCC, 0x90):
            at += 1
            continue
        start = at
        while code[at] in (0x66, 0x2E):
            at += 1
        if code[at : at + 2] != b"\x0f\x1f" or code[start : start + 5] == b"\x0f\x1f\x44\0\0":
            return False
        at = start + length_and_kind(code, start)[0]
    return True


def _is_gs_base_instruction(code: bytes, at: int) -> bool:
    """RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE, of which F3 is the first byte."""
    at += 2 if code[at + 1] & 0xF0 == 0x40 else 1
    return code[at : at + 2] == b"\x0f\xae"
