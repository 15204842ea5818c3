"""The tables by which a machine describes itself to the kernel in it, as a PC's firmware does."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from kvmpy.boot.platform import FixedHardware, IsaDevice, MmioDevice, Platform, SleepRegisters
from kvmpy.devices import I8042, AcpiPm, AcpiSleep, Cmos, Device, PciHostBridge, PvPanic, Uart16550
from kvmpy.devices.acpi_pm import PM1_CONTROL, PM1_STATUS, PM_TIMER, RESET, RESET_VALUE, S5
from kvmpy.errors import VcpuBusyError

if TYPE_CHECKING:
    from kvmpy.boot.firmware_tables import FirmwareTables
    from kvmpy.boot.image import Entry
    from kvmpy.boot.linux import LinuxKernel
    from kvmpy.boot.multiboot.kernel import MultibootKernel
    from kvmpy.machine.machine import Machine
    from kvmpy.x86.cpuid import CpuidTable

__all__ = ["load_with_tables", "platform_of", "tables_of"]


def platform_of(machine: Machine) -> Platform:
    """The processors of `machine` and the devices that are plugged in by now. Device handlers may ask, too."""
    devices = machine.devices
    first = _cpuid(machine).find(1)
    return Platform(
        apic_ids=tuple(vcpu.id for vcpu in machine.vcpus),
        signature=first.eax if first is not None else 0,
        features=first.edx if first is not None else 0,
        serial_ports=tuple(IsaDevice(each.port, each.irq) for each in devices if isinstance(each, Uart16550)),
        keyboard=next((IsaDevice(0x60, each.irq) for each in devices if isinstance(each, I8042)), None),
        clock=next((IsaDevice(each.port, each.irq) for each in devices if isinstance(each, Cmos)), None),
        pvpanic=next((IsaDevice(each.port, None) for each in devices if isinstance(each, PvPanic)), None),
        pci=any(isinstance(each, PciHostBridge) and each.present for each in devices),
        power=_power(devices),
        virtio_mmio=tuple(filter(None, map(_virtio_mmio, devices))),
    )


def _cpuid(machine: Machine) -> CpuidTable:
    """That of a processor which this thread may ask: all are alike, and other threads may run some."""
    *others, last = machine.vcpus
    for vcpu in others:
        with suppress(VcpuBusyError):
            return vcpu.get_cpuid()
    return last.get_cpuid()


def _power(devices: list[Device]) -> FixedHardware | SleepRegisters | None:
    """ACPI's power management, by the first device that is any."""
    for device in devices:
        if isinstance(device, AcpiPm):
            return FixedHardware(
                pm1a_event=device.port + PM1_STATUS,
                pm1a_control=device.port + PM1_CONTROL,
                pm_timer=device.port + PM_TIMER,
                timer_bits=device.timer_bits,
                reset=device.port + RESET,
                reset_value=RESET_VALUE,
                s5=S5,
                sci=device.irq,
            )
        if isinstance(device, AcpiSleep):
            return SleepRegisters(
                control=device.port + AcpiSleep.CONTROL,
                status=device.port + AcpiSleep.STATUS,
                reset=device.port + AcpiSleep.RESET,
                reset_value=RESET_VALUE,
                s5=S5,
            )
    return None


def _virtio_mmio(device: Any) -> MmioDevice | None:
    """Where a device of virtio's MMIO transport is. Known by its attributes: a machine without any loads none of it."""
    if not hasattr(device, "linux_parameter"):
        return None
    return MmioDevice(device.address, device.size, device.gsi)


def tables_of(machine: Machine) -> tuple[FirmwareTables, ...]:
    """The tables of `machine`. None without an irqchip: what they tell of is not there then."""
    if not machine.vm.irqchip:
        return ()
    # Here, as a firmware makes its own: what it is told by `platform_of` should not wait for these.
    from kvmpy.boot.acpi import AcpiTables
    from kvmpy.boot.mp_table import MpTable
    from kvmpy.boot.smbios import SmbiosTables

    platform = platform_of(machine)
    return MpTable(platform), AcpiTables(platform), SmbiosTables(platform)


def load_with_tables(machine: Machine, image: LinuxKernel | MultibootKernel) -> Entry:
    """Load an image that `takes_tables`, and see to it that its kernel can switch the machine off."""
    if machine.vm.irqchip and not any(isinstance(each, (AcpiPm, AcpiSleep)) for each in machine.devices):
        machine.add(AcpiPm())
    return image.load(machine.memory, tables_of(machine))
