"""The table of instructions that are done in software: one row each, found by encoding."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

from kvmpy.errors import KvmpyError
from kvmpy.x86.instruction import LEGACY, Instruction, decode_head, decode_operands

if TYPE_CHECKING:
    from kvmpy.x86.emulator.processor import Operands

    Execute = Callable[[Operands], object]

__all__ = ["ANY", "MEMORY", "REGISTER", "ROWS", "Row", "UnknownInstruction", "decode", "instruction"]

ANY, MEMORY, REGISTER = "any", "memory", "register"


class UnknownInstruction(KvmpyError):
    """No row of the table is for the instruction at the start of `code`."""

    def __init__(self, code: bytes) -> None:
        super().__init__(f"no software for the instruction at the start of {code.hex(' ')}")
        self.code = code


class Row:
    """One instruction: how it is encoded, and the function that does it.

    `map` and `opcode` as in `Instruction`; `prefix` is the mandatory one, None when it does not matter; `digit` is
    ModRM.reg where it is part of the opcode ("/digit" in the manual), and `rm` likewise; `operand` says what ModRM.rm
    must name. `immediate` is its size in bytes. `w` is REX.W or VEX.W where it tells instructions apart. `bits` are the
    modes that know the instruction. `lockable`: LOCK is allowed; others raise #UD with it. `undefined` are the flags
    that the manual leaves undefined: processors differ in them, and here they are left as they were. `leaves`: it goes
    on elsewhere, perhaps in code of another size, so what stands behind it does not follow.
    """

    __slots__ = (
        "bits", "digit", "encoding", "execute", "immediate", "leaves", "lockable", "map", "modrm", "name", "opcode",
        "operand", "prefix", "rm", "undefined", "w",
    )  # fmt: skip

    def __init__(
        self, name: str, map: int, opcode: int, execute: Execute, *, prefix: int | None, digit: int | None,
        rm: int | None, operand: str, modrm: bool, immediate: int, w: bool | None, encoding: str,
        bits: tuple[int, ...], lockable: bool, undefined: int, leaves: bool,
    ) -> None:  # fmt: skip
        self.name = name
        self.map = map
        self.opcode = opcode
        self.execute = execute
        self.prefix = prefix
        self.digit = digit
        self.rm = rm
        self.operand = operand
        self.modrm = modrm
        self.immediate = immediate
        self.w = w
        self.encoding = encoding
        self.bits = bits
        self.lockable = lockable
        self.undefined = undefined
        self.leaves = leaves

    def fits(self, it: Instruction) -> bool:
        """Whether an instruction whose head is decoded is this one, as far as the head says."""
        return (
            self.encoding == it.encoding
            and (self.prefix is None or self.prefix == it.prefix)
            and (self.w is None or self.w == it.w)
            and it.bits in self.bits
        )

    def fits_operands(self, it: Instruction) -> bool:
        """Whether it is also this one by ModRM."""
        return (
            (self.digit is None or self.digit == it.reg & 7)
            and (self.rm is None or (it.mod == 3 and self.rm == it.rm & 7))
            and (self.operand == ANY or (self.operand == MEMORY) == (it.memory is not None))
        )

    def __repr__(self) -> str:
        return f"<Row {self.name}>"


ROWS: dict[tuple[int, int], list[Row]] = {}
"""(map, opcode) -> rows, filled by the modules of instructions."""


def instruction(
    name: str, map: int, opcode: int, *, prefix: int | None = 0, digit: int | None = None, rm: int | None = None,
    operand: str = ANY, modrm: bool = True, immediate: int = 0, w: bool | None = None, encoding: str = LEGACY,
    bits: tuple[int, ...] = (16, 32, 64), lockable: bool = False, undefined: int = 0, leaves: bool = False,
) -> Callable[[Execute], Execute]:  # fmt: skip
    """Decorate the function that does an instruction: a row of the table. See `Row` for the parameters."""

    def add(execute: Execute) -> Execute:
        row = Row(
            name, map, opcode, execute, prefix=prefix, digit=digit, rm=rm, operand=operand, modrm=modrm,
            immediate=immediate, w=w, encoding=encoding, bits=bits, lockable=lockable, undefined=undefined,
            leaves=leaves,
        )  # fmt: skip
        ROWS.setdefault((map, opcode), []).append(row)
        return execute

    return add


@lru_cache(maxsize=4096)
def decode(code: bytes, bits: int) -> tuple[Row, Instruction]:
    """The row and the decoded form of the instruction at the start of `code`, in `bits`-bit code.

    Raises UnknownInstruction, or TruncatedInstruction. The same bytes at the same place are decoded once.
    """
    it = decode_head(code, bits)
    decoded: tuple[bool, int] | None = None
    for row in ROWS.get((it.map, it.opcode), ()):
        if not row.fits(it):
            continue
        if decoded != (row.modrm, row.immediate):
            decode_operands(it, code, modrm=row.modrm, immediate=row.immediate)
            decoded = (row.modrm, row.immediate)
        if row.fits_operands(it):
            return row, it
    raise UnknownInstruction(code)
