"""Places in a guest that are named by a source line, as "main.c:12"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpy.errors import ImageError, UsageError

if TYPE_CHECKING:
    from kvmpy.machine import Machine

__all__ = ["is_source_line", "source_line_address"]


def is_source_line(where: str) -> bool:
    """Whether `where` has the form of "main.c:12"."""
    file, _, line = where.rpartition(":")
    return bool(file) and line.isdecimal()


def source_line_address(machine: Machine, where: str) -> int:
    """The first address whose code comes from a line. Raises UsageError where there is none, naming lines near it."""
    file, _, line = where.rpartition(":")
    try:
        lines = machine.lines
        if lines is None or not lines:
            raise UsageError("the loaded image has no source lines: compile it with -g, and load the ELF file")
        addresses = lines.addresses_of(file, int(line), symbols=machine.symbols)
        if addresses:
            return addresses[0]
        others = sorted(lines.lines_with_code(file), key=lambda other: abs(other - int(line)))[:10]
    except ImageError as error:
        raise UsageError(f"the source lines of the image cannot be read: {error}") from error
    near = f"; near it have: {', '.join(map(str, sorted(others)))}" if others else f"; it has no file {file}"
    raise UsageError(f"{where} has no code{near}")
