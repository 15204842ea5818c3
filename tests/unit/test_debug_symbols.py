"""Symbols: by name, by address, from ELF files as `nm` sees them, from System.map, and what cannot be read."""

import struct
from pathlib import Path

import pytest

from debug_info_programs import nm, program
from elf_files import ET_DYN, ElfFile, Segment
from kvmpy.boot import ElfImage, FlatImage
from kvmpy.debug.symbols import Symbol, SymbolTable, UnknownSymbolError
from kvmpy.errors import ImageError, UsageError

NM_KINDS = {"t": "function", "d": "object", "b": "object", "r": "object", "a": "absolute"}


def text(table: SymbolTable, address: int) -> str | None:
    found = table.at(address)
    return str(found) if found else None


# By address


def test_an_address_is_a_symbol_and_an_offset() -> None:
    table = SymbolTable([Symbol("main", 0x1000, 0x20, "function")])
    found = table.at(0x1012)
    assert found is not None
    assert (found.symbol, found.offset, found.address) == (Symbol("main", 0x1000, 0x20, "function"), 0x12, 0x1012)
    assert str(found) == "main+0x12"
    assert text(table, 0x1000) == "main"
    assert table.describe(0x1012) == "0x1012 <main+0x12>"
    assert table.describe(0x2000) == "0x2000"


def test_a_symbol_with_a_size_ends_there() -> None:
    table = SymbolTable([Symbol("a", 0x1000, 0x10, "function"), Symbol("b", 0x1020, 0x10, "function")])
    assert [text(table, address) for address in (0xFFF, 0x100F, 0x1010, 0x101F, 0x1020, 0x1030)] == [
        None, "a+0xf", None, None, "b", None,
    ]  # fmt: skip


def test_a_label_reaches_up_to_the_next_symbol() -> None:
    table = SymbolTable.from_dict({"start": 0x7C00, "again": 0x7C10, "data": 0x7D00})
    assert [text(table, address) for address in (0x7BFF, 0x7C00, 0x7C0F, 0x7C10, 0x7CFF, 0x7D00)] == [
        None, "start", "start+0xf", "again", "again+0xef", "data",
    ]  # fmt: skip


def test_the_last_label_ends_where_the_image_does_or_after_64_kib() -> None:
    assert text(SymbolTable.from_dict({"start": 0x7C00}), 0x1_7BFF) == "start+0xffff"
    assert text(SymbolTable.from_dict({"start": 0x7C00}), 0x1_7C00) is None
    assert text(SymbolTable.from_dict({"start": 0x7C00}, end=0x7E00), 0x7DFF) == "start+0x1ff"
    assert text(SymbolTable.from_dict({"start": 0x7C00}, end=0x7E00), 0x7E00) is None


def test_a_function_with_a_size_is_told_before_the_labels_in_it() -> None:
    table = SymbolTable([Symbol("f", 0x1000, 0x40, "function"), Symbol("loop", 0x1010), Symbol("next", 0x1040)])
    assert text(table, 0x1014) == "f+0x14"
    assert text(table, 0x1041) == "next+0x1"


def test_a_label_in_a_function_ends_with_it() -> None:
    table = SymbolTable([Symbol("f", 0x1000, 0x40, "function"), Symbol("loop", 0x1010)])
    assert text(table, 0x1050) is None


def test_a_label_does_not_reach_over_a_function() -> None:
    table = SymbolTable([Symbol("label", 0x1000), Symbol("f", 0x1010, 0x10, "function")])
    assert [text(table, address) for address in (0x100F, 0x1010, 0x1020)] == ["label+0xf", "f", None]


def test_the_innermost_of_nested_symbols_is_told() -> None:
    outer, inner = Symbol("outer", 0x1000, 0x100, "object"), Symbol("inner", 0x1040, 0x10, "object")
    table = SymbolTable([inner, outer])
    assert [text(table, address) for address in (0x103F, 0x1040, 0x104F, 0x1050)] == [
        "outer+0x3f", "inner", "inner+0xf", "outer+0x50",
    ]  # fmt: skip


def test_of_several_symbols_at_one_address_the_most_telling_one_is_told() -> None:
    names = [
        Symbol("label", 0x1000), Symbol("data", 0x1000, 0x10, "object"), Symbol("__code", 0x1000, 0x10, "function"),
        Symbol("code", 0x1000, 0x10, "function"), Symbol("code_too", 0x1000, 0x10, "function"),
    ]  # fmt: skip
    told = []
    while names:
        found = SymbolTable(names).at(0x1001)
        assert found is not None
        told.append(found.symbol.name)
        names.remove(found.symbol)
    assert told == ["code", "code_too", "__code", "data", "label"]


