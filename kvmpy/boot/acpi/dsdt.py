"""The DSDT (ACPI 6.5, section 5.2.11.1): the devices of a platform in ACPI Machine Language."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpy.boot.acpi.aml import device, eisa_id, name, package, scope
from kvmpy.boot.acpi.resources import (
    dword_memory,
    interrupt,
    io,
    irq_no_flags,
    memory32_fixed,
    qword_memory,
    resource_template,
    word_bus_number,
    word_io,
)
from kvmpy.boot.acpi.system_table import system_table
from kvmpy.boot.platform import ISA_IRQS

if TYPE_CHECKING:
    from kvmpy.boot.platform import IsaDevice, MmioDevice, Platform

__all__ = ["dsdt"]

REVISION = 2  # integers have 64 bits
PCI_WINDOW = (0xE000_0000, 0xFEBF_FFFF)
"""Where PCI devices get their memory: below the IOAPIC, above what a machine gives to its own MMIO devices."""
ECAM_SIZE = 256 << 20
CONFIG_PORTS = (0xCF8, 8)
FOUR_GIB = 1 << 32


def dsdt(platform: Platform) -> bytes:
    """The DSDT of `platform`."""
    system_bus = [_processor(uid) for uid in range(len(platform.apic_ids))]
    if platform.pci:
        system_bus.append(_host_bridge(platform))
    for number, port in enumerate(platform.serial_ports, 1):
        path = f"COM{number}"[-4:]  # a name has four characters
        system_bus.append(_isa_device(path, "PNP0501", port, io(port.port, 8), uid=number))
    if platform.keyboard is not None:
        base = platform.keyboard.port
        system_bus.append(_isa_device("KBD", "PNP0303", platform.keyboard, io(base, 1) + io(base + 4, 1)))
    if platform.clock is not None:
        system_bus.append(_isa_device("RTC", "PNP0B00", platform.clock, io(platform.clock.port, 2)))
    if platform.pvpanic is not None:
        ports = resource_template(io(platform.pvpanic.port, 1))
        system_bus.append(device("PVPN", name("_HID", "QEMU0001"), name("_CRS", ports)))
    if platform.pci_config is not None:  # it is nobody else's; PCI's own resources must not say it (PCI Firmware 4.1.2)
        reserved = resource_template(memory32_fixed(platform.pci_config, ECAM_SIZE))
        system_bus.append(device("ECAM", name("_HID", eisa_id("PNP0C02")), name("_CRS", reserved)))
    for number, each in enumerate(platform.virtio_mmio):
        system_bus.append(_virtio_mmio(number, each))
    body = scope("\\_SB", *system_bus)
    if platform.power is not None:
        body = name("\\_S5", package(platform.power.s5, 0, 0, 0)) + body
    return system_table(b"DSDT", REVISION, body)


def _processor(uid: int) -> bytes:
    return device(f"C{uid:03X}", name("_HID", "ACPI0007"), name("_UID", uid))


def _isa_device(path: str, hid: str, place: IsaDevice, ports: bytes, *, uid: int | None = None) -> bytes:
    lines = []
    if place.irq is not None:
        lines.append(irq_no_flags(place.irq) if place.irq < ISA_IRQS else interrupt(place.irq, edge=True))
    return device(
        path,
        name("_HID", eisa_id(hid)),
        *([] if uid is None else [name("_UID", uid)]),
        name("_CRS", resource_template(ports, *lines)),
    )


def _host_bridge(platform: Platform) -> bytes:
    """PCI bus 0, with the ports and the memory that its devices may be given. With an MCFG it is PCI Express."""
    identity = [name("_HID", eisa_id("PNP0A03"))]
    if platform.pci_config is not None:
        identity = [name("_HID", eisa_id("PNP0A08")), name("_CID", eisa_id("PNP0A03"))]
    first, count = CONFIG_PORTS
    return device(
        "PCI0",
        *identity,
        name("_UID", 0),
        name("_CRS", resource_template(
            word_bus_number(0x00, 0xFF),
            io(first, count),
            word_io(0x0000, first - 1),
            word_io(first + count, 0xFFFF),
            dword_memory(*PCI_WINDOW),
        )),
    )  # fmt: skip


def _virtio_mmio(number: int, place: MmioDevice) -> bytes:
    """A virtio device of the MMIO transport, by the identifier that operating systems know for it."""
    end = place.address + place.size
    memory = (memory32_fixed if end <= FOUR_GIB else qword_memory)(place.address, place.size)
    return device(
        f"V{number:03X}",
        name("_HID", "LNRO0005"),
        name("_UID", number),
        name("_CCA", 1),
        name("_CRS", resource_template(memory, interrupt(place.gsi, edge=place.edge, shared=True))),
    )
