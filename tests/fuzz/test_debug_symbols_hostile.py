"""Hostile debugging information: whatever a file says, there is an answer or an ImageError.

The files are real ones, made by gcc with DWARF 2 to 5, with changed bytes, and with parts that are made up. Time is
watched by the deadline of each test: a loop that a number in a file drives would outlive it.
"""

import functools
import struct
from collections.abc import Callable

from hypothesis import given, note
from hypothesis import strategies as st

from debug_info_programs import program
from kvmpy.boot.elf.format import ElfHeader
from kvmpy.boot.elf.sections import ElfSections
from kvmpy.boot.image_source import ImageSource
from kvmpy.debug.disassembly import Disassembler, annotate
from kvmpy.debug.symbols import LineTable, SymbolTable
from kvmpy.errors import ImageError

SECTIONS = (".debug_line", ".debug_line_str", ".debug_str", ".symtab", ".strtab", ".shstrtab")
ADDRESSES = (0, 0xF_FFFF, 0x10_0000, 0x10_0011, 0x10_0060, 0x10_0100, 0xFFFF_FFFF, (1 << 64) - 1)


@functools.cache
def files() -> list[tuple[bytes, dict[str, tuple[int, int]]]]:
    """Small real files, and where in them their sections are; "headers" are the section headers."""
    made = []
    for bits, dwarf in ((64, 5), (32, 5), (64, 4), (32, 2)):
        data = program("-O1", bits=bits, dwarf=dwarf).elf.read_bytes()
        source = ImageSource(data)
        header = ElfHeader.read(source)
        sections = ElfSections(source, header)
        found = ((name, sections.named(name)) for name in SECTIONS)
        places = {name: (section.offset, section.size) for name, section in found if section}
        offset, size, count = header.section_table
        made.append((data, places | {"headers": (offset, size * count), "header": (0, 64), "all": (0, len(data))}))
    return made


def look_into(data: bytes) -> None:
    """Ask everything that can be asked; ImageError is an answer."""
    try:
        symbols = SymbolTable.from_elf(data, bias=0x1000)
    except ImageError as error:
        note(f"symbols: {error}")
        symbols = SymbolTable()
    for symbol in symbols:
        assert 0 <= symbol.address < 1 << 64
        assert symbol.name
    for address in ADDRESSES:
        found = symbols.at(address)
        assert found is None or found.address == address
    assert all(symbols.address_of(symbol.name) >= 0 for symbol in symbols)
    try:
        lines = LineTable.from_elf(data)
    except ImageError as error:
        note(f"lines: {error}")
        return
    attempts: list[Callable[[], object]] = [functools.partial(lines.at, address) for address in ADDRESSES]
    attempts += [lines.files, lambda: list(lines.ranges())]
    attempts += [lambda: lines.addresses_of("main.c", 9, symbols=symbols), lambda: lines.lines_with_code("shared.h")]
    for attempt in attempts:
        try:
            note(str(attempt())[:200])
        except ImageError as error:
            note(f"refused: {error}")


def test_the_healthy_files_are_read() -> None:
    for data, _ in files():
        assert SymbolTable.from_elf(data).address_of("_start")
        assert LineTable.from_elf(data).addresses_of("main.c", 17)


changes = st.lists(
    st.tuples(
        st.sampled_from([*SECTIONS, ".debug_line", ".debug_line", "headers", "headers", "header", "all"]),
        st.integers(0, 1 << 16),
        st.one_of(st.integers(0, 255), st.sampled_from([0, 1, 2, 0x7F, 0x80, 0xFF])),
    ),
    min_size=1,
    max_size=8,
)


@given(index=st.integers(0, 3), changes=changes)
def test_changed_bytes(index: int, changes: list[tuple[str, int, int]]) -> None:
    healthy, places = files()[index]
    data = bytearray(healthy)
    for part, at, value in changes:
        if part in places:
            offset, size = places[part]
            data[offset + at % size] = value
    look_into(bytes(data))


@given(index=st.integers(0, 3), length=st.integers(0, 1 << 14))
def test_truncated_files(index: int, length: int) -> None:
    data, _ = files()[index]
    look_into(data[: length % len(data)])


numbers = st.one_of(
    st.integers(0, 64), st.sampled_from([0xFFFF_FFFF, 1 << 31, 1 << 32, 1 << 60, (1 << 64) - 1]),
    st.integers(0, (1 << 64) - 1),
)  # fmt: skip


