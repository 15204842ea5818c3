"""The x87 register stack: checks before an instruction, exceptions, push and pop (SDM vol. 1, chapter 8).

A row changes nothing before the last access to memory that may fault.
"""

from __future__ import annotations

from kvmpy.x86.emulator.extended_state import FCW, FDP, FIP, FOP, FSW, FTW, ST, X87, XMM, ExtendedState
from kvmpy.x86.emulator.guest_exception import GuestException
from kvmpy.x86.emulator.processor import RIP, Operands
from kvmpy.x86.flags import Cr0

__all__ = [
    "C0",
    "C1",
    "C2",
    "C3",
    "DENORMAL",
    "INDEFINITE",
    "INVALID",
    "OVERFLOW",
    "PRECISION",
    "STACK_FAULT",
    "UNDERFLOW",
    "ZERO_DIVIDE",
    "X87Stack",
    "check_pending",
    "check_x87",
    "rotate",
]  # fmt: skip

_NM, _MF = 7, 16
_EM_OR_TS, _NE = int(Cr0.EM | Cr0.TS), int(Cr0.NE)  # plain numbers: an operation on flags makes an object
INVALID, DENORMAL, ZERO_DIVIDE, OVERFLOW, UNDERFLOW, PRECISION, STACK_FAULT = 0x1, 0x2, 0x4, 0x8, 0x10, 0x20, 0x40
_ES, C0, C1, C2, C3, _TOP = 0x80, 0x100, 0x200, 0x400, 0x4000, 0x3800
INDEFINITE = 0xFFFF_C000_0000_0000_0000
"""The quiet NaN that answers masked invalid operations (SDM vol. 1, 4.8.3.7)."""


def check_x87(op: Operands, *, waits: bool = True) -> ExtendedState:
    """The extended state with x87 in it; raises #NM and #MF as an x87 instruction does (SDM vol. 3, 2.5)."""
    if op.cpu.sregs.cr0 & _EM_OR_TS:
        raise GuestException.of(_NM)
    state = op.cpu.extended_state()
    if waits:
        check_pending(op, state)
    state.need(X87)
    return state


def check_pending(op: Operands, state: ExtendedState) -> None:
    """Raise #MF for a pending exception. Without CR0.NE it would be an interrupt of the PC's FERR# line."""
    if op.cpu.sregs.cr0 & _NE and state.in_use & X87 and state.get(FSW, 2) & _ES:
        raise GuestException.of(_MF)


def rotate(state: ExtendedState, status: int, by: int) -> int:
    """Move TOP, up or down; what is in the registers stays there, but the area holds ST0 first. Answers the new FSW."""
    registers = bytes(state.area[ST:XMM])
    state.area[ST:XMM] = registers[16 * by :] + registers[: 16 * by]
    return status & ~_TOP | (status + (by << 11) & _TOP)


class X87Stack:
    """ST0 to ST7 for one instruction that works on them. The area holds ST0 first, tags count from R0."""

    __slots__ = ("_op", "control", "state", "status")

    def __init__(self, op: Operands) -> None:
        self.state = check_x87(op)
        self._op = op
        self.control: int = self.state.get(FCW, 2)
        self.status: int = self.state.get(FSW, 2) & ~C1

    def done(self) -> None:
        """Keep FSW, and what the last instruction was: its opcode, where it and its operand are."""
        op, state = self._op, self.state
        state.set_status(self.status)
        state.put(FOP, (op.it.opcode & 7) << 8 | op.it.modrm, 2)
        state.put(FIP, op.general[RIP], 8)
        if op.it.memory is not None:
            state.put(FDP, op.address(), 8)

    def keep_c1(self) -> None:
        """For the few instructions that leave C1 as it is, unless they find an empty register."""
        self.status |= self.state.get(FSW, 2) & C1

    @property
    def top(self) -> int:
        """FSW.TOP."""
        return self.status >> 11 & 7

    def is_empty(self, place: int) -> bool:
        """Whether ST(place) is."""
        return not self.state.area[FTW] >> (self.top + place & 7) & 1

    def __getitem__(self, place: int) -> int:
        """ST(place) as 80 bits."""
        return self.state.get(ST + 16 * place, 10)

    def __setitem__(self, place: int, value: int) -> None:
        self.state.put(ST + 16 * place, value, 10)
        self.state.put(FTW, self.state.area[FTW] | 1 << (self.top + place & 7), 1)

    def free(self, place: int) -> None:
        """Mark ST(place) empty."""
        self.state.put(FTW, self.state.area[FTW] & ~(1 << (self.top + place & 7)), 1)

    def rotate(self, by: int) -> None:
        """Move TOP by 1 or -1; what is in the registers stays there."""
        self.status = rotate(self.state, self.status, by)

    def signal(self, exceptions: int) -> bool:
        """Note exceptions. Whether all of them are masked."""
        self.status |= exceptions
        return not exceptions & ~self.control & 0x3F

    def push(self, value: int, exceptions: int = 0) -> None:
        """Push a number whose making raised `exceptions`; on a full stack it is the indefinite (SDM vol. 1, 8.5.1.1).

        When that is not masked, nothing is pushed; a denormal is in any case.
        """
        if not self.is_empty(-1):
            value, exceptions = INDEFINITE, INVALID | STACK_FAULT
            self.status |= C1
        if self.signal(exceptions) or not exceptions & INVALID:
            self.rotate(-1)
            self[0] = value

    def pop(self) -> None:
        """Free ST0 and move TOP."""
        self.free(0)
        self.rotate(1)
