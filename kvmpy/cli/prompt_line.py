"""The line that is typed at a prompt, and text that appears above it meanwhile."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

__all__ = ["PromptLine"]

_HOOK = ctypes.CFUNCTYPE(ctypes.c_int)


class PromptLine:
    """Reads lines with readline, and calls `tick` ten times a second while it waits, in this thread.

    Python's readline calls PyOS_InputHook that often, which is made for event loops. Nothing else may be called on
    readline's behalf while it waits: so what other threads have to say waits for `tick`, which calls `show_above`.
    """

    def __init__(self, tick: Callable[[], None]) -> None:
        self._tick = tick
        self._prompt = ""
        self._call = _HOOK(self._called)
        self._hook = ctypes.c_void_p.in_dll(ctypes.pythonapi, "PyOS_InputHook")
        self._library = _readline_library()

    def read(self, prompt: str) -> str:
        """One line. Raises EOFError and KeyboardInterrupt as `input` does."""
        self._prompt = prompt
        before = self._hook.value
        by_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if by_default:
            signal.signal(signal.SIGINT, self._interrupted)
        self._hook.value = ctypes.cast(self._call, ctypes.c_void_p).value
        try:
            return input(prompt)
        finally:
            self._hook.value = before
            if by_default:
                signal.signal(signal.SIGINT, signal.default_int_handler)

    def _called(self) -> int:
        self._tick()
        return 0

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-C. readline calls the hook first, where raising leads nowhere; without a hook it looks for signals."""
        if not self._hook.value:
            raise KeyboardInterrupt
        self._hook.value = None
        threading.Timer(0.01, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()

    def show_above(self, data: bytes) -> None:
        """Write whole lines above the one that is being typed. To be called by `tick`."""
        library = self._library
        if library is None:
            import readline

            line = f"{self._prompt}{readline.get_line_buffer()}"
            self._write(b"\r\x1b[K" + data + line.encode("utf-8", "replace"))
            return
        if os.environ.get("TERM", "dumb") == "dumb":  # nothing can be erased there
            self._write(b"\n")
        else:
            library.rl_clear_visible_line()
            _flush()
        self._write(data)
        library.rl_on_new_line()
        library.rl_redisplay()
        _flush()

    def _write(self, data: bytes) -> None:
        sys.stdout.flush()
        while data:
            data = data[os.write(1, data) :]


def _flush() -> None:
    """readline writes through C's stdio."""
    ctypes.CDLL(None).fflush(None)


def _readline_library() -> ctypes.CDLL | None:
    """GNU readline's functions, in the module or the library that it is linked with; None without."""
    import readline

    try:
        library = ctypes.CDLL(getattr(readline, "__file__", None))
        for name in ("rl_clear_visible_line", "rl_on_new_line", "rl_redisplay"):
            getattr(library, name)
    except (OSError, AttributeError):
        return None
    return library
