"""An instruction taken apart: prefixes, opcode, ModRM, displacement, immediate (SDM vol. 2, chapter 2)."""

from __future__ import annotations

from kvmpy.errors import KvmpyError

__all__ = ["EvexPrefix", "Instruction", "MemoryOperand", "TruncatedInstruction", "decode_head", "decode_operands"]

LEGACY, VEX, EVEX = "legacy", "vex", "evex"

_SEGMENT_PREFIXES = {0x2E: "cs", 0x36: "ss", 0x3E: "ds", 0x26: "es", 0x64: "fs", 0x65: "gs"}
_RSP, _RBP, _R12, _R13 = 4, 5, 12, 13
_NONE = 4
"""SIB.index that means no index."""

# ModRM.rm of 16-bit addressing: (base, index) by number of register (SDM vol. 2, table 2-1).
_FORMS_16 = ((3, 6), (3, 7), (5, 6), (5, 7), (6, None), (7, None), (5, None), (3, None))


class TruncatedInstruction(KvmpyError):
    """The bytes end before the instruction does."""


class MemoryOperand:
    """An address to be computed: base and index are numbers of general registers, or None.

    `segment` is the name of the segment register. `rip_relative`: the displacement counts from the next instruction.
    """

    __slots__ = ("base", "displacement", "index", "rip_relative", "scale", "segment")

    def __init__(
        self, base: int | None, index: int | None, scale: int, displacement: int, segment: str, rip_relative: bool
    ) -> None:
        self.base = base
        self.index = index
        self.scale = scale
        self.displacement = displacement
        self.segment = segment
        self.rip_relative = rip_relative


class EvexPrefix:
    """What EVEX says beyond what VEX does (SDM vol. 2, 2.7): `size` of vectors in bytes, 16, 32 or 64 (48 is none).

    `mask` is the number of an opmask register, 0 for none; elements that it leaves out become zero when it `zeroes`.
    `broadcast`: a memory operand is one element; between registers it is rounding control. `reg` and `rm` are what is
    added to the numbers of registers.
    """

    __slots__ = ("broadcast", "mask", "reg", "rm", "size", "zeroes")

    def __init__(self, first: int, last: int) -> None:
        self.size = 16 << (last >> 5 & 3) if last >> 5 & 3 < 3 else 48
        self.mask = last & 7
        self.zeroes = bool(last & 0x80)
        self.broadcast = bool(last & 0x10)
        self.reg = 0 if first & 0x10 else 16
        self.rm = 0 if first & 0x40 else 16


class Instruction:
    """What the bytes say. `map` is the opcode map: 0 one-byte opcodes, 1 0F, 2 0F38, 3 0F3A.

    `prefix` is the mandatory prefix: 0, 0x66, 0xF3 or 0xF2 (of the last two the later one wins, and both win over
    0x66). `reg` and `rm` are register numbers with their REX or VEX extensions; `rm` counts when `memory` is None.
    `operand_size` is that of general registers, in bytes.
    """

    __slots__ = (
        "address_size", "bits", "encoding", "evex", "has_66", "immediate", "length", "lock", "map", "memory", "mod",
        "modrm", "opcode", "opcode_at", "operand_size", "prefix", "reg", "rex", "rm", "segment", "vector_256", "vvvv",
        "w",
    )  # fmt: skip

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.encoding = LEGACY
        self.map = 0
        self.opcode = 0
        self.opcode_at = 0
        self.prefix = 0
        self.has_66 = False
        self.lock = False
        self.segment = ""
        self.rex = 0
        """The REX prefix with its bits W, R, X, B; for VEX the same bits."""
        self.w = False
        self.vvvv = 0
        self.vector_256 = False
        self.evex: EvexPrefix | None = None
        self.operand_size = 2 if bits == 16 else 4
        self.address_size = bits // 8
        self.modrm = 0
        """The byte."""
        self.mod = 3
        self.reg = 0
        self.rm = 0
        self.memory: MemoryOperand | None = None
        self.immediate = 0
        self.length = 0


def decode_head(code: bytes, bits: int) -> Instruction:
    """Prefixes and opcode of the instruction at the start of `code`. Raises TruncatedInstruction."""
    try:
        return _decode_head(code, bits)
    except IndexError:
        raise TruncatedInstruction(f"the instruction is longer than {code.hex(' ')}") from None


def _decode_head(code: bytes, bits: int) -> Instruction:
    it = Instruction(bits)
    at = 0
    while True:
        byte = code[at]
        if byte == 0x66:
            it.has_66 = True
        elif byte in (0xF2, 0xF3):
            it.prefix = byte
        elif byte == 0xF0:
            it.lock = True
        elif byte == 0x67:
            it.address_size = {16: 4, 32: 2, 64: 4}[bits]
        elif byte in _SEGMENT_PREFIXES:
            if bits != 64 or byte in (0x64, 0x65):  # the others are ignored in 64-bit mode
                it.segment = _SEGMENT_PREFIXES[byte]
        else:
            break
        at += 1
    if bits == 64 and 0x40 <= byte <= 0x4F:
        it.rex = byte
        at += 1
        byte = code[at]
    if byte in (0xC4, 0xC5) and (bits == 64 or code[at + 1] >= 0xC0):
        return _vex(it, code, at)
    if byte == 0x62 and (bits == 64 or code[at + 1] >= 0xC0):
        return _evex(it, code, at)
    if byte == 0x0F:
        at += 1
        byte = code[at]
        it.map = {0x38: 2, 0x3A: 3}.get(byte, 1)
        if it.map > 1:
            at += 1
            byte = code[at]
    it.opcode, it.opcode_at = byte, at
    it.w = bool(it.rex & 8)
    it.prefix = it.prefix or (0x66 if it.has_66 else 0)
    if it.w:
        it.operand_size = 8
    elif it.has_66:
        it.operand_size = 6 - it.operand_size  # 2 becomes 4 and 4 becomes 2
    return it


