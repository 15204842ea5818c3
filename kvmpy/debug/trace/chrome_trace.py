"""A trace in Chrome's trace event format, which Perfetto opens (ui.perfetto.dev, "Open trace file").

One process for the machine, one thread for each vCPU, on which time in the guest and exits take turns. Interrupt lines
are counters of 0 and 1. Timestamps are microseconds, as the format has it.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmpy.debug.trace.subject import Record, Subject

__all__ = ["DETAILED", "ChromeTrace"]

DETAILED = 100_000
"""Exits with a slice for the guest before them and with their value. Those after have neither: a file of a million
exits would take too long to open."""

_PROCESS = 1
_RATE_EVERY = 256
"""Exits to a point of the curve of exits per millisecond."""

_GUEST = '{"ph":"X","pid":1,"tid":%d,"ts":%.3f,"dur":%.3f,"name":"guest"},\n'
_SLICE = '{"ph":"X","pid":1,"tid":%d,"ts":%.3f,"dur":%.3f,"name":'


class ChromeTrace:
    """The object form: its event list closed by `end`, after which nothing follows."""

    def __init__(self, title: str, vcpus: Iterable[int], detailed: int = DETAILED) -> None:
        self._title = title
        self._vcpus = tuple(vcpus)
        self._detailed = detailed
        self._left = detailed
        self._last_rate = 0
        self._rates: dict[str, float] = {}

    def begin(self) -> str:
        """The head, with the names of process and threads."""
        named = [_metadata("process_name", 0, self._title)]
        named += [_metadata("thread_name", _thread(vcpu), f"vCPU {vcpu}") for vcpu in self._vcpus]
        return '{"displayTimeUnit":"ns","traceEvents":[\n' + ",\n".join(named)

    def last(self) -> str:
        """Nothing."""
        return ""

    def end(self) -> str:
        """The tail."""
        return "\n]}\n"

    def batch(self, records: list[Record]) -> str:
        """Slices and counters, each with a comma before it."""
        pieces: list[str] = []
        for start in range(0, len(records), _RATE_EVERY):
            part = records[start : start + _RATE_EVERY]
            if self._left > 0:
                self._with_details(part, pieces)
            else:
                self._without_details(part, pieces)
            self._rate(part, pieces)
        return "".join(pieces)

    def _with_details(self, records: list[Record], pieces: list[str]) -> None:
        append = pieces.append
        for record in records:
            time, guest, duration, vcpu, subject, value, text = record
            if text or type(value) is not int or vcpu is None or not guest:
                append(_irregular(record))
                continue
            rendered = subject.rendered
            if rendered is None:
                rendered = subject.rendered = _templates(subject)
            at, tid = time / 1e3, vcpu + 1
            append(rendered[0] % (tid, (time - guest) / 1e3, guest / 1e3, tid, at, duration / 1e3, value))
        self._left -= len(records)
        if self._left <= 0 and records:
            at = records[-1][0] / 1e3
            name = f"from here on without guest slices and values, after {self._detailed} exits"
            append(f',\n{{"ph":"i","s":"g","pid":1,"tid":1,"ts":{at:.3f},"name":{json.dumps(name)}}}')

    def _without_details(self, records: list[Record], pieces: list[str]) -> None:
        append = pieces.append
        for record in records:
            time, _, duration, vcpu, subject, value, text = record
            if text or vcpu is None or type(value) is dict:
                append(_irregular(record))
                continue
            rendered = subject.rendered
            if rendered is None:
                rendered = subject.rendered = _templates(subject)
            append(rendered[1] % (vcpu + 1, time / 1e3, duration / 1e3))

    def _rate(self, records: list[Record], pieces: list[str]) -> None:
        """A point of the curves: how many exits of each kind there were in a millisecond, lately."""
        counts = Counter([record[4].kind for record in records])
        del counts["irq"]
        now = records[-1][0]
        span = now - self._last_rate
        if span > 0:
            self._rates = dict.fromkeys(self._rates, 0.0) | {kind: n * 1e6 / span for kind, n in counts.items()}
            rates = ",".join(f'"{kind}":{rate:.3f}' for kind, rate in self._rates.items())
            at = self._last_rate / 1e3  # a point holds from its time on
            pieces.append(f',\n{{"ph":"C","pid":1,"tid":0,"ts":{at:.3f},"name":"exits per ms","args":{{{rates}}}}}')
            self._last_rate = now


def _thread(vcpu: int) -> int:
    """The thread id of a vCPU: 0 is the idle thread's on Linux, which Perfetto leaves out."""
    return vcpu + 1


def _metadata(what: str, thread: int, name: str) -> str:
    event = {"ph": "M", "pid": _PROCESS, "tid": thread, "ts": 0, "name": what, "args": {"name": name}}
    return json.dumps(event, separators=(",", ":"))


def _templates(subject: Subject) -> tuple[str, str]:
    """With guest slice and value, and without both."""
    name = _named(subject)
    value = f'"value":"0x%0{2 * (subject.size or 1)}x"'
    return f',\n{_GUEST}{_SLICE}{name},"args":{{{value}}}}}', f",\n{_SLICE}{name}}}"


def _named(subject: Subject) -> str:
    return json.dumps(subject.label + (" (queued)" if subject.queued else "")).replace("%", "%%")


def _irregular(record: Record) -> str:
    """Everything else: lines of interrupts, exits without a value, steps, accesses that failed."""
    time, guest, duration, vcpu, subject, value, text = record
    if vcpu is None:
        name = json.dumps(f"irq {subject.address} {subject.device or ''}".rstrip())
        level = int(subject.direction == "raise")
        return f',\n{{"ph":"C","pid":1,"tid":0,"ts":{time / 1e3:.3f},"name":{name},"args":{{"level":{level}}}}}'
    arguments: dict[str, Any] = {}
    if isinstance(value, dict):
        arguments.update((name, hex(number)) for name, number in value.items())
    elif value is not None:
        arguments["value"] = value.hex(" ") if isinstance(value, bytes) else hex(value)
    if text:
        arguments["text"] = text
    shown = f',"args":{json.dumps(arguments)}' if arguments else ""
    tid = _thread(vcpu)
    slice = f"{_SLICE % (tid, time / 1e3, duration / 1e3)}{_named(subject).replace('%%', '%')}{shown}}}"
    return f",\n{_GUEST % (tid, (time - guest) / 1e3, guest / 1e3)}{slice}" if guest else f",\n{slice}"
