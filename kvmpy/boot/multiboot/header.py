"""The Multiboot header of a kernel (Multiboot Specification 0.6.96, chapter 3.1)."""

from __future__ import annotations

import struct
from enum import IntFlag
from typing import TYPE_CHECKING

from kvmpy._value import frozen
from kvmpy.errors import ImageError

if TYPE_CHECKING:
    from kvmpy.boot.image_source import ImageSource

__all__ = ["AddressFields", "Multiboot1Flags", "Multiboot1Header"]

MAGIC = 0x1BAD_B002
SEARCHED = 8192
ALIGNMENT = 4
_WHOLE_FILE = 0


class Multiboot1Flags(IntFlag):
    """`flags` of the header. A loader must know what bits 0 to 15 ask for, and may ignore the others."""

    PAGE_ALIGN = 1 << 0
    MEMORY_INFO = 1 << 1
    VIDEO_MODE = 1 << 2
    AOUT_KLUDGE = 1 << 16


_KNOWN = Multiboot1Flags.PAGE_ALIGN | Multiboot1Flags.MEMORY_INFO | Multiboot1Flags.VIDEO_MODE
_REQUIREMENTS = 0xFFFF


@frozen
class AddressFields:
    """Where a file goes that is no ELF file, all in physical addresses; `offset` is that of load_addr in the file.

    `size` bytes of the file go to `load_addr`, and zeroes follow up to `end`.
    """

    offset: int
    load_addr: int
    size: int
    end: int

    @classmethod
    def check(
        cls,
        source: ImageSource,
        header_offset: int,
        fields: tuple[int, int, int, int],
        place: int,
    ) -> AddressFields:
        """From header_addr, load_addr, load_end_addr and bss_end_addr, which stand at `place` in the file.

        Raises ImageError for values that contradict each other or the file.
        """
        header_addr, load_addr, load_end_addr, bss_end_addr = fields

        def refuse(index: int, message: str) -> ImageError:
            name = ("header_addr", "load_addr", "load_end_addr", "bss_end_addr")[index]
            return ImageError(f"{name} is {fields[index]:#x}: {message}", source.name, place + 4 * index)

        if load_addr > header_addr:
            raise refuse(1, f"more than header_addr, {header_addr:#x}")
        offset = header_offset - (header_addr - load_addr)
        if offset < 0:
            raise refuse(
                0, f"the header is at offset {header_offset:#x}, so load_addr {load_addr:#x} is before the file's start"
            )
        size = load_end_addr - load_addr if load_end_addr != _WHOLE_FILE else source.size - offset
        if load_end_addr != _WHOLE_FILE and load_end_addr <= load_addr:
            raise refuse(2, f"not above load_addr, {load_addr:#x}")
        if offset + size > source.size:
            raise refuse(2, f"the file ends ({source.size:#x}) before that, at {load_addr + source.size - offset:#x}")
        end = load_addr + size
        if bss_end_addr and bss_end_addr < end:
            raise refuse(3, f"less than the end of the data, {end:#x}")
        end = max(end, bss_end_addr)
        if end > 1 << 32:
            raise refuse(1, f"the image ends at {end:#x}, above 4 GiB")
        return cls(offset, load_addr, size, end)


@frozen
class Multiboot1Header:
    """A header, found and checked; `offset` is its place in the file. An ELF file needs no `addresses` and `entry`."""

    offset: int
    flags: int
    addresses: AddressFields | None
    entry: int | None

    @classmethod
    def find(cls, source: ImageSource) -> Multiboot1Header | None:
        """The first header with a right checksum, or None. Raises ImageError for one that cannot be obeyed."""
        data = source.read(0, min(source.size, SEARCHED), "the image")
        for offset in range(0, len(data) - 11, ALIGNMENT):
            magic, flags, checksum = struct.unpack_from("<3I", data, offset)
            if magic == MAGIC and (magic + flags + checksum) & 0xFFFF_FFFF == 0:
                return cls._read(source, data, offset, flags)
        return None

    @classmethod
    def _read(cls, source: ImageSource, data: bytes, offset: int, flags: int) -> Multiboot1Header:
        size = 48 if flags & Multiboot1Flags.VIDEO_MODE else 32 if flags & Multiboot1Flags.AOUT_KLUDGE else 12
        if offset + size > len(data):
            raise ImageError(
                f"the Multiboot header of {size} bytes is not all in the first {SEARCHED} bytes", source.name, offset
            )
        unknown = flags & _REQUIREMENTS & ~_KNOWN
        if unknown:
            bits = ", ".join(str(bit) for bit in range(16) if unknown >> bit & 1)
            raise ImageError(f"flags is {flags:#x}: requirement {bits} is not known", source.name, offset + 4)
        addresses = entry = None
        if flags & Multiboot1Flags.AOUT_KLUDGE:
            header_addr, load_addr, load_end_addr, bss_end_addr, entry = struct.unpack_from("<5I", data, offset + 12)
            fields = (header_addr, load_addr, load_end_addr, bss_end_addr)
            addresses = AddressFields.check(source, offset, fields, offset + 12)
            if not load_addr <= entry < addresses.end:
                raise ImageError(f"entry_addr is {entry:#x}, outside of the image", source.name, offset + 28)
        return cls(offset, flags, addresses, entry)

    @property
    def page_aligned_modules(self) -> bool:
        """Whether modules begin on 4 KiB boundaries."""
        return bool(self.flags & Multiboot1Flags.PAGE_ALIGN)

    @property
    def wants_screen(self) -> bool:
        """Whether the kernel asks which video mode is set."""
        return bool(self.flags & Multiboot1Flags.VIDEO_MODE)
