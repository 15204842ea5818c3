"""A trace as text: one line an event, in columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmpy.debug.trace.event import TraceEvent
    from kvmpy.debug.trace.subject import Record, Subject

__all__ = ["TextForm", "event_line", "shown_value"]

_HEADER = "#      time s vcpu   guest us    took us  what                      value               device"
_TIMES = "%13.9f %4s %10.3f %10.3f  "
_NAME, _VALUE, _CODE = 24, 18, 21
_BYTES_SHOWN = 32


class TextForm:
    """Lines for people and for grep, in the order in which the events were handled."""

    def begin(self) -> str:
        """The header."""
        return _HEADER + "\n"

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
            append(template % (time / 1e9, vcpu, guest / 1e3, duration / 1e3, value))
        return "".join(lines)

    def last(self) -> str:
        """Nothing."""
        return ""

    def end(self) -> str:
        """Nothing: a text ends anywhere."""
        return ""


def event_line(event: TraceEvent) -> str:
    """The line of one event, without its end."""
    times = _times(event.time, event.guest, event.duration, event.vcpu)
    if event.kind == "step":
        code = event.value if isinstance(event.value, bytes) else b""
        return times + _step(event.address, code, event.name, _shown(event.registers, 1, None), event.text)
    shown = _shown(event.value, event.size or 1, event.direction)
    return times + _what(_quoted(event), shown, event.device or "", event.text)


def _times(time: int, guest: int, duration: int, vcpu: int | None) -> str:
    return _TIMES % (time / 1e9, "-" if vcpu is None else vcpu, guest / 1e3, duration / 1e3)


def _what(name: str, value: str, device: str, more: str) -> str:
    who = f"{_printable(device)} ({_printable(more)})" if more else _printable(device)
    return f"{name:<{_NAME}} {value:<{_VALUE}}  {who}".rstrip()


def _printable(text: str) -> str:
    """A name of somebody else's, in one line and without commands for the terminal."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def _step(address: int | None, code: bytes, instruction: str, registers: str, symbol: str) -> str:
    place = f"{address or 0:#x}{f' <{_printable(symbol)}>' if symbol else ''}"
    return f"{place:<{_NAME}} {code.hex(' '):<{_CODE}} {_printable(instruction):<32} {registers}".rstrip()


def _quoted(subject: TraceEvent | Subject) -> str:
    return f"{subject.name} (queued)" if subject.queued else subject.name


def _line(time: int, guest: int, duration: int, vcpu: int | None, subject: Subject, value: Any, text: str) -> str:
    shown = _shown(value, subject.size or 1, subject.direction)
    if subject.kind == "step":
        what = _step(subject.address, subject.code, subject.name, shown, subject.remark)
    else:
        what = _what(_quoted(subject), shown, subject.device or "", text or subject.remark)
    return f"{_times(time, guest, duration, vcpu)}{what}\n"


def _template(subject: Subject) -> str:
    """The line of a subject with a number as its value, all but times and value filled in."""
    pattern = f"{_arrow(subject.direction)} 0x%0{2 * (subject.size or 1)}x"
    width = len(pattern % 0)
    what = _what(_quoted(subject), "\0" * width, subject.device or "", subject.remark)
    return _TIMES + what.replace("%", "%%").replace("\0" * width, pattern) + "\n"


def _arrow(direction: str | None) -> str:
    return "<-" if direction == "write" else "->"


def _shown(value: Any, size: int, direction: str | None) -> str:
    """A value with an arrow that says where it goes."""
    shown = shown_value(value, size)
    return f"{_arrow(direction)} {shown}" if shown and not isinstance(value, dict) else shown


def shown_value(value: Any, size: int) -> str:
    """A number with as many digits as were transferred; bytes in hex, the first of them; registers by name."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return " ".join(f"{name}={number:#x}" for name, number in value.items())
    if isinstance(value, int):
        return f"{value:#0{2 + 2 * size}x}"
    more = f" ... ({len(value)} bytes)" if len(value) > _BYTES_SHOWN else ""
    return f"{value[:_BYTES_SHOWN].hex(' ')}{more}"
