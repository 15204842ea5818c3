"""Source lines: as addr2line and pyelftools see them, for breakpoints, and in every version of DWARF."""

import struct
import subprocess
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from debug_info_programs import SOURCES, addr2line, code_addresses, line_of, program
from elf_files import ElfFile, Segment
from gnu_toolchain import compile_c
from kvmpy.boot import ElfImage, FlatImage
from kvmpy.debug.symbols import LineTable, SourceLine, SymbolTable
from kvmpy.errors import ImageError

VERSIONS = [(bits, dwarf) for bits in (32, 64) for dwarf in (2, 3, 4, 5)]


def by_pyelftools(elf: Path, addresses: list[int]) -> list[tuple[str, int, int] | None]:
    """(file without folders, line, column) for each address, by running all line number programs."""
    found: dict[int, tuple[str, int, int]] = {}
    with elf.open("rb") as stream:
        information = ELFFile(stream).get_dwarf_info()
        for unit in information.iter_CUs():
            lines = information.line_program_for_CU(unit)
            assert lines is not None
            before = None
            for state in (entry.state for entry in lines.get_entries() if entry.state is not None):
                if before is not None:
                    names = lines["file_entry"]
                    name = names[before.file - (0 if lines["version"] >= 5 else 1)].name.decode()
                    for address in addresses:
                        if before.address <= address < state.address and before.line:
                            found[address] = name.rpartition("/")[2], before.line, before.column
                before = None if state.end_sequence else state
    return [found.get(address) for address in addresses]


def short(line: SourceLine | None) -> tuple[str, int, int] | None:
    return (line.file.rpartition("/")[2], line.line, line.column) if line else None


# By address


@pytest.mark.parametrize("optimization", ["-O0", "-O2"])
@pytest.mark.parametrize(("bits", "dwarf"), VERSIONS)
def test_every_instruction_comes_from_the_line_that_the_tools_say(bits: int, dwarf: int, optimization: str) -> None:
    elf = program(optimization, bits=bits, dwarf=dwarf).elf
    lines = LineTable.from_elf(elf)
    addresses = code_addresses(elf)
    assert len(addresses) > 30
    found = [lines.at(address) for address in addresses]
    assert [short(line) for line in found] == by_pyelftools(elf, addresses)
    for line, said in zip(found, addr2line(elf, addresses), strict=True):
        path, _, number = said.rpartition(":")
        assert str(line.line if line else "?") == number
        # addr2line of binutils 2.40 confuses the files of DWARF 5, which count from 0.
        if line and dwarf < 5:
            assert f"/{path}".endswith(f"/{line.file}")


@pytest.mark.parametrize("flags", [("-ffunction-sections",), ("-gz=zlib",), ("-gno-column-info",)])
@pytest.mark.parametrize("dwarf", [4, 5])
def test_other_ways_to_write_them_say_the_same(dwarf: int, flags: tuple[str, ...]) -> None:
    elf = program("-O1", *flags, dwarf=dwarf).elf
    lines = LineTable.from_elf(elf)
    addresses = code_addresses(elf)
    assert [short(lines.at(address)) for address in addresses] == by_pyelftools(elf, addresses)
    assert lines.at(SymbolTable.from_elf(elf).address_of("other")) is not None


def test_a_line_prints_as_file_and_line() -> None:
    elf = program("-O0").elf
    line = LineTable.from_elf(elf).at(SymbolTable.from_elf(elf).address_of("_start"))
    assert line is not None
    assert str(line) == f"{line.file}:{line.line}"
    assert line.file.startswith("/")
    assert line.file.endswith("/main.c")
    assert SOURCES["main.c"].splitlines()[line.line - 2] == "void _start(void)"


def test_in_dwarf_5_paths_are_complete_and_before_as_the_compiler_was_called() -> None:
    old = LineTable.from_elf(program("-O0", dwarf=4).elf).files()
    assert old == ["drivers/../shared.h", "drivers/other.c", "entry.S", "main.c", "shared.h"]
    new = LineTable.from_elf(program("-O0", dwarf=5).elf).files()
    folder = new[0].removesuffix(old[0])
    assert folder.startswith("/")
    assert new == [folder + path for path in old]