def _vex(it: Instruction, code: bytes, at: int) -> Instruction:
    """SDM vol. 2, 2.3.5: C5 RvvvvLpp, or C4 RXBmmmmm WvvvvLpp, the bits R, X, B and vvvv inverted."""
    it.encoding = VEX
    first = code[at + 1]
    if code[at] == 0xC5:
        it.map, last = 1, first
        it.rex = (~first >> 5) & 4
        at += 2
    else:
        it.map, last = first & 31, code[at + 2]
        it.rex = (~first >> 5) & 7 | (8 if last & 0x80 else 0)
        at += 3
    if it.bits != 64:
        it.rex &= 8
    it.w = bool(it.rex & 8)
    it.vvvv = ~last >> 3 & 15 if it.bits == 64 else ~last >> 3 & 7
    it.vector_256 = bool(last & 4)
    it.prefix = (0, 0x66, 0xF3, 0xF2)[last & 3]
    it.operand_size = 8 if it.w and it.bits == 64 else 4
    it.opcode, it.opcode_at = code[at], at
    return it


def _evex(it: Instruction, code: bytes, at: int) -> Instruction:
    """SDM vol. 2, 2.7.1: 62 RXBR0mmm Wvvvv1pp zLLbVaaa; R, X, B, R', vvvv and V' inverted."""
    first, second, last = code[at + 1], code[at + 2], code[at + 3]
    it.encoding = EVEX
    it.evex = EvexPrefix(first, last)
    it.map = first & 7
    it.rex = (~first >> 5) & 7 | (8 if second & 0x80 else 0)
    it.w = bool(second & 0x80)
    it.vvvv = ~second >> 3 & 15 | (0 if last & 8 else 16)
    it.prefix = (0, 0x66, 0xF3, 0xF2)[second & 3]
    if it.bits != 64:
        it.rex &= 8
        it.vvvv &= 7
        it.evex.reg = it.evex.rm = 0
    it.opcode, it.opcode_at = code[at + 4], at + 4
    return it


def decode_operands(it: Instruction, code: bytes, *, modrm: bool, immediate: int) -> None:
    """ModRM with all that follows, and an immediate of so many bytes; completes `it`. Raises TruncatedInstruction."""
    at = it.opcode_at + 1
    try:
        if modrm:
            at = _modrm(it, code, at)
    except IndexError:
        raise TruncatedInstruction(f"the instruction is longer than {code.hex(' ')}") from None
    if at + immediate > len(code):
        raise TruncatedInstruction(f"the instruction is longer than {code.hex(' ')}")
    it.immediate = int.from_bytes(code[at : at + immediate], "little")
    it.length = at + immediate


def _modrm(it: Instruction, code: bytes, at: int) -> int:
    it.modrm = modrm = code[at]
    at += 1
    it.mod = modrm >> 6
    it.reg = modrm >> 3 & 7 | (8 if it.rex & 4 else 0)
    rm = modrm & 7
    if it.evex is not None:
        it.reg += it.evex.reg
    if it.mod == 3:
        it.rm = rm | (8 if it.rex & 1 else 0) | (0 if it.evex is None else it.evex.rm)
        return at
    if it.address_size == 2:
        return _memory_16(it, code, at, rm)
    base: int | None = rm | (8 if it.rex & 1 else 0)
    index, scale, rip_relative = None, 1, False
    if rm == _RSP:
        sib = code[at]
        at += 1
        scale = 1 << (sib >> 6)
        index = sib >> 3 & 7 | (8 if it.rex & 2 else 0)
        if index == _NONE:
            index = None
        base = sib & 7 | (8 if it.rex & 1 else 0)
        if sib & 7 == _RBP and it.mod == 0:
            base = None
    elif rm == _RBP and it.mod == 0:
        base, rip_relative = None, it.bits == 64
    size = 1 if it.mod == 1 else 4 if it.mod == 2 or base is None else 0
    displacement, at = _displacement(code, at, size)
    if it.evex is not None and size == 1:  # in units of the operand: of the rows here it is a vector or an element
        displacement *= (8 if it.w else 4) if it.evex.broadcast else it.evex.size
    segment = it.segment or ("ss" if base in (_RSP, _RBP) else "ds")
    it.memory = MemoryOperand(base, index, scale, displacement, segment, rip_relative)
    return at


def _memory_16(it: Instruction, code: bytes, at: int, rm: int) -> int:
    base: int | None
    base, index = _FORMS_16[rm]
    size = it.mod
    if rm == 6 and it.mod == 0:
        base, size = None, 2
    displacement, at = _displacement(code, at, size)
    it.memory = MemoryOperand(base, index, 1, displacement, it.segment or ("ss" if base == _RBP else "ds"), False)
    return at


def _displacement(code: bytes, at: int, size: int) -> tuple[int, int]:
    if at + size > len(code):
        raise IndexError
    return int.from_bytes(code[at : at + size], "little", signed=True), at + size
