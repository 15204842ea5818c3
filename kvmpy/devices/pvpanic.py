"""pvpanic: the port by which a guest says that it has crashed (QEMU, docs/specs/pvpanic).

Linux has a driver, pvpanic-mmio, and finds the port by the device QEMU0001 in the ACPI tables that a machine makes.
"""

from __future__ import annotations

from kvmpy.devices.device import Device, Region

__all__ = ["PvPanic", "PvPanicEvent"]


class PvPanicEvent:
    """What a read says is understood, and a write says has happened."""

    PANICKED = 1 << 0
    CRASH_LOADED = 1 << 1
    """It has crashed, and goes on in a kernel that was loaded to save what there is to save (kexec)."""
    SHUTDOWN = 1 << 2
    """It asks to be switched off."""


_ALL = PvPanicEvent.PANICKED | PvPanicEvent.CRASH_LOADED | PvPanicEvent.SHUTDOWN


class PvPanic(Device):
    """One port, 0x505. A panic ends the run as a panic, a shutdown as a shutdown.

    A crash with another kernel to go on in is counted as `crash_loaded`, and what nobody knows as `unknown_event`.
    """

    name = "pvpanic"

    def __init__(self, port: int = 0x505) -> None:
        super().__init__()
        self.port = port

    def regions(self) -> tuple[Region, ...]:
        return (Region("port", self.port, 1, self.name, self.read, self.write, width=1),)

    def read(self, offset: int, size: int) -> int:
        return _ALL

    def write(self, offset: int, size: int, value: int) -> None:
        if value & ~_ALL:
            self.counters["unknown_event"] += 1
        if value & PvPanicEvent.CRASH_LOADED:
            self.counters["crash_loaded"] += 1
        elif value & PvPanicEvent.PANICKED and self.board is not None:
            self.board.panic(f"the guest reported a panic, by {self.name} at port {self.port:#x}")
        elif value & PvPanicEvent.SHUTDOWN and self.board is not None:
            self.board.shutdown(f"{self.name} at port {self.port:#x}")
