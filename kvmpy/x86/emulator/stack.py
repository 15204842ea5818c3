"""The stack as instructions use it: how wide its pointer is, push and peek (SDM vol. 1, 6.2)."""

from __future__ import annotations

from kvmpy.x86.emulator.guest_exception import GuestException
from kvmpy.x86.emulator.processor import Operands, within_limit
from kvmpy.x86.registers import Segment

__all__ = ["Stack", "pointer_mask", "set_stack_pointer"]

_SS = 12
_RSP = 4


def pointer_mask(segment: Segment, wide: bool) -> int:
    """The bits of the stack pointer that count; `wide`: in 64-bit code."""
    return 0xFFFF_FFFF_FFFF_FFFF if wide else 0xFFFF_FFFF if segment.db else 0xFFFF


def set_stack_pointer(op: Operands, value: int, mask: int) -> None:
    """Write those bits of it."""
    op.set_register(_RSP, value & mask, mask.bit_length() // 8)


class Stack:
    """The stack of the instruction, with operands of `size` bytes. RSP changes by `move_to` and `drop` only."""

    def __init__(self, op: Operands, size: int) -> None:
        self._op = op
        self._segment: Segment = op.cpu.sregs.ss
        self._wide = op.it.bits == 64
        self.size = size
        self.mask = pointer_mask(self._segment, self._wide)
        self.top = op.register(_RSP) & self.mask

    def linear(self, offset: int) -> int:
        """The linear address of an operand at an offset in the stack segment. Raises GuestException (#SS)."""
        if self._wide:
            if offset >> 47 not in (0, 0x1FFFF):
                raise GuestException.of(_SS, 0)
            return offset
        if not within_limit(self._segment, offset, self.size):
            raise GuestException.of(_SS, 0)
        return offset + self._segment.base & 0xFFFF_FFFF

    def read(self, offset: int) -> int:
        """The operand at an offset in the stack segment."""
        return int.from_bytes(self._op.cpu.memory.read(self.linear(offset & self.mask), self.size), "little")

    def __getitem__(self, place: int) -> int:
        """The operand that is `place` operands from the top."""
        return self.read(self.top + place * self.size)

    def push(self, value: int) -> None:
        """Write an operand below the top, which moves; RSP does not."""
        at = self.top - self.size & self.mask
        self._op.cpu.memory.write(self.linear(at), (value & (1 << 8 * self.size) - 1).to_bytes(self.size, "little"))
        self.top = at

    def drop(self, count: int) -> None:
        """Take `count` bytes from it."""
        set_stack_pointer(self._op, self.top + count, self.mask)

    def move_to(self, offset: int) -> None:
        """Write RSP."""
        set_stack_pointer(self._op, offset, self.mask)
