"""Alarms of devices: a callback at a moment of `time.monotonic()`, called by the host input thread."""

import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["HostTimer", "TimerQueue"]


class HostTimer:
    """`kvmpy.devices.device.Timer`: one alarm at a time, set again as often as its owner likes."""

    __slots__ = ("_queue", "call", "deadline")

    def __init__(self, queue: "TimerQueue", call: "Callable[[], object]") -> None:
        self._queue = queue
        self.call = call
        self.deadline: float | None = None

    def start(self, deadline: float) -> None:
        """Call at `deadline`, and no longer when it was set to before."""
        self._queue.set(self, deadline)

    def stop(self) -> None:
        """Do not call. If the call is being made at this moment, it is not waited for."""
        self._queue.set(self, None)

    def __repr__(self) -> str:
        return f"<HostTimer of {getattr(self.call, '__qualname__', self.call)}>"


class TimerQueue:
    """The timers that are set. Few: the next one is searched for, and setting one again leaves nothing behind."""

    def __init__(self, wake: "Callable[[], None]") -> None:
        self._wake = wake
        self._lock = threading.Lock()
        self._set: set[HostTimer] = set()
        self._sleeps_until = float("inf")
        """The moment at which the thread that calls `pause` wakes up by itself."""

    def set(self, timer: HostTimer, deadline: float | None) -> None:
        """Set a timer, or with None unset it; wakes the sleeping thread when it would sleep too long."""
        with self._lock:
            timer.deadline = deadline
            if deadline is None:
                self._set.discard(timer)
                return
            self._set.add(timer)
            if deadline >= self._sleeps_until:
                return
        self._wake()

    def pause(self) -> float | None:
        """How many seconds may be slept now; None: until somebody wakes the thread."""
        with self._lock:
            first = min((timer.deadline for timer in self._set if timer.deadline is not None), default=None)
            self._sleeps_until = float("inf") if first is None else first
        return None if first is None else max(first - time.monotonic(), 0.0)

    def take_due(self) -> list[HostTimer]:
        """The timers whose moment has come, in that order; they are unset now."""
        with self._lock:
            if not self._set:
                return []
            now = time.monotonic()
            due = sorted(
                (timer.deadline, id(timer), timer)
                for timer in self._set
                if timer.deadline is not None and timer.deadline <= now
            )
            for _, _, timer in due:
                timer.deadline = None
                self._set.discard(timer)
            return [timer for _, _, timer in due]