def test_absolute_symbols_are_numbers_and_cover_nothing() -> None:
    table = SymbolTable([Symbol("SIZE", 0x1000, kind="absolute"), Symbol("start", 0xF00)])
    assert text(table, 0x1004) == "start+0x104"
    assert table.address_of("SIZE") == 0x1000


@pytest.mark.parametrize("address", [-1, 0, 1 << 64, 1 << 200])
def test_no_symbol_is_at_addresses_far_away(address: int) -> None:
    assert SymbolTable([Symbol("f", 0x1000, 0x10)]).at(address) is None
    assert SymbolTable().at(address) is None


# By name


def test_a_name_has_an_address() -> None:
    table = SymbolTable.from_dict({"main": 0x1000, "puts": 0x2000})
    assert table.address_of("puts") == 0x2000
    assert "puts" in table
    assert "gets" not in table
    assert [symbol.name for symbol in table] == ["main", "puts"]
    assert len(table) == 2


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("mian", "; did you mean 'main'?"),
        ("man", "; did you mean 'main'?"),
        ("mainn", "; did you mean 'main'?"),
        ("Main", "; did you mean 'main'?"),
        ("KERNEL_START", "; did you mean 'kernel_start'?"),
        ("start", "; did you mean 'kernel_start'?"),
        ("entirely_else", ""),
        ("", ""),
        ("x" * 100_000, ""),
    ],
)
def test_an_unknown_name_is_an_error_with_names_that_are_near(wrong: str, hint: str) -> None:
    table = SymbolTable.from_dict({"main": 0x1000, "kernel_start": 0x2000})
    with pytest.raises(UnknownSymbolError) as caught:
        table.address_of(wrong)
    assert isinstance(caught.value, UsageError)
    assert str(caught.value) == f"no symbol {wrong!r}{hint}"
    assert caught.value.name == wrong
    assert caught.value.similar == tuple(name for name in ("main", "kernel_start") if name in hint)


def test_at_most_three_names_are_proposed_the_shortest_first() -> None:
    table = SymbolTable.from_dict(dict.fromkeys(("do_init_module", "init_mm", "init_task", "re_init", "x"), 0))
    with pytest.raises(UnknownSymbolError, match="did you mean 'init_mm' or 're_init' or 'init_task'"):
        table.address_of("init")


def test_all_symbols_of_one_name_are_found() -> None:
    first, second = Symbol("local", 0x2000, 4, "function"), Symbol("local", 0x1000, 8, "function")
    table = SymbolTable([Symbol("other", 0), first, second])
    assert table.named("local") == (first, second)
    assert table.address_of("local") == 0x2000, "the first one"
    assert table.named("nobody") == ()


# From ELF files


@pytest.mark.parametrize("bits", [32, 64])
def test_the_symbols_of_a_program_are_those_of_nm(bits: int) -> None:
    elf = program(bits=bits).elf
    table = SymbolTable.from_elf(elf)
    listed = nm(elf)
    assert len(table) == len(listed)
    for address, size, letter, name in listed:
        found = [symbol for symbol in table.named(name) if symbol.address == address]
        assert len(found) == 1, name
        assert found[0].size == size
        kind = "label" if name in ("assembly", "inner", "within") else NM_KINDS[letter.lower()]
        assert found[0].kind == kind, name
        if size:
            assert text(table, address + size - 1) == (f"{name}+{size - 1:#x}" if size > 1 else name)


@pytest.mark.parametrize("bits", [32, 64])
def test_names_of_several_files_and_labels_of_assembly_are_told(bits: int) -> None:
    table = SymbolTable.from_elf(program("-O0", bits=bits).elf)
    main, other = table.named("local")
    assert main.address != other.address
    assembly, inner = table.address_of("assembly"), table.address_of("inner")
    assert text(table, assembly + 1) == "assembly+0x1"
    assert text(table, inner + 1) == "inner+0x1"
    sized = table.symbol("sized")
    assert (sized.size, sized.kind) == (2, "function")
    assert text(table, table.address_of("within")) == "sized+0x1"
    assert text(table, sized.end) is None, "it is the last in .text: no label reaches into another section"
    assert table.symbol("CONSTANT") == Symbol("CONSTANT", 0x1234, 0, "absolute")
    assert table.at(0x1234) is None


