"""Source lines of a guest: from addresses to lines, and from lines to addresses where a debugger can stop."""

from __future__ import annotations

import os
import posixpath
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from kvmpy._value import frozen
from kvmpy.debug.symbols.dwarf_reader import DwarfReader, StringTable
from kvmpy.debug.symbols.elf_file import OpenedElf
from kvmpy.debug.symbols.line_header import LineHeader, read_line_header, unit_bounds
from kvmpy.debug.symbols.line_program import LINE_MASK, LineProgram, Row, run_line_program, unpacked
from kvmpy.errors import ImageError

if TYPE_CHECKING:
    from kvmpy.boot.elf.image import ElfImage
    from kvmpy.boot.image import Image
    from kvmpy.debug.symbols.symbol_table import SymbolTable

__all__ = ["LineRange", "LineTable", "SourceLine"]

DEBUG_SECTION_LIMIT = 1 << 27
"""A .debug_line or .debug_str above 128 MiB is refused; those of Linux with everything in it have some 50 MiB."""
PROGRAM_LIMIT = 1 << 22
"""The largest line number program of one unit: 4 MiB, which takes about a second."""
UNIT_LIMIT = 1 << 16
SEQUENCE_LIMIT = 1 << 20

DW_LNE_SET_ADDRESS = 2


@frozen
class SourceLine:
    """A place in the source. `column` counts from 1; 0 when unknown. Prints as "/src/main.c:12"."""

    file: str
    line: int
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class LineRange(NamedTuple):
    """The machine code from `start` up to, not including, `end` comes from `source`."""

    start: int
    end: int
    source: SourceLine


class _Unit:
    """A unit of .debug_line, decoded when it is asked for. What cannot be decoded fails in the same way each time."""

    def __init__(self, read_header: Callable[[], LineHeader], run: Callable[[LineHeader], LineProgram]) -> None:
        self._read_header = read_header
        self._run = run
        self._header: LineHeader | ImageError | None = None
        self._program: LineProgram | ImageError | None = None

    def header(self) -> LineHeader:
        """The header. Raises ImageError."""
        if self._header is None:
            try:
                self._header = self._read_header()
            except ImageError as error:
                self._header = error
        if isinstance(self._header, ImageError):
            raise self._header.with_traceback(None)
        return self._header

    def program(self) -> LineProgram:
        """What the program yields. Raises ImageError."""
        header = self.header()
        if self._program is None:
            try:
                self._program = self._run(header)
            except ImageError as error:
                self._program = error
        if isinstance(self._program, ImageError):
            raise self._program.with_traceback(None)
        return self._program


