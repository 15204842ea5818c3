"""What a guest writes to its consoles, beside a prompt on the same terminal."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

__all__ = ["GuestOutput", "StandardOutput"]

_MOST_HELD = 1 << 20
_PATIENCE = 12
"""So many looks an unfinished line waits for its rest."""


class GuestOutput:
    """Passes on what a guest writes: at once, or while somebody types a line (`hold`) when `take` asks for it.

    `write` may be called by any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: bytearray | None = None
        self._waited = 0
        self._at_line_start = True

    def write(self, data: bytes) -> None:
        """The guest wrote `data`."""
        with self._lock:
            if self._held is None:
                self._pass_on(data)
                return
            self._held += data
            self._waited = 0
            del self._held[: max(len(self._held) - _MOST_HELD, 0)]

    def hold(self) -> None:
        """Keep what comes from now on: a line is being typed."""
        with self._lock:
            self._held = self._held or bytearray()

    def release(self) -> None:
        """Pass on what was kept, and what comes, at once."""
        with self._lock:
            held, self._held = self._held, None
            if held:
                self._pass_on(held)

    def take(self, *, everything: bool = False) -> bytes:
        """What was kept so far, by whole lines; a part of one when nothing was added to it for a while."""
        with self._lock:
            held = self._held
            if not held:
                return b""
            end = held.rfind(b"\n") + 1
            self._waited += 1
            if everything or self._waited > _PATIENCE:
                end = len(held)
            taken = bytes(held[:end])
            del held[:end]
            return taken

    def finish_line(self) -> None:
        """End the line that the guest has begun, if any: something else is to be written."""
        with self._lock:
            if not self._at_line_start:
                self._pass_on(b"\n")

    def show(self, text: str) -> None:
        """Write lines of the prompt's own, which nothing of the guest's comes in between."""
        with self._lock:
            sys.stdout.flush()
            start = "" if self._at_line_start else "\n"
            self._pass_on(f"{start}{text}\n".encode(sys.stdout.encoding or "utf-8", "backslashreplace"))

    def _pass_on(self, data: bytes | bytearray) -> None:
        # What was printed before comes first; but another thread would tear a line that is being printed.
        if threading.current_thread() is threading.main_thread():
            sys.stdout.flush()
        self._at_line_start = data.endswith(b"\n")
        left = memoryview(data)
        while left:
            left = left[os.write(1, left) :]


class StandardOutput:
    """Python's standard output, of which only the main thread writes directly.

    Others are device handlers of a guest that runs in the background: what they print goes where its console does.
    """

    def __init__(self, stream: Any, output: GuestOutput) -> None:
        self._stream = stream
        self._output = output

    def write(self, text: str) -> int:
        if threading.current_thread() is threading.main_thread():
            written: int = self._stream.write(text)
            return written
        self._output.write(text.encode("utf-8", "replace"))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
