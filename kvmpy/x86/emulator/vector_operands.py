"""Operands of SSE and AVX instructions, and the rows of those that compute one vector from one or two (SDM vol. 2).

One line for an instruction gives two rows: the legacy encoding, which leaves what is above 128 bits and wants its
memory aligned, and the VEX encoding, which has a source more, clears what is above its width and takes memory anywhere
(SDM vol. 2, 2.4). An operation is a function of numbers: it knows of neither.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmpy.x86.emulator.extended_state import ExtendedState
from kvmpy.x86.emulator.guest_exception import GuestException
from kvmpy.x86.emulator.processor import Operands
from kvmpy.x86.emulator.table import ANY, instruction
from kvmpy.x86.flags import Cr0, Cr4
from kvmpy.x86.instruction import VEX

if TYPE_CHECKING:
    from kvmpy.x86.emulator.table import Execute

__all__ = [
    "OPERATIONS", "OUTSIDE_REAL_MODE", "Operation", "both", "by_lane", "check_aligned", "check_avx", "check_sse",
    "check_vector", "destination", "first_source", "packed", "vector", "vector_size", "vector_source",
]  # fmt: skip

_UD, _NM, _GP = 6, 7, 13
_EM, _TS, _OSFXSR, _OSXSAVE = int(Cr0.EM), int(Cr0.TS), int(Cr4.OSFXSR), int(Cr4.OSXSAVE)
_SSE_AND_AVX = 6
_LANE = (1 << 128) - 1

OUTSIDE_REAL_MODE = (32, 64)

Operation = Callable[[int, int, int, int], int]
"""(first source, second source, bytes, immediate) -> the result. An instruction with one source has it second."""

OPERATIONS: dict[str, Operation] = {}
"""What the instructions made by `packed` compute, by name: other encodings of them compute the same."""


def check_sse(op: Operands) -> ExtendedState:
    """The extended state; raises #UD and #NM as an SSE instruction does (SDM vol. 3, 13.1.4)."""
    sregs = op.cpu.sregs
    if sregs.cr0 & _EM or not sregs.cr4 & _OSFXSR:
        raise GuestException.of(_UD)
    if sregs.cr0 & _TS:
        raise GuestException.of(_NM)
    return op.cpu.extended_state()


def check_avx(op: Operands, *, sources: int = 0) -> ExtendedState:
    """The same for a VEX encoding; `sources` is 2 when it uses VEX.vvvv, which must be 1111b otherwise."""
    sregs = op.cpu.sregs
    if not sregs.cr4 & _OSXSAVE or op.cpu.xcr0() & _SSE_AND_AVX != _SSE_AND_AVX:
        raise GuestException.of(_UD)
    if sources != 2 and op.it.vvvv:
        raise GuestException.of(_UD)
    if sregs.cr0 & _TS:
        raise GuestException.of(_NM)
    return op.cpu.extended_state()


def check_vector(op: Operands, *, sources: int = 0, only_128: bool = True) -> ExtendedState:
    """The checks of whichever encoding it has, for functions that serve both."""
    if op.it.encoding != VEX:
        return check_sse(op)
    if only_128 and op.it.vector_256:
        raise GuestException.of(_UD)
    return check_avx(op, sources=sources)


def vector_size(op: Operands) -> int:
    """16 or 32 bytes, by VEX.L."""
    return 32 if op.it.vector_256 else 16


def vector(state: ExtendedState, number: int, size: int) -> int:
    """The low `size` bytes of a vector register."""
    if size == 32:
        return state.ymm(number)
    return state.xmm(number) if size == 16 else state.xmm(number) & (1 << 8 * size) - 1


def check_aligned(op: Operands, size: int) -> None:
    """Raise #GP for a memory operand that is not aligned to its size."""
    if op.address() % size:
        raise GuestException.of(_GP, 0)


def vector_source(op: Operands, state: ExtendedState, size: int, *, aligned: bool) -> int:
    """`size` bytes of what ModRM.rm names: a vector register or memory."""
    if op.it.memory is None:
        return vector(state, op.it.rm, size)
    if aligned:
        check_aligned(op, size)
    return op.load(size)