class LineTable:
    """The lines of an ELF file with DWARF 2 to 5 line number information (made by `-g`): `from_elf`.

    A file without it has no lines, and is false. Units are decoded when an address or a file in them is asked for, and
    kept: 0.2 s for each MiB of their programs on the test machine. A unit that is not sound raises ImageError then.
    """

    def __init__(self, elf: OpenedElf) -> None:
        self._elf = elf
        self._image = elf.source.name
        self._data = self._section(".debug_line")
        self._strings: dict[str, StringTable] = {}
        self._bounds: list[tuple[int, int, int]] = []
        reader = DwarfReader(self._data, 0, len(self._data), ".debug_line", self._image)
        while reader.left:
            self._bounds.append(unit_bounds(reader))
            if len(self._bounds) > UNIT_LIMIT:
                raise reader.refusal(f"more than {UNIT_LIMIT} units")
        self._units = [_Unit(*self._decoders(*bounds)) for bounds in self._bounds]
        self._starts: tuple[list[int], list[int], list[_Unit]] | None = None

    @classmethod
    def from_elf(
        cls, source: bytes | bytearray | memoryview | str | os.PathLike[str] | ElfImage, *, bias: int | None = None
    ) -> LineTable:
        """The lines of an ELF file, from its path or bytes, or an image of it.

        `bias` is what is added to all addresses, for a file that is loaded elsewhere than where it was linked; by
        default that of the image, or 0. Raises ImageError for a file that is not sound, OSError as `open` does.
        """
        return cls(OpenedElf.open(source, bias))

    @classmethod
    def of_image(cls, image: Image) -> LineTable | None:
        """The lines of an ElfImage where it is loaded; None for other images. Raises ImageError as `from_elf` does."""
        from kvmpy.boot.elf.image import elf_of

        elf = elf_of(image)
        return cls.from_elf(elf) if elf is not None else None

    def __bool__(self) -> bool:
        return bool(self._units)

    def __repr__(self) -> str:
        return f"<LineTable of {self._image}, {len(self._units)} units>"

    # By address

    def at(self, address: int) -> SourceLine | None:
        """The line that the instruction at `address` comes from. None for code without one.

        Decodes the one unit that can have it. Raises ImageError when that is not sound.
        """
        if self._starts is None:
            self._starts = self._find_starts()
        starts, owners, others = self._starts
        if not 0 <= address <= self._elf.address_mask:
            return None
        linked = address - self._elf.bias & self._elf.address_mask
        # Sequences do not overlap, so the nearest start before the address decides, if it is one: it may also be an
        # operand that looks like it. Several have the same start where the linker has dropped functions.
        place = bisect_right(starts, linked) - 1
        while place >= 0:
            start, is_start = starts[place], False
            while place >= 0 and starts[place] == start:
                program = self._units[owners[place]].program()
                found = _row(program, linked)
                if found:
                    return self._source_line(program.header, found)
                is_start = is_start or start in program.addresses_set
                place -= 1
            if is_start:
                break
        for unit in others:
            program = unit.program()
            found = _row(program, linked)
            if found:
                return self._source_line(program.header, found)
        return None

    def ranges(self) -> Iterator[LineRange]:
        """All code that comes from a line, unit by unit, in each sequence by address. Decodes everything."""
        for unit in self._units:
            program = unit.program()
            sources: dict[int, SourceLine | None] = {}
            for sequence in program.sequences:
                ends = [*sequence.addresses[1:], sequence.end]
                for start, end, row in zip(sequence.addresses, ends, sequence.rows, strict=True):
                    if row not in sources:
                        sources[row] = self._source_line(program.header, unpacked(row))
                    source = sources[row]
                    if source and end > start:
                        yield LineRange(self._moved(start), self._moved(start) + end - start, source)

    # By line

    def addresses_of(self, file: str, line: int, *, symbols: SymbolTable | None = None) -> list[int]:
        """Where to set breakpoints for a line: the start of each stretch of code that comes from it, by address.

        `file` is a path, or the last parts of one ("main.c", "drivers/uart.c"); several files may fit. Empty for a line
        without code: see `lines_with_code`. A loop has its line at its start and at its end, and a breakpoint at both
        stops each time round; with `symbols` only the first address in each function counts, also where one function
        is inlined twice into another. The opening line of a function is at its entry, before it has a frame.

        Decodes the units that name the file. Raises ImageError when one of them is not sound.
        """
        found: set[int] = set()
        for program, numbers in self._programs_of(file):
            for sequence in program.sequences:
                inside = False
                for address, packed in zip(sequence.addresses, sequence.rows, strict=True):
                    if packed & LINE_MASK != line or (row := unpacked(packed)).file not in numbers:
                        inside = False
                    elif row.is_stmt and not inside:
                        inside = True
                        found.add(address)
        addresses = sorted(map(self._moved, found))
        if symbols is None:
            return addresses
        first: dict[int, int] = {}
        for address in addresses:
            place = symbols.at(address)
            first.setdefault(place.symbol.address if place else address, address)
        return sorted(first.values())

    def lines_with_code(self, file: str) -> list[int]:
        """The lines of `file` for which `addresses_of` finds addresses, in order."""
        lines: set[int] = set()
        for program, numbers in self._programs_of(file):
            for sequence in program.sequences:
                for row in map(unpacked, set(sequence.rows)):
                    if row.is_stmt and row.file in numbers:
                        lines.add(row.line)
        return sorted(lines - {0})

    def files(self) -> list[str]:
        """The paths of all files that the headers name, in order: also of those from which no code comes."""
        found: set[str] = set()
        for unit in self._units:
            header = unit.header()
            found.update(path for number in range(len(header.files)) if (path := header.path(number)))
        return sorted(found)

    # Units

    def _section(self, name: str) -> bytes:
        section = self._elf.sections.named(name)
        return self._elf.sections.contents(section, name, DEBUG_SECTION_LIMIT) if section else b""

    def _string_table(self, section: str) -> StringTable:
        if section not in self._strings:
            self._strings[section] = StringTable(self._section(section), section, self._image)
        return self._strings[section]

    def _decoders(
        self, start: int, end: int, offset_size: int
    ) -> tuple[Callable[[], LineHeader], Callable[[LineHeader], LineProgram]]:
        def read_header() -> LineHeader:
            reader = DwarfReader(self._data, start, end, ".debug_line", self._image)
            return read_line_header(reader, offset_size, self._string_table)

        def run(header: LineHeader) -> LineProgram:
            size = header.end - header.start
            if size > PROGRAM_LIMIT:
                message = f".debug_line at {start:#x}: a program of {size:#x} bytes, more than {PROGRAM_LIMIT:#x}"
                raise ImageError(message, self._image)
            return run_line_program(self._data, header, self._elf.address_mask, self._image)

        return read_header, run

    def _find_starts(self) -> tuple[list[int], list[int], list[_Unit]]:
        """Where sequences may start, by address, the index of the unit of each, and units without any such place.

        Programs are not run for that: a sequence starts with DW_LNE_set_address, and how that looks is known.
        """
        size = self._elf.bits // 8
        pattern = bytes([0, 1 + size, DW_LNE_SET_ADDRESS])
        found: set[tuple[int, int]] = set()
        seen: set[int] = set()
        ends = [end for _, end, _ in self._bounds]
        at = self._data.find(pattern)
        while at >= 0:
            operand = at + len(pattern)
            unit = bisect_right(ends, at)
            found.add((int.from_bytes(self._data[operand : operand + size], "little"), unit))
            seen.add(unit)
            if len(found) > SEQUENCE_LIMIT:
                raise ImageError(f".debug_line has more than {SEQUENCE_LIMIT} sequences", self._image)
            at = self._data.find(pattern, at + 1)
        ordered = sorted(found)
        others = [unit for index, unit in enumerate(self._units) if index not in seen]
        return [address for address, _ in ordered], [unit for _, unit in ordered], others

    def _programs_of(self, file: str) -> Iterator[tuple[LineProgram, set[int]]]:
        """The programs that name `file`, and the numbers by which they do."""
        wanted = posixpath.normpath(file)
        base = posixpath.basename(wanted)
        for unit in self._units:
            header = unit.header()
            numbers = {
                number
                for number, (name, _) in enumerate(header.files)
                if name.endswith(base) and _fits(header.path(number), wanted)
            }
            if numbers:
                yield unit.program(), numbers

    def _source_line(self, header: LineHeader, row: Row) -> SourceLine | None:
        path = header.path(row.file)
        return SourceLine(path, row.line, row.column) if path and row.line else None

    def _moved(self, address: int) -> int:
        return address + self._elf.bias & self._elf.address_mask


def _row(program: LineProgram, address: int) -> Row | None:
    """The row for `address`; of overlapping sequences that of the last one to start."""
    best = None
    for sequence in program.sequences:
        if sequence.start <= address < sequence.end and (best is None or sequence.start > best.start):
            best = sequence
    return best.at(address) if best else None


def _fits(path: str | None, wanted: str) -> bool:
    """Whether `wanted` is `path` or its last parts; or the reverse, when `path` is relative to who knows where."""
    if not path:
        return False
    path = posixpath.normpath(path)
    return f"/{path}".endswith(f"/{wanted}") or (not path.startswith("/") and wanted.endswith(f"/{path}"))
