"""The file of a trace stays sound when the disk is full, and is complete at any time."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvmpy.debug.trace.trace_file import TraceFile


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Files of this process cannot grow beyond `size` bytes: writing fails, as on a full disk, with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_ending_follows_every_piece_and_only_the_last_stays(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    file = TraceFile(path, "]\n")
    for number in range(3):
        file.write(f"{number},")
        assert path.read_text() == "".join(f"{n}," for n in range(number + 1)) + "]\n"
    file.close()
    file.close()
    assert path.read_text() == "0,1,2,]\n"


def test_what_was_there_before_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text("something longer from the last time")
    file = TraceFile(path, "]")
    file.write("[")
    file.close()
    assert path.read_text() == "[]"


@pytest.mark.parametrize("room", [0, 1, 6, 7, 9])
def test_a_piece_that_does_not_fit_leaves_the_file_as_it_was(tmp_path: Path, room: int) -> None:
    path = tmp_path / "trace"
    file = TraceFile(path, "]}")
    file.write("[first")
    before = path.read_text()
    assert before == "[first]}"
    with disk_of(len("[first") + room), pytest.raises(OSError, match="File too large") as caught:
        file.write(",second,")
    assert caught.value.errno == errno.EFBIG
    if room >= len("]}"):  # else not even the ending fits
        assert path.read_text() == before
    file.write(",third")
    file.close()
    assert path.read_text() == "[first,third]}"


def test_a_pipe_gets_the_ending_once(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.append(path.read_text()))
    reader.start()
    file = TraceFile(path, "]")
    file.write("[")
    file.write("1")
    file.close()
    reader.join(10)
    assert said == ["[1]"]


def test_a_file_that_cannot_be_opened_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        TraceFile(tmp_path / "nowhere" / "trace")
