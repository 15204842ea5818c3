"""Blocks made of executed instructions."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from itertools import pairwise

from kvmpy.debug.coverage.basic_blocks import BasicBlock

__all__ = ["blocks_of_steps"]


def blocks_of_steps(
    addresses: Iterable[int], sizes: Mapping[int, int], pairs: Iterable[tuple[int, int]]
) -> list[BasicBlock]:
    """Stretches of code that were entered only at their start and left only at their end.

    `sizes` are those of the instructions that are known, `pairs` which one came after which one.
    """
    pairs = [(at, there) for at, there in pairs if there != at + sizes.get(at, 1)]
    entered, left = {there for _, there in pairs}, {at for at, _ in pairs}
    blocks: list[BasicBlock] = []
    instructions: list[int] = []
    end = 0

    def complete() -> None:
        if instructions:
            blocks.append(BasicBlock(instructions[0], end - instructions[0], tuple(instructions)))
            instructions.clear()

    for address in sorted(addresses):
        if address != end or address in entered:
            complete()
        instructions.append(address)
        end = address + sizes.get(address, 1)
        if address in left:
            complete()
    complete()
    return blocks


def merged_blocks(blocks: Iterable[BasicBlock]) -> list[BasicBlock]:
    """All blocks, each place once. One that others start within is cut there: they know more about the code."""
    blocks = list(blocks)
    starts = sorted({block.start for block in blocks})
    found: dict[int, BasicBlock] = {}
    for block in blocks:
        inside = starts[bisect_right(starts, block.start) : bisect_left(starts, block.end)]
        for start, end in pairwise([block.start, *inside, block.end]):
            within = tuple(address for address in block.instructions if start <= address < end)
            part = BasicBlock(start, end - start, within, block.bits)
            if start not in found or found[start] < part:
                found[start] = part
    return [found[start] for start in sorted(found)]
