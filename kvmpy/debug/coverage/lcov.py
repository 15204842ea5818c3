"""lcov's tracefiles (geninfo(1), "FILES"): for each source file its functions and lines, and how often they ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from kvmpy.debug.coverage.source_lines import line_counts, line_tables

if TYPE_CHECKING:
    from kvmpy.debug.coverage.covered_code import Module
    from kvmpy.debug.symbols import LineTable, SymbolTable

__all__ = ["lcov_text"]


class _Function(NamedTuple):
    line: int
    name: str
    hits: int


def lcov_text(
    counts: Mapping[int, int], modules: Sequence[Module], lines: LineTable | None, symbols: SymbolTable | None,
    test: str,
) -> str:  # fmt: skip
    """The file. `lines` and `symbols` replace those of the modules. Raises UsageError without line numbers."""
    tables = line_tables(modules, lines)
    infos = [module.debug_info for module in modules if module.debug_info is not None]
    names = [symbols] if symbols is not None else [info.symbols() for info in infos]
    by_line = line_counts(counts, tables)
    functions = _functions(counts, tables, names)
    text = [f"TN:{test}\n"]
    for file in sorted(by_line):
        text.append(_record(file, by_line[file], functions.get(file, [])))
    return "".join(text)


def _record(file: str, lines: Mapping[int, int], functions: list[_Function]) -> str:
    """FN and FNDA: functions and their counts, F and H: found and hit; DA: lines and theirs."""
    rows = [f"SF:{file}"]
    rows += [f"FN:{function.line},{function.name}" for function in functions]
    rows += [f"FNDA:{function.hits},{function.name}" for function in functions]
    rows += [f"FNF:{len(functions)}", f"FNH:{sum(function.hits > 0 for function in functions)}"]
    rows += [f"DA:{line},{lines[line]}" for line in sorted(lines)]
    rows += [f"LF:{len(lines)}", f"LH:{sum(count > 0 for count in lines.values())}", "end_of_record"]
    return "\n".join(rows) + "\n"


def _functions(
    counts: Mapping[int, int], tables: Sequence[LineTable], names: Sequence[SymbolTable]
) -> dict[str, list[_Function]]:
    """File -> its functions, by line. One of several names for the same code is enough; a name is there once."""
    found: dict[str, dict[str, _Function]] = {}
    seen: set[int] = set()
    for symbol in (symbol for table in names for symbol in table):
        if symbol.kind != "function" or symbol.address in seen:
            continue
        seen.add(symbol.address)
        source = next((line for table in tables if (line := table.at(symbol.address))), None)
        if source is None:
            continue
        hits = counts.get(symbol.address, 0)
        known = found.setdefault(source.file, {}).get(symbol.name)
        if known is not None:
            hits += known.hits
        found[source.file][symbol.name] = _Function(known.line if known else source.line, symbol.name, hits)
    return {file: sorted(functions.values()) for file, functions in found.items()}
