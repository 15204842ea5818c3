"""The sections of an ELF kernel, which multiboot kernels are given for their symbols."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvmpy.boot.elf.sections import SHT_NOBITS, ElfSections
from kvmpy.boot.image import LoadedRange
from kvmpy.boot.multiboot.information import SectionHeaders
from kvmpy.boot.placement import FOUR_GIB, lowest_free

if TYPE_CHECKING:
    from kvmpy.boot.boot_memory import BootMemory
    from kvmpy.boot.elf.image import ElfImage

__all__ = ["load_sections"]

# As in elf_sections: sh_name, sh_type, sh_flags, sh_addr, sh_offset, sh_size, and four more.
_SECTION_HEADER = {32: struct.Struct("<10I"), 64: struct.Struct("<IIQQQQIIQQ")}


def load_sections(image: ElfImage, area: BootMemory, above: int) -> SectionHeaders | None:
    """Write the sections that no segment has (symbols, strings) into RAM from `above` on; answer all headers.

    sh_addr of each then says where it is. None when the file has no section headers, or RAM no room. Raises ImageError
    for sections that are not in the file.
    """
    _, entry_size, count = image.header.section_table
    sections = ElfSections(image.source, image.header)
    if not len(sections) or len(sections) != count:  # more than 0xff00 cannot be said
        return None
    headers = [sections[index] for index in range(count)]
    loose = [
        index
        for index, section in enumerate(headers)
        if section.type not in (0, SHT_NOBITS) and section.size and not section.address
    ]
    size = sum(headers[index].size + 15 & -16 for index in loose)
    address = lowest_free(area.memory, size, area.taken, alignment=16, above=above, below=FOUR_GIB)
    if address is None:
        return None
    if size:
        area.ranges.append(LoadedRange(address, size, "sections"))
    raw = image.source.read(image.header.section_table[0], count * entry_size, "the section headers")
    layout = _SECTION_HEADER[image.bits]
    table = [list(fields) for fields in layout.iter_unpack(raw)]
    for index in loose:
        section = headers[index]
        image.source.copy_to(area.memory, address, section.offset, section.size, f"section {index}")
        table[index][3] = address
        address += section.size + 15 & -16
    return SectionHeaders(
        b"".join(layout.pack(*fields) for fields in table), count, entry_size, image.header.section_names
    )
