"""A port by which the guest ends the run with a code (QEMU's `isa-debug-exit`; used by many test kernels)."""

from __future__ import annotations

from kvmpy.devices.device import Device, Region

__all__ = ["DebugExit"]


class DebugExit(Device):
    """A write of `value` ends the run with exit code `(value << 1) | 1`, so that 0 can never be meant by the guest.

    `size` ports from `port` on, each alike; a 32-bit write is one value. Reads give 0.
    """

    name = "debug exit"

    def __init__(self, port: int = 0xF4, size: int = 4) -> None:
        super().__init__()
        self.port = port
        self.size = size

    def regions(self) -> tuple[Region, ...]:
        return (Region("port", self.port, self.size, self.name, self.read, self.write, width=4),)

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if self.board is None:
            self.counters["exit_without_board"] += 1
        else:
            self.board.exit(value << 1 | 1, f"{self.name} at port {self.port:#x}, value {value:#x}")
