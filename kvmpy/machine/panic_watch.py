"""A kernel that prints that it panics: the run ends as a panic, once the lines that explain it are printed too.

Most kernels then spin or halt for ever; Linux with panic= on its command line resets the machine some time later. Both
are a panic here. What a kernel tells by a device of its own (`kvmpy.devices.pvpanic`) needs no such watch.
"""

import time

from kvmpy.machine.outcome import End, Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmpy.devices.console_output import ConsoleOutput
    from kvmpy.machine.board import MachineBoard
    from kvmpy.machine.run_control import RunControl

__all__ = ["PanicWatch"]

_LONGEST = 30.0
"""Seconds after which a guest that goes on printing is ended nevertheless."""
_LINES_BEFORE, _MOST_LINES = 20, 1000
_NOT_THE_GUESTS = (End.STOPPED, End.BREAKPOINT)


class PanicWatch:
    """Looks at each line of a console for `message`; `Machine.watch_for_panic` makes one.

    After that the run ends at a line with `last`, or when no line has come for `patience` seconds. If the guest ends it
    before, by a reset or a triple fault, or its time is over, that is the panic too.
    """

    def __init__(
        self, board: "MachineBoard", control: "RunControl", console: "ConsoleOutput",
        message: bytes, last: bytes, patience: float,
    ) -> None:  # fmt: skip
        self._console = console
        self._control = control
        self._timer = board.timer(self._finish)
        self._message = message
        self._last = last
        self._patience = patience
        self._panic = ""
        self._lines: list[str] = []
        """The panic and what follows, with some lines before."""
        self._latest_end = 0.0
        console.on_line(self._look)

    def _look(self, line: bytes) -> None:
        """The guest has printed a line."""
        if self._panic:
            if len(self._lines) < _MOST_LINES:
                self._lines.append(_text(line))
            if self._last in line:
                self._finish()
                return
        else:
            place = line.find(self._message)
            if place < 0:
                return
            self._panic = _text(line[place:]).strip()
            self._lines = [_text(before) for before in self._console.output.splitlines()[-_LINES_BEFORE - 1 :]]
            self._latest_end = time.monotonic() + _LONGEST
            self._control.verdict = self._verdict
        self._timer.start(min(time.monotonic() + self._patience, self._latest_end))

    def _finish(self) -> None:
        if self._control.running:
            self._control.finish(Outcome(End.PANIC))
        elif self._panic:  # the next run may go on
            self._timer.start(time.monotonic() + self._patience)

    def _verdict(self, outcome: Outcome) -> Outcome:
        """How a run ends in which the kernel has panicked."""
        if outcome.end in _NOT_THE_GUESTS or not self._panic:
            return outcome
        message, self._panic = self._panic, ""  # the next run begins without
        self._timer.stop()
        console = "\n".join(self._lines).rstrip()
        return Outcome(End.PANIC, message, exit=outcome.exit, vcpu=outcome.vcpu, console=console)


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace").rstrip("\r\n")
