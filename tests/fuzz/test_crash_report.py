"""Whatever state a guest leaves behind, its report is made: nothing raises, and no part is missing."""

from __future__ import annotations

import json
import random
from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from entry_rule_breaks import Bytes
from kvmpy.debug.crash_report import CrashReport
from kvmpy.debug.crash_report.evidence import (
    Console,
    Evidence,
    InterruptControllers,
    LocalApic,
    Pic,
    RecordedException,
    Step,
)
from kvmpy.debug.crash_report.memory_overlay import CopyOnWriteMemory
from kvmpy.exits import Exit, FailEntry, Hlt, InternalError, IoIn, Shutdown
from kvmpy.machine.recent_exits import DeviceAccess
from kvmpy.machine.statistics import AccessCount
from kvmpy.x86 import modes
from kvmpy.x86.registers import (
    GENERAL_REGISTERS,
    SEGMENT_REGISTERS,
    CpuState,
    DescriptorTable,
    Registers,
    Segment,
    SystemRegisters,
)

MEMORY = 0x8000

INTERESTING = [
    0, 1, 2, 7, 8, 0x10, 0x23, 0xFF, 0x400, 0x7C00, 0xFFF, 0x1000, 0x2000, 0x2FF8, 0x7FF8, 0x7FFF, 0x8000, 0xFFFF,
    0x1_0000, 0x10_0000, 0xFFFF_FFFF, 0xFFFF_FFF0, 1 << 47, (1 << 47) - 8, 0xFFFF_8000_0000_0000, (1 << 64) - 1,
    (1 << 64) - 8,
]  # fmt: skip
NUMBERS = st.one_of(st.sampled_from(INTERESTING), st.integers(0, (1 << 64) - 1))
WORDS = st.one_of(st.sampled_from([value & 0xFFFF for value in INTERESTING]), st.integers(0, 0xFFFF))
LIMITS = st.sampled_from([0, 7, 0x1F, 0x67, 0xFFF, 0xFFFF, 0xF_FFFF, 0xFFFF_FFFF])
BIT = st.integers(0, 1)

CONTROL = {
    "cr0": st.one_of(st.sampled_from([0x10, 0x11, 0x6000_0010, 0x8000_0011, 0x8001_0033, 0x8000_0000, 0x1D]), NUMBERS),
    "cr2": NUMBERS,
    "cr3": st.sampled_from([0, 0x1000, 0x2000, 0x7000, 0x8000, 0xFFFF_F000, 1 << 51, 0x1018]),
    "cr4": st.one_of(st.sampled_from([0, 0x20, 0x6A0, 0x10, 0x30_06A0, 0x1020]), NUMBERS),
    "cr8": st.integers(0, 15),
    "efer": st.one_of(st.sampled_from([0, 0x100, 0x500, 0xD00, 0xD01, 0x400]), NUMBERS),
    "apic_base": NUMBERS,
}

segments = st.builds(
    Segment, WORDS, NUMBERS, LIMITS, type=st.integers(0, 15), present=BIT, dpl=st.integers(0, 3), db=BIT, s=BIT, l=BIT,
    g=BIT, avl=BIT, unusable=BIT,
)  # fmt: skip
flat = st.builds(
    Segment, WORDS, st.just(0), st.just(0xFFFF_FFFF), type=st.sampled_from([3, 11]), dpl=st.sampled_from([0, 3]),
    db=BIT, l=BIT, g=st.just(1),
)  # fmt: skip


@st.composite
def states(draw: st.DrawFn) -> CpuState:
    """Registers that no processor would let stand, beside such that are nearly right."""
    state = CpuState(Registers(), SystemRegisters())
    for name in GENERAL_REGISTERS:
        setattr(state.regs, name, draw(NUMBERS))
    for name in SEGMENT_REGISTERS:
        setattr(state.sregs, name, draw(st.one_of(segments, flat)))
    for name, values in CONTROL.items():
        setattr(state.sregs, name, draw(values))
    for name in ("gdt", "idt"):
        setattr(state.sregs, name, DescriptorTable(draw(NUMBERS), draw(WORDS)))
    state.sregs.interrupt = draw(st.one_of(st.none(), st.integers(0, 255)))
    return state


CODES = (
    "cf", "48 cf", "cb", "c3", "0f 22 c0", "0f 22 e0", "0f 30", "cd 30", "cc", "f7 f1", "8e d8", "0f 00 d8", "0f 01 18",
    "ea 00 10 00 00 08 00", "ff 28", "0f 28 04 24", "f3 a4", "6e", "ee", "f4", "0f 0b", "eb fe", "ec a8 80 75 fb", "50",
    "58", "e8 00 00 00 00", "c9", "61", "9d", "0f ae 00", "f0 01 00", "00 00 00 00", "ff ff ff ff", "d7",
    "a1 00 10 00 00", "0f 05", "67 8b 04 25 00 00 00 00", "c4 e2 79 18 00", "0f 01 d1", "0f 23 c0", "8e 00", "0f b2 20",
    "d4 00", "62 00",
)  # fmt: skip


