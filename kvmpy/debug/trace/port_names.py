"""What is usually at a port of a PC, for ports where this machine has nothing."""

from __future__ import annotations

from bisect import bisect_right

__all__ = ["usual_owner"]

_RANGES = (
    (0x000, 0x00F, "DMA controller 1"),
    (0x020, 0x021, "PIC, master"),
    (0x02E, 0x02F, "super I/O configuration"),
    (0x040, 0x043, "PIT"),
    (0x04E, 0x04F, "super I/O configuration or TPM"),
    (0x060, 0x060, "keyboard controller, data"),
    (0x061, 0x061, "system control port B"),
    (0x064, 0x064, "keyboard controller, command and status"),
    (0x070, 0x071, "CMOS and real-time clock"),
    (0x080, 0x080, "POST code"),
    (0x081, 0x08F, "DMA page registers"),
    (0x092, 0x092, "system control port A (A20, fast reset)"),
    (0x0A0, 0x0A1, "PIC, slave"),
    (0x0B2, 0x0B3, "APM control (SMI)"),
    (0x0C0, 0x0DF, "DMA controller 2"),
    (0x0E9, 0x0E9, "debug console of Bochs and QEMU"),
    (0x0F0, 0x0F1, "coprocessor error"),
    (0x0F4, 0x0F4, "debug exit of QEMU"),
    (0x170, 0x177, "ATA, secondary channel"),
    (0x1CE, 0x1CF, "VBE registers of Bochs and QEMU"),
    (0x1F0, 0x1F7, "ATA, primary channel"),
    (0x200, 0x207, "game port"),
    (0x220, 0x22F, "Sound Blaster"),
    (0x278, 0x27A, "LPT2"),
    (0x279, 0x279, "ISA plug and play"),
    (0x2E8, 0x2EF, "COM4"),
    (0x2F8, 0x2FF, "COM2"),
    (0x300, 0x31F, "NE2000 network card"),
    (0x330, 0x331, "MPU-401"),
    (0x376, 0x376, "ATA, secondary channel, control"),
    (0x378, 0x37A, "LPT1"),
    (0x3B0, 0x3BB, "MDA"),
    (0x3BC, 0x3BF, "LPT on a display card"),
    (0x3C0, 0x3DF, "VGA"),
    (0x3E8, 0x3EF, "COM3"),
    (0x3F0, 0x3F5, "floppy controller"),
    (0x3F6, 0x3F6, "ATA, primary channel, control"),
    (0x3F7, 0x3F7, "floppy controller"),
    (0x3F8, 0x3FF, "COM1"),
    (0x402, 0x402, "debug port of SeaBIOS and OVMF"),
    (0x4D0, 0x4D1, "PIC, edge or level"),
    (0x501, 0x501, "isa-debug-exit of QEMU"),
    (0x505, 0x505, "pvpanic"),
    (0x510, 0x511, "fw_cfg"),
    (0x514, 0x51B, "fw_cfg DMA"),
    (0x600, 0x63F, "ACPI registers of QEMU's Q35 and PIIX4"),
    (0x700, 0x70F, "SMBus of PIIX4"),
    (0xA79, 0xA79, "ISA plug and play, write data"),
    (0xAE00, 0xAE0F, "ACPI hot plug of QEMU"),
    (0xAF00, 0xAF1F, "CPU hot plug of QEMU"),
    (0xB000, 0xB03F, "ACPI registers of PIIX4"),
    (0xB100, 0xB10F, "SMBus of PIIX4"),
    (0xCF8, 0xCFF, "PCI configuration"),
    (0xCF9, 0xCF9, "reset control"),
    (0x5658, 0x5658, "VMware backdoor"),
)  # fmt: skip
"""First and last port, and what is there; where two overlap, the narrower one counts."""


def _resolved() -> tuple[list[int], list[str]]:
    """The ranges cut at their borders: where each piece begins, and whose it is ("" for nobody's)."""
    borders = sorted({edge for first, last, _ in _RANGES for edge in (first, last + 1)})
    owners = []
    for border in borders:
        there = [(last - first, name) for first, last, name in _RANGES if first <= border <= last]
        owners.append(min(there)[1] if there else "")
    return borders, owners


_BORDERS, _OWNERS = _resolved()


def usual_owner(port: int) -> str:
    """What a PC has at `port`, or "" when it is no usual place: Intel's and QEMU's maps of I/O addresses."""
    index = bisect_right(_BORDERS, port) - 1
    return _OWNERS[index] if index >= 0 else ""
