"""FNSTENV, FLDENV, FNSAVE, FRSTOR: x87 state in memory in the formats of the 80287 and 80387 (SDM vol. 1, 8.1.10)."""

from __future__ import annotations

import struct

from kvmpy.x86.emulator.extended_state import FCW, FDP, FIP, FOP, FSW, FTW, ST, ExtendedState
from kvmpy.x86.emulator.processor import Operands
from kvmpy.x86.emulator.table import MEMORY, instruction
from kvmpy.x86.emulator.x87_numbers import tag
from kvmpy.x86.emulator.x87_stack import check_x87, rotate
from kvmpy.x86.flags import Cr0

_EXCEPTIONS = 0x3F
_EMPTY = 3
_INITIAL_CONTROL = 0x37F


def _tag_word(state: ExtendedState) -> int:
    """The full tag word, two bits for each of R0 to R7."""
    tags, top, word = state.get(FTW, 1), state.get(FSW, 2) >> 11 & 7, 0
    for register in range(8):
        in_use = tags >> register & 1
        place = register - top & 7
        word |= (tag(state.get(ST + 16 * place, 10)) if in_use else _EMPTY) << 2 * register
    return word


def _wide(op: Operands) -> bool:
    """Whether the format has 32-bit fields: by operand size, which REX.W does not change."""
    return op.it.operand_size != 2


def _environment(op: Operands, state: ExtendedState) -> bytes:
    words = state.get(FCW, 2), state.get(FSW, 2), _tag_word(state)
    opcode, instruction_at, operand_at = state.get(FOP, 2), state.get(FIP, 8), state.get(FDP, 8)
    protected = op.cpu.sregs.cr0 & Cr0.PE
    # FCS and FDS are zero, as on processors that deprecate them (CPUID leaf 7, EBX bit 13).
    if _wide(op):
        if protected:
            pointers = instruction_at & 0xFFFF_FFFF, opcode << 16, operand_at & 0xFFFF_FFFF, 0xFFFF_0000
        else:
            high = (instruction_at >> 16 & 0xFFFF) << 12 | opcode
            pointers = (
                instruction_at & 0xFFFF | 0xFFFF_0000, high, operand_at & 0xFFFF | 0xFFFF_0000,
                (operand_at >> 16 & 0xFFFF) << 12,
            )  # fmt: skip
        return struct.pack("<7I", *(word | 0xFFFF_0000 for word in words), *pointers)
    if protected:
        return struct.pack("<7H", *words, instruction_at & 0xFFFF, 0, operand_at & 0xFFFF, 0)
    high = (instruction_at >> 16 & 0xF) << 12 | opcode
    return struct.pack(
        "<7H", *words, instruction_at & 0xFFFF, high, operand_at & 0xFFFF, (operand_at >> 16 & 0xF) << 12
    )


def _load_environment(op: Operands, state: ExtendedState, data: bytes) -> None:
    protected = op.cpu.sregs.cr0 & Cr0.PE
    control, status, tags, *pointers = struct.unpack("<7I" if _wide(op) else "<7H", data)
    if protected:
        instruction_at, opcode, operand_at = pointers[0], pointers[1] >> 16, pointers[2]
    else:
        instruction_at = pointers[0] & 0xFFFF | (pointers[1] >> 12 & 0xFFFF) << 16
        opcode, operand_at = pointers[1], pointers[2] & 0xFFFF | (pointers[3] >> 12 & 0xFFFF) << 16
    state.put(FCW, control & 0x1F3F | 0x40, 2)
    before = state.get(FSW, 2)
    rotate(state, before, (status >> 11) - (before >> 11) & 7)  # what R0 to R7 hold stays there
    state.set_status(status & 0xFFFF)
    in_use = sum(1 << register for register in range(8) if tags >> 2 * register & 3 != _EMPTY)
    state.put(FTW, in_use, 1)
    state.put(FOP, opcode & 0x7FF, 2)
    state.put(FIP, instruction_at, 8)
    state.put(FDP, operand_at, 8)


@instruction("fnstenv", 0, 0xD9, prefix=None, digit=6, operand=MEMORY)
def _fnstenv(op: Operands) -> None:
    state = check_x87(op, waits=False)
    op.store_bytes(_environment(op, state))
    state.put(FCW, state.get(FCW, 2) | _EXCEPTIONS, 2)
    state.set_status(state.get(FSW, 2))


@instruction("fldenv", 0, 0xD9, prefix=None, digit=4, operand=MEMORY)
def _fldenv(op: Operands) -> None:
    state = check_x87(op)
    _load_environment(op, state, op.load_bytes(28 if _wide(op) else 14))


@instruction("fnsave", 0, 0xDD, prefix=None, digit=6, operand=MEMORY)
def _fnsave(op: Operands) -> None:
    state = check_x87(op, waits=False)
    registers = b"".join(bytes(state.area[at : at + 10]) for at in range(ST, ST + 128, 16))
    op.store_bytes(_environment(op, state) + registers)
    before = state.get(FSW, 2)
    rotate(state, before, -(before >> 11 & 7))
    for offset, value, size in (
        (FCW, _INITIAL_CONTROL, 2),
        (FSW, 0, 2),
        (FTW, 0, 2),
        (FOP, 0, 2),
        (FIP, 0, 8),
        (FDP, 0, 8),
    ):
        state.put(offset, value, size)


@instruction("frstor", 0, 0xDD, prefix=None, digit=4, operand=MEMORY)
def _frstor(op: Operands) -> None:
    state = check_x87(op)
    size = 28 if _wide(op) else 14
    data = op.load_bytes(size + 80)
    _load_environment(op, state, data[:size])
    for place in range(8):
        at = size + 10 * place
        state.area[ST + 16 * place : ST + 16 * place + 10] = data[at : at + 10]
