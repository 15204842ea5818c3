"""A part of the page: lines to read, and the same as plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from kvmpy._value import field, frozen, mutable
from kvmpy.debug.crash_report.case import Case

__all__ = ["Line", "Section", "SectionBuilder", "build"]


@frozen
class Line:
    """One line. `mark` is for those that matter most."""

    text: str
    mark: bool = False


@frozen
class Section:
    """A part: `name` for programs, `title` for readers. `unavailable` says why there is nothing, if that is so."""

    name: str
    title: str
    lines: tuple[Line, ...] = ()
    data: Any = None
    unavailable: str = ""


@mutable
class Contents:
    """What a builder puts together."""

    lines: list[Line] = field(default_factory=list)
    data: Any = None

    def add(self, text: str = "", *, mark: bool = False) -> None:
        """Add the lines of `text`."""
        self.lines += (Line(line, mark) for line in text.split("\n"))

    def heading(self, text: str) -> None:
        """Add a line that stands above others, with an empty one before it."""
        if self.lines:
            self.lines.append(Line(""))
        self.lines.append(Line(text))

    def indented(self, lines: Iterable[str], *, mark: bool = False) -> None:
        """Add lines two spaces in."""
        self.lines += (Line(f"  {line}", mark) for line in lines)


@frozen
class SectionBuilder:
    """How a part is made from a case. It adds nothing where there is nothing to say."""

    name: str
    title: str
    fill: Callable[[Case, Contents], None]


def build(builder: SectionBuilder, case: Case) -> Section | None:
    """The part; None when it has nothing to say. What goes wrong is said in its place."""
    contents = Contents()
    try:
        builder.fill(case, contents)
    except Exception as error:  # a report shows what it can
        return Section(
            builder.name, builder.title, tuple(contents.lines), contents.data, f"{type(error).__name__}: {error}"
        )
    if not contents.lines:
        return None
    return Section(builder.name, builder.title, tuple(contents.lines), contents.data)
