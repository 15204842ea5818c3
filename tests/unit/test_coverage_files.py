"""Results of coverage: merging, lines of source, lcov and drcov files. No KVM."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gnu_toolchain import TOOLCHAIN, GuestProgram, compile_c
from kvmpy.debug.coverage import BasicBlock, CoveredCode, Module, coverage_format
from kvmpy.debug.coverage.drcov import drcov_file
from kvmpy.debug.symbols import LineTable, SymbolTable
from kvmpy.errors import UsageError

SOURCE = """int twice(int x)
{
    if (x == 10)
        return 20;
    return 2 * x;
}

static int never(int x)
{
    return x + 1;
}

int (*volatile pointer)(int) = never;

void _start(void)
{
    twice(10);
}
"""


class DebugInfo:
    """Line numbers and symbols of a compiled program."""

    def __init__(self, program: GuestProgram) -> None:
        self.table = LineTable.from_elf(program.elf)
        self.names = SymbolTable.from_elf(program.elf)

    def lines(self) -> LineTable:
        return self.table

    def symbols(self) -> SymbolTable:
        return self.names


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    (folder / "main.c").write_text(SOURCE)
    return folder


@pytest.fixture(scope="module")
def info(folder: Path) -> DebugInfo:
    compile_c("void _start(void) {}\n")  # skips without the tools
    return DebugInfo(TOOLCHAIN.compile_c("main.c", flags=("-O0",), folder=folder))


def addresses_of(info: DebugInfo, *lines: int) -> dict[int, int]:
    """The addresses of the code of some lines, counted as often as the number of the line."""
    return {address: line for line in lines for address in info.table.addresses_of("main.c", line)}


def module(info: DebugInfo | None = None, name: str = "main", start: int = 0x10_0000, end: int = 0x20_0000) -> Module:
    return Module(name, start, end, info)


# The formats by name


@pytest.mark.parametrize(
    ("path", "expected"),
    [("a.info", "lcov"), ("b/c.d.lcov", "lcov"), ("x.drcov", "drcov"), (Path("drcov.1.log"), "drcov")],
)
def test_the_suffix_says_the_format(path: str | Path, expected: str) -> None:
    assert coverage_format(path) == expected


@pytest.mark.parametrize("path", ["coverage", "a.txt", ".info", "a.info.gz", ""])
def test_another_suffix_is_refused_and_nothing_is_written(path: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.info, \.lcov, \.drcov, \.log"):
        coverage_format(path)
    with pytest.raises(UsageError):
        CoveredCode().write(tmp_path / (path or "none"))
    assert not list(tmp_path.iterdir())


# Lines


def test_a_line_counts_as_often_as_the_most_executed_of_its_instructions(info: DebugInfo) -> None:
    counts = addresses_of(info, 3, 4)
    third = info.table.addresses_of("main.c", 3)[0]
    inside = {third + 1: 9}  # of the same line
    code = CoveredCode([module(info)], {**counts, **inside})
    (lines,) = code.lines().values()
    assert {line: count for line, count in lines.items() if count} == {3: 9, 4: 4}
    assert {2, 3, 4, 5, 6, 9, 10, 11, 16, 17, 18} == set(lines)


def test_addresses_outside_of_the_program_are_no_lines(info: DebugInfo) -> None:
    code = CoveredCode([module(info)], {0: 1, 0x1000: 5, 1 << 40: 7})
    (lines,) = code.lines().values()
    assert set(lines.values()) == {0}


def test_without_line_numbers_the_error_says_what_to_do(tmp_path: Path) -> None:
    for code in (CoveredCode(), CoveredCode([module()], {0x10_0000: 1})):
        with pytest.raises(UsageError, match="-g"):
            code.lines()
        with pytest.raises(UsageError, match="-g"):
            code.write_lcov(tmp_path / "a.info")
    assert not list(tmp_path.iterdir())


# lcov


class Record(NamedTuple):
    functions: dict[str, tuple[int, int]]
    lines: dict[int, int]


def read_lcov(path: Path) -> tuple[str, dict[str, Record]]:
    """The test's name, and file -> functions (line, count) and lines; checks the sums."""
    test = ""
    records: dict[str, Record] = {}
    starts: dict[str, int] = {}
    name = ""
    for row in path.read_text().splitlines():
        key, _, value = row.partition(":")
        match key:
            case "TN":
                test = value
            case "SF":
                name = value
                records[name] = Record({}, {})
                starts = {}
            case "FN":
                line, function = value.split(",", 1)
                starts[function] = int(line)
            case "FNDA":
                count, function = value.split(",", 1)
                records[name].functions[function] = starts[function], int(count)
            case "DA":
                line, count = value.split(",")
                assert int(line) not in records[name].lines
                records[name].lines[int(line)] = int(count)
            case "FNF":
                assert int(value) == len(records[name].functions)
            case "FNH":
                assert int(value) == sum(count > 0 for _, count in records[name].functions.values())
            case "LF":
                assert int(value) == len(records[name].lines)
            case "LH":
                assert int(value) == sum(count > 0 for count in records[name].lines.values())
            case _:
                assert row == "end_of_record"
                name = ""
    assert not name
    return test, records