def test_a_bias_moves_all_symbols_but_absolute_ones() -> None:
    elf = program(bits=64).elf
    linked, moved = SymbolTable.from_elf(elf), SymbolTable.from_elf(elf.read_bytes(), bias=0xFFFF_FFFF_0000_0000)
    start = linked.address_of("_start")
    assert moved.address_of("_start") == start + 0xFFFF_FFFF_0000_0000
    assert moved.describe(0xFFFF_FFFF_0000_0000 + start) == f"{0xFFFF_FFFF_0000_0000 + start:#x} <_start>"
    assert moved.at(start) is None
    assert text(moved, moved.address_of("inner") + 2) == "inner+0x2"
    assert moved.address_of("CONSTANT") == 0x1234


def test_a_bias_wraps_around_as_addresses_do() -> None:
    elf = program(bits=32).elf
    start = SymbolTable.from_elf(elf).address_of("_start")
    assert SymbolTable.from_elf(elf, bias=-start).address_of("_start") == 0
    assert SymbolTable.from_elf(elf, bias=(1 << 32) - start - 8).address_of("_start") == (1 << 32) - 8


def elf_with_symbols(
    symbols: list[tuple[bytes, int, int, int, int]], *, type: int = ET_DYN, table_type: int = 2, address: int = 0
) -> bytes:
    """A file for `address` with (name, st_info, st_shndx, st_value, st_size) in .symtab; section 3 is .text."""
    names, table = b"\0", bytes(24)
    for name, info, place, value, size in symbols:
        table += struct.pack("<IBBHQQ", len(names), info, 0, place, value, size)
        names += name + b"\0"
    body = ElfFile([Segment(address, b"\xf4" * 0x20, memsz=0x1000)], type=type, entry=address + 1).to_bytes()
    sections = bytes(64)
    sections += struct.pack("<IIQQQQIIQQ", 0, table_type, 0, 0, len(body), len(table), 2, 1, 8, 24)
    sections += struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, len(body) + len(table), len(names), 0, 0, 1, 0)
    sections += struct.pack("<IIQQQQIIQQ", 0, 1, 6, address, 0x40, 0x20, 0, 0, 16, 0)
    data = bytearray(body + table + names + sections)
    struct.pack_into("<Q", data, 0x28, len(body) + len(table) + len(names))
    struct.pack_into("<HHH", data, 0x3A, 64, 4, 0)
    return bytes(data)


def test_symbols_of_an_image_are_where_it_is_loaded() -> None:
    image = ElfImage(elf_with_symbols([(b"code", 0x12, 3, 0x4, 8)]), base=0x30_0000)
    assert SymbolTable.of_image(image).address_of("code") == 0x30_0004
    assert SymbolTable.from_elf(image, bias=0).address_of("code") == 4
    assert len(SymbolTable.of_image(FlatImage(b"\xf4"))) == 0


def test_global_symbols_come_before_weak_and_local_ones() -> None:
    local, weak, global_ = 0x02, 0x22, 0x12
    symbols = [(b"f", local, 3, 1, 4), (b"f", weak, 3, 2, 4), (b"f", global_, 3, 3, 4), (b"f", global_, 3, 4, 4)]
    table = SymbolTable.from_elf(elf_with_symbols(symbols))
    assert [symbol.address for symbol in table.named("f")] == [3, 4, 2, 1]
    assert table.address_of("f") == 3
    aliases = [(b"a", local, 3, 8, 4), (b"b", weak, 3, 8, 4), (b"__c", global_, 3, 8, 4)]
    assert text(SymbolTable.from_elf(elf_with_symbols(aliases)), 9) == "__c+0x1"


def test_undefined_unnamed_and_other_symbols_are_left_out() -> None:
    symbols = [
        (b"undefined", 0x12, 0, 5, 0), (b"", 0x12, 3, 1, 0), (b"file.c", 0x04, 0xFFF1, 0, 0), (b"tls", 0x16, 3, 8, 4),
        (b"section", 0x03, 3, 0, 0), (b"resolver", 0x1A, 3, 2, 1), (b"label", 0x10, 3, 4, 0),
    ]  # fmt: skip
    table = SymbolTable.from_elf(elf_with_symbols(symbols))
    assert [(symbol.name, symbol.kind) for symbol in table] == [("resolver", "function"), ("label", "label")]


