"""The Multiboot2 header of a kernel (Multiboot2 Specification 2.0, chapter 3.1)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from kvmpy._value import frozen
from kvmpy.boot.multiboot.header import AddressFields
from kvmpy.errors import ImageError

if TYPE_CHECKING:
    from kvmpy.boot.image_source import ImageSource

__all__ = ["HeaderTag", "InformationTag", "Multiboot2Header", "Relocatable"]

MAGIC = 0xE852_50D6
ARCHITECTURE_I386 = 0
SEARCHED = 32768
ALIGNMENT = 8
_OPTIONAL = 1
_FROM_THE_START = 0xFFFF_FFFF
_CONSOLE_REQUIRED, _EGA_TEXT_SUPPORTED = 1 << 0, 1 << 1


class HeaderTag(IntEnum):
    """Types of tags in the header."""

    END = 0
    INFORMATION_REQUEST = 1
    ADDRESS = 2
    ENTRY_ADDRESS = 3
    CONSOLE_FLAGS = 4
    FRAMEBUFFER = 5
    MODULE_ALIGNMENT = 6
    EFI_BOOT_SERVICES = 7
    EFI_I386_ENTRY_ADDRESS = 8
    EFI_AMD64_ENTRY_ADDRESS = 9
    RELOCATABLE = 10


class InformationTag(IntEnum):
    """Types of tags in the boot information."""

    END = 0
    COMMAND_LINE = 1
    BOOT_LOADER_NAME = 2
    MODULE = 3
    BASIC_MEMORY = 4
    BIOS_BOOT_DEVICE = 5
    MEMORY_MAP = 6
    VBE = 7
    FRAMEBUFFER = 8
    ELF_SECTIONS = 9
    APM = 10
    EFI_32_SYSTEM_TABLE = 11
    EFI_64_SYSTEM_TABLE = 12
    SMBIOS = 13
    ACPI_OLD_RSDP = 14
    ACPI_NEW_RSDP = 15
    NETWORK = 16
    EFI_MEMORY_MAP = 17
    EFI_BOOT_SERVICES_NOT_TERMINATED = 18
    EFI_32_IMAGE_HANDLE = 19
    EFI_64_IMAGE_HANDLE = 20
    LOAD_BASE_ADDRESS = 21


GIVEN = frozenset(
    {
        InformationTag.COMMAND_LINE, InformationTag.BOOT_LOADER_NAME, InformationTag.MODULE,
        InformationTag.BASIC_MEMORY, InformationTag.MEMORY_MAP, InformationTag.FRAMEBUFFER,
        InformationTag.ELF_SECTIONS, InformationTag.ACPI_OLD_RSDP, InformationTag.ACPI_NEW_RSDP,
        InformationTag.LOAD_BASE_ADDRESS,
        # Never there: the kernel comes from no BIOS disk, and then the tag "must not be present".
        InformationTag.BIOS_BOOT_DEVICE,
    }
)  # fmt: skip
"""What a kernel may ask for. Whether it is there is another question: a guest without modules has no such tag."""

_SIZES: dict[int, int] = {
    HeaderTag.ADDRESS: 24, HeaderTag.ENTRY_ADDRESS: 12, HeaderTag.CONSOLE_FLAGS: 12, HeaderTag.FRAMEBUFFER: 20,
    HeaderTag.RELOCATABLE: 24,
}  # fmt: skip


class Relocatable(NamedTuple):
    """The relocatable tag: the image may be anywhere from `min_addr` to `max_addr`. It stands at `offset` in the file.

    Its `preference` is advice, which kvmpy does not need: an image stays where it was linked when that is possible.
    """

    min_addr: int
    max_addr: int
    align: int
    preference: int
    offset: int


class _Tag(NamedTuple):
    offset: int
    type: int
    optional: bool
    data: bytes

    def words(self) -> tuple[int, ...]:
        return struct.unpack_from(f"<{len(self.data) // 4}I", self.data)


@frozen
class Multiboot2Header:
    """A header, found and checked. `offset` is its place in the file; `addresses` is None for an ELF file.

    `entry` is that of the entry address tag, or None.
    """

    offset: int
    addresses: AddressFields | None
    entry: int | None
    page_aligned_modules: bool
    wants_screen: bool
    relocatable: Relocatable | None

    @classmethod
    def find(cls, source: ImageSource) -> Multiboot2Header | None:
        """The first header with a right checksum, or None. Raises ImageError for one that cannot be obeyed."""
        data = source.read(0, min(source.size, SEARCHED), "the image")
        for offset in range(0, len(data) - 15, ALIGNMENT):
            magic, architecture, length, checksum = struct.unpack_from("<4I", data, offset)
            if magic == MAGIC and (magic + architecture + length + checksum) & 0xFFFF_FFFF == 0:
                if architecture != ARCHITECTURE_I386:
                    raise ImageError(
                        f"architecture is {architecture}; i386 is {ARCHITECTURE_I386}", source.name, offset + 4
                    )
                if not 16 <= length <= len(data) - offset:
                    raise ImageError(
                        f"header_length is {length:#x}: the header is not all in the first {len(data):#x} bytes",
                        source.name, offset + 8,
                    )  # fmt: skip
                return cls._read(source, data[offset : offset + length], offset)
        return None

    @classmethod
    def _read(cls, source: ImageSource, header: bytes, offset: int) -> Multiboot2Header:
        fields: tuple[int, int, int, int] | None = None
        address_tag = entry_tag = None
        aligned = screen = False
        relocatable = None
        for tag in _tags(source, header, offset):
            match tag.type:
                case HeaderTag.INFORMATION_REQUEST:
                    screen |= InformationTag.FRAMEBUFFER in _check_request(source, tag)
                case HeaderTag.ADDRESS:
                    address_tag = tag
                    fields = struct.unpack_from("<4I", tag.data)
                case HeaderTag.ENTRY_ADDRESS:
                    entry_tag = tag
                case HeaderTag.CONSOLE_FLAGS:
                    screen |= _check_console(source, tag)
                case HeaderTag.FRAMEBUFFER:
                    screen = True
                case HeaderTag.MODULE_ALIGNMENT:
                    aligned = True
                case HeaderTag.RELOCATABLE:
                    lowest, highest, align, preference = struct.unpack_from("<4I", tag.data)
                    relocatable = Relocatable(lowest, highest, align, preference, tag.offset)
                case HeaderTag.EFI_BOOT_SERVICES | HeaderTag.EFI_I386_ENTRY_ADDRESS | HeaderTag.EFI_AMD64_ENTRY_ADDRESS:
                    pass  # "taken into account only on EFI platforms"
                case _ if not tag.optional:
                    raise ImageError(
                        f"header tag of type {tag.type} is required, but not known", source.name, tag.offset
                    )
        entry = entry_tag.words()[0] if entry_tag is not None else None
        addresses = None
        if fields is not None and address_tag is not None:
            start = address_tag.offset + 8
            header_addr, load_addr, load_end_addr, bss_end_addr = fields
            if load_addr == _FROM_THE_START:
                load_addr = header_addr - offset
                if load_addr < 0:
                    raise ImageError(
                        f"header_addr is {header_addr:#x}, too low for an image that is loaded from its start",
                        source.name, start,
                    )  # fmt: skip
            addresses = AddressFields.check(
                source, offset, (header_addr, load_addr, load_end_addr, bss_end_addr), start
            )
        if addresses is not None and not (entry is not None and addresses.load_addr <= entry < addresses.end):
            place = entry_tag.offset + 8 if entry_tag is not None else offset
            found = (
                "there is no entry address tag" if entry is None else f"entry_addr is {entry:#x}, outside of the image"
            )
            raise ImageError(found, source.name, place)
        return cls(offset, addresses, entry, aligned, screen, relocatable)


def _tags(source: ImageSource, header: bytes, offset: int) -> Iterator[_Tag]:
    """The tags of a header that begins at `offset` in the file, without the last one. Raises ImageError."""
    position = 16
    while position + 8 <= len(header):
        kind, flags, size = struct.unpack_from("<HHI", header, position)
        place = offset + position
        if kind == HeaderTag.END:
            return
        if size < _SIZES.get(kind, 8) or position + size > len(header):
            raise ImageError(f"header tag of type {kind} has {size} bytes, too few or too many", source.name, place)
        yield _Tag(place, kind, bool(flags & _OPTIONAL), header[position + 8 : position + size])
        position += size + 7 & -8
    raise ImageError("the Multiboot2 header ends without its last tag, of type 0", source.name, offset)


def _check_request(source: ImageSource, tag: _Tag) -> tuple[int, ...]:
    missing = set(tag.words()) - GIVEN
    if missing and not tag.optional:
        names = {int(known): known.name.lower().replace("_", " ") for known in InformationTag}
        text = ", ".join(f"{kind} ({names.get(kind, 'not known')})" for kind in sorted(missing))
        raise ImageError(f"the kernel requires information that kvmpy cannot give: {text}", source.name, tag.offset)
    return tag.words()


def _check_console(source: ImageSource, tag: _Tag) -> bool:
    flags = tag.words()[0]
    if flags & _CONSOLE_REQUIRED and not flags & _EGA_TEXT_SUPPORTED and not tag.optional:
        raise ImageError(
            f"console_flags is {flags:#x}: the kernel requires a console, but takes no EGA text",
            source.name,
            tag.offset,
        )
    return bool(flags & _EGA_TEXT_SUPPORTED)