def test_lcov_has_functions_and_lines(info: DebugInfo, folder: Path, tmp_path: Path) -> None:
    twice = info.names.address_of("twice")
    counts = {**addresses_of(info, 2, 3, 4, 16), twice: 2, info.names.address_of("_start"): 1}
    code = CoveredCode([module(info)], counts)
    code.write_lcov(tmp_path / "a.info", test="mine")
    code.write(tmp_path / "b.info")
    test, records = read_lcov(tmp_path / "a.info")
    assert test == "mine"
    assert records.keys() == {str(folder / "main.c")}
    record = records[str(folder / "main.c")]
    assert record.functions == {"twice": (2, 2), "never": (9, 0), "_start": (16, 1)}
    assert record.lines == code.lines()[str(folder / "main.c")]
    assert read_lcov(tmp_path / "b.info") == ("", records)


@pytest.mark.skipif(shutil.which("genhtml") is None, reason="genhtml is not installed")
def test_genhtml_reads_it(info: DebugInfo, tmp_path: Path) -> None:
    CoveredCode([module(info)], addresses_of(info, 3, 4)).write_lcov(tmp_path / "a.info")
    done = subprocess.run(
        ["genhtml", "-o", tmp_path / "html", tmp_path / "a.info"],
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    assert "(2 of 11 lines)" in done.stdout
    assert (tmp_path / "html" / "index.html").exists()


# drcov


class Drcov(NamedTuple):
    modules: list[tuple[int, int, str]]
    blocks: list[tuple[int, int, int]]
    """Start, size, module."""


def read_drcov(data: bytes) -> Drcov:
    lines = data.split(b"\n")
    assert lines[:2] == [b"DRCOV VERSION: 2", b"DRCOV FLAVOR: drcov"]
    title, _, count = lines[2].rpartition(b" ")
    assert title == b"Module Table: version 2, count"
    assert lines[3] == b"Columns: id, base, end, entry, path"
    modules = []
    for number, row in enumerate(lines[4 : 4 + int(count)]):
        id, base, end, entry, path = row.split(b", ", 4)
        assert (int(id), int(entry, 16)) == (number, 0)
        modules.append((int(base, 16), int(end, 16), path.decode()))
    title, _, rest = lines[4 + int(count)].partition(b": ")
    assert title == b"BB Table"
    assert rest.endswith(b" bbs")
    table = b"\n".join(lines[5 + int(count) :])
    assert len(table) == 8 * int(rest.removesuffix(b" bbs"))
    return Drcov(modules, list(struct.iter_unpack("<IHH", table)))


def test_drcov_has_modules_and_blocks(tmp_path: Path) -> None:
    modules = [module(name="/kernel, the one.elf"), module(name="boot", start=0x7C00, end=0x7E00)]
    blocks = [BasicBlock(0x7C00, 3), BasicBlock(0x10_0010, 7, (0x10_0010, 0x10_0013)), BasicBlock(0x10_0020, 1)]
    CoveredCode(modules, {}, blocks).write(tmp_path / "a.drcov")
    assert read_drcov((tmp_path / "a.drcov").read_bytes()) == Drcov(
        [(0x10_0000, 0x20_0000, "/kernel, the one.elf"), (0x7C00, 0x7E00, "boot")],
        [(0, 3, 1), (0x10, 7, 0), (0x20, 1, 0)],
    )


def test_what_is_in_no_module_gets_one_for_each_4_gib() -> None:
    high = 0xFFFF_FFFF_8010_0000
    found = read_drcov(drcov_file([BasicBlock(0x8000, 2), BasicBlock(high, 5)], [module()]))
    assert found.modules[1:] == [
        (0, 1 << 32, "[guest memory]"), (0xFFFF_FFFF_0000_0000, 1 << 64, "[guest memory]"),
    ]  # fmt: skip
    assert found.blocks == [(0x8000, 2, 1), (0x8010_0000, 5, 2)]


def test_blocks_larger_than_a_size_can_say_become_several() -> None:
    found = read_drcov(drcov_file([BasicBlock(0x10_0000, 0x2_0001)], [module()]))
    assert found.blocks == [(0, 0xFFFF, 0), (0xFFFF, 0xFFFF, 0), (0x1FFFE, 3, 0)]


@given(
    st.lists(st.tuples(st.integers(0, (1 << 64) - 1), st.integers(1, 0xFFFF))),
    st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(1, 1 << 32)), max_size=5),
)
def test_every_block_can_be_found_again_in_a_drcov_file(
    parts: list[tuple[int, int]], places: list[tuple[int, int]]
) -> None:
    modules = [Module(f"m{number}", start, start + size) for number, (start, size) in enumerate(places)]
    found = read_drcov(drcov_file([BasicBlock(*part) for part in parts], modules))
    assert len(found.modules) >= len(modules)
    again = [(found.modules[number][0] + offset, size) for offset, size, number in found.blocks]
    assert again == parts
    for (start, _), (_, _, number) in zip(parts, found.blocks, strict=True):
        base, end, _ = found.modules[number]
        assert base <= start < end