def test_a_label_ends_with_its_section_and_one_in_a_reserved_section_after_64_kib() -> None:
    table = SymbolTable.from_elf(elf_with_symbols([(b"label", 0x10, 3, 0x10, 0)]), bias=0x5000)
    assert (text(table, 0x501F), text(table, 0x5020)) == ("label+0xf", None)
    table = SymbolTable.from_elf(elf_with_symbols([(b"label", 0x10, 0xFF20, 0x10, 0)]))
    assert (text(table, 0x20), text(table, 0x1_0010)) == ("label+0x10", None)


def test_an_absolute_function_is_a_routine_at_a_fixed_address() -> None:
    table = SymbolTable.from_elf(elf_with_symbols([(b"rom", 0x12, 0xFFF1, 0xF_E000, 0x10)]), bias=0x5000)
    assert text(table, 0xF_E001) == "rom+0x1"


def test_a_name_that_is_no_utf_8_is_still_a_name() -> None:
    table = SymbolTable.from_elf(elf_with_symbols([("é".encode(), 0x12, 3, 1, 0), (b"\xff!", 0x12, 3, 2, 0)]))
    assert [symbol.name for symbol in table] == ["é", "\N{REPLACEMENT CHARACTER}!"]


def test_the_dynamic_symbols_do_when_there_are_no_others() -> None:
    data = elf_with_symbols([(b"code", 0x12, 3, 4, 8)], table_type=11)
    assert SymbolTable.from_elf(data).address_of("code") == 4


def test_a_stripped_file_has_no_symbols() -> None:
    table = SymbolTable.from_elf(ElfFile([Segment(0x10_0000)]).to_bytes())
    assert len(table) == 0
    assert table.at(0x10_0000) is None


def test_names_that_are_tails_of_others_are_read_unless_they_are_all_tails_of_one() -> None:
    data = bytearray(elf_with_symbols([(b"very_long", 0x12, 3, 1, 0), (b"x", 0x12, 3, 2, 0)]))
    at = data.index(struct.pack("<IBB", len(b"\0very_long\0"), 0x12, 0))
    struct.pack_into("<I", data, at, 1 + len("very_"))
    assert [symbol.name for symbol in SymbolTable.from_elf(bytes(data))] == ["very_long", "long"]

    name = b"a" * 1000
    bomb = bytearray(elf_with_symbols([(name, 0x12, 3, 1, 0), *[(b"", 0x12, 3, 2, 0)] * 900]))
    for index in range(900):
        entry = struct.pack("<IBB", len(name) + 2 + index, 0x12, 0)
        struct.pack_into("<I", bomb, bomb.index(entry), 2 + index)
    with pytest.raises(ImageError, match="overlap"):
        SymbolTable.from_elf(bytes(bomb))


@pytest.mark.parametrize(
    ("at", "layout", "value", "message"),
    [
        (64 + 0x20, "<Q", 24 << 20, "more than 1048576 entries|truncated"),
        (64 + 0x20, "<Q", 1 << 62, "more than 1048576 entries"),
        (64 + 0x38, "<Q", 23, "entries of 23 bytes, not 24"),
        (64 + 0x28, "<I", 0, "sh_link 0 names no section"),
        (64 + 0x28, "<I", 4, "sh_link 4 names no section"),
        (128 + 0x20, "<Q", 3, "does not end in the table of names"),
        (128 + 0x20, "<Q", 1 << 40, "bytes, more than"),
        (128 + 0x18, "<Q", 1 << 40, "truncated"),
    ],
)
def test_a_lying_table_is_an_image_error(at: int, layout: str, value: int, message: str) -> None:
    data = bytearray(elf_with_symbols([(b"code", 0x12, 3, 1, 0)]))
    struct.pack_into(layout, data, len(data) - 4 * 64 + at, value)
    with pytest.raises(ImageError, match=message):
        SymbolTable.from_elf(bytes(data))


def test_a_million_symbols_are_read_and_looked_up() -> None:
    """All of one name at one place, the worst that they can be."""
    data = elf_with_symbols([(b"code", 0x12, 3, 1, 4)])
    body, sections = data[: data.index(b"\0code\0") - 48], data[-4 * 64 :]
    count = 1_000_000
    symbols = bytes(24) + struct.pack("<IBBHQQ", 1, 0x12, 0, 3, 1, 4) * count
    made = bytearray(body + symbols + b"\0code\0" + sections)
    struct.pack_into("<Q", made, 0x28, len(made) - 4 * 64)
    struct.pack_into("<Q", made, len(made) - 3 * 64 + 0x20, len(symbols))
    struct.pack_into("<Q", made, len(made) - 2 * 64 + 0x18, len(body) + len(symbols))
    table = SymbolTable.from_elf(bytes(made))
    assert len(table) == count
    assert text(table, 2) == "code+0x1"
    assert table.address_of("code") == 1
    with pytest.raises(UnknownSymbolError, match="did you mean 'code'"):
        table.address_of("coed")


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="not an ELF file"):
        SymbolTable.from_elf(b"not an ELF file at all")
    with pytest.raises(ImageError, match="not a regular file"):
        SymbolTable.from_elf(tmp_path)
    with pytest.raises(FileNotFoundError):
        SymbolTable.from_elf(tmp_path / "absent")


