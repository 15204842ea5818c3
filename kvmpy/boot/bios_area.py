"""Where a PC's firmware keeps what operating systems search memory for: below 1 MiB, on 16-byte boundaries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpy.boot.e820 import BIOS, EXTENDED_BIOS_DATA, ONE_MIB, VIDEO_MEMORY, E820Entry, E820Type
from kvmpy.boot.firmware_tables import PlacedTables
from kvmpy.boot.image import LoadedRange
from kvmpy.boot.placement import lowest_free, ram_text
from kvmpy.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvmpy.memory import GuestMemory

__all__ = ["place_in_bios_area"]

PARAGRAPH = 16


def place_in_bios_area(
    memory: GuestMemory,
    taken: Sequence[LoadedRange],
    size: int,
    name: str,
    make: Callable[[int], bytes],
    *,
    or_base_memory: bool = False,
) -> tuple[int, PlacedTables]:
    """Write the `size` bytes that `make(address)` gives into RAM from 0xf0000 to 1 MiB that nothing in `taken` uses.

    Answers the address too. With `or_base_memory` the last KiB below 640 KiB will do. Raises ImageError.
    """
    address = lowest_free(memory, size, taken, alignment=PARAGRAPH, above=BIOS, below=ONE_MIB)
    if address is None and or_base_memory:
        address = lowest_free(
            memory, size, taken, alignment=PARAGRAPH, above=EXTENDED_BIOS_DATA, below=VIDEO_MEMORY
        )  # fmt: skip
    if address is None:
        raise ImageError(
            f"no {size:#x} bytes are free from {BIOS:#x} to {ONE_MIB:#x}, where operating systems look for it "
            f"(the guest has {ram_text(memory)}); the image can be loaded with tables=()", name,
        )  # fmt: skip
    memory.write(address, make(address))
    return address, PlacedTables(
        (LoadedRange(address, size, name),), (E820Entry(address, size, E820Type.RESERVED),)
    )  # fmt: skip
