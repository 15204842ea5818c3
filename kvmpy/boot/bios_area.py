"""Where a PC's firmware keeps what operating systems search memory for: below 1 MiB, on 16-byte boundaries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpy.boot.e820 import BIOS, EXTENDED_BIOS_DATA, ONE_MIB, VIDEO_MEMORY, E820Entry, E820Type
from kvmpy.boot.firmware_tables import PlacedTables
from kvmpy.boot.image import LoadedRange
from kvmpy.boot.placement import highest_free, lowest_free, ram_text
from kvmpy.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvmpy.memory import GuestMemory

    Maker = Callable[[int], bytes]

__all__ = ["place_in_base_memory", "place_in_bios_area", "place_in_reserved_memory"]

PARAGRAPH = 16
PAGE = 0x1000


def place_in_bios_area(
    memory: GuestMemory, taken: Sequence[LoadedRange], size: int, name: str, make: Maker
) -> PlacedTables:
    """Write the `size` bytes of `make(address)` into RAM from 0xf0000 to 1 MiB that nothing in `taken` uses.

    Raises ImageError, which calls the bytes `name`.
    """
    address = _in_bios_area(memory, taken, size, PARAGRAPH)
    if address is None:
        raise _no_room(memory, size, name)
    return _write(memory, address, size, name, make)


def place_in_base_memory(
    memory: GuestMemory, taken: Sequence[LoadedRange], size: int, name: str, make: Maker
) -> PlacedTables:
    """The same, or else into the last KiB below 640 KiB."""
    address = _in_bios_area(memory, taken, size, PARAGRAPH)
    if address is None:
        address = lowest_free(
            memory, size, taken, alignment=PARAGRAPH, above=EXTENDED_BIOS_DATA, below=VIDEO_MEMORY
        )  # fmt: skip
    if address is None:
        raise _no_room(memory, size, name)
    return _write(memory, address, size, name, make)


def place_in_reserved_memory(
    memory: GuestMemory, taken: Sequence[LoadedRange], size: int, name: str, make: Maker, *, alignment: int
) -> PlacedTables:
    """The same for what need not be searched for: or else into the highest RAM below 4 GiB, which is reserved then."""
    address = _in_bios_area(memory, taken, size, alignment)
    if address is None:
        address = highest_free(memory, size, taken, alignment=PAGE)
    if address is None:
        raise _no_room(memory, size, name)
    return _write(memory, address, size, name, make)


def _in_bios_area(memory: GuestMemory, taken: Sequence[LoadedRange], size: int, alignment: int) -> int | None:
    return lowest_free(memory, size, taken, alignment=alignment, above=BIOS, below=ONE_MIB)


def _no_room(memory: GuestMemory, size: int, name: str) -> ImageError:
    return ImageError(
        f"no {size:#x} bytes are free from {BIOS:#x} to {ONE_MIB:#x}, where a firmware has its tables "
        f"(the guest has {ram_text(memory)}); the image can be loaded with tables=()", name,
    )  # fmt: skip


def _write(memory: GuestMemory, address: int, size: int, name: str, make: Maker) -> PlacedTables:
    memory.write(address, make(address))
    return PlacedTables((LoadedRange(address, size, name),), (E820Entry(address, size, E820Type.RESERVED),))
