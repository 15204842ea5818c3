"""What the tables of a firmware tell of: the processors and devices of a PC, as plain values.

A machine fills in what it has (`kvmpy.machine.platform_tables`). Interrupt inputs are GSIs: input n of the one IOAPIC,
and IRQ n of the ISA bus below 16. KVM routes every GSI to the IOAPIC pin of its own number, the timer's GSI 0 to pin 0
too (arch/x86/kvm: its default routing), where other monitors move it to pin 2. So nothing here overrides an IRQ.
"""

from __future__ import annotations

from kvmpy._value import frozen

__all__ = [
    "IOAPIC_ADDRESS",
    "LOCAL_APIC_ADDRESS",
    "FixedHardware",
    "IsaDevice",
    "MmioDevice",
    "Platform",
    "SleepRegisters",
]

LOCAL_APIC_ADDRESS = 0xFEE0_0000
LOCAL_APIC_VERSION = 0x14
IOAPIC_ADDRESS = 0xFEC0_0000
IOAPIC_VERSION = 0x11
IOAPIC_ID = 0  # what its ID register says
ISA_IRQS = 16
CASCADE_IRQ = 2  # the second PIC hangs on it: no device can


@frozen
class IsaDevice:
    """A device at `port` and the following ones, with the ISA interrupt `irq`, if it has one."""

    port: int
    irq: int | None


@frozen
class MmioDevice:
    """A device with `size` bytes of registers at `address`, and the interrupt input `gsi`."""

    address: int
    size: int
    gsi: int
    edge: bool = True


@frozen
class FixedHardware:
    """ACPI's fixed hardware (ACPI 6.5, 4.8.3): the ports of its registers, and the interrupt SCI.

    `s5` is the sleep type that switches off.
    """

    pm1a_event: int
    pm1a_control: int
    pm_timer: int
    reset: int
    reset_value: int
    s5: int
    sci: int
    timer_bits: int = 32


@frozen
class SleepRegisters:
    """What hardware-reduced ACPI has instead (ACPI 6.5, 4.8.3.7): the ports of a byte each, and the same numbers."""

    control: int
    status: int
    reset: int
    reset_value: int
    s5: int


@frozen
class Platform:
    """A PC with local APICs, one IOAPIC and an ISA bus.

    `apic_ids` are those of the processors, the boot processor's first. `signature` and `features` are EAX and EDX of
    CPUID leaf 1. `pci` says whether there is a host bridge with bus 0 behind it, `pci_config` where its configuration
    space is in memory (ECAM, 256 MiB), if it is. `virtio_mmio` are virtio devices of the MMIO transport.
    """

    apic_ids: tuple[int, ...] = (0,)
    signature: int = 0
    features: int = 0
    serial_ports: tuple[IsaDevice, ...] = ()
    keyboard: IsaDevice | None = None
    clock: IsaDevice | None = None
    pvpanic: IsaDevice | None = None
    pci: bool = False
    pci_config: int | None = None
    power: FixedHardware | SleepRegisters | None = None
    virtio_mmio: tuple[MmioDevice, ...] = ()

    @property
    def sci(self) -> int | None:
        """The ISA interrupt by which ACPI's hardware calls, the one of these that is level-triggered. None: there is
        no such hardware, or it is no ISA interrupt, and then level-triggered anyway."""
        if isinstance(self.power, FixedHardware) and self.power.sci < ISA_IRQS:
            return self.power.sci
        return None
