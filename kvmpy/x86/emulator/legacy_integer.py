"""What KVM's emulator leaves out of the integer instructions: DAA and its like, BOUND, ARPL, ENTER (SDM vol. 2)."""

from __future__ import annotations

from kvmpy.x86.emulator.guest_exception import GuestException
from kvmpy.x86.emulator.processor import Operands
from kvmpy.x86.emulator.stack import Stack
from kvmpy.x86.emulator.table import MEMORY, instruction
from kvmpy.x86.flags import Cr0, Rflags

_BR, _UD = 5, 6
_RAX, _RBP = 0, 5
_CF, _PF, _AF, _ZF, _SF = (int(flag) for flag in (Rflags.CF, Rflags.PF, Rflags.AF, Rflags.ZF, Rflags.SF))
_RESULT = _PF | _ZF | _SF
_NOT_64 = (16, 32)
_OF = int(Rflags.OF)


def _result_flags(byte: int) -> int:
    return (0 if byte.bit_count() & 1 else _PF) | (0 if byte else _ZF) | (_SF if byte & 0x80 else 0)


def _adjust(name: str, opcode: int, sign: int) -> None:
    """DAA adds, DAS subtracts: 6 for the lower digit, 0x60 for the upper one."""

    @instruction(name, 0, opcode, prefix=None, modrm=False, bits=_NOT_64, undefined=_OF)
    def execute(op: Operands) -> None:
        before, flags = op.register(_RAX, 1), op.flags
        value, after = before, 0
        if before & 15 > 9 or flags & _AF:
            value += 6 * sign
            after = _AF | (_CF if flags & _CF or not 0 <= value <= 0xFF else 0)
        if before > 0x99 or flags & _CF:
            value += 0x60 * sign
            after |= _CF
        elif sign > 0:
            after &= ~_CF  # SDM: "ELSE CF <- 0", only in DAA
        value &= 0xFF
        op.set_register(_RAX, value, 1)
        op.set_flags(after | _result_flags(value), _CF | _AF | _RESULT)


_adjust("daa", 0x27, 1)
_adjust("das", 0x2F, -1)


def _adjust_unpacked(name: str, opcode: int, sign: int) -> None:
    """AAA and AAS: one digit in AL, carried into AH."""

    @instruction(name, 0, opcode, prefix=None, modrm=False, bits=_NOT_64, undefined=_OF | _RESULT)
    def execute(op: Operands) -> None:
        value, carries = op.register(_RAX, 2), bool(op.register(_RAX, 1) & 15 > 9 or op.flags & _AF)
        if carries:
            value += 0x106 * sign
        op.set_register(_RAX, value & 0xFF0F, 2)
        op.set_flags(_CF | _AF if carries else 0, _CF | _AF)


_adjust_unpacked("aaa", 0x37, 1)
_adjust_unpacked("aas", 0x3F, -1)


@instruction("bound", 0, 0x62, prefix=None, operand=MEMORY, bits=_NOT_64)
def _bound(op: Operands) -> None:
    size = op.it.operand_size
    limits = op.load_bytes(2 * size)
    lower, upper = (int.from_bytes(part, "little", signed=True) for part in (limits[:size], limits[size:]))
    index = op.register(op.it.reg, size)
    index -= 1 << 8 * size if index >> 8 * size - 1 else 0
    if not lower <= index <= upper:
        raise GuestException.of(_BR)


@instruction("arpl", 0, 0x63, prefix=None, bits=_NOT_64)
def _arpl(op: Operands) -> None:
    if not op.cpu.sregs.cr0 & Cr0.PE or op.flags & Rflags.VM:
        raise GuestException.of(_UD)
    selector, ring = op.source(2), op.register(op.it.reg, 2) & 3
    raised = selector & 3 < ring
    if raised:
        selector = selector & ~3 | ring
        if op.it.memory is None:
            op.set_register(op.it.rm, selector, 2)
        else:
            op.store(selector, 2)
    op.set_flags(_ZF if raised else 0, _ZF)


@instruction("enter", 0, 0xC8, prefix=None, modrm=False, immediate=3)
def _enter(op: Operands) -> None:
    room, level = op.it.immediate & 0xFFFF, op.it.immediate >> 16 & 31
    size = op.it.operand_size
    if op.it.bits == 64:
        size = 2 if op.it.has_66 and not op.it.w else 8
    stack = Stack(op, size)
    stack.push(op.register(_RBP, size))
    frame = stack.top
    if level:
        pointer = op.register(_RBP)
        for place in range(1, level):
            stack.push(stack.read(pointer - place * size))
        stack.push(frame)
    end = stack.top - room & stack.mask
    op.cpu.memory.check_writable(stack.linear(end), size)
    op.set_register(_RBP, frame, size)
    stack.move_to(end)
