"""Code of ring 0 made fit to run in ring 3: a copy of each page, in which some instructions are replaced.

Ring 3 executes some instructions in silence but not as ring 0 does: PUSHF shows another interrupt flag, POPF does not
change it, CPUID and moves of selectors tell of the host. HLT takes the first byte of each, and faults; what kernels do
most is done without leaving the guest (`kvmpy.machine.direct_execution.stand_ins`).
"""

from __future__ import annotations

from kvmpy.x86.instruction_length import length_and_kind
from kvmpy.x86.instruction_runs import reaches, starts_of, sweep

__all__ = ["Code", "find_instructions", "ways_into"]

_PAGE = 0x1000


class Code:
    """A copy of one page of code: the bytes that it was made from, and what was replaced.

    `behind` are the bytes that follow. `first` and `end` are where the first instruction begins in the page and the
    last one ends behind it (-1: unknown). With `uncertain`, bytes before `first` were left out.
    """

    __slots__ = (
        "_starts",
        "behind",
        "copy",
        "detours",
        "end",
        "first",
        "has_gs_base",
        "moved",
        "original",
        "replaced",
        "sensitive",
        "slot",
        "stand_ins",
        "uncertain",
    )  # fmt: skip

    def __init__(self, original: bytes, behind: bytes, first: int, end: int, uncertain: bool) -> None:
        self.original = original
        self.copy = bytearray(original)
        self.behind = behind
        self.first = first
        self.end = end
        self.uncertain = uncertain
        self.slot = 0
        self.sensitive: set[int] = set()
        """Where sensitive instructions are."""
        self.has_gs_base = False
        """Whether there are instructions that depend on whether the guest has RDFSBASE and its like."""
        self.stand_ins: list[int] = []
        self.moved: dict[int, int] = {}
        """Where instructions began that a jump to a stand-in is in the place of, but the first one: where they are."""
        self.detours: dict[int, int] = {}
        """Where a jump is among fillers, that nobody comes to but from an instruction: where that is."""
        self.replaced = 0
        """Where the last such jump ends."""
        self._starts: set[int] | None = None

    def begins(self, offset: int) -> bool:
        """Whether an instruction begins there."""
        return offset in self.sensitive or offset in self.starts

    @property
    def starts(self) -> set[int]:
        """Where instructions begin: found when it is first asked for."""
        if self._starts is None:
            self._starts = starts_of(self.original + self.behind, self.first, _PAGE)
        return self._starts


def ways_into(code: bytes, border: int) -> set[int]:
    """Where instructions may begin behind `border`: ways that begin before it at different bytes mostly agree."""
    ways = set()
    seen: set[int] = set()
    for start in range(16 if border else 1):
        at = start
        while at < border and at not in seen:
            seen.add(at)
            at += length_and_kind(code, at)[0] or 1
        if at >= border:
            ways.add(at)
    return ways


def find_instructions(code: bytes, border: int, ways: set[int], entry: int | None) -> tuple[int, int, list[int]] | None:
    """Instructions from `border` on, for a page: where the first and the one behind the last begin, and the sensitive
    ones. None if it is not certain.

    Where `ways` differ, what comes before they fall into step is left out. `entry`, if it is known, is where the
    processor goes on in the page: the ways that miss it are wrong.
    """
    end = border + _PAGE
    if entry is not None:
        ways = {way for way in ways if reaches(code, way, border + entry)} or {border + entry}
    while len(ways) > 1:
        at = min(ways)
        if at >= end:
            return None
        try:
            ways = ways - {at} | {at + (length_and_kind(code, at)[0] or 1)}
        except IndexError:
            return None
    (first,) = ways
    return (first, *sweep(code, first, end)) if first < end else None
