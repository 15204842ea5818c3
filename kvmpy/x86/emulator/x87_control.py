"""FNCLEX, FWAIT, FLDCW, FNSTCW, FNSTSW, EMMS, LDMXCSR, STMXCSR, FILD and their like (SDM vol. 2)."""

from __future__ import annotations

from kvmpy.x86.emulator.extended_state import SSE, X87
from kvmpy.x86.emulator.guest_exception import GuestException
from kvmpy.x86.emulator.processor import Operands
from kvmpy.x86.emulator.table import MEMORY, instruction
from kvmpy.x86.flags import Cr0, Cr4

_UD, _NM, _MF, _GP = 6, 7, 16, 13
_RAX = 0
FCW, FSW, FTW, ST0 = 0, 2, 4, 32
_EXCEPTIONS, _ES, _BUSY = 0x3F, 0x80, 0x8000


def check_x87(op: Operands, *, waits: bool = True) -> None:
    """Raise #NM and #MF as an x87 instruction does (SDM vol. 3, 2.5; vol. 1, 8.7)."""
    cr0 = op.cpu.sregs.cr0
    if cr0 & (Cr0.EM | Cr0.TS):
        raise GuestException.of(_NM)
    if waits and cr0 & Cr0.NE and op.cpu.extended_state().in_use & X87:
        state = op.cpu.extended_state()
        if state.get(FSW, 2) & _ES:
            raise GuestException.of(_MF)


@instruction("fwait", 0, 0x9B, prefix=None, modrm=False)
def _fwait(op: Operands) -> None:
    cr0 = op.cpu.sregs.cr0
    if cr0 & Cr0.TS and cr0 & Cr0.MP:
        raise GuestException.of(_NM)
    state = op.cpu.extended_state()
    if cr0 & Cr0.NE and state.in_use & X87 and state.get(FSW, 2) & _ES:
        raise GuestException.of(_MF)


@instruction("fnclex", 0, 0xDB, prefix=None, digit=4, rm=2)
def _fnclex(op: Operands) -> None:
    check_x87(op, waits=False)
    state = op.cpu.extended_state()
    state.need(X87)
    state.put(FSW, state.get(FSW, 2) & ~(_EXCEPTIONS | 0x40 | _ES | _BUSY), 2)


@instruction("fldcw", 0, 0xD9, prefix=None, digit=5, operand=MEMORY)
def _fldcw(op: Operands) -> None:
    check_x87(op)
    state = op.cpu.extended_state()
    state.need(X87)
    word = op.load(2)
    state.put(FCW, word & 0x1F3F | 0x40, 2)
    status = state.get(FSW, 2)
    pending = status & ~word & _EXCEPTIONS
    state.put(FSW, status & ~(_ES | _BUSY) | ((_ES | _BUSY) if pending else 0), 2)


@instruction("fnstsw ax", 0, 0xDF, prefix=None, digit=4, rm=0)
def _fnstsw(op: Operands) -> None:
    check_x87(op, waits=False)
    state = op.cpu.extended_state()
    state.need(X87)
    op.set_register(_RAX, state.get(FSW, 2), 2)


@instruction("emms", 1, 0x77)
def _emms(op: Operands) -> None:
    if op.cpu.sregs.cr0 & Cr0.EM:
        raise GuestException.of(_UD)
    check_x87(op)
    state = op.cpu.extended_state()
    state.need(X87)
    state.put(FTW, 0, 1)  # the abridged tag word: a bit is set for a register in use


def _push_integer(op: Operands, size: int) -> None:
    check_x87(op)
    value = op.load(size)
    if value >> 8 * size - 1:
        value -= 1 << 8 * size
    push(op, _extended_real(value))


def _extended_real(value: int) -> int:
    """An integer of up to 64 bits as an 80-bit number, exactly."""
    if not value:
        return 0
    sign, magnitude = (1 << 79 if value < 0 else 0), abs(value)
    shift = 64 - magnitude.bit_length()
    return sign | 0x3FFF + 63 - shift << 64 | magnitude << shift


def push(op: Operands, value: int) -> None:
    """Push an 80-bit number; a full stack gives the indefinite number, and IE, SF and C1 (SDM vol. 1, 8.5.1.1)."""
    state = op.cpu.extended_state()
    state.need(X87)
    status, tags = state.get(FSW, 2), state.get(FTW, 1)
    top = (status >> 11) - 1 & 7
    overflow = tags >> top & 1
    status &= ~0x200
    if overflow:
        status |= 0x241
        if not state.get(FCW, 2) & 1:  # not masked: nothing is pushed
            state.put(FSW, status | _ES | _BUSY, 2)
            return
        value = 0xFFFF_C000_0000_0000_0000
    state.put(FSW, status & ~0x3800 | top << 11, 2)
    state.put(FTW, tags | 1 << top, 1)
    # The area holds ST0 first; a push moves the others one place up.
    registers = [state.get(ST0 + 16 * place, 10) for place in range(8)]
    for place, number in enumerate([value, *registers[:7]]):
        state.put(ST0 + 16 * place, number, 10)


@instruction("fild m16", 0, 0xDF, prefix=None, digit=0, operand=MEMORY)
def _fild_16(op: Operands) -> None:
    _push_integer(op, 2)


@instruction("fild m32", 0, 0xDB, prefix=None, digit=0, operand=MEMORY)
def _fild_32(op: Operands) -> None:
    _push_integer(op, 4)


@instruction("fild m64", 0, 0xDF, prefix=None, digit=5, operand=MEMORY)
def _fild_64(op: Operands) -> None:
    _push_integer(op, 8)


def _check_sse(op: Operands) -> None:
    sregs = op.cpu.sregs
    if sregs.cr0 & Cr0.EM or not sregs.cr4 & Cr4.OSFXSR:
        raise GuestException.of(_UD)
    if sregs.cr0 & Cr0.TS:
        raise GuestException.of(_NM)


@instruction("ldmxcsr", 1, 0xAE, digit=2, operand=MEMORY)
def _ldmxcsr(op: Operands) -> None:
    _check_sse(op)
    state = op.cpu.extended_state()
    value = op.load(4)
    if value & ~state.mxcsr_bits:
        raise GuestException.of(_GP, 0)
    state.need(SSE)
    state.current_mxcsr = value


@instruction("stmxcsr", 1, 0xAE, digit=3, operand=MEMORY)
def _stmxcsr(op: Operands) -> None:
    _check_sse(op)
    op.store(op.cpu.extended_state().current_mxcsr, 4)
