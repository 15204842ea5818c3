"""Executed addresses as lines of source."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from kvmpy.errors import UsageError

if TYPE_CHECKING:
    from kvmpy.debug.coverage.covered_code import Module
    from kvmpy.debug.symbols import LineTable

__all__ = ["line_counts", "line_tables"]


def line_tables(modules: Iterable[Module], given: LineTable | None) -> list[LineTable]:
    """The line numbers of all programs, or those that were `given`. Raises UsageError when there are none."""
    if given is not None:
        tables = [given]
    else:
        infos = [module.debug_info for module in modules if module.debug_info is not None]
        tables = [table for info in infos if (table := info.lines())]
    if not any(tables):
        raise UsageError(
            "the program has no line numbers (DWARF): compile it with -g and load the ELF file, or give lines="
        )
    return tables


def line_counts(counts: Mapping[int, int], tables: Iterable[LineTable]) -> dict[str, dict[int, int]]:
    """File -> line -> the highest count of its instructions, for all lines that have code."""
    executed = sorted(counts)
    found: dict[str, dict[int, int]] = {}
    for table in tables:
        for start, end, source in table.ranges():
            lines = found.setdefault(source.file, {})
            highest = max((counts[address] for address in _within(executed, start, end)), default=0)
            lines[source.line] = max(lines.get(source.line, 0), highest)
    return found


def _within(ordered: list[int], start: int, end: int) -> Iterator[int]:
    for index in range(bisect_left(ordered, start), len(ordered)):
        if ordered[index] >= end:
            return
        yield ordered[index]
