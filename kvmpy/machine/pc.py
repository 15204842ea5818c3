"""A PC: a machine with the devices that kernels and boot loaders expect, plugged in at their usual places."""

from __future__ import annotations

from kvmpy.machine.machine import RAM_HOLE, Machine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvmpy.devices import I8042, AcpiPm, Cmos, DebugConsole, Uart16550
    from kvmpy.devices.console_output import Sink

__all__ = ["Pc"]


class Pc(Machine):
    """What `kvmpy run` and `kvmpy boot` run guests on.

    `serial` is COM1, `debug_console` port 0xE9, `keyboard` the 8042, `clock` the CMOS, which says how much memory and
    how many processors there are, and `power` ACPI's registers, by which guests switch themselves off. Besides: port
    0x80, debug exit at 0xF4, pvpanic at 0x505, and a PCI host bridge with an empty bus. `sink` gets what the guest
    writes to COM1, `debug_sink` what it writes to port 0xE9. A kernel that panics on COM1 ends the run as a panic, see
    `watch_for_panic`. The other `options` are those of `Machine`.
    """

    def __init__(
        self, memory: int = 16 << 20, vcpus: int = 1, *, sink: Sink | None = None, debug_sink: Sink | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(memory, vcpus, **options)
        from kvmpy.devices import (
            I8042,
            AcpiPm,
            Cmos,
            DebugConsole,
            DebugExit,
            PciHostBridge,
            PostPort,
            PvPanic,
            Uart16550,
        )

        try:
            below = min(memory, RAM_HOLE)
            self.serial: Uart16550 = self.add(Uart16550(sink=sink))
            self.debug_console: DebugConsole = self.add(DebugConsole(sink=debug_sink))
            self.keyboard: I8042 = self.add(I8042())
            self.clock: Cmos = self.add(Cmos(memory_below_4g=below, memory_above_4g=memory - below, cpus=vcpus))
            self.power: AcpiPm = self.add(AcpiPm())
            self.add(PostPort())
            self.add(DebugExit())
            self.add(PvPanic())
            self.add(PciHostBridge())
            self.watch_for_panic(self.serial)
        except BaseException:
            self.close()
            raise
