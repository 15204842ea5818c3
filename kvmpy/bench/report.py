"""Results as a table for a terminal, as a Markdown table, and as data for JSON."""

from __future__ import annotations

from kvmpy.bench.rows import Row, Samples, Target
from kvmpy.bench.suite import Results

__all__ = ["as_data", "as_markdown", "as_text"]

_HEADINGS = ("what", "unit", "kvmpy", "against", "median", "ratio", "target", "met")
_WORDS = {True: "yes", False: "no", None: ""}

EXPLANATION = (
    "Medians of {rounds} rounds (lowest..highest), the contenders in turns; ratios are formed in each round "
    "(>1: kvmpy's figure is the larger one)."
)


def as_text(results: Results) -> str:
    """A table in columns, with what it was measured on above and what is missing below."""
    table = [_HEADINGS, *(line for rows in results.rows.values() for row in rows for line in _lines(row))]
    widths = [max(len(line[column]) for line in table) for column in range(len(_HEADINGS))]
    lines = [f"{name:<8}{value}" for name, value in results.host.items()]
    lines += ["", EXPLANATION.format(rounds=results.rounds), ""]
    for number, line in enumerate(table):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        if number == 0:
            lines.append("-" * len(lines[-1]))
    lines += ["", *_remarks(results)]
    return "\n".join(lines).rstrip()


def as_markdown(results: Results) -> str:
    """The same for README.md."""
    lines = [f"| {' | '.join(_HEADINGS)} |", "|" + "---|" * len(_HEADINGS)]
    for rows in results.rows.values():
        for row in rows:
            lines += [f"| {' | '.join(cell.replace('|', chr(0x2223)) for cell in line)} |" for line in _lines(row)]
    host = "; ".join(f"{name} {value}" for name, value in results.host.items() if name != "load")
    lines += ["", f"Measured on: {host}.", EXPLANATION.format(rounds=results.rounds)]
    return "\n".join([*lines, *(f"{remark}." for remark in _remarks(results))])


def as_data(results: Results) -> dict[str, object]:
    """All of it in dicts, lists, strings and numbers."""
    return {
        "host": results.host,
        "rounds": results.rounds,
        "rows": [{"benchmark": name, **_row_data(row)} for name, rows in results.rows.items() for row in rows],
        "missing": results.missing,
    }


def _lines(row: Row) -> list[tuple[str, ...]]:
    """A row is one line by itself when it has a target of its own or stands alone, and one for each contender."""
    lines: list[tuple[str, ...]] = []
    if row.target is not None or not row.comparisons:
        target = "" if row.target is None else f"{row.target} {row.unit}"
        lines.append((row.name, row.unit, _spread(row.samples), "", "", "", target, _WORDS[row.met]))
    for comparison in row.comparisons:
        target = "" if comparison.target is None else f"{comparison.target} x"
        own = ("", "", "") if lines else (row.name, row.unit, _spread(row.samples))
        lines.append(
            (*own, comparison.contender, _number(comparison.samples.median), _spread(comparison.ratio), target,
             _WORDS[comparison.met])
        )  # fmt: skip
    return lines


def _remarks(results: Results) -> list[str]:
    notes = [f"{row.name}: {row.note}" for rows in results.rows.values() for row in rows if row.note]
    return [*notes, *(f"No {contender}: {reason}" for contender, reason in results.missing.items())]


def _spread(samples: Samples) -> str:
    if len(samples.values) == 1:
        return _number(samples.median)
    return f"{_number(samples.median)} ({_number(samples.low)}..{_number(samples.high)})"


def _number(value: float) -> str:
    """Three or four digits."""
    size = abs(value)
    return f"{value:.2f}" if size < 10 else f"{value:.1f}" if size < 100 else f"{value:.0f}"


def _row_data(row: Row) -> dict[str, object]:
    return {
        "name": row.name,
        "unit": row.unit,
        **_samples_data(row.samples),
        **_target_data(row.target, row.met),
        "note": row.note,
        "against": [
            {
                "contender": comparison.contender,
                **_samples_data(comparison.samples),
                "ratio": _samples_data(comparison.ratio),
                **_target_data(comparison.target, comparison.met),
            }
            for comparison in row.comparisons
        ],
    }


def _samples_data(samples: Samples) -> dict[str, object]:
    return {"median": samples.median, "low": samples.low, "high": samples.high, "samples": list(samples.values)}


def _target_data(target: Target | None, met: bool | None) -> dict[str, object]:
    return {"target": None if target is None else str(target), "met": met}
