"""The formats of trace files, by name and by suffix."""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING, Protocol

from kvmpy.errors import UsageError

if TYPE_CHECKING:
    from kvmpy.debug.trace.subject import Record
    from kvmpy.machine import Machine

__all__ = ["FORMATS", "TraceFormat", "format_named", "make_format"]

FORMATS = {"text": ".txt", "jsonl": ".jsonl", "chrome": ".json", "html": ".html"}
"""Name and suffix."""


class TraceFormat(Protocol):
    """Turns records into text: `begin`, then any number of `batch`, then `last`; `end` follows each of them."""

    def begin(self) -> str:
        """The head of the file."""

    def batch(self, records: list[Record]) -> str:
        """Some records."""

    def last(self) -> str:
        """What can only be written when the trace is over."""

    def end(self) -> str:
        """What makes the file complete, always the same; the next batch takes its place."""


def format_named(format: str | None, path: str) -> str:
    """The name of the format of a file. Raises UsageError for one that is not known."""
    if format is not None:
        if format not in FORMATS:
            raise UsageError(f"{format!r} is no format of traces; there are {', '.join(FORMATS)}")
        return format
    suffix = PurePath(path).suffix.lower()
    for name, usual in FORMATS.items():
        if suffix == usual:
            return name
    raise UsageError(f"{path}: name the file {', '.join('*' + usual for usual in FORMATS.values())}, or give a format")


def make_format(name: str, machine: Machine) -> TraceFormat:
    """A writer for the trace of `machine`."""
    if name == "text":
        from kvmpy.debug.trace.text_form import TextForm

        return TextForm()
    if name == "jsonl":
        from kvmpy.debug.trace.json_lines import JsonLines

        return JsonLines()
    title = f"kvmpy: {machine.image!r}" if machine.image is not None else "kvmpy"
    vcpus = [vcpu.id for vcpu in machine.vcpus]
    if name == "chrome":
        from kvmpy.debug.trace.chrome_trace import ChromeTrace

        return ChromeTrace(title, vcpus)
    from kvmpy.debug.trace.html_page import HtmlPage

    return HtmlPage(title)