# Merging


def test_merging_adds_counts_and_keeps_blocks_once() -> None:
    first = CoveredCode(
        [module()], {0x10: 2, 0x12: 1}, [BasicBlock(0x10, 4, (0x10, 0x12))], [BasicBlock(0x20, 2, (0x20,))]
    )
    second = CoveredCode([module()], {0x10: 1, 0x20: 5}, [BasicBlock(0x10, 2, (0x10,)), BasicBlock(0x20, 2, (0x20,))])
    merged = first | second
    assert merged.counts == {0x10: 3, 0x12: 1, 0x20: 5}
    assert merged.addresses == {0x10, 0x12, 0x20}
    assert [block.start for block in merged.blocks] == [0x10, 0x20]
    assert merged.missed == ()
    assert merged.modules == (module(),)
    assert str(merged) == "3 instructions in 2 blocks"
    assert str(first) == "1 of 2 blocks"
    assert CoveredCode.merge(first, second, CoveredCode()).counts == merged.counts
    assert first.counts == {0x10: 2, 0x12: 1}


def test_nothing_merged_is_nothing() -> None:
    assert CoveredCode.merge().addresses == set()
    with pytest.raises(TypeError):
        CoveredCode() | 3  # type: ignore[operator]


def test_different_programs_at_the_same_addresses_are_not_merged() -> None:
    here, there = module(name="a"), module(name="b", start=0x1F_FFFF, end=0x30_0000)
    with pytest.raises(UsageError, match=r"a and b|b and a"):
        CoveredCode([here]) | CoveredCode([there])
    beside = module(name="b", start=0x20_0000, end=0x30_0000)
    assert (CoveredCode([here]) | CoveredCode([beside])).modules == (here, beside)


def test_a_merged_result_has_the_lines_of_all_programs(info: DebugInfo) -> None:
    other = module(name="other", start=0x30_0000, end=0x40_0000)
    merged = CoveredCode([module(info)], addresses_of(info, 3)) | CoveredCode([other], {0x30_0000: 1})
    assert merged.lines() == CoveredCode([module(info)], addresses_of(info, 3)).lines()