@st.composite
def memories(draw: st.DrawFn) -> Bytes:
    """A little memory: noise or zeros, an instruction here and there, page tables that may lead somewhere."""
    memory = Bytes(MEMORY)
    noise = draw(st.integers(0, 3))
    if noise:
        memory.data[:] = random.Random(noise).randbytes(MEMORY) if noise > 1 else b"\xff" * MEMORY
    for place in draw(st.lists(st.sampled_from([0, 8, 0x1000, 0x2000, 0x7C00, 0x7FF8, 0x7FFF]), max_size=5)):
        code = bytes.fromhex(draw(st.sampled_from(CODES)))[: MEMORY - place]
        memory.write(place, code)
    for table in draw(st.lists(st.sampled_from([0x1000, 0x2000, 0x3000, 0x7000]), max_size=4)):
        entry = draw(st.sampled_from([0, 0x2003, 0x3003, 0x83, 0x1087, 0x9003, 1 << 63 | 0x83, (1 << 64) - 1]))
        memory.write(table, entry.to_bytes(8, "little"))
    return memory


EXITS: st.SearchStrategy[Exit | None] = st.sampled_from(
    [
        None, Shutdown(), Hlt(), IoIn(0x60), FailEntry(0x8000_0021), FailEntry((1 << 64) - 1), FailEntry(7),
        InternalError(1, (0, 1), b"\x0f\x0b" + bytes(13)), InternalError(1, (0,)), InternalError(3, (1, 2, 3)),
        InternalError(99),
    ]
)  # fmt: skip

CONTROLLERS = st.one_of(
    st.none(),
    st.builds(
        InterruptControllers,
        pics=st.sampled_from([(), (Pic(8, 1, 0, 1, False), Pic(0x70, 0xFF, 0xFF, 0xFF, True))]),
        ioapic=st.sampled_from([(), ((2, 0x30),)]),
        ioapic_waits_for_eoi=st.sampled_from([(), (2,)]),
        apic=st.sampled_from([None, LocalApic(0, True, (0x30,), (0x31, 0xFF), 0x40, False, 1000, 0)]),
        pit_programmed=st.booleans(),
    ),
)

ENDS = ("triple fault", "failed", "timeout", "halted", "panic", "stopped", "still running", "")

TEXT = "<script>alert(1)</script> & \x1b[31m\x00 \N{SNOWMAN} \ud800"


@st.composite
def evidences(draw: st.DrawFn) -> Evidence:
    state, memory = draw(states()), draw(memories())
    entry = draw(st.one_of(st.none(), states()))
    recorded = draw(
        st.one_of(
            st.none(), st.builds(RecordedException, st.integers(0, 31), st.one_of(st.none(), WORDS), st.booleans())
        )
    )
    return Evidence(
        state=state,
        memory=CopyOnWriteMemory(memory),
        end=draw(st.sampled_from(ENDS)),
        message=TEXT,
        exit=draw(EXITS),
        registers_lost=draw(st.booleans()) and draw(st.booleans()),
        entry_state=entry,
        ranges=draw(st.sampled_from([(), ((0x1000, 0x1000, "image"), (0x3000, 0x2000, "tables"))])),
        loaded=draw(st.one_of(st.none(), st.just(Bytes(MEMORY)))),
        recorded=recorded,
        controllers=draw(CONTROLLERS),
        halted=draw(st.booleans()),
        exits=(DeviceAccess("port", "read", 0x60, 1, 0xFF), IoIn(0x60), InternalError(1, (), b"\xcd\x30"), Shutdown()),
        unclaimed=(AccessCount("port", "read", 0x1F7, 1, 3), AccessCount("mmio", "write", 1 << 51, 8, 1)),
        devices=((TEXT, "port", 0x60, 1),),
        device_counters={TEXT: {TEXT: 1}},
        consoles=(Console(TEXT, TEXT),),
        memory_map=((0, MEMORY, "RAM"),),
        steps=draw(st.sampled_from([(), (Step(state), Step(state.copy()))])),
        unavailable=draw(st.sampled_from([{}, {TEXT: TEXT}])),
    )


class _Balance(HTMLParser):
    """That every element that is opened is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check(report: CrashReport) -> None:
    page = str(report)
    assert page.startswith(report.summary)
    assert "Traceback" not in page
    assert {section.name: section.unavailable for section in report.sections if section.unavailable} == {}
    assert [name for name in report.unavailable if name != TEXT] == []
    json.dumps(report.as_data(), allow_nan=False)
    html = report._repr_html_()
    assert html.isascii()
    balance = _Balance()
    balance.feed(html)
    balance.close()
    assert not balance.open
    assert not balance.seen - {"div", "style", "p", "b", "i", "code", "details", "summary", "pre", "mark", "ul", "li"}


@given(evidences())
def test_any_state_gives_a_whole_report(evidence: Evidence) -> None:
    check(CrashReport.of(evidence))


@given(st.data(), st.sampled_from([16, 32, 64]), st.binary(min_size=1, max_size=15))
def test_any_instruction_gives_a_whole_report(data: st.DataObject, bits: int, code: bytes) -> None:
    memory = Bytes(MEMORY)
    memory.write(0x1000, code)
    state = {
        16: lambda: modes.real_mode(0x1000),
        32: lambda: modes.protected_mode(0x1000, stack=0x7000),
        64: lambda: modes.long_mode(0x1000, 0x2000, stack=0x7000),
    }[bits]()
    if bits == 64:  # one 2 MiB page
        for table, entry in ((0x2000, 0x3003), (0x3000, 0x4003), (0x4000, 0x83)):
            memory.write(table, entry.to_bytes(8, "little"))
    for name in GENERAL_REGISTERS[:16]:
        setattr(state.regs, name, data.draw(NUMBERS))
    before = bytes(memory.data)
    check(CrashReport.of(Evidence(state, CopyOnWriteMemory(memory))))
    assert memory.data == before
