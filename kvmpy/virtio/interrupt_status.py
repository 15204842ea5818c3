"""The interrupt of a virtio-mmio device: its causes, and the line or the eventfd that tells the guest."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from kvmpy.devices.device import NULL_LINE, InterruptLine

if TYPE_CHECKING:
    from kvmpy.devices.device import InterruptEvent

__all__ = ["CONFIG_CHANGE", "USED_BUFFER", "InterruptStatus"]

USED_BUFFER, CONFIG_CHANGE = 1, 2
"""Bits of InterruptStatus (virtio 1.2, section 4.2.2)."""


class InterruptStatus:
    """InterruptStatus and InterruptACK; `line` is raised while there is a cause, or `event` gives an edge.

    Level or edge. Section 4.2.2 has a level in mind: the interrupt is asserted while InterruptStatus is not 0. A
    line does that, by an ioctl when it rises and one when it falls. An irqfd gives an edge instead, by one write,
    whenever InterruptStatus becomes other than 0, and one more when a driver has acknowledged but a part. That is
    enough for an input that is programmed for edges, as the ISA inputs of a PC are unless a table says otherwise: a
    driver acknowledges before it looks at the rings (section 4.2.3.4), so what comes in between it sees, and what comes
    later is an edge again. An input programmed for levels would lose an edge that comes while it is masked. (The
    resampling irqfd would serve it, but wakes the host input thread after each interrupt, which costs more than the
    ioctl that it saves.) Devices that share an edge-triggered input need edges of their own: a line that one of them
    holds high hides that another raises it.

    It has a lock of its own: a vCPU that acknowledges need not wait until a batch of requests is done.
    """

    __slots__ = ("_lock", "causes", "event", "line")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.causes = 0
        """What register InterruptStatus gives."""
        self.line: InterruptLine = NULL_LINE
        self.event: InterruptEvent | None = None

    def add(self, causes: int) -> None:
        """There is something for the driver to see."""
        with self._lock:
            before = self.causes
            self.causes = before | causes
            if not before:
                if (event := self.event) is not None:
                    event.signal()
                else:
                    self.line.raise_line()

    def acknowledge(self, causes: int) -> None:
        """The driver has seen `causes`."""
        with self._lock:
            before = self.causes
            self.causes = left = before & ~causes
            if left == before:
                return
            if (event := self.event) is not None:
                if left:
                    event.signal()
            else:
                self.line.lower_line()
                if left:  # an edge for what is left
                    self.line.raise_line()
