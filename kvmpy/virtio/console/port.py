"""One port of a console device: what the guest writes is kept and passed on, what is sent waits until it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvmpy.devices.console_output import ConsoleOutput, Sink
from kvmpy.devices.host_input import HasFileno, InputStream

if TYPE_CHECKING:
    from kvmpy.devices.device import Board
    from kvmpy.virtio.console.device import VirtioConsole

__all__ = ["ConsolePort"]

_PIECE = 0x1_0000


class ConsolePort(ConsoleOutput):
    """`text`, `output`, `expect` and the sink are those of every console; `send` types.

    A port with `is_console` is a terminal (Linux: hvc0 ...), others are plain channels (/dev/vport0p1, with a `name`
    also /dev/virtio-ports/NAME).
    """

    def __init__(
        self, device: VirtioConsole, number: int, *, name: str = "", is_console: bool = False,
        columns: int = 80, rows: int = 25, sink: Sink | None = None, history: int = 0x1_0000,
    ) -> None:  # fmt: skip
        super().__init__(sink=sink, history=history)
        self.number = number
        self.name = name
        self.is_console = is_console
        self.columns = columns
        self.rows = rows
        self.guest_open = False
        """Whether somebody in the guest has it open. A driver without ports never says so."""
        self.guest_ready = False
        """Whether the guest's driver knows it."""
        self._device = device
        self._unread = bytearray()
        self._host_input: InputStream | None = None

    def send(self, data: bytes | str) -> None:
        """Give `data` (a str as UTF-8) to the guest. From any thread; never blocks, loses nothing."""
        with self._device.lock:
            self._unread += data.encode() if isinstance(data, str) else data
            self.feed()

    @property
    def unread(self) -> int:
        """How many bytes the guest has not taken yet."""
        return len(self._unread)

    def connect_input(self, source: HasFileno | int | None) -> None:
        """Take input from a file object, socket or terminal from now on; None: only from `send`."""
        before, self._host_input = self._host_input, None if source is None else InputStream(source, self.send)
        board = self._device.board
        if board is not None:
            if before is not None:
                board.forget(before)
            self.attach(board)

    def attach(self, board: Board) -> None:
        """The device is plugged in."""
        if self._host_input is not None:
            board.listen(self._host_input)

    def feed(self) -> None:
        """Give the guest what there is, as far as it has made buffers available. With the device's lock held."""
        device = self._device
        if not self._unread or not device.takes_input(self):
            return
        queue = device.receive_queue(self)
        with queue.batch():
            for _ in range(queue.size):
                chain = queue.take() if self._unread else None
                if chain is None:
                    return
                piece = bytes(self._unread[: min(chain.writable_left, _PIECE)])
                if not piece:
                    device.counters["no_room"] += 1
                del self._unread[: chain.write(piece)]
                chain.complete()
        device.transport.process_later(queue)

    def written(self, data: bytes) -> None:
        """The guest wrote `data`."""
        self._put_bytes(data)

    def state(self) -> dict[str, Any]:
        """What the guest could notice."""
        return {
            "columns": self.columns, "rows": self.rows, "open": self.guest_open, "ready": self.guest_ready,
            "unread": bytes(self._unread),
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.columns, self.rows = state["columns"], state["rows"]
        self.guest_open, self.guest_ready = state["open"], state["ready"]
        self._unread[:] = state["unread"]

    def reset(self) -> None:
        """The device was reset: the guest's driver is gone. What it has not read stays."""
        self.guest_open = self.guest_ready = False

    def close(self) -> None:
        """Whoever waits in `expect` is told that nothing more comes."""
        self._close_output()

    on_open: Callable[[bool], object] | None = None
    """Called with True when a program in the guest opens the port, with False when it closes it."""

    def __repr__(self) -> str:
        return f"<ConsolePort {self.number}{f' {self.name!r}' if self.name else ''}>"
