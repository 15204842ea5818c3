"""A board for device tests: it writes down what the device does to it."""

from __future__ import annotations

from collections.abc import Callable

from kvmpy.devices.host_input import HostInput


class RecordingLine:
    """An interrupt line that remembers its level and every change it was told."""

    def __init__(self) -> None:
        self.level = False
        self.history: list[bool] = []

    def raise_line(self) -> None:
        self.level = True
        self.history.append(True)

    def lower_line(self) -> None:
        self.level = False
        self.history.append(False)

    @property
    def edges(self) -> int:
        """How often the line went up."""
        return self.history.count(True)


class RecordingTimer:
    """A timer that a test lets ring."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call
        self.deadline: float | None = None

    def start(self, deadline: float) -> None:
        self.deadline = deadline

    def stop(self) -> None:
        self.deadline = None


class RecordingBoard:
    """Gives out recording lines, and notes how the run was ended."""

    def __init__(self) -> None:
        self.lines: dict[int, RecordingLine] = {}
        self.ended: list[tuple[str, int | None]] = []
        self.inputs: list[HostInput] = []
        self.queued: set[int] = set()
        self.timers: list[RecordingTimer] = []

    def interrupt_line(self, number: int) -> RecordingLine:
        return self.lines.setdefault(number, RecordingLine())

    def reset(self, source: str) -> None:
        self.ended.append(("reset", None))

    def shutdown(self, source: str) -> None:
        self.ended.append(("shutdown", None))

    def panic(self, source: str) -> None:
        self.ended.append(("panic", None))

    def exit(self, code: int, source: str) -> None:
        self.ended.append(("exit", code))

    def queue_writes(self, port: int, queue: bool) -> None:
        if queue:
            self.queued.add(port)
        else:
            self.queued.discard(port)

    def listen(self, source: HostInput) -> None:
        self.inputs.append(source)

    def forget(self, source: HostInput) -> None:
        self.inputs.remove(source)

    def timer(self, call: Callable[[], object]) -> RecordingTimer:
        self.timers.append(RecordingTimer(call))
        return self.timers[-1]
