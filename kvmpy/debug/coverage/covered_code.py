"""What was executed of a guest's code: addresses, counts and blocks, lines of source, and files for other tools."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from kvmpy.debug.coverage.basic_blocks import BasicBlock
from kvmpy.debug.coverage.executed_blocks import merged_blocks
from kvmpy.errors import UsageError

if TYPE_CHECKING:
    from kvmpy.debug.symbols import LineTable, SymbolTable

__all__ = ["CoverageFormat", "CoveredCode", "DebugInfo", "Module", "coverage_format"]

CoverageFormat = Literal["lcov", "drcov"]

_SUFFIXES: dict[str, CoverageFormat] = {".info": "lcov", ".lcov": "lcov", ".drcov": "drcov", ".log": "drcov"}


def coverage_format(path: str | os.PathLike[str]) -> CoverageFormat:
    """The format of a coverage file, by its suffix: .info and .lcov are lcov, .drcov and .log are drcov.

    Raises UsageError for another one.
    """
    suffix = os.path.splitext(os.fspath(path))[1]
    if suffix not in _SUFFIXES:
        raise UsageError(f"a coverage file ends in {', '.join(_SUFFIXES)}, not in {suffix!r}: {os.fspath(path)}")
    return _SUFFIXES[suffix]


class Module(NamedTuple):
    """A program in the guest's memory: the linear addresses from `start` up to, not including, `end`.

    `name` is the path of its file where it has one. `debug_info` reads line numbers and symbols when they are needed.
    """

    name: str
    start: int
    end: int
    debug_info: DebugInfo | None = None

    @property
    def place(self) -> tuple[str, int, int]:
        """What makes it the same program in another machine."""
        return self.name, self.start, self.end


class DebugInfo(Protocol):
    """Line numbers and symbols of a program. Both raise ImageError for a file that is not sound."""

    def lines(self) -> LineTable | None: ...
    def symbols(self) -> SymbolTable: ...


class CoveredCode:
    """The result of one coverage run or several: `first | second`, or `CoveredCode.merge(*all)`.

    All addresses are linear: what RIP holds, plus the base of CS outside 64-bit mode.
    """

    def __init__(
        self,
        modules: Iterable[Module] = (),
        counts: Mapping[int, int] | None = None,
        blocks: Iterable[BasicBlock] = (),
        missed: Iterable[BasicBlock] = (),
    ) -> None:
        self._modules = tuple(modules)
        self._counts = Counter(counts or {})
        self._blocks = tuple(sorted(blocks))
        self._missed = tuple(sorted(missed))

    @property
    def modules(self) -> tuple[Module, ...]:
        """The programs that the addresses are in."""
        return self._modules

    @property
    def counts(self) -> Mapping[int, int]:
        """Address -> how often the instruction there was executed.

        From breakpoints it is 1; merged, in how many runs it was reached.
        """
        return self._counts

    @property
    def addresses(self) -> set[int]:
        """Where instructions start that were executed."""
        return set(self.counts)

    @property
    def blocks(self) -> tuple[BasicBlock, ...]:
        """The code that was executed, by address: basic blocks, or with `places="lines"` code of one line."""
        return self._blocks

    @property
    def missed(self) -> tuple[BasicBlock, ...]:
        """The blocks that had a breakpoint and were not reached, by address. Steps know only what was executed."""
        return self._missed

    # Merging

    @classmethod
    def merge(cls, *results: CoveredCode) -> CoveredCode:
        """All of them together; of guests that have the same program at the same addresses.

        Raises UsageError when different programs have the same addresses.
        """
        modules: dict[tuple[str, int, int], Module] = {}
        for module in (module for result in results for module in result.modules):
            if module.place in modules:
                continue
            for other in modules.values():
                if module.start < other.end and other.start < module.end:
                    raise UsageError(f"{module.name} and {other.name} are at the same addresses: not to be merged")
            modules[module.place] = module
        counts: Counter[int] = Counter()
        for result in results:
            counts.update(result.counts)
        blocks = merged_blocks(block for result in results for block in result.blocks)
        missed = {block.start: block for result in results for block in result.missed if block.start not in counts}
        return CoveredCode(modules.values(), counts, blocks, missed.values())

    def __or__(self, other: CoveredCode) -> CoveredCode:
        if not isinstance(other, CoveredCode):
            return NotImplemented
        return CoveredCode.merge(self, other)

    # As lines of source

    def lines(self, *, lines: LineTable | None = None) -> dict[str, dict[int, int]]:
        """File -> line -> how often it was executed, for all lines that have code: 0 for those that were not.

        A line counts as often as that of its instructions that was executed most often. `lines` are the line numbers of
        the program where the machine has none, because it was given bare bytes. Raises UsageError without any.
        """
        from kvmpy.debug.coverage.source_lines import line_counts, line_tables

        return line_counts(self.counts, line_tables(self.modules, lines))

    # As files

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write a file whose suffix says its format, see `coverage_format`. Raises UsageError, OSError."""
        if coverage_format(path) == "lcov":
            self.write_lcov(path)
        else:
            self.write_drcov(path)

    def write_lcov(
        self, path: str | os.PathLike[str], *, lines: LineTable | None = None, symbols: SymbolTable | None = None,
        test: str = "",
    ) -> None:  # fmt: skip
        """Write lines and functions for genhtml and other readers of lcov's tracefiles, see geninfo(1).

        `test` is the name of the test. `lines` and `symbols` are those of the program where the machine has none.
        Raises UsageError for a program without line numbers, OSError.
        """
        from kvmpy.debug.coverage.lcov import lcov_text

        text = lcov_text(self.counts, self.modules, lines, symbols, test)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)

    def write_drcov(self, path: str | os.PathLike[str]) -> None:
        """Write blocks for Lighthouse and other readers of DynamoRIO's drcov, version 2. Raises OSError."""
        from kvmpy.debug.coverage.drcov import drcov_file

        data = drcov_file(self.blocks, self.modules)
        with open(path, "wb") as file:
            file.write(data)

    def __str__(self) -> str:
        blocks, missed = len(self.blocks), len(self.missed)
        if missed:
            return f"{blocks} of {blocks + missed} blocks"
        return f"{len(self.addresses)} instructions in {blocks} blocks"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self}>"
