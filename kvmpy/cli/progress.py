"""What a person at a terminal sees while nothing is to be seen yet: what is done, and since when."""

from __future__ import annotations

import os
import sys
import threading
import time

__all__ = ["Progress"]

_PATIENCE = 0.5
"""Seconds before anything is shown: what is quick needs no progress."""


class Progress:
    """One line on standard error, with the seconds that a phase takes; nothing where that is no terminal."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._phase = ""
        self._began = 0.0
        self._visible = False
        self._thread: threading.Thread | None = None

    def phase(self, what: str) -> None:
        """From now on, `what` is done."""
        with self._lock:
            self._phase, self._began = what, time.monotonic()
        if self._shown and self._thread is None:
            self._thread = threading.Thread(target=self._tell, name="kvmpy progress", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """Something else is to be seen now; from any thread, and as often as one likes."""
        self._ended.set()
        with self._lock:
            if self._visible:
                self._visible = False
                os.write(2, b"\r\x1b[K")

    def _tell(self) -> None:
        wait = _PATIENCE
        while not self._ended.wait(wait):
            with self._lock:
                if self._ended.is_set():
                    return
                self._visible = True
                os.write(2, f"\r\x1b[Kkvmpy: {self._phase}, {time.monotonic() - self._began:.0f} s".encode())
            wait = 1.0
