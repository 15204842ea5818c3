"""The terminal as a serial line: raw mode that is always undone, and the escape key."""

from __future__ import annotations

import os
import signal
import sys
import termios
from collections.abc import Callable
from types import FrameType, TracebackType

__all__ = ["HELP", "EscapeKey", "RawTerminal", "is_ours"]

ESCAPE = 0x01  # Ctrl-A

HELP = """
Ctrl-A x       end the run
Ctrl-A b       send a break
Ctrl-A h       this help
Ctrl-A Ctrl-A  send Ctrl-A to the guest
"""

_FATAL = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""Signals that end the process, and must not leave the user with a terminal in raw mode."""


def is_ours(fd: int) -> bool:
    """Whether `fd` is a terminal that this process may read: in the foreground. Reading would stop it otherwise."""
    if not os.isatty(fd):
        return False
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:  # not our controlling terminal, so there is no job control either
        return True


class EscapeKey:
    """Takes what is typed apart: text for the guest, and commands after Ctrl-A. See `HELP`.

    `send` gets the text, `actions` maps the key after Ctrl-A to what is done. Other keys after Ctrl-A do nothing.
    """

    def __init__(self, send: Callable[[bytes], object], actions: dict[str, Callable[[], object]]) -> None:
        self._send = send
        self._actions = {ord(key): action for key, action in actions.items()}
        self._escaped = False

    def feed(self, data: bytes) -> None:
        """Some keys were pressed. A Ctrl-A at the end waits for the next key."""
        text = bytearray()
        for key in data:
            if not self._escaped:
                if key == ESCAPE:
                    self._escaped = True
                else:
                    text.append(key)
                continue
            self._escaped = False
            if key == ESCAPE:
                text.append(key)
            elif key in self._actions:
                if text:  # in the order of typing
                    self._send(bytes(text))
                    text.clear()
                self._actions[key]()
        if text:
            self._send(bytes(text))


class RawTerminal:
    """A context in which terminal `fd` passes every key on: no echo, no lines, no signals, Enter is CR.

    What is written to it is still processed: a guest's line feed goes to the start of the line. Left by the end of the
    block, by an exception, or by a signal that ends the process, the terminal is as it was before.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._before: list[object] = []
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> RawTerminal:
        before = termios.tcgetattr(self._fd)
        self._before = before
        for number in _FATAL:
            if signal.getsignal(number) is signal.SIG_DFL:
                self._handlers[number] = signal.signal(number, self._die)
        iflag, oflag, cflag, lflag, ispeed, ospeed, characters = before
        iflag &= ~(
            termios.BRKINT | termios.ICRNL | termios.IGNCR | termios.INLCR | termios.INPCK | termios.ISTRIP
            | termios.IXON
        )  # fmt: skip
        cflag = cflag & ~(termios.CSIZE | termios.PARENB) | termios.CS8
        lflag &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN | termios.ISIG)
        characters = [*characters]
        characters[termios.VMIN], characters[termios.VTIME] = 1, 0
        termios.tcsetattr(self._fd, termios.TCSANOW, [iflag, oflag, cflag, lflag, ispeed, ospeed, characters])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._handlers.clear()

    def _restore(self) -> None:
        try:
            termios.tcsetattr(self._fd, termios.TCSANOW, self._before)  # type: ignore[arg-type]
        except termios.error:
            # A terminal that was closed meanwhile has no settings to restore.
            return

    def _die(self, number: int, frame: FrameType | None) -> None:
        """Restore, then end by the same signal, so that the parent process sees what happened."""
        self._restore()
        sys.stderr.flush()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
