"""Raw firmware: a ROM image such as SeaBIOS's bios.bin, which the processor starts at the reset vector."""

from __future__ import annotations

import os

from kvmpy.boot.image import Entry, LoadedRange, RomMapping
from kvmpy.boot.image_source import ImageSource
from kvmpy.boot.placement import FOUR_GIB, ram_views
from kvmpy.errors import ImageError
from kvmpy.x86 import modes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmpy.memory import GuestMemory

__all__ = ["FirmwareImage"]

KIB = 0x400
SMALLEST = 64 * KIB
LARGEST = 16 * KIB * KIB
ONE_MIB = 0x10_0000
SHADOW = 128 * KIB
"""How much of the end of the ROM a PC shows under 1 MiB: the segments E000 and F000."""
SHADOW_LIMIT = 256 * KIB


class FirmwareImage:
    """A ROM that ends at 4 GiB, with its last 128 KiB also under 1 MiB, started at the reset vector 0xFFFFFFF0.

    `source` is a path or the bytes. The size must be 64 KiB (the least that fills segment F000, where the first far
    jump goes) to 16 MiB (a larger one would come near the local APIC at 0xFEE00000 and what else a PC has there), in
    multiples of 4 KiB, because KVM maps whole pages. Files of odd sizes are refused rather than padded: nobody could
    tell whether the start or the end is missing.

    The ROM itself is read only (`memory_needs`). The copy under 1 MiB, at 0xE0000 to 0xFFFFF, is ordinary RAM that
    `load` fills: on a PC the chip set's PAM registers let firmware replace the ROM there by RAM with the same contents
    (440FX data sheet, "PAM - Programmable Attribute Map"), and SeaBIOS keeps its variables in it. A machine without
    PAM registers behaves as if they had been programmed already.

    `shadow` is how many bytes of the end are copied, at most 256 KiB (down to 0xC0000). A firmware of that size that
    finds no chip set to program cannot bring in by itself what it has below 0xE0000: SeaBIOS's bios-256k.bin then ends
    in a triple fault with 128 KiB, and runs with 256 KiB; bios.bin is content with 128.

    Raises ImageError for other sizes; `load` does so when there is no RAM under 1 MiB.
    """

    def __init__(
        self, source: bytes | bytearray | memoryview | str | os.PathLike[str], *, shadow: int = SHADOW
    ) -> None:
        file = ImageSource(source)
        self._name, size = file.name, file.size
        if not SMALLEST <= size <= LARGEST or size % 0x1000:
            raise ImageError(
                f"has {size:#x} bytes; a firmware image has {SMALLEST:#x} (64 KiB) to {LARGEST:#x} (16 MiB), "
                "in multiples of 0x1000 (4 KiB), so that it ends at 4 GiB in whole pages", self._name,
            )  # fmt: skip
        if not 0x1_0000 <= shadow <= SHADOW_LIMIT or shadow % 0x1000:
            raise ImageError(
                f"shadow is {shadow:#x} bytes; it must be 0x10000 to {SHADOW_LIMIT:#x}, in multiples of 0x1000",
                self._name,
            )
        self._data = file.read_all()
        self._shadow = min(shadow, size)

    @property
    def address(self) -> int:
        """Where the ROM starts: it ends at 4 GiB."""
        return FOUR_GIB - len(self._data)

    def memory_needs(self) -> tuple[RomMapping, ...]:
        """The ROM below 4 GiB, read only."""
        return (RomMapping(self.address, self._data, name="firmware ROM"),)

    def load(self, memory: GuestMemory) -> Entry:
        """Copy the end of the ROM under 1 MiB. The machine has mapped `memory_needs()` before. Raises ImageError."""
        low = ONE_MIB - self._shadow
        ram_views(memory, low, self._shadow, self._name, "the copy of the firmware under 1 MiB")
        memory.write(low, self._data[-self._shadow :])
        ranges = (
            LoadedRange(low, self._shadow, "firmware under 1 MiB"),
            LoadedRange(self.address, len(self._data), "firmware ROM"),
        )
        return Entry(modes.reset_vector(), ranges)

    def __repr__(self) -> str:
        return f"<FirmwareImage {self._name} {len(self._data):#x} bytes at {self.address:#x}>"
