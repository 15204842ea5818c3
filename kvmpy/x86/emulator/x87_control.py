"""FNCLEX, FNINIT, FWAIT, FLDCW, FNSTCW, FNSTSW, EMMS (SDM vol. 2)."""

from __future__ import annotations

from kvmpy.x86.emulator.extended_state import FCW, FDP, FIP, FOP, FSW, FTW
from kvmpy.x86.emulator.guest_exception import GuestException
from kvmpy.x86.emulator.processor import Operands
from kvmpy.x86.emulator.table import MEMORY, instruction
from kvmpy.x86.emulator.x87_stack import check_pending, check_x87, rotate
from kvmpy.x86.flags import Cr0

_UD, _NM = 6, 7
_RAX = 0
_EM, _TS, _MP = int(Cr0.EM), int(Cr0.TS), int(Cr0.MP)
_EXCEPTIONS, _STACK_FAULT = 0x3F, 0x40


@instruction("fwait", 0, 0x9B, prefix=None, modrm=False)
def _fwait(op: Operands) -> None:
    cr0 = op.cpu.sregs.cr0
    if cr0 & _TS and cr0 & _MP:
        raise GuestException.of(_NM)
    check_pending(op, op.cpu.extended_state())


@instruction("fnclex", 0, 0xDB, prefix=None, digit=4, rm=2)
def _fnclex(op: Operands) -> None:
    state = check_x87(op, waits=False)
    state.set_status(state.get(FSW, 2) & ~(_EXCEPTIONS | _STACK_FAULT))


@instruction("fldcw", 0, 0xD9, prefix=None, digit=5, operand=MEMORY)
def _fldcw(op: Operands) -> None:
    state = check_x87(op)
    state.put(FCW, op.load(2) & 0x1F3F | 0x40, 2)
    state.set_status(state.get(FSW, 2))


@instruction("fninit", 0, 0xDB, prefix=None, digit=4, rm=3)
def _fninit(op: Operands) -> None:
    state = check_x87(op, waits=False)
    state.put(FCW, 0x37F, 2)
    status = state.get(FSW, 2)
    rotate(state, status, -(status >> 11 & 7))
    state.put(FSW, 0, 2)
    state.put(FTW, 0, 1)
    state.put(FOP, 0, 2)
    state.put(FIP, 0, 8)
    state.put(FDP, 0, 8)


@instruction("fnstcw", 0, 0xD9, prefix=None, digit=7, operand=MEMORY)
def _fnstcw(op: Operands) -> None:
    op.store(check_x87(op, waits=False).get(FCW, 2), 2)


@instruction("fnstsw m", 0, 0xDD, prefix=None, digit=7, operand=MEMORY)
def _fnstsw_memory(op: Operands) -> None:
    op.store(check_x87(op, waits=False).get(FSW, 2), 2)


@instruction("fneni", 0, 0xDB, prefix=None, digit=4, rm=0)
@instruction("fndisi", 0, 0xDB, prefix=None, digit=4, rm=1)
@instruction("fnsetpm", 0, 0xDB, prefix=None, digit=4, rm=4)
def _nothing(op: Operands) -> None:
    """What the 8087 and the 287 needed, and no later one."""
    check_x87(op, waits=False)


@instruction("fnstsw ax", 0, 0xDF, prefix=None, digit=4, rm=0)
def _fnstsw(op: Operands) -> None:
    op.set_register(_RAX, check_x87(op, waits=False).get(FSW, 2), 2)


@instruction("emms", 1, 0x77, modrm=False)
def _emms(op: Operands) -> None:
    if op.cpu.sregs.cr0 & _EM:
        raise GuestException.of(_UD)
    state = check_x87(op)
    status = state.get(FSW, 2)
    state.put(FSW, rotate(state, status, -(status >> 11 & 7)), 2)  # TOP becomes 0 (SDM vol. 3, table 12-2)
    state.put(FTW, 0, 1)  # the abridged tag word: a bit is set for a register in use
