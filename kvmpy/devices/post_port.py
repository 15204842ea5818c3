"""Port 0x80: the BIOS shows there how far its power-on self test (POST) has come."""

from __future__ import annotations

from collections import deque

from kvmpy.devices.device import Device, Region

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["PostPort"]


class PostPort(Device):
    """Keeps the last `history` bytes written, in `codes`, and how many there were in all, in `count`.

    On a PC the port is a spare page register of the DMA controller (0 after power-on), which a plug-in card displays:
    so a read gives the byte last written. Operating systems also write to it just to wait a microsecond (`outb_p`).
    """

    name = "POST port"

    def __init__(self, port: int = 0x80, *, history: int = 0x100) -> None:
        super().__init__()
        self.port = port
        self.count = 0
        self._codes: deque[int] = deque(maxlen=history)
        self._last = 0

    def regions(self) -> tuple[Region, ...]:
        return (Region("port", self.port, 1, self.name, self.read, self.write, width=1),)

    @property
    def codes(self) -> tuple[int, ...]:
        """The last codes, oldest first."""
        return tuple(self._codes)

    @property
    def last(self) -> int | None:
        """The code written last, None if there was none."""
        return self._codes[-1] if self._codes else None

    def read(self, offset: int, size: int) -> int:
        return self._last

    def write(self, offset: int, size: int, value: int) -> None:
        self._last = value & 0xFF
        self._codes.append(self._last)
        self.count += 1

    def reset(self) -> None:
        self._last = 0

    def state(self) -> dict[str, Any]:
        """The byte that a read gives. `codes` and `count` are the host's record."""
        return {"last": self._last}

    def restore(self, state: dict[str, Any]) -> None:
        self._last = state["last"]
