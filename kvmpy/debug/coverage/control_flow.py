"""Where the processor goes after an instruction, read off its disassembly: what basic blocks are made of."""

from __future__ import annotations

from typing import NamedTuple

from kvmpy.debug.disassembly import BYTES, Disassembler, Instruction

__all__ = ["LONGEST", "Flow", "flow_at", "flow_of"]

LONGEST = 15
"""Bytes of the longest instruction (SDM vol. 2, 2.3.11)."""

_TO_ANYWHERE = frozenset(
    ("ret", "retf", "retfq", "iret", "iretd", "iretq", "sysret", "sysretq", "sysexit", "sysexitq", "rsm", "ljmp")
)
"""Never on to the next instruction, and where to is not in the instruction."""
_CALLS = frozenset(("call", "lcall", "int", "int1", "int3", "into", "syscall", "sysenter"))
"""Elsewhere; what returns from there comes to the next instruction."""
_MAY_END_THE_RUN = frozenset(("hlt", "out", "outsb", "outsw", "outsd"))


class Flow(NamedTuple):
    """One instruction: its `size`, and where it leads."""

    size: int
    falls: bool = True
    """Whether the next instruction may follow."""
    target: int | None = None
    """Where a jump or call goes that says so itself."""
    anywhere: bool = False
    """Whether it may lead to places that are not in it."""
    ends: bool = False
    """Whether a basic block ends with it. One also ends where the guest may end the run: HLT, and writes to ports."""
    halts: bool = False
    """Whether it is HLT, behind which there may be data."""
    padding: bool = False
    """Whether it fills the space between functions: NOP in all its lengths, and INT3."""

    def leads(self, address: int, there: int) -> bool:
        """Whether the instruction at `address` may be followed by the one `there`; itself, after a round of REP."""
        return self.anywhere or there in (address, self.target) or (self.falls and there == address + self.size)


def flow_of(instruction: Instruction) -> Flow | None:
    """The flow of an instruction whose targets are linear addresses. None for what is no instruction."""
    if instruction.mnemonic == BYTES:
        return None
    name = instruction.mnemonic.split()[-1]  # after prefixes: "bnd jmp", "repz ret"
    size, target = len(instruction.bytes), instruction.target
    if name in _TO_ANYWHERE:
        return Flow(size, falls=False, anywhere=True, ends=True)
    if name == "jmp":
        return Flow(size, falls=False, target=target, anywhere=target is None, ends=True)
    if name in _CALLS:
        return Flow(size, target=target, anywhere=target is None, ends=True, padding=name == "int3")
    if target is not None:  # a conditional jump, a loop, XBEGIN
        return Flow(size, target=target, ends=True)
    if name in ("ud0", "ud1", "ud2"):
        return Flow(size, falls=False, ends=True)
    if name in _MAY_END_THE_RUN:
        return Flow(size, ends=True, halts=name == "hlt")
    return Flow(size, padding=name == "nop")


def flow_at(disassembler: Disassembler, code: bytes, address: int, bits: int) -> Flow | None:
    """The flow of the instruction that `code` begins with, at linear `address`. None when it cannot be decoded."""
    instructions = disassembler.disassemble(code, address, bits, 1)
    return flow_of(instructions[0]) if instructions else None