@pytest.mark.parametrize("dwarf", [4, 5])
def test_standard_input_is_no_path(dwarf: int) -> None:
    elf = compile_c("void _start(void)\n{\n    for (;;)\n        ;\n}\n", flags=(f"-gdwarf-{dwarf}",)).elf
    assert str(LineTable.from_elf(elf).at(0x10_0000)) in ("<stdin>:2", "<stdin>:3", "<stdin>:4")


def test_what_is_no_code_has_no_line() -> None:
    elf = program("-O0").elf
    lines, symbols = LineTable.from_elf(elf), SymbolTable.from_elf(elf)
    last = max(code_addresses(elf))
    assert lines.at(last) is not None
    for address in (-1, 0, 0xF_FFFF, last + 0x10, symbols.address_of("total"), (1 << 64) - 1, 1 << 64, 1 << 100):
        assert lines.at(address) is None


def test_a_bias_moves_lines() -> None:
    elf = program("-O0").elf
    bias = 0xFFFF_FFFF_0000_0000
    linked, moved = LineTable.from_elf(elf), LineTable.from_elf(elf.read_bytes(), bias=bias)
    start = SymbolTable.from_elf(elf).address_of("_start")
    assert moved.at(start) is None
    assert moved.at(start + bias) == linked.at(start)
    even = line_of("main.c", "even")
    assert moved.addresses_of("main.c", even) == [address + bias for address in linked.addresses_of("main.c", even)]
    assert next(moved.ranges()).start == next(linked.ranges()).start + bias


def test_lines_of_an_image_are_where_it_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "pie.c").write_text("void _start(void)\n{\n    for (;;)\n        ;\n}\n")
    compile_c("void _start(void) {}")  # skips without gcc
    command = ["gcc", "-g", "-O1", "-ffreestanding", "-nostdlib", "-static-pie", "-fpie", "-o", "pie.elf", "pie.c"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60, capture_output=True)
    image = ElfImage(tmp_path / "pie.elf", base=0x40_0000)
    symbols, lines = SymbolTable.of_image(image), LineTable.of_image(image)
    assert lines is not None
    assert image.bias
    start = lines.at(symbols.address_of("_start"))
    assert start is not None
    assert Path(start.file).name == "pie.c"
    assert LineTable.of_image(FlatImage(b"\xf4")) is None


def test_ranges_cover_the_code_and_agree_with_single_addresses() -> None:
    elf = program("-O2").elf
    lines = LineTable.from_elf(elf)
    ranges = list(lines.ranges())
    assert all(part.start < part.end for part in ranges)
    inside = {address: part.source for part in ranges for address in range(part.start, part.end)}
    for address in range(0xF_FFF0, max(code_addresses(elf)) + 0x20):
        assert lines.at(address) == inside.get(address)


# By line


@pytest.mark.parametrize(("bits", "dwarf"), VERSIONS)
def test_a_breakpoint_for_a_line_is_where_its_code_starts(bits: int, dwarf: int) -> None:
    elf = program("-O0", bits=bits, dwarf=dwarf).elf
    lines, symbols = LineTable.from_elf(elf), SymbolTable.from_elf(elf)
    for file, comment, function in (
        ("main.c", "odd", "helper"), ("main.c", "even", "helper"), ("main.c", "first", "_start"),
        ("drivers/other.c", "here", "local"), ("entry.S", "inner", "assembly"),
    ):  # fmt: skip
        number = line_of(file, comment)
        for spelling in (file, file.rpartition("/")[2], f"./{file}", f"drivers/../{file}"):
            (address,) = lines.addresses_of(spelling, number)
            line, place = lines.at(address), symbols.at(address)
            assert line is not None
            assert place is not None
            assert (line.line, place.symbol.name) == (number, function)
            assert lines.at(address - 1) != line


