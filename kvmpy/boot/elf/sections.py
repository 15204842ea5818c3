"""The sections of an ELF file (System V gABI, chapter 4): where they are, and what is in them.

Loading does without them; symbols and line numbers need them. As in `elf_format`, every number is checked where it is
read. Own code instead of pyelftools, which takes 18 us for each symbol (on the test machine), and a large kernel has
hundreds of thousands of them.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvmpy._value import frozen
from kvmpy.errors import ImageError

if TYPE_CHECKING:
    from kvmpy.boot.elf.format import ElfHeader
    from kvmpy.boot.image_source import ImageSource

__all__ = ["SHT_DYNSYM", "SHT_NOBITS", "SHT_SYMTAB", "ElfSections", "Section"]

SHT_SYMTAB, SHT_NOBITS, SHT_DYNSYM = 2, 8, 11
SHF_ALLOC, SHF_COMPRESSED = 0x2, 0x800
ELFCOMPRESS_ZLIB, ELFCOMPRESS_ZSTD = 1, 2
SHN_XINDEX = 0xFFFF

# struct Elf32_Shdr and Elf64_Shdr have the same fields in the same order: sh_name, sh_type, sh_flags, sh_addr,
# sh_offset, sh_size, sh_link, sh_info, sh_addralign, sh_entsize.
_SECTION_HEADER = {32: struct.Struct("<10I"), 64: struct.Struct("<IIQQQQIIQQ")}
# ch_type, ch_size, ch_addralign; the padding of Elf64_Chdr is ch_reserved.
_COMPRESSION_HEADER = {32: struct.Struct("<III"), 64: struct.Struct("<I4xQQ")}
_SECTION_LIMIT = 1 << 17
_NAMES_LIMIT = 1 << 24


@frozen
class Section:
    """A section header: the manual's fields without their `sh_`. `name` is an offset into the names of the sections."""

    name: int
    type: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    entry_size: int

    @property
    def end(self) -> int:
        """The address after its last byte."""
        return self.address + self.size


class ElfSections:
    """The section header table of a file, checked; the sections themselves are read when they are asked for.

    Raises ImageError when the table is not in the file, or has entries of another size than its class has. A file
    without a table (e_shoff is 0) has no sections.
    """

    def __init__(self, source: ImageSource, header: ElfHeader) -> None:
        self._source = source
        self._bits = header.bits
        self._headers: list[tuple[int, ...]] = []
        self._names: bytes | None = None
        offset, entry_size, count = header.section_table
        layout = _SECTION_HEADER[header.bits]
        names = header.section_names
        if not offset:
            return
        if entry_size == layout.size and offset + entry_size <= source.size:
            first = layout.unpack(source.read(offset, entry_size, "the first section header"))
            # From 0xff00 sections on, their number and the index of their names are in the first entry.
            count = count or first[5]
            names = first[6] if names == SHN_XINDEX else names
        sound = entry_size == layout.size and 0 < count <= _SECTION_LIMIT
        if not sound or offset + count * entry_size > source.size:
            table = f"the section header table ({count} entries of {entry_size} bytes)"
            raise ImageError(f"{table} is not in the file", source.name, offset)
        self._headers = list(layout.iter_unpack(source.read(offset, count * entry_size, "the section header table")))
        self._names_index = names

    def __len__(self) -> int:
        return len(self._headers)

    def __getitem__(self, index: int) -> Section:
        return Section(*self._headers[index])

    def ends(self) -> list[int]:
        """The end address of every section that is in the guest's memory; 0 for the others."""
        return [fields[3] + fields[5] if fields[2] & SHF_ALLOC else 0 for fields in self._headers]

    def of_type(self, kind: int) -> Section | None:
        """The first section of type `kind` (SHT_...)."""
        return next((Section(*fields) for fields in self._headers if fields[1] == kind), None)

    def named(self, name: str) -> Section | None:
        """The first section called `name`."""
        if not self._headers:
            return None
        if self._names is None:
            self._names = self._read_names()
        wanted = name.encode() + b"\0"
        for fields in self._headers:
            if self._names.startswith(wanted, fields[0]):
                return Section(*fields)
        return None

    def linked(self, section: Section, what: str) -> Section:
        """The section that sh_link of `section` names; `what` it is is for the error."""
        if not 0 < section.link < len(self._headers):
            raise ImageError(f"sh_link {section.link} names no section as {what}", self._source.name)
        return self[section.link]

    def contents(self, section: Section, what: str, limit: int) -> bytes:
        """The bytes of `section`, decompressed. Raises ImageError when they are not in the file, or more than `limit`.

        A section without bytes in the file (SHT_NOBITS) is empty.
        """
        if section.type == SHT_NOBITS:
            return b""
        if section.size > limit:
            raise ImageError(
                f"{what} has {section.size:#x} bytes, more than {limit:#x}", self._source.name, section.offset
            )
        data = self._source.read(section.offset, section.size, what)
        return self._decompressed(data, section, what, limit) if section.flags & SHF_COMPRESSED else data

    def _read_names(self) -> bytes:
        if not 0 < self._names_index < len(self._headers):
            raise ImageError(f"e_shstrndx {self._names_index} names no section", self._source.name)
        return self.contents(self[self._names_index], "the table of section names", _NAMES_LIMIT)

    def _decompressed(self, data: bytes, section: Section, what: str, limit: int) -> bytes:
        def refuse(message: str) -> ImageError:
            return ImageError(f"{what} {message}", self._source.name, section.offset)

        layout = _COMPRESSION_HEADER[self._bits]
        if len(data) < layout.size:
            raise refuse("is compressed, but ends within its compression header")
        kind, size, _ = layout.unpack_from(data)
        if kind != ELFCOMPRESS_ZLIB:
            name = "zstd" if kind == ELFCOMPRESS_ZSTD else f"method {kind}"
            raise refuse(f"is compressed by {name}; zlib is known (gcc -gz=zlib, objcopy --decompress-debug-sections)")
        if size > limit:
            raise refuse(f"has {size:#x} bytes decompressed, more than {limit:#x}")
        import zlib

        stream = zlib.decompressobj()
        try:
            # One byte more than is promised shows a lie, and is all that a bomb can fill.
            plain = stream.decompress(memoryview(data)[layout.size :], size + 1)
        except zlib.error as error:
            raise refuse(f"cannot be decompressed: {error}") from error
        if len(plain) != size or not stream.eof:
            raise refuse(f"does not decompress to the {size:#x} bytes that it promises")
        return plain
