"""A pseudo-terminal with a process in the foreground of its session, for tests that type and look."""

import os
import pty
import select
import subprocess
import termios
import time
from types import TracebackType
from typing import Self

__all__ = ["PromptTerminal"]

PATIENCE = 20.0


class PromptTerminal:
    """Runs `command` with standard streams on a terminal, and does not let it outlive the `with` block.

    `term` is the terminal's type: "dumb" has no escape sequences, so that what is shown is text.
    """

    def __init__(self, *command: str, term: str = "dumb", cwd: str | None = None) -> None:
        self._master, self._slave = pty.openpty()
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *command],
            stdin=self._slave, stdout=self._slave, stderr=self._slave, cwd=cwd, env={**os.environ, "TERM": term},
        )  # fmt: skip
        self.shown = ""
        """All that was shown so far, with line feeds as the ends of lines."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE)
        os.close(self._master)
        os.close(self._slave)

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def resize(self, columns: int, rows: int) -> None:
        """The window gets another size."""
        termios.tcsetwinsize(self._master, (rows, columns))

    def wait_for(self, text: str, *, after: int = 0, patience: float = PATIENCE) -> int:
        """Read until `text` has been shown, from place `after` of `shown` on; the place behind it."""
        deadline = time.monotonic() + patience
        while (found := self.shown.find(text, after)) < 0:
            ready, _, _ = select.select([self._master], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"waited for {text!r}, saw {self.shown[after:]!r}"
            self.shown += os.read(self._master, 0x1000).decode("utf-8", "replace").replace("\r\n", "\n")
        return found + len(text)

    def status(self) -> int:
        """The exit status of the process, which is about to end."""
        return self.process.wait(PATIENCE)
