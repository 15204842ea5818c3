"""The basic blocks of a program, found by disassembling it: stretches that are executed from their start to their end.

Functions whose size is known are swept from end to end, for all of it is code. From other starts only what can be
reached by direct jumps and calls is followed: behind a label there may be data, and a breakpoint there would change it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from kvmpy.debug.coverage.control_flow import LONGEST, Flow, flow_of
from kvmpy.debug.disassembly import Disassembler
from kvmpy.errors import UsageError

__all__ = ["BasicBlock", "Function", "find_blocks"]

_CHUNK = 128
"""Bytes disassembled at once where the end of the code is not known."""
_BEHIND_HLT = 4
"""Instructions within which what is behind a HLT must jump back to be taken as code."""

Read = Callable[[int, int], bytes]
"""Up to so many bytes at a linear address; fewer, or none, where the program's code ends."""


class BasicBlock(NamedTuple):
    """`size` bytes from linear address `start` on, and where the instructions in them start.

    `bits` is how wide the code is: 16, 32 or 64; 0 when nobody has looked.
    """

    start: int
    size: int
    instructions: tuple[int, ...] = ()
    bits: int = 0

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.start + self.size

    def __repr__(self) -> str:
        return f"<BasicBlock {self.start:#x}..{self.end - 1:#x}, {len(self.instructions)} instructions>"


class Function(NamedTuple):
    """Where code starts, how wide it is (16, 32 or 64 `bits`), and its `size` where that is known, else 0."""

    start: int
    bits: int
    size: int = 0


def find_blocks(functions: Iterable[Function], read: Read) -> list[BasicBlock]:
    """The basic blocks of `functions` and of what they jump to and call, by address. `read` gives their code.

    Blocks start where a function does, where a jump or call leads, and after each jump, call and return; space that
    is filled up with NOPs is none. An address within an instruction of another block starts none either: it could not
    be replaced without changing that block. Raises UsageError without capstone.
    """
    disassembler = Disassembler()
    if not disassembler.available:
        raise UsageError("basic blocks are found with capstone: pip install 'kvmpy[debug]'; or take places=\"lines\"")
    sweep = _Sweep(disassembler, read)
    for function in sorted(functions, key=lambda function: -function.size):  # those swept whole come first
        sweep.add(function)
    sweep.add_behind_hlt()
    return sweep.blocks()


class _Sweep:
    def __init__(self, disassembler: Disassembler, read: Read) -> None:
        self._disassembler = disassembler
        self._read = read
        self._flows: dict[int, Flow] = {}
        self._bits: dict[int, int] = {}
        self._leaders: set[int] = set()
        self._behind_hlt: list[tuple[int, int]] = []
        self._behind: list[int] = []
        """What follows an instruction that never goes on to it."""

    def add(self, function: Function) -> None:
        self._leaders.add(function.start)
        waiting = self._sweep(function) if function.size else [function.start]
        self._follow_all(waiting, function.bits)

    def add_behind_hlt(self) -> None:
        """Go on behind HLT in code of unknown size, where that does not look like data: an idle loop leads back."""
        before = -1
        while before != len(self._flows):
            before = len(self._flows)
            for at, bits in self._behind_hlt:
                if at not in self._flows and self._leads_back(at, bits):
                    self._follow_all([at], bits)

    def _follow_all(self, waiting: list[int], bits: int) -> None:
        while waiting:
            start = waiting.pop()
            if start not in self._flows:
                waiting += self._follow(start, bits)

    def _sweep(self, function: Function) -> list[int]:
        """Decode a whole function, as far as it can be decoded. Answers the targets of its jumps and calls."""
        targets: list[int] = []
        code = self._read(function.start, function.size)
        for instruction in self._disassembler.disassemble(code, function.start, function.bits):
            flow = flow_of(instruction)
            if flow is None:
                break
            self._note(instruction.address, flow, function.bits, targets)
        return targets

    def _follow(self, start: int, bits: int) -> list[int]:
        """Decode from `start` to where it does not go on. Answers the targets of its jumps and calls."""
        targets: list[int] = []
        for address, flow in self._from(start, bits):
            if address in self._flows:
                break
            self._note(address, flow, bits, targets)
            if flow.halts:
                self._behind_hlt.append((address + flow.size, bits))
                break
            if not flow.falls:
                break
        return targets

    def _leads_back(self, start: int, bits: int) -> bool:
        """Whether what is at `start` looks like instructions that soon jump back to code before, or return at once."""
        for count, (_, flow) in enumerate(self._from(start, bits)):
            if flow.target is not None and flow.target < start and flow.target in self._flows:
                return True
            if not flow.falls or count == _BEHIND_HLT:
                return flow.anywhere and count == 0
        return False

    def _from(self, start: int, bits: int) -> Iterator[tuple[int, Flow]]:
        """The instructions from `start` on, to the first that is none."""
        at = start
        while code := self._read(at, _CHUNK):
            begin = at
            for instruction in self._disassembler.disassemble(code, at, bits):
                flow = flow_of(instruction)
                if flow is None:
                    break
                yield instruction.address, flow
                at = instruction.end
            if at == begin:
                return

    def _note(self, address: int, flow: Flow, bits: int, targets: list[int]) -> None:
        self._flows[address], self._bits[address] = flow, bits
        if flow.target is not None:
            targets.append(flow.target)
            self._leaders.add(flow.target)
        if flow.ends and flow.falls:
            self._leaders.add(address + flow.size)
        elif flow.ends:
            self._behind.append(address + flow.size)

    def blocks(self) -> list[BasicBlock]:
        flows = self._flows
        for at in self._behind:
            while at in flows and flows[at].padding and at not in self._leaders:
                at += flows[at].size
            self._leaders.add(at)
        leaders = {at for at in self._leaders if at in flows and not self._within_another(at)}
        return [self._block(leader, leaders) for leader in sorted(leaders)]

    def _within_another(self, address: int) -> bool:
        return any(
            before in self._flows and before + self._flows[before].size > address
            for before in range(address - LONGEST + 1, address)
        )

    def _block(self, start: int, leaders: set[int]) -> BasicBlock:
        instructions = []
        at = start
        while at in self._flows and (at == start or at not in leaders):
            instructions.append(at)
            flow = self._flows[at]
            at += flow.size
            if flow.ends:
                break
        return BasicBlock(start, at - start, tuple(instructions), self._bits[start])
