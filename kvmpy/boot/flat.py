"""Flat binaries: bytes that go to one address and start in a given mode."""

from __future__ import annotations

import os

from kvmpy.boot.image import Entry, LoadedRange, RomMapping
from kvmpy.boot.image_source import ImageSource
from kvmpy.boot.start import Start
from kvmpy.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmpy.memory import GuestMemory

__all__ = ["BOOT_SECTOR_ADDRESS", "DEFAULT_ADDRESS", "FlatImage"]

DEFAULT_ADDRESS = 0x1000
BOOT_SECTOR_ADDRESS = 0x7C00
_BOOT_SIGNATURE = b"\x55\xaa"
_FIRST_HARD_DISK = 0x80


class FlatImage:
    """A flat binary: `code` (bytes, or the path of a file) goes to guest-physical `address` as it is.

    `mode` is "real", "protected16", "protected" or "long". `entry` is the address of the first instruction, by default
    that of the first byte. `stack`, `ring` and `tables` are those of `kvmpy.boot.start.Start`.

    512 bytes that end in 55 AA are a boot sector: it goes to 0x7C00 unless an `address` is given, and starts in real
    mode with DL = 0x80, the BIOS number of the first hard disk, as a BIOS hands it over (BIOS Boot Specification
    1.01). Everything else goes to 0x1000.

    Raises ImageError for an empty image, an address that cannot be and an entry outside of the image; `load` does so
    when the image is not wholly in RAM.
    """

    def __init__(
        self,
        code: bytes | bytearray | memoryview | str | os.PathLike[str],
        address: int | None = None,
        mode: str = "real",
        *,
        entry: int | None = None,
        stack: int | None = None,
        ring: int = 0,
        tables: int | None = None,
    ) -> None:
        self._source = ImageSource(code)
        self._start = Start(mode, stack=stack, ring=ring, tables=tables)
        self.size = self._source.size
        """Bytes in memory."""
        if not self.size:
            raise ImageError("is empty", self._source.name)
        self.boot_sector = self.size == 512 and self._source.read(510, 2, "the boot signature") == _BOOT_SIGNATURE
        """Whether these are 512 bytes that end in 55 AA."""
        if address is None:
            address = BOOT_SECTOR_ADDRESS if self.boot_sector else DEFAULT_ADDRESS
        if address < 0 or address + self.size > 1 << 64:
            raise ImageError(f"{self.size:#x} bytes at {address:#x} do not fit 64-bit addresses", self._source.name)
        self.address = address
        """Where the first byte goes."""
        self.entry = address if entry is None else entry
        """The address of the first instruction."""
        if not address <= self.entry < address + self.size:
            last = address + self.size - 1
            raise ImageError(f"entry {self.entry:#x} is not in the image, {address:#x}..{last:#x}", self._source.name)

    @property
    def mode(self) -> str:
        """The mode that the processor starts in."""
        return self._start.mode

    @property
    def source(self) -> ImageSource:
        """Where the bytes come from: its `name` is the path of a file."""
        return self._source

    def memory_needs(self) -> tuple[RomMapping, ...]:
        """Nothing: a flat image lives in RAM."""
        return ()

    def load(self, memory: GuestMemory) -> Entry:
        """Write the image into RAM, and the tables of its mode. Raises ImageError when something does not fit."""
        self._source.copy_to(memory, self.address, 0, self.size, "the image")
        used = [LoadedRange(self.address, self.size, "image")]
        entry = self._start.enter(memory, self.entry, used, self._source.name)
        if self.boot_sector and self.mode == "real":
            entry.state.regs.rdx = _FIRST_HARD_DISK
        return entry

    def __repr__(self) -> str:
        return f"<FlatImage {self._source.name} at {self.address:#x} mode={self.mode}>"
