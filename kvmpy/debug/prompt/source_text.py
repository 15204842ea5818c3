"""Source lines as a person reads them: a short path, and the text of the line where the file is at hand."""

from __future__ import annotations

import linecache
import os
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmpy.debug.symbols import SourceLine

__all__ = ["line_text", "short_path"]

_LARGEST_SOURCE = 4 << 20


def short_path(path: str) -> str:
    """`path` relative to the current directory if it is below that, else as it is."""
    try:
        here = os.getcwd()
    except OSError:  # it was removed
        return path
    return path[len(here) + 1 :] if path.startswith(here.rstrip("/") + "/") else path


def line_text(source: SourceLine) -> str:
    """The text of the line without its indentation; empty when the file is not there, or is no file to be read.

    Its name comes from the image, which may say anything: what blocks or never ends (a FIFO, /dev/zero) is not opened.
    """
    try:
        status = os.stat(source.file)
    except (OSError, ValueError):
        return ""
    if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_SOURCE:
        return ""
    return linecache.getline(source.file, source.line).strip()
