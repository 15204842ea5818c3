"""What the prompt shows: values in hex, memory dumps, register changes, listings, source lines."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.debug.disassembly import Instruction
from kvmpy.debug.prompt.command_list import CommandList
from kvmpy.debug.prompt.disassembly_listing import DisassemblyListing
from kvmpy.debug.prompt.exit_listing import ExitListing
from kvmpy.debug.prompt.hex_dump import HexDump
from kvmpy.debug.prompt.hex_text import shown
from kvmpy.debug.prompt.register_changes import register_changes
from kvmpy.debug.prompt.source_text import line_text, short_path
from kvmpy.debug.prompt.stack_listing import StackListing
from kvmpy.debug.prompt.stopped import Place, Stopped
from kvmpy.debug.symbols import SourceLine, Symbol, SymbolTable
from kvmpy.exits import Hlt
from kvmpy.machine import End, Outcome
from kvmpy.machine.recent_exits import DeviceAccess
from kvmpy.x86 import modes
from kvmpy.x86.flags import Rflags
from kvmpy.x86.registers import CpuState, DescriptorTable, Registers

SYMBOLS = SymbolTable([Symbol("main", 0x1000, 0x20, "function"), Symbol("puts", 0x1020, 0x10, "function")])

# Values


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (255, "0xff"),
        (-1, "-0x1"),
        (0, "0x0"),
        (True, "True"),
        (1.5, "1.5"),
        ("7", "'7'"),
        (b"7", "b'7'"),
        ([], "[]"),
        ((), "()"),
        (set(), "set()"),
        ([1, True, [16]], "[0x1, True, [0x10]]"),
        ((1,), "(0x1,)"),
        ((1, 2), "(0x1, 0x2)"),
        ({16}, "{0x10}"),
        (frozenset({16}), "frozenset({0x10})"),
        ({1: {2: 3}}, "{0x1: {0x2: 0x3}}"),
        (Rflags.ZF, repr(Rflags.ZF)),
        (End.HALTED, repr(End.HALTED)),
        (range(3), "range(0, 3)"),
        (Outcome(End.HALTED, "hlt"), "halted: hlt"),
        (Registers(rax=1), str(Registers(rax=1))),
        (Symbol("main", 0x1000), "Symbol(name='main', address=0x1000, size=0x0, kind='label', module='')"),
        (Outcome, repr(Outcome)),
    ],
)  # fmt: skip
def test_numbers_are_in_hex_and_the_rest_as_it_shows_itself(value: object, text: str) -> None:
    assert shown(value) == text


def test_classes_of_others_show_themselves() -> None:
    class Port(int):
        pass

    @dataclass
    class Mine:
        port: int

    assert shown(Port(16)) == "16"
    assert shown([Port(16), Mine(16)]) == f"[16, {Mine(16)!r}]"


def test_a_list_that_contains_itself_comes_to_an_end() -> None:
    endless: list[object] = [16]
    endless.append(endless)
    assert shown(endless) == "[0x10, ...]"
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    assert shown(deep).count("[") == 20


@given(st.recursive(st.integers() | st.booleans() | st.text(), lambda inner: st.lists(inner) | st.tuples(inner, inner)))
def test_what_is_shown_of_plain_values_is_python_for_the_same_value(value: object) -> None:
    assert eval(shown(value)) == value


# Memory


def test_a_dump_has_rows_of_sixteen_at_multiples_of_sixteen() -> None:
    assert str(HexDump(0x1006, b"Hello, \x00\xffworld!")).splitlines() == [
        "0x1000                    48 65  6c 6c 6f 2c 20 00 ff 77        Hello, ..w",
        "0x1010  6f 72 6c 64 21                                    orld!",
    ]


def test_what_is_not_there_is_shown_so() -> None:
    dump = HexDump(0x1FFE, (0x41, 0x42, None, None))
    assert str(dump).splitlines() == [
        f"0x1ff0  {'':23}  {'':17} 41 42  {'':14}AB",
        f"0x2000  {'?? ??':23}  {'':23}  ??",
    ]
    assert dump.data == b"AB\0\0"


def test_nothing_and_the_last_byte_can_be_dumped() -> None:
    assert str(HexDump(0x1000, b"")) == ""
    assert str(HexDump((1 << 64) - 1, b"z")).endswith("7a  " + " " * 15 + "z")


@given(st.integers(0, 1 << 40), st.binary(max_size=100))
def test_a_dump_tells_every_byte(address: int, data: bytes) -> None:
    found = []
    for row in str(HexDump(address, data)).splitlines():
        start, digits = int(row.split()[0], 16), row[row.index("  ") :][: 2 + 49]
        assert start % 16 == 0
        found += digits.split()
    assert bytes.fromhex("".join(found)) == data


# Registers


def changes(change: Callable[[CpuState], object], before: CpuState | None = None) -> list[str]:
    before = before if before is not None else modes.long_mode(0x1000, 0x2000)
    after = before.copy()
    change(after)
    return [str(line) for line in register_changes(before, after)]


def test_a_change_shows_the_old_and_the_new_value() -> None:
    def change(state: CpuState) -> None:
        state.regs.rax, state.regs.rip, state.sregs.cr2 = 5, 0x1002, 0xDEAD000

    assert changes(change) == ["rax     0x0 -> 0x5", "cr2     0x0 -> 0xdead000"]
    assert changes(lambda state: None) == []


def test_flags_that_were_set_and_cleared_have_names() -> None:
    def change(state: CpuState) -> None:
        state.regs.rflags = int(Rflags.FIXED1 | Rflags.ZF | Rflags.PF)
        state.sregs.cr0 &= ~(1 << 31)
        state.sregs.cr4 |= 1 << 20
        state.sregs.efer |= 1 << 63  # a bit without a name

    before = modes.long_mode(0x1000, 0x2000)
    before.regs.rflags = int(Rflags.FIXED1 | Rflags.CF)
    cr0, cr4, efer = before.sregs.cr0, before.sregs.cr4, before.sregs.efer
    assert changes(change, before) == [
        "rflags  0x3 -> 0x46 (+PF +ZF -CF)",
        f"cr0     {cr0:#x} -> {cr0 & ~(1 << 31):#x} (-PG)",
        f"cr4     {cr4:#x} -> {cr4 | 1 << 20:#x} (+SMEP)",
        f"efer    {efer:#x} -> {efer | 1 << 63:#x}",
    ]


def test_the_resume_flag_is_not_the_guest_s() -> None:
    def change(state: CpuState) -> None:
        state.regs.rflags |= Rflags.RF

    assert changes(change) == []


def test_segments_and_tables_show_the_fields_that_changed() -> None:
    def change(state: CpuState) -> None:
        state.sregs.ds = state.sregs.ds.replace(selector=0x23, base=0x400, dpl=3)
        state.sregs.gdt = DescriptorTable(0x5000, 0x17)
        state.sregs.interrupt = 0x20

    before = modes.long_mode(0x1000, 0x2000)
    before.sregs.ds = before.sregs.ds.replace(selector=0x10)
    before.sregs.gdt = DescriptorTable(0x5000, 0x2F)
    assert changes(change, before) == [
        "ds      selector 0x10 -> 0x23, base 0x0 -> 0x400, dpl 0x0 -> 0x3",
        "gdt     limit 0x2f -> 0x17",
        "interrupt  none -> 0x20",
    ]


# Where the guest is


def test_a_stop_says_why_where_and_what_changed() -> None:
    state = modes.long_mode(0x1000, 0x2000)
    after = state.copy()
    after.regs.rbx = 7
    place = Place(1, 0x1004, "main+0x4", source=SourceLine("/nowhere/main.c", 12), instruction="ret")
    outcome = Outcome(End.TRIPLE_FAULT, "vCPU 1 shut down", vcpu=1)
    stopped = Stopped(place, after, register_changes(state, after), str(outcome), outcome, others=True)
    assert str(stopped).splitlines() == [
        "triple fault: vCPU 1 shut down",
        "report() explains it",
        "vCPU 1 at 0x1004 <main+0x4>, /nowhere/main.c:12",
        "=> ret",
        "   rbx     0x0 -> 0x7",
    ]


def test_a_place_in_a_segment_and_one_without_code_say_so() -> None:
    assert str(Place(0, 0x12345, far="1000:2345")) == "0x12345 (1000:2345)\n=> no code can be read there"


def test_a_source_line_shows_its_text_and_a_short_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "main.c"
    source.write_text("int main(void)\n{\n    return 0;\n}\n")
    monkeypatch.chdir(tmp_path)
    place = Place(0, 0x1000, source=SourceLine(str(source), 3), instruction="xor eax, eax")
    assert str(place) == "0x1000, main.c:3  return 0;\n=> xor eax, eax"
    assert short_path("/elsewhere/main.c") == "/elsewhere/main.c"
    assert line_text(SourceLine(str(source), 99)) == ""


def test_what_the_image_names_as_its_source_is_opened_only_when_it_is_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with open(tmp_path / "large", "wb") as large:
        large.truncate(1 << 40)
    for path in (tmp_path / "fifo", tmp_path / "large", tmp_path, tmp_path / "none", "/dev/zero", "a\0b", ""):
        assert line_text(SourceLine(str(path), 1)) == ""


# Listings


def test_disassembly_shows_bytes_symbols_and_the_next_instruction() -> None:
    listing = DisassemblyListing(
        (
            Instruction(0x101E, b"\x31\xc0", "xor", "eax, eax"),
            Instruction(0x1020, b"\xe8\xdb\xff\xff\xff", "call", "0x1000"),
        ),
        SYMBOLS, 0x1020, "advice",
    )  # fmt: skip
    assert str(listing).splitlines() == [
        "<main+0x1e>:",
        "   0x101e  31 c0                    xor eax, eax",
        "<puts>:",
        "=> 0x1020  e8 db ff ff ff           call 0x1000 <main>",
        "(advice)",
    ]


def test_a_stack_shows_words_and_the_symbols_that_they_may_be_in() -> None:
    listing = StackListing(0x7FF8, 8, (0x1005, 5, None), SYMBOLS)
    assert str(listing).splitlines() == [
        "0x7ff8  +0x00  0000000000001005  <main+0x5>",
        "0x8000  +0x08  0000000000000005",
        "0x8008  +0x10  ????????????????",
    ]
    assert str(StackListing(0x10, 2, (0xABC,), SYMBOLS)) == "0x10  +0x00  0abc"


def test_exits_are_a_tuple_that_prints_as_lines() -> None:
    write = DeviceAccess("port", "write", 0x3F8, 1, 0x41)
    listing = ExitListing([write, Hlt()])
    assert listing[0] is write
    assert str(listing).splitlines() == ["port write 0x3f8 <- 0x41", repr(Hlt())]
    assert str(ExitListing()) == "no exit so far"


def test_commands_are_listed_with_parameters_and_the_first_line_of_their_text() -> None:
    def go(where: int, *, fast: bool = False, **options: bool) -> None:
        """Go there.

        And not back.
        """

    def with_so_many_parameters(first: int, second: int, third: int) -> None:
        """Do it."""

    listed = str(CommandList({"go": go, "with_so_many_parameters": with_so_many_parameters}))
    assert listed.splitlines() == [
        "go(where, fast=False)           Go there.",
        "with_so_many_parameters(first, second, third)",
        "                                Do it.",
    ]