def test_a_loop_has_its_line_in_several_places_but_once_in_a_function() -> None:
    elf = program("-O0").elf
    lines, symbols = LineTable.from_elf(elf), SymbolTable.from_elf(elf)
    loop = line_of("main.c", "loop")
    addresses = lines.addresses_of("main.c", loop)
    assert len(addresses) > 1
    assert addresses == sorted(addresses)
    assert lines.addresses_of("main.c", loop, symbols=symbols) == addresses[:1]


def test_an_inlined_line_is_found_in_every_function_that_has_it() -> None:
    elf = program("-O2").elf
    lines, symbols = LineTable.from_elf(elf), SymbolTable.from_elf(elf)
    addresses = lines.addresses_of("shared.h", 5, symbols=symbols)
    assert {str(symbols.at(address)).partition("+")[0] for address in addresses} >= {"_start", "other"}


def test_a_path_must_fit_in_whole_parts() -> None:
    lines = LineTable.from_elf(program("-O0").elf)
    here = line_of("drivers/other.c", "here")
    assert lines.addresses_of("other.c", here)
    full = next(path for path in lines.files() if path.endswith("other.c"))
    assert lines.addresses_of(full, here) == lines.addresses_of("other.c", here)
    for wrong in ("ther.c", "rivers/other.c", "main/other.c", "other", "", "/", "/drivers/other.c"):
        assert lines.addresses_of(wrong, here) == []


def test_a_path_that_the_file_does_not_know_whole_fits_by_its_end() -> None:
    lines = LineTable.from_elf(program("-O0", dwarf=4).elf)
    here = line_of("drivers/other.c", "here")
    assert lines.addresses_of("/anywhere/drivers/other.c", here) == lines.addresses_of("other.c", here) != []


def test_lines_with_code_are_those_for_which_there_are_addresses() -> None:
    lines = LineTable.from_elf(program("-O1").elf)
    for file in ("main.c", "other.c", "shared.h", "entry.S"):
        count = 1 + max(len(text.splitlines()) for text in SOURCES.values())
        assert lines.lines_with_code(file) == [line for line in range(count) if lines.addresses_of(file, line)] != []
    assert lines.lines_with_code("absent.c") == []
    assert lines.addresses_of("main.c", 2) == [], "a declaration"


# Files without, and hand-made ones


def test_a_file_without_debugging_information_has_no_lines() -> None:
    lines = LineTable.from_elf(ElfFile([Segment(0x10_0000)]).to_bytes())
    assert not lines
    assert lines.at(0x10_0000) is None
    assert lines.files() == []
    assert lines.addresses_of("main.c", 1) == []
    assert list(lines.ranges()) == []
    assert LineTable.from_elf(program("-O0").elf)


def uleb(value: int) -> bytes:
    digits = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([digit | 0x80 for digit in digits[:-1]] + digits[-1:])


def extended(opcode: int, operand: bytes = b"") -> bytes:
    return b"\0" + uleb(1 + len(operand)) + bytes([opcode]) + operand


def set_address(address: int) -> bytes:
    return extended(2, struct.pack("<Q", address))


END = extended(1)
COPY, ADVANCE_PC, ADVANCE_LINE, SET_FILE = b"\x01", b"\x02", b"\x03", b"\x04"


def unit(
    program: bytes, *, version: int = 4, opcode_base: int = 13, operations: int = 1, line_range: int = 14,
    names: bytes = b"\0main.c\0\0\0\0other.c\0\0\0\0\0", counts: bytes | None = None,
) -> bytes:  # fmt: skip
    """A unit of DWARF 2 to 4, with the files 1, main.c, and 2, other.c."""
    lengths = bytes([0, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1])[: opcode_base - 1] if counts is None else counts
    head = b"\x01" + (bytes([operations]) if version >= 4 else b"")
    head += struct.pack("<BbBB", 1, -5, line_range, opcode_base) + lengths + names
    contents = struct.pack("<HI", version, len(head)) + head + program
    return struct.pack("<I", len(contents)) + contents


