"""RAM handed out, piece by piece, for what a boot loader leaves to a kernel: parameters, strings, tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from kvmpy.boot.e820 import BIOS_HOLE
from kvmpy.boot.image import LoadedRange
from kvmpy.boot.placement import FOUR_GIB, lowest_free, ram_text
from kvmpy.errors import ImageError

if TYPE_CHECKING:
    from kvmpy.memory import GuestMemory

__all__ = ["BootMemory"]

LOWEST = 0x8000
"""Below are the interrupt vectors, the BIOS data area, and the place where a BIOS puts boot sectors.

From here up, not from 640 KiB down: Linux's decompressor takes the last pages below the extended BIOS data area for
code of its own, while it still runs on the loader's page tables."""


class BootMemory:
    """The lowest RAM from 0x8000 on that is not `taken`; every piece handed out becomes one of `ranges`.

    `ranges` are what has been put into memory, `reserved` what must stay free besides. `image` is what errors name.
    """

    def __init__(self, memory: GuestMemory, ranges: Iterable[LoadedRange], image: str) -> None:
        self.memory = memory
        self.ranges = list(ranges)
        self.reserved: list[LoadedRange] = []
        self._image = image

    @property
    def used(self) -> tuple[LoadedRange, ...]:
        """What has an owner already. Tables of a firmware may still go where a BIOS is on a PC."""
        return (*self.ranges, *self.reserved)

    @property
    def taken(self) -> tuple[LoadedRange, ...]:
        """All that nothing else may be put into."""
        return (*self.used, BIOS_HOLE)

    def place(self, size: int, name: str, *, alignment: int = 8, below: int = FOUR_GIB) -> int:
        """The address of `size` bytes for `name`. Not cleared. Raises ImageError when there is no room."""
        address = lowest_free(self.memory, size, self.taken, alignment=alignment, above=LOWEST, below=below)
        if address is None:
            raise ImageError(
                f"no {size:#x} bytes between {LOWEST:#x} and {below:#x} are left for the {name} "
                f"(the guest has {ram_text(self.memory)})", self._image,
            )  # fmt: skip
        self.ranges.append(LoadedRange(address, size, name))
        return address

    def put(self, data: bytes | bytearray, name: str, *, alignment: int = 8, below: int = FOUR_GIB) -> int:
        """Write `data` where `place` finds room for it, and answer its address."""
        address = self.place(len(data), name, alignment=alignment, below=below)
        self.memory.write(address, data)
        return address
