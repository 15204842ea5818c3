"""What notebooks show: HTML that is well-formed, escaped, and says what the text says."""

from __future__ import annotations

import unicodedata
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.debug.disassembly import Instruction
from kvmpy.debug.prompt.command_list import CommandList
from kvmpy.debug.prompt.disassembly_listing import DisassemblyListing
from kvmpy.debug.prompt.exit_listing import ExitListing
from kvmpy.debug.prompt.hex_dump import HexDump
from kvmpy.debug.prompt.register_changes import register_changes
from kvmpy.debug.prompt.stack_listing import StackListing
from kvmpy.debug.prompt.stopped import Place, Stopped
from kvmpy.debug.symbols import Symbol, SymbolTable
from kvmpy.exits import Hlt
from kvmpy.machine import End, Outcome
from kvmpy.machine.statistics import AccessCount, Statistics
from kvmpy.memory import GuestMemory, MemoryRegion
from kvmpy.x86 import modes
from kvmpy.x86.html_text import escaped, preformatted
from kvmpy.x86.page_walk import walk
from kvmpy.x86.register_text import rflags_text
from kvmpy.x86.registers import Registers


class Page(HTMLParser):
    """The text of some HTML, and what of it is marked. Fails for tags that are not closed in their order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text = ""
        self.marked: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("pre", "mark")
        self.open.append(tag)
        if tag == "mark":
            self.marked.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        assert self.open
        self.text += data
        if self.open[-1] == "mark":
            self.marked[-1] += data


@given(st.text(st.characters()))
def test_any_text_comes_out_as_it_went_in(text: str) -> None:
    visible = "".join(
        "\ufffd" if unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t" else character
        for character in text
    )
    assert Page(f"<pre>{escaped(text)}</pre>").text == visible
    assert Page(preformatted(text)).text == visible


@given(st.text("ab<&>'\"", min_size=1), st.text("ab<&>'\"", min_size=1), st.text("ab<&>'\"", min_size=1))
def test_a_marked_word_is_marked_where_it_is_first(before: str, word: str, after: str) -> None:
    page = Page(preformatted(before + word + after, [word]))
    assert page.text == before + word + after
    assert page.marked == [word]


def test_a_word_that_is_not_there_marks_nothing() -> None:
    assert Page(preformatted("some text", ["other"])).marked == []


STATE = modes.long_mode(0x1000, 0x2000)
SYMBOLS = SymbolTable([Symbol("operator<<", 0x1000, 0x20, "function")])
STATISTICS = Statistics(
    (AccessCount("port", "write", 0x3F8, 1, 6),), (AccessCount("mmio", "read", 0xD000_0000, 4, 1),), {"HLT": 1}
)
LISTING = DisassemblyListing((Instruction(0x1000, b"\xc3", "ret", ""),), SYMBOLS, 0x1000)


@pytest.mark.parametrize(
    "value",
    [
        STATE.regs,
        STATE.sregs,
        STATE,
        STATISTICS,
        HexDump(0x1000, b"<script>&\"'"),
        LISTING,
        StackListing(0x7FF8, 8, (0x1004,), SYMBOLS),
        ExitListing([Hlt()]),
        CommandList({"go": lambda where="<here>": None}),
        Outcome(End.HALTED, "hlt, next rip 0x1001"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_it_is_the_text_in_fixed_width(value: Any) -> None:
    html = value._repr_html_()
    assert html.startswith("<pre")
    assert Page(html).text == str(value)


def test_statistics_of_nothing_say_so() -> None:
    assert Page(Statistics((), (), {})._repr_html_()).text == "nothing so far"


def test_a_segment_says_what_its_type_is() -> None:
    page = Page(STATE.sregs.cs._repr_html_())
    assert page.text == f"{STATE.sregs.cs!r}\ncode, readable, accessed"


def test_a_walk_marks_why_it_failed() -> None:
    memory = GuestMemory()
    memory.add(MemoryRegion.anonymous(0, 0x1000))
    state = modes.long_mode(0, 0)
    failed = walk(memory, state.sregs, 0x40_0000)
    page = Page(failed._repr_html_())
    assert page.text == str(failed)
    assert page.marked == ["PML4E not present"]
    assert Page(walk(memory, modes.real_mode(0).sregs, 0x400)._repr_html_()).marked == []


def test_the_instruction_that_comes_next_is_marked() -> None:
    assert Page(LISTING._repr_html_()).marked == [str(LISTING).splitlines()[1]]


def test_a_bad_outcome_is_marked_and_brings_its_report() -> None:
    class Report:
        def _repr_html_(self) -> str:
            return preformatted("the IDT is <missing>")

    outcome = Outcome(End.TRIPLE_FAULT, "vCPU 0 shut down")
    assert Page(outcome._repr_html_()).marked == ["triple fault"]
    outcome.report = Report()  # type: ignore[assignment]
    assert Page(outcome._repr_html_()).text == "triple fault: vCPU 0 shut downthe IDT is <missing>"


def test_a_stop_marks_the_registers_that_changed_among_all() -> None:
    after = STATE.copy()
    after.regs = Registers(rax=5, r8=0x10, rflags=0x46, rip=0x1002, rsp=STATE.regs.rsp)
    after.sregs.cr2 = 0xDEAD000
    changes = register_changes(STATE, after)
    page = Page(Stopped(Place(0, 0x1002, instruction="ret"), after, changes)._repr_html_())
    assert page.text.startswith(f"0x1002\n=> ret\n{after.regs}\n")
    assert page.marked == [
        "rax 0000000000000005",
        "r8  0000000000000010",
        f"rflags {rflags_text(0x46)}",
        str(changes[-1]),
    ]
