"""The FADT (ACPI 6.5, section 5.2.9), which says what hardware ACPI finds, and the FACS that it points to."""

from __future__ import annotations

import struct
from enum import IntFlag
from typing import TYPE_CHECKING

from kvmpy.boot.acpi.system_table import HEADER_SIZE, port_register, system_table
from kvmpy.boot.field_table import Fields
from kvmpy.boot.platform import FixedHardware, SleepRegisters

if TYPE_CHECKING:
    from kvmpy.boot.platform import Platform

__all__ = ["FADT", "BootArchitecture", "FadtFlags", "facs", "fadt"]

REVISION, MINOR_REVISION = 6, 5
SIZE = 276
NO_C2, NO_C3 = 0xFFF, 0xFFF  # latencies above 100 and 1000 us: there are no such states
CENTURY = 0x32  # the register of a PC's CMOS

FADT = {
    "FIRMWARE_CTRL": (36, 4), "DSDT": (40, 4), "Preferred_PM_Profile": (45, 1), "SCI_INT": (46, 2),
    "SMI_CMD": (48, 4), "ACPI_ENABLE": (52, 1), "ACPI_DISABLE": (53, 1), "PM1a_EVT_BLK": (56, 4),
    "PM1a_CNT_BLK": (64, 4), "PM_TMR_BLK": (76, 4), "PM1_EVT_LEN": (88, 1), "PM1_CNT_LEN": (89, 1),
    "PM_TMR_LEN": (91, 1), "P_LVL2_LAT": (96, 2), "P_LVL3_LAT": (98, 2), "CENTURY": (108, 1),
    "IAPC_BOOT_ARCH": (109, 2), "Flags": (112, 4), "RESET_REG": (116, 12), "RESET_VALUE": (128, 1),
    "FADT Minor Version": (131, 1), "X_DSDT": (140, 8), "X_PM1a_EVT_BLK": (148, 12), "X_PM1a_CNT_BLK": (172, 12),
    "X_PM_TMR_BLK": (208, 12), "SLEEP_CONTROL_REG": (244, 12), "SLEEP_STATUS_REG": (256, 12),
    "Hypervisor Vendor Identity": (268, 8),
}  # fmt: skip
"""The fields that are not zero here."""


class FadtFlags(IntFlag):
    """Fixed feature flags (table 5.10)."""

    WBINVD = 1 << 0
    PROC_C1 = 1 << 2
    PWR_BUTTON = 1 << 4  # one is found in the DSDT, or there is none
    SLP_BUTTON = 1 << 5  # the same for the sleep button
    FIX_RTC = 1 << 6  # the clock does not wake the machine by PM1
    TMR_VAL_EXT = 1 << 8  # the PM timer has 32 bits
    RESET_REG_SUP = 1 << 10
    HW_REDUCED_ACPI = 1 << 20


class BootArchitecture(IntFlag):
    """What a PC has, and what an operating system need not search for (table 5.11)."""

    LEGACY_DEVICES = 1 << 0
    KEYBOARD_CONTROLLER = 1 << 1
    VGA_NOT_PRESENT = 1 << 2
    CMOS_RTC_NOT_PRESENT = 1 << 5


def fadt(platform: Platform, *, dsdt: int, facs: int) -> bytes:
    """The FADT of `platform`, with the addresses of DSDT and FACS (0: none, as for hardware-reduced ACPI).

    A platform without fixed hardware is hardware-reduced (section 4.1): there is no PM timer and no SCI then, and
    operating systems may leave PICs and PIT alone.
    """
    fields = Fields(FADT, bytearray(SIZE - HEADER_SIZE), HEADER_SIZE)
    fields["DSDT"], fields["X_DSDT"], fields["FIRMWARE_CTRL"] = dsdt & 0xFFFF_FFFF, dsdt, facs
    fields["P_LVL2_LAT"], fields["P_LVL3_LAT"] = NO_C2, NO_C3
    fields["CENTURY"] = CENTURY if platform.clock is not None else 0
    fields["IAPC_BOOT_ARCH"] = _boot_architecture(platform)
    fields["FADT Minor Version"] = MINOR_REVISION
    fields["Hypervisor Vendor Identity"] = int.from_bytes(b"KVMPY\0\0\0", "little")
    flags = FadtFlags.WBINVD | FadtFlags.PROC_C1 | FadtFlags.SLP_BUTTON | FadtFlags.FIX_RTC
    power = platform.power
    match power:
        case FixedHardware():
            fields["SCI_INT"] = power.sci
            for register, port, length, access in (
                ("PM1a_EVT_BLK", power.pm1a_event, 4, 2),
                ("PM1a_CNT_BLK", power.pm1a_control, 2, 2),
                ("PM_TMR_BLK", power.pm_timer, 4, 4),
            ):
                fields[register] = port
                fields[f"X_{register}"] = _number(port_register(port, length, access))
            fields["PM1_EVT_LEN"], fields["PM1_CNT_LEN"], fields["PM_TMR_LEN"] = 4, 2, 4
            if power.timer_bits == 32:
                flags |= FadtFlags.TMR_VAL_EXT
        case SleepRegisters():
            fields["SLEEP_CONTROL_REG"] = _number(port_register(power.control, 1))
            fields["SLEEP_STATUS_REG"] = _number(port_register(power.status, 1))
    if not isinstance(power, FixedHardware):
        flags |= FadtFlags.HW_REDUCED_ACPI | FadtFlags.PWR_BUTTON
    if power is not None:
        flags |= FadtFlags.RESET_REG_SUP
        fields["RESET_REG"] = _number(port_register(power.reset, 1))
        fields["RESET_VALUE"] = power.reset_value
    fields["Flags"] = flags
    return system_table(b"FACP", REVISION, fields.data)


def _number(register: bytes) -> int:
    return int.from_bytes(register, "little")


def _boot_architecture(platform: Platform) -> int:
    found = BootArchitecture.VGA_NOT_PRESENT
    if platform.serial_ports or platform.keyboard is not None:
        found |= BootArchitecture.LEGACY_DEVICES
    if platform.keyboard is not None:
        found |= BootArchitecture.KEYBOARD_CONTROLLER
    if platform.clock is None:
        found |= BootArchitecture.CMOS_RTC_NOT_PRESENT
    return int(found)


def facs() -> bytes:
    """The FACS (5.2.10): waking vectors and the global lock, all zero. It has no checksum and lies on 64 bytes."""
    return struct.pack("<4sI24xB31x", b"FACS", 64, 2)
