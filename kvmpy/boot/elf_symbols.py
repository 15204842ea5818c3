"""The symbol table of an ELF file, through pyelftools. A module of its own: importing pyelftools costs 65 ms."""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO

from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from kvmpy.errors import ImageError

if TYPE_CHECKING:
    from kvmpy.boot.elf_format import ElfHeader
    from kvmpy.boot.image_source import ImageSource

__all__ = ["read_symbols"]

_SECTION_HEADER_SIZE = {32: 40, 64: 64}
_SYMBOL_SIZE = {32: 16, 64: 24}
_KINDS = ("STT_NOTYPE", "STT_OBJECT", "STT_FUNC")


def read_symbols(stream: BinaryIO, size: int, header: ElfHeader, source: ImageSource) -> dict[str, tuple[int, bool]]:
    """Name -> (value, whether it is absolute) of all symbols that the file of `size` bytes defines.

    From .symtab, or .dynsym when there is no other. Raises ImageError when the tables are not sound.
    """
    offset, entry_size, count = header.section_table
    if not offset:
        return {}
    # What pyelftools does not look at: with an entry size of 0, or 2^60 entries, it would count for ever.
    if entry_size != _SECTION_HEADER_SIZE[header.bits] or not count or offset + count * entry_size > size:
        raise ImageError(
            f"the section header table ({count} entries of {entry_size} bytes) is not in the file", source.name, offset
        )
    try:
        table = _symbol_table(ELFFile(stream))
        if table is None:
            return {}
        if table["sh_entsize"] != _SYMBOL_SIZE[header.bits] or table["sh_offset"] + table["sh_size"] > size:
            raise ImageError("the symbol table is not in the file", source.name, table["sh_offset"])
        return _defined(table)
    except ImageError:
        raise
    except (
        Exception
    ) as error:  # pyelftools lets out whatever its parser ran into: struct, Unicode, Attribute errors ...
        raise ImageError(f"the symbol table cannot be read ({type(error).__name__}: {error})", source.name) from error


def _symbol_table(elf: ELFFile) -> SymbolTableSection | None:
    found = None
    for index in range(elf.num_sections()):
        # By type first: making a section object parses the names, and hostile files may have 65,000 large sections.
        kind = elf._get_section_header(index)["sh_type"]
        if kind == "SHT_SYMTAB" or (kind == "SHT_DYNSYM" and found is None):
            found = index
            if kind == "SHT_SYMTAB":
                break
    section = elf.get_section(found) if found is not None else None
    return section if isinstance(section, SymbolTableSection) else None


def _defined(table: SymbolTableSection) -> dict[str, tuple[int, bool]]:
    symbols: dict[str, tuple[int, bool]] = {}
    local: set[str] = set()
    for symbol in table.iter_symbols():
        place, info = symbol["st_shndx"], symbol["st_info"]
        if place == "SHN_UNDEF" or not symbol.name or info["type"] not in _KINDS:
            continue
        is_local = info["bind"] == "STB_LOCAL"
        if symbol.name in symbols and (is_local or symbol.name not in local):
            continue
        symbols[symbol.name] = symbol["st_value"], place == "SHN_ABS"
        (local.add if is_local else local.discard)(symbol.name)
    return symbols
