"""The three ways as a table, and as a picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kvmpy.bench.ways import WAYS, WORKLOADS, Figures, Results
from kvmpy.errors import UsageError

__all__ = ["FORMATS", "as_text", "draw"]

FORMATS = (".svg", ".png")
"""What `draw` can write, by the end of the file's name."""

WHAT_COUNTS = (
    "An exit is a return of KVM_RUN for something that the guest did. What KVM does by itself is none: its PIC, PIT\n"
    "and local APIC, HLT, ioeventfd, irqfd, and queued writes to the 16550."
)

_HEADINGS = ("work", "way", "exits", "seconds", "bytes per exit")
_COLOURS = ("#b2182b", "#f4a582", "#2166ac")
_TITLES = {
    "print": "print", "disk": "read a disk", "timestamps": "timestamps", "ticks": "timer ticks", "messages": "messages",
}  # fmt: skip


def as_text(results: Results) -> str:
    """A table for a terminal."""
    table = [_HEADINGS]
    for workload in WORKLOADS:
        for number, way in enumerate(WAYS):
            figures = results[way][workload]
            table.append(
                (workload if number == 0 else "", way, f"{figures.exits:,}", f"{figures.seconds:.3f}", _rate(figures))
            )
    widths = [max(len(line[column]) for line in table) for column in range(len(_HEADINGS))]
    lines = []
    for number, line in enumerate(table):
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
        if number == 0:
            lines.append("-" * len(lines[-1]))
    return "\n".join([*lines, "", WHAT_COUNTS])


def _rate(figures: Figures) -> str:
    if not figures.bytes:
        return ""
    return f"{figures.bytes / figures.exits:,.0f}" if figures.exits else "no exit"


def draw(results: Results, path: str | os.PathLike[str]) -> None:
    """Draw exits and times into an SVG or PNG file. Raises UsageError for another kind, and without matplotlib."""
    kind = Path(path).suffix.lower()
    if kind not in FORMATS:
        raise UsageError(f"a plot is an {' or '.join(FORMATS)} file, not {os.fspath(path)}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("a plot needs matplotlib: pip install 'kvmpy[plot]'") from None

    # No pyplot: it looks for a display.
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1)
    figure.suptitle("The same work in three ways")
    _bars(above, {way: [results[way][name].exits for name in WORKLOADS] for way in WAYS}, 0.7)
    above.set_ylabel("exits (logarithmic)")
    above.legend(WAYS, ncols=len(WAYS), loc="upper center", bbox_to_anchor=(0.5, 1.14), frameon=False)
    seconds = {way: [results[way][name].seconds * 1e3 for name in WORKLOADS] for way in WAYS}
    _bars(below, seconds, min(min(row) for row in seconds.values()) / 2)
    below.set_ylabel("milliseconds (logarithmic)")
    figure.savefig(path, format=kind[1:], dpi=120)


def _bars(axes: Any, rows: dict[str, list[float]], bottom: float) -> None:
    """Groups of bars on a logarithmic scale, with their values above them; 0 has no bar but a value."""
    width = 0.27
    for number, way in enumerate(WAYS):
        places = [index + (number - 1) * width for index in range(len(WORKLOADS))]
        axes.bar(places, [max(value, bottom / 2) for value in rows[way]], width * 0.94, color=_COLOURS[number])
        for place, value in zip(places, rows[way], strict=True):
            text = f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
            axes.annotate(
                text, (place, max(value, bottom)), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=8
            )
    axes.set_yscale("log")
    axes.set_ylim(bottom, max(max(row) for row in rows.values()) * 4 + bottom)
    axes.set_xticks(range(len(WORKLOADS)), [_TITLES[name] for name in WORKLOADS])
    axes.spines[["top", "right"]].set_visible(False)
