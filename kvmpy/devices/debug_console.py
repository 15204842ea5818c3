"""Debug consoles: one port, each byte written there is a character (Bochs' port 0xE9 hack; QEMU's `isa-debugcon`)."""

from __future__ import annotations

from kvmpy.devices.console_output import ConsoleOutput
from kvmpy.devices.device import Device, Region

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvmpy.devices.console_output import Sink
    from kvmpy.devices.device import Board

__all__ = ["DebugConsole"]

READBACK = 0xE9


class DebugConsole(ConsoleOutput, Device):
    """A console at one port: 0xE9 (Bochs), or 0x402 for the debug output of SeaBIOS and OVMF.

    A read answers 0xE9 at either port: that is how firmware finds out whether anybody listens. With `queued`,
    characters may wait in the host's queue until the guest does something else, at most 50 ms: long logs then cost half
    as much.
    """

    name = "debug console"

    def __init__(
        self, port: int = 0xE9, *, sink: Sink | None = None, history: int = 64 * 1024, queued: bool = False
    ) -> None:
        Device.__init__(self)
        ConsoleOutput.__init__(self, sink=sink, history=history)
        self.port = port
        self._queued = queued

    def regions(self) -> tuple[Region, ...]:
        return (Region("port", self.port, 1, self.name, self.read, self.write, width=1),)

    def attach(self, board: Board) -> None:
        super().attach(board)
        if self._queued:
            board.queue_writes(self.port, True)

    def read(self, offset: int, size: int) -> int:
        return READBACK

    def write(self, offset: int, size: int, value: int) -> None:
        self._put(value & 0xFF)

    def state(self) -> dict[str, Any]:
        """Nothing: the port remembers nothing, and the output is the host's record."""
        return {}

    def close(self) -> None:
        """Whoever waits in `expect` is told that nothing more comes."""
        self._close_output()
