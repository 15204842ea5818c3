"""One instruction taken apart, its length included: by the emulator's decoder, and a table of what follows an opcode.

Enough to say what an instruction needs of memory, segments and the stack, with or without a disassembler installed.
VEX, EVEX and 3DNow! forms are not decoded.
"""

from __future__ import annotations

from kvmpy._value import frozen
from kvmpy.x86.instruction import (
    LEGACY,
    Instruction,
    MemoryOperand,
    TruncatedInstruction,
    decode_head,
    decode_operands,
)

__all__ = ["Decoded", "decode"]

# What follows an opcode: "m" ModRM; "b" 8, "w" 16 and "z" 16 or 32 bits of immediate; "M" and "Z" ModRM and such;
# "v" an immediate of the whole operand size; "o" an address; "p" a far pointer; "e" ENTER's; "f" and "F" group 3,
# whose TEST has an immediate; "?" prefixes and escapes, which are taken away before (SDM vol. 2, table A-2).
_ONE_BYTE = (
    "mmmmbz  mmmmbz ?"
    "mmmmbz  mmmmbz  "
    "mmmmbz? mmmmbz? "
    "mmmmbz? mmmmbz? "
    "                "
    "                "
    "  mm????zZbM    "
    "bbbbbbbbbbbbbbbb"
    "MZMMmmmmmmmmmmmm"
    "          p     "
    "oooo    bz      "
    "bbbbbbbbvvvvvvvv"
    "MMw mmMZe w  b  "
    "mmmmbb  mmmmmmmm"
    "bbbbbbbbzzpb    "
    "? ??  fF      mm"
)
_TWO_BYTE_PLAIN = frozenset((*range(0x05, 0x0C), 0x0E, *range(0x30, 0x38), 0x77, 0xA0, 0xA1, 0xA2, 0xA8, 0xA9, 0xAA,
                             *range(0xC8, 0xD0)))  # fmt: skip
_TWO_BYTE_IMMEDIATE = frozenset((0x70, 0x71, 0x72, 0x73, 0xA4, 0xAC, 0xBA, 0xC2, 0xC4, 0xC5, 0xC6))
_MOV_CONTROL = range(0x20, 0x24)
_LONGEST = 15


@frozen
class Decoded:
    """The parts of one instruction.

    `opcode` is one byte, or with its escape 0x0F22, 0x0F38F0. `bits` is the width of the code, `operand_bits` and
    `address_bits` what the prefixes make of it. `rep` is 0xF2 or 0xF3 or 0. `modrm` says whether there is one: then
    `reg` and `rm` are numbers of registers, `rm` when `memory` is None. `immediate` is as encoded, unsigned; `selector`
    the second part of a far pointer.
    """

    data: bytes
    bits: int
    opcode: int
    operand_bits: int
    address_bits: int
    segment: str
    rep: int
    lock: bool
    operand_prefix: bool
    rex: int
    modrm: bool
    reg: int
    rm: int
    memory: MemoryOperand | None
    immediate: int
    immediate_size: int
    selector: int

    @property
    def length(self) -> int:
        return len(self.data)

    @property
    def group(self) -> int:
        """ModRM.reg without REX, where it says which instruction of a group this is; -1 without ModRM."""
        return self.reg & 7 if self.modrm else -1

    @property
    def signed_immediate(self) -> int:
        """The immediate, sign-extended."""
        if not self.immediate_size:
            return 0
        sign = 1 << (8 * self.immediate_size - 1)
        return (self.immediate ^ sign) - sign


def decode(data: bytes, bits: int) -> Decoded | None:
    """The instruction that `data` begins with, in code of 16, 32 or 64 `bits`.

    None when the bytes end before it does, or when its form is not decoded here. That an opcode is decoded does not
    mean that the processor has it.
    """
    data = data[:_LONGEST]
    try:
        it = decode_head(data, bits)
        form = _form(it, data)
        if form is None:
            return None
        return _decode(it, form, data)
    except (TruncatedInstruction, IndexError):
        return None


def _form(it: Instruction, data: bytes) -> str | None:
    """The letter of what follows the opcode; None for what is not decoded."""
    if it.encoding != LEGACY or (it.map == 1 and it.opcode == 0x0F):
        return None
    if it.map == 0:
        if it.opcode == 0x62 and (it.bits == 64 or data[it.opcode_at + 1] >= 0xC0):
            return None  # EVEX
        form = _ONE_BYTE[it.opcode]
        # A REX that is not the last prefix is not decoded either.
        return None if form == "?" or (it.bits == 64 and it.opcode & 0xF0 == 0x40) else form
    if it.map > 1:
        return "M" if it.map == 3 else "m"
    if it.opcode in _TWO_BYTE_PLAIN:
        return " "
    if 0x80 <= it.opcode <= 0x8F:
        return "z"
    return "M" if it.opcode in _TWO_BYTE_IMMEDIATE else "m"


def _decode(it: Instruction, form: str, data: bytes) -> Decoded:
    modrm = form in "mMZfF"
    code = data
    if form in "fF":
        form = {"f": "M", "F": "Z"}[form] if data[it.opcode_at + 1] >> 3 & 7 < 2 else "m"
    if it.map == 1 and it.opcode in _MOV_CONTROL:  # takes ModRM.mod for 3, whatever it is
        at = it.opcode_at + 1
        code = data[:at] + bytes([data[at] | 0xC0]) + data[at + 1 :]
    first = _immediate_size(it, form)
    second = {"p": 2, "e": 1}.get(form, 0)
    decode_operands(it, code, modrm=modrm, immediate=first + second)
    opcode = {0: 0, 1: 0x0F00, 2: 0x0F3800, 3: 0x0F3A00}[it.map] | it.opcode
    return Decoded(
        data=data[: it.length],
        bits=it.bits,
        opcode=opcode,
        operand_bits=8 * it.operand_size,
        address_bits=8 * it.address_size,
        segment=it.segment,
        rep=it.prefix if it.prefix in (0xF2, 0xF3) else 0,
        lock=it.lock,
        operand_prefix=it.has_66,
        rex=it.rex,
        modrm=modrm,
        reg=it.reg,
        rm=it.rm,
        memory=it.memory,
        immediate=it.immediate & ((1 << 8 * first) - 1),
        immediate_size=first,
        selector=it.immediate >> 8 * first if second else 0,
    )


def _immediate_size(it: Instruction, form: str) -> int:
    """Bytes of the first immediate."""
    if form in "zZp":
        near_branch = (it.map == 0 and it.opcode in (0xE8, 0xE9)) or (it.map == 1 and it.opcode & 0xF0 == 0x80)
        return 4 if it.operand_size != 2 or (it.bits == 64 and near_branch) else 2
    return {"b": 1, "M": 1, "w": 2, "e": 2, "v": it.operand_size, "o": it.address_size}.get(form, 0)
