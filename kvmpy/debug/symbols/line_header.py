"""The header of a unit of .debug_line: DWARF 2 to 5 (version 5, section 6.2.4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kvmpy._value import frozen
from kvmpy.debug.symbols.dwarf_reader import DwarfReader, StringTable

__all__ = ["FILE_LIMIT", "LineHeader", "SourceFile", "Strings", "read_line_header", "unit_bounds"]

Strings = Callable[[str], StringTable]
"""Gives the strings of .debug_str or .debug_line_str. Most files need only one of them, and old ones neither."""

FILE_LIMIT = (1 << 16) - 1
"""More files than this in one unit are a lie."""

DW_LNCT_PATH, DW_LNCT_DIRECTORY_INDEX = 1, 2
DW_FORM_DATA2, DW_FORM_DATA4, DW_FORM_DATA8, DW_FORM_STRING = 0x05, 0x06, 0x07, 0x08
DW_FORM_BLOCK, DW_FORM_DATA1, DW_FORM_STRP, DW_FORM_UDATA = 0x09, 0x0B, 0x0E, 0x0F
DW_FORM_DATA16, DW_FORM_LINE_STRP = 0x1E, 0x1F
_FIXED_SIZES = {DW_FORM_DATA1: 1, DW_FORM_DATA2: 2, DW_FORM_DATA4: 4, DW_FORM_DATA8: 8}


class SourceFile(NamedTuple):
    """A file as the header names it: `directory` is a number of the header's table of directories."""

    name: str
    directory: int


@frozen
class LineHeader:
    """What the program of a unit needs to know. `start` and `end` are where it stands in .debug_line.

    `files` are by the number that the program calls them: from 1 in DWARF 2 to 4, from 0 in DWARF 5. The program may
    add some. `special` has for each opcode from `opcode_base` on the advances of address and line.
    """

    version: int
    start: int
    end: int
    minimum_instruction_length: int
    default_is_stmt: bool
    opcode_base: int
    operand_counts: bytes
    special: list[tuple[int, int]]
    directories: list[str]
    files: list[SourceFile]

    def path(self, file: int) -> str | None:
        """The path of a file, as far as the header knows it; None when it knows no such file.

        Directory 0 is where the compiler ran. Before DWARF 5 the header does not tell it, so paths relative to it stay
        so. Names such as "<stdin>" are no paths.
        """
        if not 0 <= file < len(self.files):
            return None
        path, directory = self.files[file]
        if not path or path.startswith("<"):
            return path or None
        for index in dict.fromkeys((directory, 0)):
            parent = self.directories[index] if index < len(self.directories) else ""
            if parent and not path.startswith("/"):
                path = f"{parent.rstrip('/')}/{path}"
        return path


def unit_bounds(reader: DwarfReader) -> tuple[int, int, int]:
    """Pass over a unit: where its contents start and end, and the size of an offset in it, 4 or 8 (section 7.4)."""
    length, offset_size = reader.number(4), 4
    if length == 0xFFFF_FFFF:
        length, offset_size = reader.number(8), 8
    start = reader.at
    if length > reader.left:
        raise reader.refusal(f"a unit of {length:#x} bytes goes past the end: {reader.left:#x} are left")
    reader.skip(length)
    return start, reader.at, offset_size


def read_line_header(reader: DwarfReader, offset_size: int, strings: Strings) -> LineHeader:
    """The header at the start of a unit's contents, whose end is that of `reader`. Raises ImageError."""
    version = reader.number(2)
    if not 2 <= version <= 5:
        raise reader.refusal(f"version {version} of line number information; known are 2 to 5")
    if version == 5:
        reader.skip(2)  # address_size and segment_selector_size: DW_LNE_set_address tells its size itself
    length = reader.number(offset_size)
    if length > reader.left:
        raise reader.refusal(f"a header of {length:#x} bytes goes past the end of its unit")
    start = reader.at + length
    minimum_instruction_length = reader.number(1)
    if version >= 4 and reader.number(1) > 1:
        raise reader.refusal("maximum_operations_per_instruction is not 1: x86 has no VLIW instructions")
    default_is_stmt = bool(reader.number(1))
    line_base, line_range, opcode_base = reader.signed(1), reader.number(1), reader.number(1)
    if not line_range or not opcode_base:
        raise reader.refusal(f"line_range is {line_range} and opcode_base {opcode_base}; neither can be 0")
    at = reader.at
    reader.skip(opcode_base - 1)
    counts = bytes(1) + reader.data(at, reader.at)
    special = [
        (operation // line_range * minimum_instruction_length, line_base + operation % line_range)
        for operation in range(256 - opcode_base)
    ]
    if version == 5:
        directories, files = _tables(reader, offset_size, strings)
    else:
        directories, files = _old_tables(reader)
    return LineHeader(
        version, start, reader.end, minimum_instruction_length, default_is_stmt, opcode_base, counts, special,
        directories, files,
    )  # fmt: skip


def _old_tables(reader: DwarfReader) -> tuple[list[str], list[SourceFile]]:
    """The directories and files of DWARF 2 to 4: strings up to an empty one. Entry 0 of each is implied."""
    directories, files = [""], [SourceFile("", 0)]
    while directory := reader.string():
        directories.append(directory)
        if len(directories) > FILE_LIMIT:
            raise reader.refusal(f"more than {FILE_LIMIT} directories")
    while name := reader.string():
        index = reader.uleb128()
        reader.uleb128()  # time of modification
        reader.uleb128()  # size
        files.append(SourceFile(name, index))
        if len(files) > FILE_LIMIT:
            raise reader.refusal(f"more than {FILE_LIMIT} files")
    return directories, files


def _tables(reader: DwarfReader, offset_size: int, strings: Strings) -> tuple[list[str], list[SourceFile]]:
    """The directories and files of DWARF 5: entries whose format stands before them."""

    def entries() -> list[SourceFile]:
        formats = [(reader.uleb128(), reader.uleb128()) for _ in range(reader.number(1))]
        count = reader.uleb128()
        # An entry takes a byte at least, unless it has no format at all.
        if count > FILE_LIMIT or count > reader.left or (count and not formats):
            raise reader.refusal(f"a table of {count} files or directories is not in the header")
        found = []
        for _ in range(count):
            path, directory = "", 0
            for content, form in formats:
                value = _value(reader, form, offset_size, strings)
                if content == DW_LNCT_PATH and isinstance(value, str):
                    path = value
                elif content == DW_LNCT_DIRECTORY_INDEX and isinstance(value, int):
                    directory = value
            found.append(SourceFile(path, directory))
        return found

    directories = [path for path, _ in entries()]
    return directories, entries()


def _value(reader: DwarfReader, form: int, offset_size: int, strings: Strings) -> str | int | None:
    """One value of an entry; None for those that say nothing here, such as an MD5 sum."""
    if form in (DW_FORM_LINE_STRP, DW_FORM_STRP):
        table = strings(".debug_line_str" if form == DW_FORM_LINE_STRP else ".debug_str")
        return table.at(reader.number(offset_size))
    if form == DW_FORM_STRING:
        return reader.string()
    if form == DW_FORM_UDATA:
        return reader.uleb128()
    if form in _FIXED_SIZES:
        return reader.number(_FIXED_SIZES[form])
    if form == DW_FORM_DATA16:
        reader.skip(16)
    elif form == DW_FORM_BLOCK:
        reader.skip(reader.uleb128())
    else:
        raise reader.refusal(f"form {form:#x} in a table of files is not known")
    return None