def destination(op: Operands, state: ExtendedState, value: int) -> None:
    """Write the vector register that ModRM.reg names, as the encoding does."""
    if op.it.encoding == VEX:
        state.set_vector(op.it.reg, value)
    else:
        state.set_xmm(op.it.reg, value)


def first_source(op: Operands, state: ExtendedState) -> int:
    """128 bits of the first of two sources: the destination itself, or by VEX what VEX.vvvv names."""
    return state.xmm(op.it.vvvv if op.it.encoding == VEX else op.it.reg)


def both(
    name: str,
    opcode: int,
    prefix: int,
    *,
    map: int = 1,
    operand: str = ANY,
    immediate: int = 0,
    digit: int | None = None,
) -> Callable[[Execute], Execute]:
    """Decorate a function that serves the legacy and the VEX encoding: two rows."""

    def add(execute: Execute) -> Execute:
        instruction(name, map, opcode, prefix=prefix, operand=operand, immediate=immediate, digit=digit)(execute)
        instruction(
            f"v{name}", map, opcode, prefix=prefix, operand=operand, immediate=immediate, digit=digit,
            encoding=VEX, bits=OUTSIDE_REAL_MODE,
        )(execute)  # fmt: skip
        return execute

    return add


def by_lane(operation: Operation) -> Operation:
    """The operation on each 128 bits of its own: most that move elements do not cross them."""

    def each(first: int, second: int, size: int, immediate: int) -> int:
        if size == 16:
            return operation(first, second, 16, immediate)
        result = 0
        for shift in range(0, 8 * size, 128):
            result |= operation(first >> shift & _LANE, second >> shift & _LANE, 16, immediate) << shift
        return result

    return each


def packed(
    name: str, opcode: int, operation: Operation, *, map: int = 1, prefix: int = 0x66, sources: int = 2,
    immediate: bool = False, part: int = 1, lanes: bool = False, operand: str = ANY, legacy: bool = True,
    vex: bool = True, w: bool | None = None, only_256: bool = False, only_128: bool = False,
    with_xmm0: bool = False,
) -> None:  # fmt: skip
    """The rows of an instruction that computes a vector.

    `sources` is 2 or 1. `immediate`: it has one byte. The second source is 1 / `part` of the vector's size. `lanes`:
    each 128 bits are on their own. `legacy`, `vex`: which encodings there are. `w` is VEX.W. `only_256`, `only_128`:
    VEX.L has to be 1, or 0. `with_xmm0`: in place of an immediate the operation gets XMM0.
    """
    operation = by_lane(operation) if lanes else operation
    OPERATIONS[name] = operation
    memory_must_be_aligned = part == 1

    def execute_legacy(op: Operands) -> None:
        state = check_sse(op)
        second = vector_source(op, state, 16 // part, aligned=memory_must_be_aligned)
        first = state.xmm(op.it.reg) if sources == 2 else 0
        state.set_xmm(op.it.reg, operation(first, second, 16, state.xmm(0) if with_xmm0 else op.it.immediate))

    def execute_vex(op: Operands) -> None:
        state = check_avx(op, sources=sources)
        size = vector_size(op)
        if (only_256 and size == 16) or (only_128 and size == 32):
            raise GuestException.of(_UD)
        second = vector_source(op, state, size // part, aligned=False)
        first = vector(state, op.it.vvvv, size) if sources == 2 else 0
        state.set_vector(op.it.reg, operation(first, second, size, op.it.immediate))

    size = 1 if immediate else 0
    if legacy:
        instruction(name, map, opcode, prefix=prefix, operand=operand, immediate=size)(execute_legacy)
    if vex:
        instruction(
            f"v{name}", map, opcode, prefix=prefix, operand=operand, immediate=size, encoding=VEX, w=w,
            bits=OUTSIDE_REAL_MODE,
        )(execute_vex)  # fmt: skip
