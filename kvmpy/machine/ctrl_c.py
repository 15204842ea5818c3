"""Ctrl-C while a machine runs in the main thread: between exits the first time, at once the second."""

import threading

from kvmpy.machine import run_control

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from types import FrameType
else:
    import _signal as signal  # see kvmpy.kvm.kick

__all__ = ["CtrlC"]


class CtrlC:
    """A context: SIGINT calls `interrupt` instead of raising KeyboardInterrupt wherever Python happens to be.

    The second SIGINT raises as usual, so that a device handler that never returns can be left. Only in the main thread,
    and only where Python's own handler is installed; a program's own handler stays.
    """

    def __init__(self, interrupt: "Callable[[], object]") -> None:
        self._interrupt = interrupt
        self._installed = False
        self.seen = False
        self.deferred = False
        """While set, no SIGINT raises: the run is being put in order."""

    def __enter__(self) -> "CtrlC":
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)
            self._installed = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _handle(self, number: int, frame: "FrameType | None") -> None:
        if self.seen and not self.deferred and not _in_run_control(frame):
            raise KeyboardInterrupt
        self.seen = True
        self._interrupt()


def _in_run_control(frame: "FrameType | None") -> bool:
    """Whether the signal came in the midst of what needs the lock of the run: an exception there might leave it held.

    Nothing there lasts: whoever waits under that lock is woken by the first SIGINT.
    """
    while frame is not None:
        if frame.f_code.co_filename == run_control.__file__:
            return True
        frame = frame.f_back
    return False
