"""The tables by which a machine describes itself to the kernel in it, as a PC's firmware does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpy.boot.mp_table import MpTable
from kvmpy.boot.platform import IsaDevice, Platform

if TYPE_CHECKING:
    from kvmpy.boot.firmware_tables import FirmwareTables
    from kvmpy.boot.image import Entry
    from kvmpy.boot.linux import LinuxKernel
    from kvmpy.boot.multiboot import MultibootKernel
    from kvmpy.machine.machine import Machine

__all__ = ["load_with_tables", "platform_of", "tables_of"]


def platform_of(machine: Machine) -> Platform:
    """The processors of `machine` and the devices that are plugged in by now."""
    from kvmpy.devices import I8042, Cmos, PciHostBridge, Uart16550

    devices = machine.devices
    first = machine.vcpus[0].get_cpuid().find(1)
    return Platform(
        apic_ids=tuple(vcpu.id for vcpu in machine.vcpus),
        signature=first.eax if first is not None else 0,
        features=first.edx if first is not None else 0,
        serial_ports=tuple(IsaDevice(each.port, each.irq) for each in devices if isinstance(each, Uart16550)),
        keyboard=next((IsaDevice(0x60, each.irq) for each in devices if isinstance(each, I8042)), None),
        clock=next((IsaDevice(each.port, each.irq) for each in devices if isinstance(each, Cmos)), None),
        pci=any(isinstance(each, PciHostBridge) and each.present for each in devices),
    )


def tables_of(machine: Machine) -> tuple[FirmwareTables, ...]:
    """The tables of `machine`. None without an irqchip: what they tell of is not there then."""
    if not machine.vm.irqchip:
        return ()
    return (MpTable(platform_of(machine)),)


def load_with_tables(machine: Machine, image: LinuxKernel | MultibootKernel) -> Entry:
    """Load an image that `takes_tables`."""
    return image.load(machine.memory, tables_of(machine))