def elf_with_lines(debug_line: bytes, **others: bytes) -> bytes:
    """A file with these sections; `debug_line_str=...` becomes .debug_line_str."""
    contents = {".debug_line": debug_line} | {f".{name}": data for name, data in others.items()}
    names = b"\0.shstrtab\0" + b"".join(name.encode() + b"\0" for name in contents)
    body = ElfFile([Segment(0x1000)]).to_bytes()
    sections = bytes(64) + struct.pack("<IIQQQQIIQQ", 1, 3, 0, 0, len(body), len(names), 0, 0, 1, 0)
    body += names
    for name, data in contents.items():
        place = names.index(name.encode() + b"\0")
        sections += struct.pack("<IIQQQQIIQQ", place, 1, 0, 0, len(body), len(data), 0, 0, 1, 0)
        body += data
    made = bytearray(body + sections)
    struct.pack_into("<Q", made, 0x28, len(body))
    struct.pack_into("<HHH", made, 0x3A, 64, len(sections) // 64, 1)
    return bytes(made)


def test_the_64_bit_format_of_dwarf_is_read() -> None:
    head = b"\x01\x01\x01" + struct.pack("<bBB", -5, 14, 1) + b"\0main.c\0\0\0\0\0"
    contents = struct.pack("<HQ", 4, len(head)) + head + set_address(0x1000) + b"\x06" + set_address(0x1010) + END
    assert str(table(struct.pack("<IQ", 0xFFFF_FFFF, len(contents)) + contents).at(0x1000)) == "main.c:1"


def table(*units: bytes, **others: bytes) -> LineTable:
    return LineTable.from_elf(elf_with_lines(b"".join(units), **others))


SIMPLE = unit(
    set_address(0x1000) + COPY + ADVANCE_LINE + b"\x09" + ADVANCE_PC + b"\x10" + COPY + ADVANCE_PC + b"\x10" + END
)


def test_a_sequence_ends_where_it_says() -> None:
    lines = table(SIMPLE)
    assert [str(lines.at(address)) for address in (0xFFF, 0x1000, 0x100F, 0x1010, 0x101F, 0x1020)] == [
        "None", "main.c:1", "main.c:1", "main.c:10", "main.c:10", "None",
    ]  # fmt: skip


def test_rows_after_the_last_end_of_a_sequence_end_nowhere() -> None:
    lines = table(unit(set_address(0x1000) + COPY + ADVANCE_PC + b"\x10" + COPY))
    assert [str(lines.at(address)) for address in (0x1000, 0x100F, 0x1010)] == ["main.c:1", "main.c:1", "None"]


def test_the_last_row_for_an_address_counts_and_breakpoints_know_the_others() -> None:
    lines = table(unit(set_address(0x1000) + COPY + ADVANCE_LINE + b"\x01" + COPY + ADVANCE_PC + b"\x10" + END))
    assert str(lines.at(0x1000)) == "main.c:2"
    assert lines.addresses_of("main.c", 1) == lines.addresses_of("main.c", 2) == [0x1000]
    assert [str(part.source) for part in lines.ranges()] == ["main.c:2"]


def test_rows_that_go_back_are_put_in_order() -> None:
    lines = table(
        unit(
            set_address(0x1010) + COPY + set_address(0x1000) + ADVANCE_LINE + b"\x01" + COPY + set_address(0x1020) + END
        )
    )
    assert (str(lines.at(0x1004)), str(lines.at(0x1014))) == ("main.c:2", "main.c:1")


def test_line_0_and_a_file_without_entry_are_no_source() -> None:
    lines = table(
        unit(set_address(0x1000) + ADVANCE_LINE + b"\x7f" + COPY + ADVANCE_PC + b"\x10" + END),
        unit(set_address(0x2000) + SET_FILE + b"\x03" + COPY + ADVANCE_PC + b"\x10" + END),
        unit(set_address(0x3000) + SET_FILE + uleb(1 << 40) + COPY + ADVANCE_PC + b"\x10" + END),
    )
    assert [lines.at(address) for address in (0x1000, 0x2000, 0x3000)] == [None, None, None]
    assert list(lines.ranges()) == []


def test_only_statements_are_places_for_breakpoints() -> None:
    lines = table(
        unit(set_address(0x1000) + b"\x06" + COPY + ADVANCE_PC + b"\x10" + b"\x06" + COPY + ADVANCE_PC + b"\x10" + END)
    )
    assert str(lines.at(0x1000)) == "main.c:1"
    assert lines.addresses_of("main.c", 1) == [0x1010]


def test_every_opcode_does_what_the_standard_says() -> None:
    advance = (255 - 13) // 14  # of DW_LNS_const_add_pc
    special = bytes([13 + 3 * 14 + 7])  # 3 bytes and 7 - 5 lines on
    lines = table(
        unit(
            set_address(0x1000) + special  # 0x1003, line 3
            + b"\x08" + COPY  # const_add_pc
            + b"\x09" + struct.pack("<H", 0x100) + b"\x05" + uleb(200) + COPY  # fixed_advance_pc, set_column
            + b"\x07\x0a\x0b" + b"\x0c\x05"  # basic_block, prologue_end, epilogue_begin, set_isa
            + extended(4, b"\x07") + extended(0x80, b"1234")  # set_discriminator, one of DW_LNE_lo_user
            + extended(3, b"third.c\0\0\0\0") + SET_FILE + b"\x03" + ADVANCE_LINE + uleb(0x7E)
            + ADVANCE_PC + b"\x10" + COPY + ADVANCE_PC + b"\x10" + END
        )
    )  # fmt: skip
    ranges = [(part.start, part.end, str(part.source), part.source.column) for part in lines.ranges()]
    third = 0x1003 + advance + 0x100
    assert ranges == [
        (0x1003, 0x1003 + advance, "main.c:3", 0),
        (0x1003 + advance, third, "main.c:3", 0),
        (third, third + 0x10, "main.c:3", 200),
        (third + 0x10, third + 0x20, "third.c:1", 200),
    ]
    assert lines.addresses_of("third.c", 1) == [third + 0x10]


def test_fewer_and_more_standard_opcodes_are_understood() -> None:
    few = unit(set_address(0x1000) + bytes([4]) + ADVANCE_PC + b"\x10" + END, opcode_base=4, line_range=1)
    more = unit(
        set_address(0x2000) + bytes([13]) + uleb(1 << 30) + b"\x05" + COPY + ADVANCE_PC + b"\x10" + END,
        opcode_base=14, counts=bytes([0, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 2]),
    )  # fmt: skip
    lines = table(few, more)
    assert [str(lines.at(address)) for address in (0x1000, 0x2000)] == [f"main.c:{(1 - 5) & 0xFFFF_FFFF}", "main.c:1"]


def test_a_sequence_at_address_0_without_set_address_is_found() -> None:
    lines = table(SIMPLE, unit(COPY + ADVANCE_PC + b"\x10" + END, names=b"\0low.c\0\0\0\0\0"))
    assert str(lines.at(4)) == "low.c:1"
    assert str(lines.at(0x1004)) == "main.c:1"


def test_an_operand_that_looks_like_a_start_does_not_mislead() -> None:
    decoy = extended(0x80, set_address(0x1008))
    lines = table(SIMPLE, unit(decoy + set_address(0x9000) + COPY + ADVANCE_PC + b"\x10" + END))
    assert str(lines.at(0x100A)) == "main.c:1"


def test_of_functions_that_the_linker_dropped_to_address_0_the_real_one_is_found() -> None:
    def dropped(size: int, name: bytes) -> bytes:
        return unit(set_address(0) + COPY + ADVANCE_PC + uleb(size) + END, names=b"\0" + name + b"\0\0\0\0\0")

    lines = table(dropped(0x10, b"a.c"), dropped(0x2000, b"b.c"), SIMPLE)
    assert str(lines.at(0x1004)) == "main.c:1"
    assert str(lines.at(0x18)) == "b.c:1"


def test_only_the_unit_of_an_address_is_decoded() -> None:
    broken = unit(set_address(0x2000) + b"\x02\xff")
    lines = table(SIMPLE, broken)
    assert str(lines.at(0x1004)) == "main.c:1"
    for _ in range(2):
        with pytest.raises(ImageError, match=r"LEB128 number does not end"):
            lines.at(0x2004)
        with pytest.raises(ImageError, match=r"LEB128 number does not end"):
            lines.addresses_of("main.c", 1)
    assert lines.addresses_of("absent.c", 1) == []


def v5_unit(tables: bytes, program: bytes = END) -> bytes:
    head = struct.pack("<BBBbBB", 1, 1, 1, -5, 14, 1) + tables
    contents = struct.pack("<HBBI", 5, 8, 0, len(head)) + head + program
    return struct.pack("<I", len(contents)) + contents


PROGRAM = set_address(0x1000) + bytes([14 * 0 + 1 + 5]) + set_address(0x1010) + END
PATH, DIRECTORY, MD5 = 1, 2, 5
STRING, LINE_STRP, STRP, UDATA, DATA1, DATA16, BLOCK = 0x08, 0x1F, 0x0E, 0x0F, 0x0B, 0x1E, 0x09


def test_the_tables_of_dwarf_5_may_have_any_form() -> None:
    directories = bytes([1, PATH, STRING]) + b"\x02/root\0sub\0"
    formats = (
        bytes([5, MD5, DATA16, DIRECTORY, UDATA, PATH, LINE_STRP])
        + uleb(0x2001)
        + bytes([BLOCK])
        + uleb(0x2002)
        + bytes([DATA1])
    )
    file = bytes(16) + b"\x01" + struct.pack("<I", 3) + b"\x02ab" + b"\x07"
    lines = table(v5_unit(directories + formats + uleb(2) + file + file, PROGRAM), debug_line_str=b"no\0main.c\0")
    assert str(lines.at(0x1000)) == "/root/sub/main.c:1"
    files = bytes([1, PATH, STRP]) + b"\x02" + struct.pack("<I", 4) * 2
    lines = table(v5_unit(directories + files, PROGRAM), debug_str=b"abc\0x.c\0")
    assert str(lines.at(0x1000)) == "/root/x.c:1"


@pytest.mark.parametrize(
    ("units", "message"),
    [
        (b"\x01", "4 bytes are expected, 0x1 are left"),
        (struct.pack("<I", 100) + bytes(8), "a unit of 0x64 bytes goes past the end: 0x8 are left"),
        (struct.pack("<IQ", 0xFFFF_FFFF, 1 << 60), "goes past the end"),
        (struct.pack("<I", 0) * 70_000, "more than 65536 units"),
    ],
)
def test_units_that_are_not_there_are_an_error_at_once(units: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        table(units)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (unit(b"", version=6), "version 6"),
        (unit(b"", version=1), "version 1"),
        (struct.pack("<I", 0), "expected"),
        (unit(b"", line_range=0), "line_range is 0"),
        (unit(b"", opcode_base=1).replace(b"\xfb\x0e\x01", b"\xfb\x0e\x00"), "opcode_base 0"),
        (unit(b"", operations=4), "VLIW"),
        (unit(b"", names=b"\0main.c"), "a string does not end"),
        (unit(b"", names=b"\0" + b"x" * 5000 + b"\0\0\0\0\0"), "a string does not end"),
        (unit(b"", names=b"a\0" * 66_000 + b"\0\0"), "more than 65535 directories"),
        (unit(b"", names=b"\0" + b"a\0\0\0\0" * 66_000 + b"\0"), "more than 65535 files"),
        (unit(b"\0"), "LEB128 number does not end"),
        (unit(b"\0\x09\x02"), "bytes are expected"),
        (unit(b"\0\x04\x02\0\0\0"), "an address of 3 bytes"),
        (unit(b"\0\x7f\x80"), "ends within an instruction"),
        (unit(b"\x03" + b"\x80" * 20 + b"\x00"), "LEB128 number does not end"),
        (unit(b"\x01" * ((4 << 20) + 1)), "a program of 0x400001 bytes, more than 0x400000"),
        (v5_unit(bytes([0]) + uleb(1 << 60) + bytes(2)), "a table of 1152921504606846976 files"),
        (v5_unit(bytes([0]) + uleb(1) + bytes(2)), "a table of 1 files"),
        (v5_unit(bytes([1, PATH, STRING]) + uleb(65_000) + bytes(2)), "a table of 65000 files"),
        (v5_unit(bytes([1, PATH, 0x17]) + b"\x01" + bytes(8)), "form 0x17"),
        (v5_unit(bytes([1, PATH, LINE_STRP]) + b"\x01" + bytes(8)), r"\.debug_line_str at 0x0: a string does not end"),
        (v5_unit(bytes([1, MD5, BLOCK]) + b"\x01" + uleb(1 << 40) + bytes(8)), "bytes are expected"),
    ],
)
def test_a_lying_unit_is_an_error_when_it_is_asked_for(data: bytes, message: str) -> None:
    lines = table(data)
    with pytest.raises(ImageError, match=message):
        list(lines.ranges())


