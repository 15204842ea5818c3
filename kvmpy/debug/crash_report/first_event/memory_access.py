"""Which memory an instruction touches, in the processor's order (SDM vol. 2, the pages of the instructions).

Known here are the instructions of the integer set, the moves of SSE, and all that use the stack. For others a
disassembler, where one is installed, says what their memory operand is.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvmpy._value import frozen
from kvmpy.debug.crash_report.first_event.decoder import Decoded
from kvmpy.debug.crash_report.first_event.execution import Execution
from kvmpy.x86.page_walk import Access

__all__ = ["MemoryAccess", "memory_accesses", "stack_item_size"]


@frozen
class MemoryAccess:
    """`size` bytes at an offset in a segment. `what` names it for a reader; `aligned` must divide the address."""

    segment: str
    offset: int
    size: int
    access: Access
    what: str
    aligned: int = 0


_READ, _WRITE, _CHANGE = "r", "w", "rw"

# Opcode -> access to the ModRM operand and its size in bytes; 0 is the operand size.
_ONE_BYTE: dict[int, tuple[str, int]] = {
    0x62: (_READ, 0), 0x69: (_READ, 0), 0x6B: (_READ, 0), 0x84: (_READ, 1), 0x85: (_READ, 0), 0x86: (_CHANGE, 1),
    0x87: (_CHANGE, 0), 0x88: (_WRITE, 1), 0x89: (_WRITE, 0), 0x8A: (_READ, 1), 0x8B: (_READ, 0), 0x8C: (_WRITE, 2),
    0x8E: (_READ, 2), 0x8F: (_WRITE, 0), 0xC0: (_CHANGE, 1), 0xC1: (_CHANGE, 0), 0xC6: (_WRITE, 1), 0xC7: (_WRITE, 0),
    0xD0: (_CHANGE, 1), 0xD1: (_CHANGE, 0), 0xD2: (_CHANGE, 1), 0xD3: (_CHANGE, 0), 0xFE: (_CHANGE, 1),
}  # fmt: skip
_TWO_BYTE: dict[int, tuple[str, int]] = {
    0x0F02: (_READ, 2), 0x0F03: (_READ, 2), 0x0F90: (_WRITE, 1), 0x0FA3: (_READ, 0), 0x0FA4: (_CHANGE, 0),
    0x0FA5: (_CHANGE, 0), 0x0FAB: (_CHANGE, 0), 0x0FAC: (_CHANGE, 0), 0x0FAD: (_CHANGE, 0), 0x0FAF: (_READ, 0),
    0x0FB0: (_CHANGE, 1), 0x0FB1: (_CHANGE, 0), 0x0FB3: (_CHANGE, 0), 0x0FB6: (_READ, 1), 0x0FB7: (_READ, 2),
    0x0FB8: (_READ, 0), 0x0FBB: (_CHANGE, 0), 0x0FBC: (_READ, 0), 0x0FBD: (_READ, 0), 0x0FBE: (_READ, 1),
    0x0FBF: (_READ, 2), 0x0FC0: (_CHANGE, 1), 0x0FC1: (_CHANGE, 0), 0x0FC3: (_WRITE, 0), 0x0F2B: (_WRITE, 16),
    0x0FE7: (_WRITE, 16),
    **{0x0F40 + number: (_READ, 0) for number in range(16)},
    **{0x0F90 + number: (_WRITE, 1) for number in range(16)},
}  # fmt: skip
_SSE_MOVES = {0x0F10: _READ, 0x0F11: _WRITE, 0x0F28: _READ, 0x0F29: _WRITE, 0x0F6F: _READ, 0x0F7F: _WRITE}
_SSE_ALIGNED = (0x0F28, 0x0F29, 0x0F2B, 0x0FE7)

_STRINGS: dict[int, tuple[str, ...]] = {
    0x6C: ("di w",), 0x6E: ("si r",), 0xA4: ("si r", "di w"), 0xA6: ("si r", "di r"), 0xAA: ("di w",),
    0xAC: ("si r",), 0xAE: ("di r",),
}  # fmt: skip
"""By the opcode of the byte form; the next one is the wider form (SDM vol. 1, 7.3.9)."""

_PUSHES = frozenset((0x06, 0x0E, 0x16, 0x1E, *range(0x50, 0x58), 0x68, 0x6A, 0x9C, 0x0FA0, 0x0FA8, 0xE8))
_POPS = frozenset((0x07, 0x17, 0x1F, *range(0x58, 0x60), 0x8F, 0x9D, 0x0FA1, 0x0FA9, 0xC2, 0xC3))


def stack_item_size(decoded: Decoded) -> int:
    """Bytes that a push or a pop moves: in 64-bit mode 8 unless a prefix makes it 2."""
    if decoded.bits != 64:
        return decoded.operand_bits // 8
    near_branch = decoded.opcode in (0xE8, 0xC2, 0xC3) or (decoded.opcode == 0xFF and decoded.group == 2)
    return 2 if decoded.operand_prefix and not near_branch else 8


def memory_accesses(execution: Execution, decoded: Decoded) -> Iterator[MemoryAccess]:
    """What the instruction reads and writes, explicit operands before the stack; none that it would not reach."""
    pops = _stack_pops(execution, decoded)
    if decoded.opcode == 0x8F:  # POP reads the stack first
        yield from pops
        yield from _operand(execution, decoded)
        return
    yield from _operand(execution, decoded)
    yield from _implicit(execution, decoded)
    yield from pops
    yield from _stack_pushes(execution, decoded)


# Explicit operands


def _operand(execution: Execution, decoded: Decoded) -> Iterator[MemoryAccess]:
    if decoded.memory is None:
        return
    found = _operand_kind(decoded)
    if found is None:
        return
    kind, size, aligned = found
    segment, offset = execution.effective_address(decoded)
    for letter in kind:
        access = Access.READ if letter == "r" else Access.WRITE
        yield MemoryAccess(segment, offset, size, access, "the operand", aligned)


def _operand_kind(decoded: Decoded) -> tuple[str, int, int] | None:
    """(how, bytes, alignment) of the access to the ModRM operand; None: there is none, or it is not known."""
    opcode, wide = decoded.opcode, decoded.operand_bits // 8
    if opcode < 0x40 and opcode & 7 < 4:  # ADD, OR, ADC, SBB, AND, SUB, XOR, CMP
        to_memory = opcode & 7 < 2 and opcode >> 3 != 7
        return (_CHANGE if to_memory else _READ, wide if opcode & 1 else 1, 0)
    if opcode in (0x80, 0x81, 0x82, 0x83):
        return (_READ if decoded.group == 7 else _CHANGE, 1 if opcode in (0x80, 0x82) else wide, 0)
    if opcode == 0x63:
        return (_READ, 4, 0) if decoded.bits == 64 else (_CHANGE, 2, 0)
    if opcode in (0xF6, 0xF7):
        return (_CHANGE if decoded.group in (2, 3) else _READ, wide if opcode & 1 else 1, 0)
    if opcode in (0xC4, 0xC5, 0x0FB2, 0x0FB4, 0x0FB5):
        return _READ, wide + 2, 0
    if opcode == 0xFF:
        if decoded.group < 2:
            return _CHANGE, wide, 0
        if decoded.group in (3, 5):
            return _READ, wide + 2, 0
        return _READ, 8 if decoded.bits == 64 and not decoded.operand_prefix else wide, 0
    if opcode in _SSE_MOVES:
        return _sse_move(decoded)
    if opcode in (0x0F00, 0x0F01, 0x0FAE, 0x0FBA, 0x0FC7):
        return _group(decoded, wide)
    found = _ONE_BYTE.get(opcode) or _TWO_BYTE.get(opcode)
    if found is None:
        return None
    kind, size = found
    if opcode == 0x8F:
        size = stack_item_size(decoded)
    elif opcode == 0x62:
        size = 2 * wide
    return kind, size or wide, 16 if opcode in _SSE_ALIGNED else 0


def _sse_move(decoded: Decoded) -> tuple[str, int, int]:
    opcode, kind = decoded.opcode, _SSE_MOVES[decoded.opcode]
    if opcode in (0x0F10, 0x0F11):
        return kind, {0xF3: 4, 0xF2: 8}.get(decoded.rep, 16), 0
    if opcode in (0x0F28, 0x0F29):
        return kind, 16, 16
    if decoded.rep == 0xF3:
        return kind, 16, 0
    return (kind, 16, 16) if decoded.operand_prefix else (kind, 8, 0)


def _group(decoded: Decoded, wide: int) -> tuple[str, int, int] | None:
    """Instructions that share an opcode."""
    group, table = decoded.group, 10 if decoded.bits == 64 else 6
    found: dict[tuple[int, int], tuple[str, int, int]] = {
        (0x0F00, 0): (_WRITE, 2, 0), (0x0F00, 1): (_WRITE, 2, 0), (0x0F00, 2): (_READ, 2, 0),
        (0x0F00, 3): (_READ, 2, 0), (0x0F00, 4): (_READ, 2, 0), (0x0F00, 5): (_READ, 2, 0),
        (0x0F01, 0): (_WRITE, table, 0), (0x0F01, 1): (_WRITE, table, 0), (0x0F01, 2): (_READ, table, 0),
        (0x0F01, 3): (_READ, table, 0), (0x0F01, 4): (_WRITE, 2, 0), (0x0F01, 6): (_READ, 2, 0),
        (0x0FAE, 0): (_WRITE, 512, 16), (0x0FAE, 1): (_READ, 512, 16), (0x0FAE, 2): (_READ, 4, 0),
        (0x0FAE, 3): (_WRITE, 4, 0),
        (0x0FBA, 4): (_READ, wide, 0), (0x0FBA, 5): (_CHANGE, wide, 0), (0x0FBA, 6): (_CHANGE, wide, 0),
        (0x0FBA, 7): (_CHANGE, wide, 0),
        (0x0FC7, 1): (_CHANGE, 16 if wide == 8 else 8, 16 if wide == 8 else 0),
    }  # fmt: skip
    return found.get((decoded.opcode, group))


# Operands that are not in ModRM


def _implicit(execution: Execution, decoded: Decoded) -> Iterator[MemoryAccess]:
    opcode = decoded.opcode
    if opcode in (0xA0, 0xA1, 0xA2, 0xA3):  # MOV between the accumulator and an address
        size = decoded.operand_bits // 8 if opcode & 1 else 1
        access = Access.READ if opcode < 0xA2 else Access.WRITE
        yield MemoryAccess(decoded.segment or "ds", decoded.immediate, size, access, "the operand")
    elif opcode == 0xD7:  # XLAT
        mask = (1 << decoded.address_bits) - 1
        offset = (execution.regs.rbx + (execution.regs.rax & 0xFF)) & mask
        yield MemoryAccess(decoded.segment or "ds", offset, 1, Access.READ, "the table of XLAT")
    elif (places := _STRINGS.get(opcode & ~1)) is not None:
        mask = (1 << decoded.address_bits) - 1
        if decoded.rep and not execution.regs.rcx & mask:
            return
        size = decoded.operand_bits // 8 if opcode & 1 else 1
        if opcode in (0x6D, 0x6F):
            size = min(size, 4)
        for place in places:
            register, letter = place.split()
            source = register == "si"
            segment = (decoded.segment or "ds") if source else "es"
            offset = getattr(execution.regs, f"r{register}") & mask
            access = Access.READ if letter == "r" else Access.WRITE
            yield MemoryAccess(segment, offset, size, access, f"the string's {'source' if source else 'destination'}")


# The stack


def _stack_pops(execution: Execution, decoded: Decoded) -> Iterator[MemoryAccess]:
    opcode, size = decoded.opcode, stack_item_size(decoded)
    count = 0
    if opcode in _POPS:
        count = 1
    elif opcode in (0xCA, 0xCB):  # RETF; its items have the operand size
        count, size = 2, decoded.operand_bits // 8
    elif opcode == 0xCF:
        count, size = (5 if execution.bits == 64 else 3), decoded.operand_bits // 8
    elif opcode == 0x61:
        count, size = 8, decoded.operand_bits // 8
    elif opcode == 0xC9:  # LEAVE reads where RBP points
        offset = execution.regs.rbp & ((1 << execution.stack_bits) - 1)
        yield MemoryAccess("ss", offset, size, Access.READ, "the stack, which LEAVE takes from RBP,")
        return
    if count:
        yield MemoryAccess("ss", execution.stack_offset(0), count * size, Access.READ, "the stack")


def _stack_pushes(execution: Execution, decoded: Decoded) -> Iterator[MemoryAccess]:
    opcode, size = decoded.opcode, stack_item_size(decoded)
    count = 0
    if opcode in _PUSHES or (opcode == 0xFF and decoded.group in (2, 6)) or opcode == 0xC8:
        count = 1
    elif opcode == 0x9A or (opcode == 0xFF and decoded.group == 3):
        count, size = 2, decoded.operand_bits // 8
    elif opcode == 0x60:
        count, size = 8, decoded.operand_bits // 8
    for number in range(1, count + 1):
        yield MemoryAccess("ss", execution.stack_offset(-number * size), size, Access.WRITE, "the stack")