# From System.map

KALLSYMS = """\
ffffffff81000000 T startup_64
ffffffff81000000 T _text
ffffffff81000100 t helper
ffffffff81000200 W weak_one
ffffffff82000000 D jiffies
ffffffff82000010 V weak_data
0000000000001000 A fixed_size
ffffffffc0000000 t init_module\t[virtio]
"""


def test_a_system_map_has_names_kinds_and_modules() -> None:
    table = SymbolTable.from_system_map(KALLSYMS)
    assert text(table, 0xFFFF_FFFF_8100_0110) == "helper+0x10"
    assert text(table, 0xFFFF_FFFF_8100_0004) == "startup_64+0x4"
    assert text(table, 0xFFFF_FFFF_C000_0004) == "init_module+0x4 [virtio]"
    assert table.at(0x1004) is None
    assert {symbol.name: symbol.kind for symbol in table} == {
        "startup_64": "function", "_text": "function", "helper": "function", "weak_one": "label", "jiffies": "object",
        "weak_data": "object", "fixed_size": "absolute", "init_module": "function",
    }  # fmt: skip


def test_a_system_map_is_a_path_bytes_or_text(tmp_path: Path) -> None:
    path = tmp_path / "System.map"
    path.write_text(KALLSYMS)
    for source in (path, str(path), KALLSYMS, KALLSYMS.encode()):
        assert SymbolTable.from_system_map(source).address_of("jiffies") == 0xFFFF_FFFF_8200_0000


def test_the_offset_of_kaslr_moves_all_but_absolute_symbols() -> None:
    table = SymbolTable.from_system_map(KALLSYMS, bias=0x1200_0000)
    assert table.address_of("_text") == 0xFFFF_FFFF_9300_0000
    assert table.address_of("fixed_size") == 0x1000


def test_what_nm_prints_is_a_system_map() -> None:
    table = SymbolTable.from_system_map("                 U puts\n                 w hook\n0000000000001000 T main\n")
    assert [symbol.name for symbol in table] == ["main"]


def test_hidden_addresses_are_an_error_that_says_why() -> None:
    with pytest.raises(ImageError, match="copy it as root"):
        SymbolTable.from_system_map("0000000000000000 T _text\n0000000000000000 T other\n")


@pytest.mark.parametrize(
    "line", ["main", "1000 main", "xyz T main", "1000 TT main", "-1 T main", f"{1 << 64:x} T main", "1000 T"]
)
def test_a_line_of_another_form_is_an_error_that_shows_it(line: str) -> None:
    with pytest.raises(ImageError, match=f"line 2 is not an address, a letter and a name: '{line}'"):
        SymbolTable.from_system_map(f"1000 T main\n{line}\n")


def test_a_system_map_from_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="not a regular file"):
        SymbolTable.from_system_map(tmp_path)


# Merging


def test_merged_tables_know_the_symbols_of_all_and_the_first_wins() -> None:
    kernel = SymbolTable.from_system_map(KALLSYMS)
    program_ = SymbolTable([Symbol("main", 0x40_0000, 0x20, "function"), Symbol("jiffies", 0x40_1000, 8, "object")])
    table = SymbolTable.merge(program_, SymbolTable(), kernel)
    assert len(table) == len(kernel) + 2
    assert text(table, 0x40_0004) == "main+0x4"
    assert text(table, 0xFFFF_FFFF_C000_0004) == "init_module+0x4 [virtio]"
    assert table.address_of("jiffies") == 0x40_1000
    assert [symbol.address for symbol in table.named("jiffies")] == [0x40_1000, 0xFFFF_FFFF_8200_0000]
    assert len(kernel) == 8, "the merged ones are as they were"
    same = SymbolTable.merge(SymbolTable.from_dict({"first": 0x10}), SymbolTable.from_dict({"second": 0x10}))
    assert text(same, 0x10) == "first"
