"""What every device is: registers at ports or memory addresses, an interrupt line, state that can be saved.

A device knows no KVM. It is plugged into a *board* (a `Machine`, or anything with the same few methods), so every
device is tested without a VM. What a guest does wrong to a device is a counted event, never an exception.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from kvmpy.devices.host_input import HostInput
else:
    Protocol = object

__all__ = [
    "NULL_LINE", "Board", "Device", "InterruptEvent", "InterruptLine", "Region", "Timer", "WriteEvent",
]  # fmt: skip

ReadHandler = Callable[[int, int], int]
WriteHandler = Callable[[int, int, int], None]
StringHandler = Callable[[int, int, int], bytes]


class InterruptLine(Protocol):
    """A wire to an interrupt controller. Level: it stays raised until it is lowered."""

    def raise_line(self) -> None: ...
    def lower_line(self) -> None: ...


class _NullLine:
    """A line that is connected to nothing."""

    def raise_line(self) -> None:
        pass

    def lower_line(self) -> None:
        pass


NULL_LINE: InterruptLine = _NullLine()


class Timer(Protocol):
    """Calls what it was made for at a moment of `time.monotonic()`, once; setting it again replaces that moment.

    The call comes from another thread than the guest's, so the device needs a lock, and perhaps a millisecond late.
    """

    def start(self, deadline: float) -> None: ...
    def stop(self) -> None: ...


class WriteEvent(Protocol):
    """Guest writes that wake the host input thread, until it is closed."""

    def close(self) -> None: ...


class InterruptEvent(Protocol):
    """Raises an interrupt input by an edge, from any thread, until it is closed.

    `raised` is the device's answer to whether it waits for the guest: asked when an edge may have been lost.
    """

    raised: Callable[[], bool]

    def signal(self) -> None: ...
    def close(self) -> None: ...


class Board(Protocol):
    """What a device may ask of what it is plugged into.

    `reset`, `shutdown`, `panic` and `exit` end the run after the present access; `source` names device and cause.
    """

    def interrupt_line(self, number: int) -> InterruptLine: ...
    def reset(self, source: str) -> None: ...
    def shutdown(self, source: str) -> None: ...
    def panic(self, source: str) -> None: ...
    def exit(self, code: int, source: str) -> None: ...

    # Let writes to one port wait in a queue, where the host can, until the guest accesses something else: half as many
    # exits for a register that is only written. They arrive in order, at the latest within 50 ms.
    def queue_writes(self, port: int, queue: bool) -> None: ...

    # Have a source's `ready()` called whenever it can be read, or no longer.
    def listen(self, source: HostInput) -> None: ...
    def forget(self, source: HostInput) -> None: ...

    # Alarms: see Timer. One that is not set costs nothing.
    def timer(self, call: Callable[[], object]) -> Timer: ...

    # Guest memory, for devices that reach into it by themselves (DMA): a kvmpy.memory.GuestMemory.
    @property
    def memory(self) -> Any: ...

    # Have the host input thread call `call()` after the guest wrote `value`, `size` bytes wide, at an address ("mmio")
    # or port ("port"), instead of an exit (ioeventfd). None where the host cannot: then the write comes to `write`.
    def write_event(
        self, kind: str, address: int, size: int, value: int, call: Callable[[], object]
    ) -> WriteEvent | None: ...

    # An interrupt input that is raised by an edge, without an ioctl (irqfd). None where the host cannot.
    def interrupt_event(self, number: int) -> InterruptEvent | None: ...

    # A place for a device whose user named none: `size` bytes of memory-mapped I/O; an interrupt input, which others
    # may share when all are taken.
    def allocate_mmio(self, size: int) -> int: ...
    def allocate_interrupt(self) -> int: ...


class Region:
    """A range of ports or of guest-physical addresses and who answers there.

    `read(offset, size) -> int` and `write(offset, size, value)`; `offset` counts from `start`, plus `base`, the number
    that the device gives to the first byte of this region. `width` is the widest access, in bytes, that the device
    takes at once: wider ones are split, lowest address first, as an ISA bus does. `read_string(offset, size, count)`,
    if there is one, answers a string instruction (REP INS): the bytes of `count` reads, for the cost of one.
    """

    __slots__ = ("base", "kind", "length", "name", "read", "read_string", "start", "width", "write")

    def __init__(
        self, kind: str, start: int, length: int, name: str,
        read: ReadHandler | None, write: WriteHandler | None, *, base: int = 0, width: int = 8,
        read_string: StringHandler | None = None,
    ) -> None:  # fmt: skip
        self.kind = kind  # "port" or "mmio"
        self.start = start
        self.length = length
        self.name = name
        self.read = read
        self.write = write
        self.read_string = read_string
        self.base = base
        self.width = width

    def overlaps(self, other: Region) -> bool:
        """Whether any address belongs to both, which are of one kind."""
        return self.start < other.start + other.length and other.start < self.start + self.length

    def __repr__(self) -> str:
        return f"{self.name} ({self.kind} {self.start:#x}..{self.start + self.length - 1:#x})"


class Device:
    """Base of all devices. A subclass sets `name`, gives `regions()`, and answers `read` and `write`.

    `counters` counts what the guest did wrong or what was dropped, by a short name.
    """

    name = "device"
    irq: int | None = None

    def __init__(self) -> None:
        self.line: InterruptLine = NULL_LINE
        self.board: Board | None = None
        self.counters: Counter[str] = Counter()

    def place(self, board: Board) -> None:
        """Choose what the user left to the board: called before `regions`, when the device is plugged in."""

    def regions(self) -> tuple[Region, ...]:
        """The ports and addresses that this device answers at."""
        return ()

    def attach(self, board: Board) -> None:
        """Plug the device into a board: connect its interrupt line."""
        self.board = board
        if self.irq is not None:
            self.line = board.interrupt_line(self.irq)

    def read(self, offset: int, size: int) -> int:
        """The guest reads `size` bytes at `offset`. All ones where there is no register."""
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """The guest writes `value`, `size` bytes wide, at `offset`."""

    def reset(self) -> None:
        """Return to the state after power-on. Host-side output that was already produced stays."""

    def quiesce(self) -> None:
        """Finish what is under way on the host, and begin nothing until `resume`: guest memory stays as it is."""

    def resume(self) -> None:
        """Go on after `quiesce`, or after a `restore`."""

    def state(self) -> dict[str, Any]:
        """All that `restore` needs, as plain data (ints, strings, bytes, lists, dicts)."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state()` gave, the interrupt line included."""

    def close(self) -> None:
        """Release what the device holds on the host."""
