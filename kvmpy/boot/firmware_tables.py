"""Tables that an operating system expects a firmware to have left in memory: MP table, ACPI, SMBIOS.

A boot protocol with a `tables` parameter takes any number of objects like `FirmwareTables`. It has each put itself
into guest memory, and tells the kernel what they answer: the addresses that are not free RAM, and where the RSDP is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from kvmpy._value import frozen
from kvmpy.boot.e820 import E820Entry
from kvmpy.boot.image import LoadedRange

if TYPE_CHECKING:
    from kvmpy.memory import GuestMemory

__all__ = ["FirmwareTables", "PlacedTables", "place_tables"]


@frozen
class PlacedTables:
    """Where tables were put: the `ranges` they take, what the memory map says of these, and the RSDP's address.

    `rsdp` is 0 for tables that have none.
    """

    ranges: tuple[LoadedRange, ...] = ()
    memory_map: tuple[E820Entry, ...] = ()
    rsdp: int = 0


class FirmwareTables(Protocol):
    """Tables, or several of them that belong together."""

    def place(self, memory: GuestMemory, taken: Sequence[LoadedRange]) -> PlacedTables:
        """Write the tables into RAM that nothing in `taken` uses. Raises ImageError when there is no room."""


def place_tables(tables: Iterable[FirmwareTables], memory: GuestMemory, taken: Sequence[LoadedRange]) -> PlacedTables:
    """Place all of `tables`, one after the other; the answer is about all of them. The first RSDP counts."""
    ranges: list[LoadedRange] = []
    memory_map: list[E820Entry] = []
    rsdp = 0
    for each in tables:
        placed = each.place(memory, (*taken, *ranges))
        ranges += placed.ranges
        memory_map += placed.memory_map
        rsdp = rsdp or placed.rsdp
    return PlacedTables(tuple(ranges), tuple(memory_map), rsdp)
