"""POPCNT, LZCNT, TZCNT, BMI1, BMI2, ADX, CRC32, MOVBE (SDM vol. 2)."""

from __future__ import annotations

from kvmpy.x86.emulator.processor import Operands
from kvmpy.x86.emulator.table import MEMORY, instruction
from kvmpy.x86.instruction import VEX

_CF, _PF, _AF, _ZF, _SF, _OF = 0x1, 0x4, 0x10, 0x40, 0x80, 0x800
_ARITHMETIC = _CF | _PF | _AF | _ZF | _SF | _OF

_OUTSIDE_REAL_MODE = (32, 64)


def _zero_and_sign(value: int, size: int) -> int:
    return (_ZF if not value else 0) | (_SF if value >> 8 * size - 1 else 0)


@instruction("popcnt", 1, 0xB8, prefix=0xF3)
def _popcnt(op: Operands) -> None:
    value = op.source(op.it.operand_size)
    op.set_register(op.it.reg, value.bit_count(), op.it.operand_size)
    op.set_flags(0 if value else _ZF, _ARITHMETIC)


@instruction("lzcnt", 1, 0xBD, prefix=0xF3, undefined=_OF | _SF | _PF | _AF)
def _lzcnt(op: Operands) -> None:
    size = op.it.operand_size
    value = op.source(size)
    count = 8 * size - value.bit_length()
    op.set_register(op.it.reg, count, size)
    op.set_flags((_CF if not value else 0) | (_ZF if not count else 0), _CF | _ZF)


@instruction("tzcnt", 1, 0xBC, prefix=0xF3, undefined=_OF | _SF | _PF | _AF)
def _tzcnt(op: Operands) -> None:
    size = op.it.operand_size
    value = op.source(size)
    count = (value & -value).bit_length() - 1 if value else 8 * size
    op.set_register(op.it.reg, count, size)
    op.set_flags((_CF if not value else 0) | (_ZF if not count else 0), _CF | _ZF)


@instruction("andn", 2, 0xF2, encoding=VEX, bits=_OUTSIDE_REAL_MODE, undefined=_AF | _PF)
def _andn(op: Operands) -> None:
    size = op.it.operand_size
    result = ~op.register(op.it.vvvv, size) & op.source(size)
    op.set_register(op.it.reg, result, size)
    op.set_flags(_zero_and_sign(result, size), _ZF | _SF | _OF | _CF)


@instruction("bextr", 2, 0xF7, encoding=VEX, bits=_OUTSIDE_REAL_MODE, undefined=_AF | _PF | _SF)
def _bextr(op: Operands) -> None:
    size = op.it.operand_size
    control = op.register(op.it.vvvv, 2)
    start, length = control & 0xFF, control >> 8
    result = op.source(size) >> start & (1 << length) - 1
    op.set_register(op.it.reg, result, size)
    op.set_flags(0 if result else _ZF, _ZF | _OF | _CF)


def _lowest_bit(op: Operands, result: int, carry: bool) -> None:
    size = op.it.operand_size
    op.set_register(op.it.vvvv, result, size)
    op.set_flags(_zero_and_sign(result, size) | (_CF if carry else 0), _ZF | _SF | _OF | _CF)


@instruction("blsr", 2, 0xF3, digit=1, encoding=VEX, bits=_OUTSIDE_REAL_MODE, undefined=_AF | _PF)
def _blsr(op: Operands) -> None:
    value = op.source(op.it.operand_size)
    _lowest_bit(op, value & (value - 1) if value else 0, not value)


@instruction("blsmsk", 2, 0xF3, digit=2, encoding=VEX, bits=_OUTSIDE_REAL_MODE, undefined=_AF | _PF)
def _blsmsk(op: Operands) -> None:
    value = op.source(op.it.operand_size)
    _lowest_bit(op, (value ^ value - 1) & (1 << 8 * op.it.operand_size) - 1, not value)


@instruction("blsi", 2, 0xF3, digit=3, encoding=VEX, bits=_OUTSIDE_REAL_MODE, undefined=_AF | _PF)
def _blsi(op: Operands) -> None:
    value = op.source(op.it.operand_size)
    _lowest_bit(op, value & -value, bool(value))


@instruction("bzhi", 2, 0xF5, encoding=VEX, bits=_OUTSIDE_REAL_MODE, undefined=_AF | _PF)
def _bzhi(op: Operands) -> None:
    size = op.it.operand_size
    index = op.register(op.it.vvvv, 1)
    value = op.source(size)
    result = value & (1 << index) - 1 if index < 8 * size else value
    op.set_register(op.it.reg, result, size)
    carry = _CF if index > 8 * size - 1 else 0
    op.set_flags(_zero_and_sign(result, size) | carry, _ZF | _SF | _OF | _CF)


@instruction("pdep", 2, 0xF5, prefix=0xF2, encoding=VEX, bits=_OUTSIDE_REAL_MODE)
def _pdep(op: Operands) -> None:
    size = op.it.operand_size
    value, mask, result = op.register(op.it.vvvv, size), op.source(size), 0
    while mask:
        lowest = mask & -mask
        if value & 1:
            result |= lowest
        value >>= 1
        mask ^= lowest
    op.set_register(op.it.reg, result, size)


