"""A board for device tests: it writes down what the device does to it."""

from __future__ import annotations

from collections.abc import Callable

from kvmpy.devices.host_input import HostInput
from kvmpy.memory import GuestMemory


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


class RecordingEvent:
    """A guest write that a test lets happen with `call()`, or an interrupt that it sees in `signals`."""

    def __init__(self, call: Callable[[], object] = lambda: None) -> None:
        self.call = call
        self.signals = 0
        self.closed = False
        self.raised: Callable[[], bool] = lambda: False

    def signal(self) -> None:
        self.signals += 1

    def close(self) -> None:
        self.closed = True


class RecordingBoard:
    """Gives out recording lines, and notes how the run was ended."""

    def __init__(self) -> None:
        self.lines: dict[int, RecordingLine] = {}
        self.ended: list[tuple[str, int | None]] = []
        self.inputs: list[HostInput] = []
        self.queued: set[int] = set()
        self.timers: list[RecordingTimer] = []
        self.memory = GuestMemory()
        self.has_events = False
        """Whether it has ioeventfd and irqfd."""
        self.write_events: dict[tuple[str, int, int, int], RecordingEvent] = {}
        self.interrupt_events: dict[int, RecordingEvent] = {}
        self.next_address = 0xD000_0000

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

    def write_event(
        self, kind: str, address: int, size: int, value: int, call: Callable[[], object]
    ) -> RecordingEvent | None:
        if not self.has_events:
            return None
        event = self.write_events[kind, address, size, value] = RecordingEvent(call)
        return event

    def interrupt_event(self, number: int) -> RecordingEvent | None:
        if not self.has_events:
            return None
        return self.interrupt_events.setdefault(number, RecordingEvent())

    def allocate_mmio(self, size: int) -> int:
        self.next_address += 0x1000
        return self.next_address - 0x1000

    def allocate_interrupt(self) -> int:
        return 5
