"""A trace as one self-contained HTML page: timeline, counts by device and place, slowest exits, list of events.

The page holds the first and the last `KEPT` / 2 events in full, and of all others the totals: it opens as fast after a
billion exits as after a thousand. So it is written when the trace is over.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from heapq import heappush, heappushpop
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmpy.debug.trace.event import KINDS
from kvmpy.debug.trace.subject import Subject
from kvmpy.debug.trace.text_form import shown_value

if TYPE_CHECKING:
    from kvmpy.debug.trace.subject import Record

__all__ = ["KEPT", "HtmlPage"]

KEPT = 100_000
"""Events that the page shows one by one."""

_SUBJECTS = 4096
"""Distinct things that are counted apart; those that come later are counted together, by kind."""
_SLOWEST = 100
_BUCKETS = 512
"""Columns of the overview: each counts the events of a part of the trace."""
_GROUPS = 24
"""Devices and kinds that have a colour of their own there; what comes later has one together."""

_PARTS = Path(__file__).with_name("page")
_STYLES = ("page.css",)
_SCRIPTS = ("trace.js", "timeline.js", "tables.js", "page.js")


class _Totals:
    """What all events of one subject add up to. Times in nanoseconds."""

    __slots__ = ("columns", "count", "duration", "guest", "longest", "number", "subject")

    def __init__(self, subject: Subject, number: int, columns: list[int]) -> None:
        self.subject = subject
        self.number = number
        self.columns = columns
        """The events of its device, or kind, in the columns of the overview."""
        self.count = 0
        self.duration = 0
        self.longest = 0
        self.guest = 0

    def row(self) -> dict[str, Any]:
        """For the page. Addresses are text: numbers of JavaScript have 53 bits."""
        subject = self.subject
        return {
            "kind": subject.kind,
            "name": subject.name + (" (queued)" if subject.queued else ""),
            "direction": subject.direction,
            "address": None if subject.address is None else hex(subject.address),
            "size": subject.size,
            "device": subject.device,
            "remark": subject.remark,
            "count": self.count,
            "duration": self.duration,
            "longest": self.longest,
            "guest": self.guest,
        }


class HtmlPage:
    """Gathers what the page shows, and writes it at the end."""

    def __init__(self, title: str, kept: int = KEPT) -> None:
        self._title = title
        self._first: list[Record] = []
        self._last: deque[Record] = deque(maxlen=kept - kept // 2)
        self._room = kept // 2
        self._totals: dict[tuple[Any, ...], _Totals] = {}
        self._slowest: list[tuple[int, int, Record]] = []
        self._count = 0
        self._span = 0
        self._width = 1 << 16
        """Nanoseconds of a column of the overview."""
        self._overview: dict[str, list[int]] = {}
        """By device, or by kind of events that have none."""

    def begin(self) -> str:
        """Nothing yet."""
        return ""

    def end(self) -> str:
        """Nothing."""
        return ""

    def batch(self, records: list[Record]) -> str:
        """Count, and keep some; nothing is written yet."""
        slowest, least = self._slowest, self._slowest[0][0] if len(self._slowest) == _SLOWEST else -1
        number = self._count
        for record in records:
            duration, subject = record[2], record[4]
            totals = subject.rendered
            if totals is None:
                totals = subject.rendered = self._totals_of(subject)
            totals.count += 1
            totals.duration += duration
            totals.guest += record[1]
            if duration > totals.longest:
                totals.longest = duration
            number += 1
            if duration > least and subject.kind != "interrupted":
                if len(slowest) < _SLOWEST:
                    heappush(slowest, (duration, -number, record))
                else:
                    least = heappushpop(slowest, (duration, -number, record))[0]
        self._count = number
        self._span = max(self._span, max(record[0] + record[2] for record in records))
        self._note_in_overview(records)
        room = max(self._room - len(self._first), 0)
        self._first.extend(records[:room])
        self._last.extend(records[room:])
        return ""

    def _totals_of(self, subject: Subject) -> _Totals:
        key = (subject.kind, subject.name, subject.size, subject.device, subject.queued)
        if key not in self._totals and len(self._totals) >= _SUBJECTS:
            subject = Subject(subject.kind, None, None, None, f"other {subject.kind} events")
            key = (subject.kind, subject.name, None, None, False)
        if key not in self._totals:
            self._totals[key] = _Totals(subject, len(self._totals), self._columns_of(subject))
        return self._totals[key]

    def _columns_of(self, subject: Subject) -> list[int]:
        group = subject.device or subject.kind
        if group not in self._overview and len(self._overview) >= _GROUPS:
            group = "others"
        return self._overview.setdefault(group, [0] * _BUCKETS)

    def _note_in_overview(self, records: list[Record]) -> None:
        while self._span >= self._width * _BUCKETS:
            self._width *= 2
            for columns in self._overview.values():
                pairs = [a + b for a, b in zip(columns[::2], columns[1::2], strict=True)]
                columns[:] = pairs + [0] * (_BUCKETS // 2)
        width = self._width
        for record in records:
            record[4].rendered.columns[record[0] // width] += 1

    def last(self) -> str:
        """The page."""
        last = list(self._last)
        data = {
            "title": self._title,
            "span": self._span,
            "count": self._count,
            "kinds": KINDS,
            "subjects": [totals.row() for totals in self._totals.values()],
            "overview": {"width": self._width, "counts": self._overview},
            "first": _columns(self._first),
            "last": _columns(last),
            "slowest": _columns(record for _, _, record in sorted(self._slowest, reverse=True)),
        }
        # In a script element only "</script" and "<!--" would be taken for HTML.
        text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
        page = (_PARTS / "page.html").read_text("utf-8")
        for mark, parts in (("/*STYLES*/", _STYLES), ("/*SCRIPTS*/", _SCRIPTS)):
            page = page.replace(mark, "\n".join((_PARTS / part).read_text("utf-8") for part in parts), 1)
        head, tail = page.split("/*DATA*/")
        return f"{head}{text}{tail}"


def _columns(records: Iterable[Record]) -> dict[str, list[Any]]:
    """Column by column, which is smaller and faster to read than one object an event. Times are differences."""
    columns: dict[str, list[Any]] = {"time": [], "guest": [], "duration": [], "vcpu": [], "subject": [], "value": []}
    before = 0
    for time, guest, duration, vcpu, subject, value, text in records:
        columns["time"].append(time - before)
        before = time
        columns["guest"].append(guest)
        columns["duration"].append(duration)
        columns["vcpu"].append(-1 if vcpu is None else vcpu)
        columns["subject"].append(subject.rendered.number)
        shown = shown_value(value, subject.size or 1)
        columns["value"].append(f"{shown} {text}".strip())
    return columns