@instruction("pext", 2, 0xF5, prefix=0xF3, encoding=VEX, bits=_OUTSIDE_REAL_MODE)
def _pext(op: Operands) -> None:
    size = op.it.operand_size
    value, mask, result, place = op.register(op.it.vvvv, size), op.source(size), 0, 0
    while mask:
        lowest = mask & -mask
        if value & lowest:
            result |= 1 << place
        place += 1
        mask ^= lowest
    op.set_register(op.it.reg, result, size)


@instruction("mulx", 2, 0xF6, prefix=0xF2, encoding=VEX, bits=_OUTSIDE_REAL_MODE)
def _mulx(op: Operands) -> None:
    size = op.it.operand_size
    product = op.register(2, size) * op.source(size)  # RDX
    op.set_register(op.it.vvvv, product & (1 << 8 * size) - 1, size)
    op.set_register(op.it.reg, product >> 8 * size, size)  # last: it counts when both are the same register


@instruction("rorx", 3, 0xF0, prefix=0xF2, immediate=1, encoding=VEX, bits=_OUTSIDE_REAL_MODE)
def _rorx(op: Operands) -> None:
    size = op.it.operand_size
    bits = 8 * size
    count, value = op.it.immediate & bits - 1, op.source(size)
    op.set_register(op.it.reg, (value >> count | value << bits - count) & (1 << bits) - 1, size)


def _shift_count(op: Operands) -> int:
    return op.register(op.it.vvvv, 1) & 8 * op.it.operand_size - 1


@instruction("sarx", 2, 0xF7, prefix=0xF3, encoding=VEX, bits=_OUTSIDE_REAL_MODE)
def _sarx(op: Operands) -> None:
    size = op.it.operand_size
    value = op.source(size)
    if value >> 8 * size - 1:
        value -= 1 << 8 * size
    op.set_register(op.it.reg, value >> _shift_count(op) & (1 << 8 * size) - 1, size)


@instruction("shlx", 2, 0xF7, prefix=0x66, encoding=VEX, bits=_OUTSIDE_REAL_MODE)
def _shlx(op: Operands) -> None:
    size = op.it.operand_size
    op.set_register(op.it.reg, op.source(size) << _shift_count(op) & (1 << 8 * size) - 1, size)


@instruction("shrx", 2, 0xF7, prefix=0xF2, encoding=VEX, bits=_OUTSIDE_REAL_MODE)
def _shrx(op: Operands) -> None:
    size = op.it.operand_size
    op.set_register(op.it.reg, op.source(size) >> _shift_count(op), size)


def _add_with(op: Operands, flag: int) -> None:
    size = 8 if op.it.w else 4
    total = op.register(op.it.reg, size) + op.source(size) + (1 if op.flags & flag else 0)
    op.set_register(op.it.reg, total & (1 << 8 * size) - 1, size)
    op.set_flags(flag if total >> 8 * size else 0, flag)


@instruction("adcx", 2, 0xF6, prefix=0x66)
def _adcx(op: Operands) -> None:
    _add_with(op, _CF)


@instruction("adox", 2, 0xF6, prefix=0xF3)
def _adox(op: Operands) -> None:
    _add_with(op, _OF)


def _crc_table() -> tuple[int, ...]:
    """CRC-32C, the polynomial of the instruction (0x11EDC6F41), bits reversed."""
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC = _crc_table()


def _crc32(op: Operands, size: int) -> None:
    value = op.register(op.it.reg, 4)
    for byte in _byte_register_or_memory(op, size).to_bytes(size, "little"):
        value = value >> 8 ^ _CRC[(value ^ byte) & 0xFF]
    op.set_register(op.it.reg, value, 4)


def _byte_register_or_memory(op: Operands, size: int) -> int:
    it = op.it
    if size == 1 and it.memory is None and not it.rex and 4 <= it.rm < 8:  # AH, CH, DH, BH
        return op.register(it.rm - 4, 2) >> 8
    return op.source(size)


@instruction("crc32 r, rm8", 2, 0xF0, prefix=0xF2)
def _crc32_byte(op: Operands) -> None:
    _crc32(op, 1)


@instruction("crc32 r, rm", 2, 0xF1, prefix=0xF2)
def _crc32_word(op: Operands) -> None:
    it = op.it
    # 66 stands beside F2 here, and still gives 16 bits.
    _crc32(op, it.operand_size)


@instruction("movbe load", 2, 0xF0, prefix=None, operand=MEMORY)
def _movbe_load(op: Operands) -> None:
    size = op.it.operand_size
    op.set_register(op.it.reg, int.from_bytes(op.load_bytes(size), "big"), size)


@instruction("movbe store", 2, 0xF1, prefix=None, operand=MEMORY)
def _movbe_store(op: Operands) -> None:
    size = op.it.operand_size
    op.store_bytes(op.register(op.it.reg, size).to_bytes(size, "big"))
