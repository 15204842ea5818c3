"""Code of ring 0 made fit to run in ring 3: a copy of each page, in which some instructions are replaced.

Ring 3 executes some instructions in silence but not as ring 0 does: PUSHF shows another interrupt flag, POPF does not
change it, CPUID and moves of selectors tell of the host. HLT takes the first byte of each, and faults; what kernels do
most is done without leaving the guest (`kvmpy.machine.direct_stand_ins`).
"""

from __future__ import annotations

from kvmpy.x86.instruction_length import length_and_kind, sweep

__all__ = ["Code", "find_instructions", "ways_into"]

_PAGE = 0x1000


class Code:
    """A copy of one page of code: the bytes that it was made from, where instructions begin, and what was replaced.

    `first` and `end` are where the first instruction begins in the page and the last one ends behind it (-1: unknown).
    With `uncertain`, bytes before `first` were left out.
    """

    __slots__ = ("copy", "end", "first", "moved", "original", "replaced", "slot", "stand_ins", "starts", "uncertain")

    def __init__(self, original: bytes, starts: set[int], first: int, end: int, uncertain: bool) -> None:
        self.original = original
        self.copy = bytearray(original)
        self.starts = starts
        self.first = first
        self.end = end
        self.uncertain = uncertain
        self.slot = 0
        self.stand_ins: list[int] = []
        self.moved: dict[int, int] = {}
        """Where instructions began that a jump to a stand-in is in the place of, but the first one: where they are."""
        self.replaced = 0
        """Where the last such jump ends."""


def ways_into(code: bytes, border: int) -> set[int]:
    """Where instructions may begin behind `border`: ways that begin before it at different bytes mostly agree."""
    ways = set()
    for start in range(16 if border else 1):
        at = start
        while at < border:
            at += length_and_kind(code, at)[0] or 1
        ways.add(at)
    return ways


def find_instructions(code: bytes, border: int, ways: set[int], entry: int | None) -> tuple[set[int], list[int]] | None:
    """Instructions that begin from `border` on for a page, and the sensitive ones of them; None if it is not certain.

    Where `ways` differ, what comes before they fall into step is left out. `entry`, if it is known, is where the
    processor goes on in the page: the ways that miss it are wrong.
    """
    end = border + _PAGE
    swept = [sweep(code, way, end) for way in sorted(ways)]
    if entry is not None:
        swept = [found for found in swept if border + entry in found[0]] or [sweep(code, border + entry, end)]
    if len(swept) == 1:
        return swept[0]
    common = set.intersection(*(found[0] for found in swept))
    return sweep(code, min(common), end) if common else None