def test_a_header_that_says_it_is_longer_than_its_unit_is_refused() -> None:
    data = bytearray(unit(b""))
    struct.pack_into("<I", data, 6, 0x1000)
    with pytest.raises(ImageError, match="a header of 0x1000 bytes goes past the end"):
        table(bytes(data)).files()


def test_strings_that_are_all_tails_of_one_are_refused() -> None:
    count = 4000
    files = bytes([1, PATH, LINE_STRP]) + uleb(count) + b"".join(struct.pack("<I", at) for at in range(count))
    lines = table(v5_unit(bytes([0, 0]) + files), debug_line_str=b"a" * count + b"\0")
    with pytest.raises(ImageError, match="overlap"):
        lines.files()


def compressed(plain: bytes, **lies: int) -> bytes:
    """A file with a compressed .debug_line; `kind`, `size` override what its header says."""
    import zlib

    packed = struct.pack("<IIQQ", lies.get("kind", 1), 0, lies.get("size", len(plain)), 1) + zlib.compress(plain)
    data = bytearray(elf_with_lines(packed))
    struct.pack_into("<Q", data, len(data) - 64 + 8, 0x800)
    return bytes(data)


@pytest.mark.parametrize("options", [["--only-keep-debug"], ["--compress-debug-sections=zlib"]])
def test_files_that_objcopy_has_changed_say_the_same(tmp_path: Path, options: list[str]) -> None:
    elf = program("-O1").elf
    subprocess.run(["objcopy", *options, elf, tmp_path / "changed"], check=True, timeout=60)
    lines, changed = LineTable.from_elf(elf), LineTable.from_elf(tmp_path / "changed")
    assert list(changed.ranges()) == list(lines.ranges()) != []
    assert list(SymbolTable.from_elf(tmp_path / "changed")) == list(SymbolTable.from_elf(elf)) != []


def test_a_compressed_section_is_read() -> None:
    assert str(LineTable.from_elf(compressed(SIMPLE)).at(0x1000)) == "main.c:1"


@pytest.mark.parametrize(
    ("lies", "message"),
    [
        ({"kind": 2}, "compressed by zstd"),
        ({"kind": 77}, "method 77"),
        ({"size": 1 << 40}, "decompressed, more than"),
        ({"size": 10}, "does not decompress to the 0xa bytes"),
        ({"size": 10_000}, "does not decompress to the 0x2710 bytes"),
    ],
)
def test_a_lying_compressed_section_is_refused(lies: dict[str, int], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        LineTable.from_elf(compressed(SIMPLE, **lies))


def test_a_broken_compressed_section_is_refused() -> None:
    data = bytearray(compressed(SIMPLE))
    place = data.index(b"\x78\x9c")
    data[place : place + 2] = b"\0\0"
    with pytest.raises(ImageError, match="cannot be decompressed"):
        LineTable.from_elf(bytes(data))
