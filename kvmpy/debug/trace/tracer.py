"""Records what a machine's guest does: `Machine.trace`."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from kvmpy.debug.trace.selection import Selection
from kvmpy.debug.trace.steps import StepObserver
from kvmpy.debug.trace.subject import Subjects, event_of
from kvmpy.debug.trace.trace_file import TraceFile
from kvmpy.debug.trace.trace_format import TraceFormat, format_named, make_format
from kvmpy.errors import KvmpyError, UsageError

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from kvmpy.debug.trace.event import TraceEvent
    from kvmpy.debug.trace.selection import Places
    from kvmpy.debug.trace.subject import Note, Record, What
    from kvmpy.machine import Machine

__all__ = ["RING", "TraceError", "Tracer"]

RING = 65536
"""How many events are kept without a file, unless told otherwise."""

_BATCH = 1024
"""Notes that are written at once."""
_EVERY = 250_000_000
"""Nanoseconds after which fewer are, so that a file can be followed while the guest runs."""
_BEHIND = 16 * _BATCH
"""Notes at which a vCPU waits for the one that writes."""


class TraceError(KvmpyError, OSError):
    """A trace could not be written to its end. `written` events are in the file, `lost` are not."""

    def __init__(self, path: str, error: OSError, written: int, lost: int) -> None:
        super().__init__(error.errno, error.strerror or str(error), path)
        self.written = written
        self.lost = lost

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}; the trace has {self.written} events, {self.lost} are lost"


class Tracer:
    """Tells what a machine's guest does, from `start` (or the beginning of a `with` block) to `close` (its end).

    Without a `path` the last `ring` events are kept, for `events`. With one they are written there as they come, in
    the `format` "text", "jsonl", "chrome" or "html", by default told by the suffix: .txt, .jsonl, .json, .html. With
    both, the last `ring` events are written at the end. The filters are those of `Selection`; `minimum` is in seconds.
    `steps` traces each instruction as well, which makes the guest very slow.

    Start and end need no stop of the guest. A file that cannot be written to ends the trace, not the guest: `error`
    says so, and `close` raises TraceError. Raises UsageError for filters that cannot be, and OSError when the file
    cannot be opened.
    """

    def __init__(
        self,
        machine: Machine,
        path: str | os.PathLike[str] | None = None,
        *,
        format: str | None = None,
        kinds: str | Iterable[str] | None = None,
        ports: Places | None = None,
        addresses: Places | None = None,
        devices: str | Iterable[str] | None = None,
        vcpus: int | Iterable[int] | None = None,
        minimum: float = 0.0,
        ring: int | None = None,
        steps: bool = False,
    ) -> None:
        if ring is not None and (not isinstance(ring, int) or ring < 1):
            raise UsageError(f"a ring holds one event or more, not {ring!r}")
        self.machine = machine
        self.path = None if path is None else os.fspath(path)
        self.error: OSError | None = None
        """Why writing ended before the trace did."""
        self.count = 0
        """Events that passed the filters."""
        self.written = 0
        """Events that are in the file."""
        self._selection = Selection(
            kinds=kinds, ports=ports, addresses=addresses, devices=devices, vcpus=vcpus, minimum=minimum
        )
        self._format_name = None if self.path is None else format_named(format, self.path)
        if self.path is None and format is not None:
            raise UsageError("a format is for a file, and there is no path")
        self._ring: deque[Record] | None = None
        if self.path is None or ring is not None:
            self._ring = deque(maxlen=ring or RING)
        self._steps = StepObserver(machine, self.note) if steps else None
        self._subjects = Subjects(
            (machine.ports, machine.mmio), machine.devices, self._selection.takes, machine.symbols if steps else None
        )
        self._file: TraceFile | None = None
        self._format: TraceFormat | None = None
        self._notes: list[Note] = []
        self._append = self._notes.append
        self._writing = threading.Lock()
        self._next_write = 0
        self._began = 0
        self._state = "new"

    # From outside

    def start(self) -> Self:
        """Begin. Raises OSError when the file cannot be opened, UsageError when the machine is traced already."""
        if self._state != "new":
            raise UsageError("a tracer starts once; make another one with machine.trace()")
        runners = self.machine.runners
        if any(runner.observer is not None for runner in runners):
            raise UsageError("this machine is traced already")
        if self._steps is not None and any(runner.debug.traced for runner in runners):
            raise UsageError("somebody else, such as coverage, takes the steps of this machine; end that first")
        if self.path is not None and self._format_name is not None:
            self._format = make_format(self._format_name, self.machine)
            self._file = TraceFile(self.path, self._format.end())
            self._write(self._format.begin(), 0)
        self._state = "on"
        self._began = perf_counter_ns()
        self._next_write = self._began + _EVERY
        self.machine.board.observe_levels(self._note_level)
        if self._steps is not None:
            self._steps.start()
        for runner in runners:
            runner.observe(self._steps or self)
        return self

    def close(self) -> None:
        """End the trace and complete its file. Raises TraceError when not all events could be written."""
        if self._state != "on":
            return
        if self._steps is not None:
            self._steps.stop()
        for runner in self.machine.runners:
            runner.observer = None
            if not runner.vcpu.closed:
                runner.observe(None)
        self.machine.board.observe_levels(None)
        with self._writing:
            self._take()
            self._state = "closed"
            if self._file is None or self._format is None:
                return
            try:
                if self._ring is not None:
                    self._write(self._format.batch(list(self._ring)), len(self._ring))
                self._write(self._format.last(), 0)
                self._file.close()
            except OSError as error:
                self.error = self.error or error
        if self.error is not None:
            raise TraceError(str(self.path), self.error, self.written, self.count - self.written)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except TraceError:
            if error is None:  # else what ended the block matters more; `self.error` is still there
                raise

    @property
    def events(self) -> tuple[TraceEvent, ...]:
        """The events in the ring, the oldest first. Raises UsageError for a trace that is written to a file only."""
        if self._ring is None:
            raise UsageError(f"the events are in {self.path}; a trace with ring= keeps the last ones in memory as well")
        with self._writing:
            self._take()
            return tuple(event_of(record) for record in self._ring)

    # From vCPU threads

    def note(self, *note: Any) -> None:
        """Be told of an exit; see `kvmpy.machine.observed_loop.Observer`."""
        self._append(note)
        if len(self._notes) >= _BATCH or note[3] >= self._next_write:
            self._write_some()

    def _note_level(self, gsi: int, level: int) -> None:
        now = perf_counter_ns()
        what: What = ("irq", "raise" if level else "lower", gsi)
        self.note(None, now, now, now, what, None)

    def _write_some(self) -> None:
        """Write what has come, unless another thread does so at the moment."""
        if self._writing.acquire(blocking=len(self._notes) >= _BEHIND):
            try:
                self._take()
            finally:
                self._writing.release()

    def _take(self) -> None:
        """Put what was noted where it belongs. With the lock held."""
        notes = self._notes[:]
        del self._notes[: len(notes)]  # the list stays the same: other threads append to it meanwhile
        self._next_write = perf_counter_ns() + _EVERY
        if self._state != "on" or not notes:
            return
        records = self._subjects.records(notes, self._began)
        if self._selection.vcpus is not None or self._selection.minimum:
            vcpus, minimum = self._selection.vcpus, self._selection.minimum
            records = [r for r in records if (vcpus is None or r[3] in vcpus) and r[2] >= minimum]
        self.count += len(records)
        if self._ring is not None:
            self._ring.extend(records)
        elif self._format is not None and records and self.error is None:
            self._write(self._format.batch(records), len(records))

    def _write(self, text: str, events: int) -> None:
        """Write to the file. Should it not take it, that is kept for `close` to say: the guest has no part in it."""
        if self._file is None or self.error is not None:
            return
        try:
            self._file.write(text)
        except OSError as error:
            self.error = error
        else:
            self.written += events
