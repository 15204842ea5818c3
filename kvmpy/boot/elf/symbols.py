"""The symbol table of an ELF file (System V gABI, chapter 4, "Symbol Table")."""

from __future__ import annotations

from itertools import accumulate, compress
from typing import TYPE_CHECKING

from kvmpy._value import frozen
from kvmpy.boot.elf.sections import SHT_DYNSYM, SHT_SYMTAB, ElfSections
from kvmpy.errors import ImageError

if TYPE_CHECKING:
    from kvmpy.boot.elf.format import ElfHeader
    from kvmpy.boot.image_source import ImageSource

__all__ = ["SHN_ABS", "STB_LOCAL", "STB_WEAK", "STT_FUNC", "STT_GNU_IFUNC", "STT_NOTYPE", "STT_OBJECT", "ElfSymbols",
           "read_symbol_table", "read_symbols"]  # fmt: skip

STB_LOCAL, STB_WEAK = 0, 2
STT_NOTYPE, STT_OBJECT, STT_FUNC, STT_GNU_IFUNC = 0, 1, 2, 10
SHN_UNDEF, SHN_ABS = 0, 0xFFF1
SYMBOL_LIMIT = 1 << 20

# Elf32_Sym is four words: st_name, st_value, st_size, and st_info, st_other, st_shndx in one. Elf64_Sym is three of 64
# bits: st_name, st_info, st_other, st_shndx in one, st_value, st_size.
_SYMBOL_SIZE = {32: 16, 64: 24}
_KINDS = (STT_NOTYPE, STT_OBJECT, STT_FUNC, STT_GNU_IFUNC)
_NAMES_LIMIT = 1 << 26


@frozen
class ElfSymbols:
    """The symbols that a file defines, column by column, in the order of the file.

    `values` and `sizes` are st_value and st_size; `types` and `bindings` the halves of st_info, `places` st_shndx: the
    index of a section, or SHN_ABS. Columns, because a large kernel has hundreds of thousands of symbols, of which few
    are ever asked for.
    """

    names: list[str]
    values: list[int]
    sizes: list[int]
    types: list[int]
    bindings: list[int]
    places: list[int]


def read_symbols(header: ElfHeader, source: ImageSource) -> dict[str, tuple[int, bool]]:
    """Name -> (value, whether it is absolute) of all labels, objects and functions that the file defines.

    Of several symbols of one name a global one counts, else the first. Raises ImageError as `read_symbol_table` does.
    """
    table = read_symbol_table(ElfSections(source, header), header.bits, source)
    symbols: dict[str, tuple[int, bool]] = {}
    local: set[str] = set()
    for name, value, kind, binding, place in zip(
        table.names, table.values, table.types, table.bindings, table.places, strict=True
    ):
        if kind == STT_GNU_IFUNC:
            continue  # its value is not the function, but what chooses it
        if name in symbols and (binding == STB_LOCAL or name not in local):
            continue
        symbols[name] = value, place == SHN_ABS
        (local.add if binding == STB_LOCAL else local.discard)(name)
    return symbols


def read_symbol_table(sections: ElfSections, bits: int, source: ImageSource) -> ElfSymbols:
    """The defined, named symbols of .symtab, or of .dynsym when there is no other.

    Without those that name files, sections and thread-local storage. None for a stripped file. Raises ImageError when
    the tables are not sound, or have more than a million entries.
    """
    table = sections.of_type(SHT_SYMTAB) or sections.of_type(SHT_DYNSYM)
    if table is None:
        return ElfSymbols([], [], [], [], [], [])
    entry_size = _SYMBOL_SIZE[bits]
    if table.entry_size != entry_size:
        raise ImageError(
            f"the symbol table has entries of {table.entry_size} bytes, not {entry_size}", source.name, table.offset
        )
    if table.size > SYMBOL_LIMIT * entry_size:
        raise ImageError(f"the symbol table has more than {SYMBOL_LIMIT} entries", source.name, table.offset)
    raw = sections.contents(table, "the symbol table", SYMBOL_LIMIT * entry_size)
    columns = _columns(raw[: len(raw) - len(raw) % entry_size], bits)
    strings = sections.contents(sections.linked(table, "the symbols' names"), "the symbols' names", _NAMES_LIMIT)
    names = _names(strings, columns[0], source)
    if "" in names:  # an offset that is not 0 may lead to a NUL, too
        named = [bool(name) for name in names]
        columns = tuple(list(compress(column, named)) for column in columns)
        names = list(filter(None, names))
    return ElfSymbols(names, *columns[1:])


def _columns(raw: bytes, bits: int) -> tuple[list[int], ...]:
    """st_name, st_value, st_size, type, binding and st_shndx of the symbols that count.

    By whole columns: a tuple for each symbol would take three times as long.
    """
    if bits == 64:
        words = memoryview(raw).cast("Q")
        first, values, sizes = (words[column::3].tolist() for column in range(3))
        offsets, infos, places = (
            [word & 0xFFFF_FFFF for word in first],
            [word >> 32 & 0xFF for word in first],
            [word >> 48 for word in first],
        )
    else:
        words = memoryview(raw).cast("I")
        offsets, values, sizes, last = (words[column::4].tolist() for column in range(4))
        infos, places = [word & 0xFF for word in last], [word >> 16 for word in last]
    known = {binding << 4 | kind for binding in range(16) for kind in _KINDS}
    wanted = [
        place != SHN_UNDEF and offset != 0 and info in known
        for offset, info, place in zip(offsets, infos, places, strict=True)
    ]
    types, bindings = [info & 15 for info in infos], [info >> 4 for info in infos]
    return tuple(list(compress(column, wanted)) for column in (offsets, values, sizes, types, bindings, places))


def _names(strings: bytes, offsets: list[int], source: ImageSource) -> list[str]:
    """The NUL-terminated names at `offsets`; undecodable ones with replacement characters."""
    text = strings.decode("latin-1")  # one character a byte, so that offsets stay what they are
    whole = text.split("\0")
    whole.pop()  # what follows the last NUL is not terminated
    starts = accumulate((len(name) + 1 for name in whole), initial=0)
    known = dict(zip(starts, whole, strict=False))
    # A name may be the tail of another one. Each byte may be used so four times: a table of a million tails of
    # one long name would fill the memory.
    budget = 4 * len(strings)
    for offset in {offset for offset in offsets if offset not in known}:
        end = text.find("\0", offset)
        if end < 0:
            raise ImageError(f"the name of a symbol at {offset:#x} does not end in the table of names", source.name)
        budget -= end - offset
        if budget < 0:
            raise ImageError("the names of the symbols overlap too much to be names", source.name)
        known[offset] = text[offset:end]
    if not strings.isascii():
        known = {offset: name.encode("latin-1").decode("utf-8", "replace") for offset, name in known.items()}
    return [known[offset] for offset in offsets]
