"""A trace as JSON lines: one object an event."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmpy.debug.trace.subject import Record, Subject

__all__ = ["JsonLines"]

_NAMED = ("step", "other")
"""Kinds whose name says what no other key does."""


class JsonLines:
    """For scripts. The keys are those of `TraceEvent`, without those that say nothing; bytes are written in hex.

    `name` is written only where the other keys do not say it already: each key makes reading a tenth slower.
    """

    def begin(self) -> str:
        """Nothing: each line stands for itself."""
        return ""

    def batch(self, records: list[Record]) -> str:
        """A line for each record."""
        lines: list[str] = []
        append = lines.append
        for time, guest, duration, vcpu, subject, value, text in records:
            if text or type(value) is not int or vcpu is None:
                append(_line(time, guest, duration, vcpu, subject, value, text))
                continue
            template = subject.rendered
            if template is None:
                template = subject.rendered = _template(subject)
            append(template % (time, guest, duration, vcpu, value))
        return "".join(lines)

    def last(self) -> str:
        """Nothing."""
        return ""

    def end(self) -> str:
        """Nothing."""
        return ""


def _template(subject: Subject) -> str:
    """The line of a subject with a number as its value, all but times, vCPU and value filled in."""
    first, last = _fields(subject, 0, "").split('"value":0', 1)
    fixed = [part.replace("%", "%%") for part in (first, last)]
    return f'{{"time":%d,"guest":%d,"duration":%d,"vcpu":%d,{fixed[0]}"value":%d{fixed[1]}}}\n'


def _line(time: int, guest: int, duration: int, vcpu: int | None, subject: Subject, value: Any, text: str) -> str:
    times = f'{{"time":{time},"guest":{guest},"duration":{duration},"vcpu":{json.dumps(vcpu)},'
    return f"{times}{_fields(subject, value, text)}}}\n"


def _fields(subject: Subject, value: Any, text: str) -> str:
    """All keys but the times and the vCPU, without the braces."""
    data = subject.code if subject.kind == "step" else value
    fields = {
        "kind": subject.kind,
        "name": subject.name if subject.kind in _NAMED else None,
        "direction": subject.direction,
        "address": subject.address,
        "size": subject.size,
        "value": data.hex() if isinstance(data, bytes) else data,
        "device": subject.device,
        "queued": subject.queued or None,
        "text": text or subject.remark or None,
        "registers": value if isinstance(value, dict) else None,
    }
    return json.dumps({key: field for key, field in fields.items() if field is not None}, separators=(",", ":"))[1:-1]
