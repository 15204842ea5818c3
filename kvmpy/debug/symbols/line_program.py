"""The line number program of a unit (DWARF 5, section 6.2.5): a state machine whose output is a table of rows.

Own code instead of pyelftools: that takes 2.4 s for a program of 1 MiB, and has no bounds. Here every opcode takes
a byte at least and adds a row at most, so the work is bounded by the size of the program.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from operator import gt
from typing import NamedTuple

from kvmpy._value import field, frozen, mutable
from kvmpy.debug.symbols.dwarf_reader import DwarfReader
from kvmpy.debug.symbols.line_header import FILE_LIMIT, LineHeader, SourceFile

__all__ = ["LINE_MASK", "LineProgram", "Row", "Sequence", "run_line_program", "unpacked"]

DW_LNS_COPY, DW_LNS_ADVANCE_PC, DW_LNS_ADVANCE_LINE, DW_LNS_SET_FILE, DW_LNS_SET_COLUMN = 1, 2, 3, 4, 5
DW_LNS_NEGATE_STMT, DW_LNS_CONST_ADD_PC, DW_LNS_FIXED_ADVANCE_PC = 6, 8, 9
DW_LNE_END_SEQUENCE, DW_LNE_SET_ADDRESS, DW_LNE_DEFINE_FILE = 1, 2, 3

# A row in 64 bits, for there may be millions: the file above the column above is_stmt above the line.
_FILE_SHIFT, _COLUMN_SHIFT, _STMT_SHIFT = 48, 33, 32
LINE_MASK, _COLUMN_MASK = 0xFFFF_FFFF, 0x7FFF


class Row(NamedTuple):
    """What a stretch of code belongs to. `file` is a number of the unit's table; `line` 0 means nothing in the source.

    `is_stmt`: a debugger may stop here for this line. Columns above 32,767 are given as that.
    """

    file: int
    line: int
    column: int
    is_stmt: bool


def unpacked(row: int) -> Row:
    """A row of a `Sequence`, unpacked."""
    return Row(row >> _FILE_SHIFT, row & LINE_MASK, row >> _COLUMN_SHIFT & _COLUMN_MASK, bool(row >> _STMT_SHIFT & 1))


@frozen
class Sequence:
    """Rows of a contiguous range: `rows[i]` is for `addresses[i]` up to the next address, the last one up to `end`.

    Rows are packed. Of several for one address all but the last have no code left, but a debugger may stop there.
    """

    addresses: array[int]
    rows: array[int]
    end: int

    @property
    def start(self) -> int:
        """The first address."""
        return self.addresses[0]

    def at(self, address: int) -> Row | None:
        """The row for `address`."""
        if not self.start <= address < self.end:
            return None
        return unpacked(self.rows[bisect_right(self.addresses, address) - 1])


@mutable
class LineProgram:
    """The sequences of a unit, and every address that its program has set."""

    header: LineHeader
    sequences: list[Sequence] = field(default_factory=list)
    addresses_set: set[int] = field(default_factory=set)


def run_line_program(data: bytes, header: LineHeader, address_mask: int, image: str) -> LineProgram:
    """Run the program that `header` describes. Raises ImageError when it ends within an instruction."""
    reader = DwarfReader(data, header.start, header.end, ".debug_line", image)
    program = LineProgram(header)
    opcode_base, special, end = header.opcode_base, header.special, header.end
    constant_advance = special[-1][0] if special else 0
    initial = 1 << _FILE_SHIFT | header.default_is_stmt << _STMT_SHIFT  # file 1, column 0
    address, line, other = 0, 1, initial
    addresses: list[int] = []
    rows: list[int] = []
    at = header.start
    while at < end:
        opcode = data[at]
        at += 1
        if opcode >= opcode_base:
            address_advance, line_advance = special[opcode - opcode_base]
            address = address + address_advance & address_mask
            line = line + line_advance & LINE_MASK
            addresses.append(address)
            rows.append(other | line)
            continue
        if opcode == DW_LNS_COPY:
            addresses.append(address)
            rows.append(other | line)
            continue
        if opcode == DW_LNS_NEGATE_STMT:
            other ^= 1 << _STMT_SHIFT
            continue
        if opcode == DW_LNS_SET_COLUMN and at < end and data[at] < 0x80:
            other = other & ~(_COLUMN_MASK << _COLUMN_SHIFT) | data[at] << _COLUMN_SHIFT
            at += 1
            continue
        reader.at = at
        if opcode == DW_LNS_ADVANCE_LINE:
            line = line + reader.sleb128() & LINE_MASK
        elif opcode == DW_LNS_ADVANCE_PC:
            address = address + reader.uleb128() * header.minimum_instruction_length & address_mask
        elif opcode == DW_LNS_SET_COLUMN:
            column = min(reader.uleb128(), _COLUMN_MASK)
            other = other & ~(_COLUMN_MASK << _COLUMN_SHIFT) | column << _COLUMN_SHIFT
        elif opcode == DW_LNS_SET_FILE:
            # FILE_LIMIT stands for all numbers that no table of files can have.
            file = min(reader.uleb128(), FILE_LIMIT)
            other = other & (1 << _FILE_SHIFT) - 1 | file << _FILE_SHIFT
        elif opcode == DW_LNS_CONST_ADD_PC:
            address = address + constant_advance & address_mask
        elif opcode == DW_LNS_FIXED_ADVANCE_PC:
            address = address + reader.number(2) & address_mask
        elif opcode:
            for _ in range(header.operand_counts[opcode]):
                reader.uleb128()
        else:
            length = reader.uleb128()
            following = reader.at + length
            kind = reader.number(1) if length else 0
            if kind == DW_LNE_END_SEQUENCE:
                _finish(program, addresses, rows, address)
                address, line, other = 0, 1, initial
                addresses, rows = [], []
            elif kind == DW_LNE_SET_ADDRESS:
                if length - 1 not in (2, 4, 8):
                    raise reader.refusal(f"an address of {length - 1} bytes")
                address = reader.number(length - 1) & address_mask
                program.addresses_set.add(address)
            elif kind == DW_LNE_DEFINE_FILE and len(header.files) < FILE_LIMIT:
                header.files.append(SourceFile(reader.string(), reader.uleb128()))
            reader.at = following  # opcodes that nobody knows are passed over
        at = reader.at
    if at > end:
        raise reader.refusal("the line number program ends within an instruction")
    # A program without end_sequence leaves open where its last row ends.
    if addresses:
        _finish(program, addresses, rows, addresses[-1])
    return program


def _finish(program: LineProgram, addresses: list[int], rows: list[int], end: int) -> None:
    """Add a sequence that ends at `end`, unless it is empty. Rows that go back in address are put in order."""
    if any(map(gt, addresses, addresses[1:])):
        order = sorted(range(len(rows)), key=addresses.__getitem__)
        addresses, rows = [addresses[index] for index in order], [rows[index] for index in order]
    if addresses and end > addresses[0]:
        program.sequences.append(Sequence(array("Q", addresses), array("Q", rows), max(end, addresses[-1])))