@given(index=st.integers(0, 3), lies=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9), numbers), max_size=4))
def test_lying_section_headers(index: int, lies: list[tuple[int, int, int]]) -> None:
    healthy, places = files()[index]
    data = bytearray(healthy)
    offset, size = places["headers"]
    wide = data[4] == 2
    layout = struct.Struct("<IIQQQQIIQQ" if wide else "<10I")
    for section, field, value in lies:
        at = offset + section * layout.size
        if at + layout.size <= offset + size:
            fields = list(layout.unpack_from(data, at))
            fields[field] = value & (0xFFFF_FFFF if not wide or field in (1, 6, 7) else (1 << 64) - 1)
            layout.pack_into(data, at, *fields)
    look_into(bytes(data))


# Whole instructions of line number programs, and the starts of others.
INSTRUCTIONS = [
    b"\0\x09\x02\0\0\x10\0\0\0\0\0", b"\0\x05\x02\0\0\x10\0", b"\0\x01\x01", b"\0\x06\x03x\0\0\0\0", b"\0\x02\x04\x01",
    b"\0\xff", b"\x01", b"\x02\x10", b"\x02\xff\xff\x7f", b"\x03\x7f", b"\x04\x02", b"\x05\x01", b"\x06", b"\x08",
    b"\x09\x10\0", b"\x0c\x01", b"\x40", b"\xff",
]  # fmt: skip
line_programs = st.lists(st.one_of(st.sampled_from(INSTRUCTIONS), st.binary(max_size=4)), max_size=30).map(b"".join)
OLD_TABLES = b"\0main.c\0\0\0\0shared.h\0\0\0\0\0"
NEW_TABLES = b"\x01\x01\x08\x01/src\0\x02\x01\x08\x02\x0b\x02main.c\0\0shared.h\0\0"
heads = st.one_of(st.sampled_from([OLD_TABLES, NEW_TABLES]), st.binary(max_size=24))


@given(index=st.integers(0, 3), body=line_programs, version=st.integers(2, 5), head=heads)
def test_made_up_units(index: int, body: bytes, version: int, head: bytes) -> None:
    """The unit takes the place of the real ones."""
    healthy, places = files()[index]
    offset, size = places[".debug_line"]
    table = (
        (b"\1\1" if version >= 4 else b"\1") + b"\1\xfb\x0e\x0d" + bytes([0, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1]) + head
    )
    contents = struct.pack("<H", version) + (b"\x08\0" if version == 5 else b"") + struct.pack("<I", len(table))
    contents = (contents + table + body)[: size - 4].ljust(size - 4, b"\x07")  # DW_LNS_set_basic_block: nothing
    data = bytearray(healthy)
    data[offset : offset + size] = struct.pack("<I", len(contents)) + contents
    look_into(bytes(data))


@given(text=st.text(st.sampled_from("0123456789abcdefTtDUw[]_ \t\n\r\0\u2028é"), max_size=200))
def test_system_maps_of_any_text(text: str) -> None:
    try:
        table = SymbolTable.from_system_map(text.encode())
    except ImageError as error:
        note(str(error))
        return
    for symbol in table:
        found = table.at(symbol.address)
        assert symbol.kind == "absolute" or (found is not None and found.address == symbol.address)


@given(
    code=st.binary(max_size=64), address=numbers, bits=st.sampled_from([16, 32, 64]), count=st.integers(0, 9),
    data=st.data(),
)  # fmt: skip
def test_code_of_any_bytes(code: bytes, address: int, bits: int, count: int, data: st.DataObject) -> None:
    disassembler = Disassembler()
    found = disassembler.disassemble(code, address, bits)
    assert b"".join(instruction.bytes for instruction in found) == code
    assert disassembler.disassemble(code, address, bits, count) == found[:count] or count == 0
    symbols = SymbolTable.from_dict({"symbol": 0x1000})
    assert all(annotate(instruction, symbols).startswith(str(instruction)) for instruction in found)
    length = data.draw(st.integers(0, len(code)))
    before = disassembler.before(code, address, address + length, bits, count, start=data.draw(numbers))
    assert len(before) <= count
    joined = b"".join(instruction.bytes for instruction in before)
    assert code[:length].endswith(joined)
    assert not before or before[-1].end == address + length
