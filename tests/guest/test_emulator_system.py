"""XGETBV, RDPID, RDTSCP, LAR, LSL, VERR, VERW, STAC, CLAC, INVPCID and hints in software.

What ring 3 may do is compared with the processor. A KVM without VT-x and AMD-V lets ring 3 run with its own descriptor
table: then LAR and its sisters are compared in that table, as far as the processor shows it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from instruction_batch import Batch, assemble_each, batch, compare_batch, xsave_image
from instruction_comparison import RAM, Comparison, Given, PlainProcessor, comparison, xcr0
from kvmpy.x86.descriptors import encode_segment
from kvmpy.x86.emulator import GuestException, perform
from kvmpy.x86.emulator.extended_state import ExtendedState
from kvmpy.x86.registers import DescriptorTable, Segment

pytestmark = pytest.mark.kvm

RAX, RBX, RCX, RDX, RSI = range(5)
ZF, AC = 0x40, 1 << 18
GDT = 0x2_0000
TSC_AUX = 0xC000_0103
UD, GP = 6, 13
SELECTORS = ["lar eax, ebx", "lar rax, rbx", "lar ax, bx", "lsl eax, ebx", "lsl rax, rbx", "verr bx", "verw bx"]
HINTS = ["clwb [rsi]", "cldemote [rsi]", ".byte 0x0f, 0x19, 0xc0", ".byte 0x0f, 0x1d, 0x46, 0x10"]
OTHERS = [
    "xgetbv",
    "rdpid rax",
    "rdtscp",
    "stac",
    "clac",
    "invpcid rax, [rsi]",
    "lar eax, word ptr [rsi]",
    "monitor",
    "mwait",
]


@pytest.fixture(scope="module")
def codes() -> dict[str, bytes]:
    return assemble_each([*SELECTORS, *HINTS, *OTHERS, "verw word ptr [rsi]"])


@pytest.fixture(scope="module")
def states() -> Iterator[Batch]:
    def state(chance: random.Random, number: int, place: int) -> Given:
        given = Given.random(chance)
        given.general[RCX] = chance.choice((0, 1, 1, 2, chance.getrandbits(64)))
        given.general[RSI] = place
        given.xsave = xsave_image(chance, chance.getrandbits(64) & xcr0())
        return given

    with batch(state, "system") as made:
        yield made


def test_xgetbv_shows_what_is_enabled_and_what_is_in_use(states: Batch, codes: dict[str, bytes]) -> None:
    compare_batch(states, codes["xgetbv"], saves=True)


@pytest.mark.parametrize("source", HINTS)
def test_hints_change_nothing(states: Batch, codes: dict[str, bytes], source: str) -> None:
    compare_batch(states, codes[source])


@pytest.mark.parametrize("source", ["stac", "clac", "invpcid rax, [rsi]"])
def test_what_is_for_ring_0_is_refused_in_ring_3(states: Batch, codes: dict[str, bytes], source: str) -> None:
    compare_batch(states, codes[source])
    expected = (GP, 0, None) if source.startswith("invpcid") else (UD, None, None)
    assert states.software(codes[source], 0).exception == expected


def test_protection_keys_are_a_component_of_the_extended_state(processors: Comparison) -> None:
    """Without CR4.PKE they are undefined, as on the processor; with it PKRU is where XSAVE has it."""
    read, write = bytes.fromhex("0f01ee"), bytes.fromhex("0f01ef")
    state = processors.state.copy()

    def cpu(rax: int, *, rcx: int = 0, rdx: int = 0, area: bytes = b"") -> PlainProcessor:
        general = [rax, 0, rcx, rdx, *[0] * 12, 0x1000, 2]
        made = PlainProcessor(processors.memory, state.sregs, general, area or bytes(0xB00))
        made.extended = ExtendedState(bytearray(area or bytes(0xB00)), {9: (0xA80, 8, False)})
        return made

    for code in (read, write):
        assert processors.native(code, Given([0] * 16)).exception in ((UD, None, None), (GP, 0, None))
        with pytest.raises(GuestException) as undefined:
            perform(cpu(0), code + bytes(15), 64)
        assert undefined.value.event.vector == UD
    state.sregs.cr4 |= 1 << 22  # PKE
    writer = cpu(0xFFFF_FFFF_1234_5678)
    perform(writer, write + bytes(15), 64)
    reader = cpu(77, rdx=5, area=bytes(writer.extended.area))
    perform(reader, read + bytes(15), 64)
    assert (reader.general[0], reader.general[3]) == (0x1234_5678, 0)
    for code, rcx, rdx in ((read, 1, 0), (write, 1, 0), (write, 0, 1)):
        with pytest.raises(GuestException) as refused:
            perform(cpu(0, rcx=rcx, rdx=rdx), code + bytes(15), 64)
        assert (refused.value.event.vector, refused.value.event.error_code) == (GP, 0)


def test_monitor_and_mwait_do_nothing_in_ring_0(processors: Comparison, codes: dict[str, bytes]) -> None:
    general = [0x2000, *[0] * 15]
    for code in (codes["monitor"], codes["mwait"]):
        after = perform_with(processors, code, general)
        assert (after[:16], after[16] - 0x1000) == (general, 3)
        with pytest.raises(GuestException) as undefined:
            perform_with(processors, code, general, ring=3)
        assert undefined.value.event.vector == UD
    with pytest.raises(GuestException) as unmapped:
        perform_with(processors, codes["monitor"], [RAM + 8, *[0] * 15])
    assert unmapped.value.event.vector == 14


@pytest.fixture(scope="module")
def processors() -> Iterator[Comparison]:
    with comparison() as pair:
        yield pair


def perform_with(
    processors: Comparison, code: bytes, general: list[int], *, ring: int = 0, flags: int = 0
) -> list[int]:
    """What the registers are after it, RIP and RFLAGS too; TSC_AUX is 7, the TSC 5 * 2^32 + 6."""
    state = processors.state.copy()
    state.sregs.ss = state.sregs.ss.replace(dpl=ring)
    cpu = PlainProcessor(processors.memory, state.sregs, [*general, 0x1000, flags | 2], b"")
    cpu.msrs[TSC_AUX] = 7
    cpu.tsc = 5 << 32 | 6
    perform(cpu, code + bytes(15), 64)
    return cpu.general


def test_rdpid_and_rdtscp_read_tsc_aux_as_the_processor_does(processors: Comparison, codes: dict[str, bytes]) -> None:
    ones = [(1 << 64) - 1] * 16
    after = perform_with(processors, codes["rdpid rax"], ones)
    assert after[:16] == [7, *ones[1:]]
    after = perform_with(processors, codes["rdtscp"], ones)
    assert (after[RAX], after[RDX], after[RCX]) == (6, 5, 7)
    # The processor's own TSC_AUX is the host's here: the shape is the same, registers are written in full.
    given = Given(ones)
    number = processors.native(codes["rdpid rax"], given).general
    stamp = processors.native(codes["rdtscp"], given).general
    assert number[1:] == ones[1:15]
    assert number[RAX] == stamp[RCX] < 1 << 32
    assert stamp[RAX] < 1 << 32 > stamp[RDX]
    assert [stamp[RBX], *stamp[4:]] == ones[:12]


def test_stac_and_clac_change_ac_only(processors: Comparison, codes: dict[str, bytes]) -> None:
    for before in (0, 0x8D5, 0x8D5 | AC):
        zeros = [0] * 16
        assert perform_with(processors, codes["stac"], zeros, flags=before)[17] == before | AC | 2
        assert perform_with(processors, codes["clac"], zeros, flags=before)[17] == before & ~AC | 2


# Selectors


def lar_mask(source: str) -> int:
    """Of what LAR gives, bits 19 to 16 are undefined (SDM vol. 2)."""
    return ~0xF_0000 if source.startswith("lar") else -1


def outcomes(
    processors: Comparison, codes: dict[str, bytes], selector: int, *, native: bool
) -> dict[str, tuple[int, int]]:
    """What each instruction makes of a selector: RAX and ZF."""
    found: dict[str, tuple[int, int]] = {}
    for source in SELECTORS:
        given = Given([0x1234_5678_9ABC_DEF0] * 16)
        given.general[RBX] = selector
        result = (processors.native if native else processors.software)(codes[source], given)
        assert result.exception is None
        found[source] = result.general[RAX] & lar_mask(source), result.flags & ZF
    return found


def test_selectors_in_the_descriptor_table_that_ring_3_has(processors: Comparison, codes: dict[str, bytes]) -> None:
    """Descriptors that LAR and LSL of the processor show are rebuilt; then all four must agree for every selector."""
    sregs = processors.state.sregs
    own = sregs.gdt
    table = bytearray(0x100)
    shown = {}
    for selector in range(0, 0x100, 8):
        natively = shown[selector] = outcomes(processors, codes, selector | 3, native=True)
        (access, seen), (limit, _) = natively["lar eax, ebx"], natively["lsl eax, ebx"]
        if seen:
            table[selector : selector + 8] = rebuilt(access, limit)
    assert any(table)
    processors.memory.write(GDT, bytes(table))
    try:
        sregs.gdt = DescriptorTable(GDT, len(table) - 1)
        for selector, natively in shown.items():
            assert outcomes(processors, codes, selector | 3, native=False) == natively, hex(selector)
            low = outcomes(processors, codes, selector, native=True)
            assert outcomes(processors, codes, selector, native=False) == low, hex(selector)
    finally:
        sregs.gdt = own


def rebuilt(access: int, limit: int) -> bytes:
    """A descriptor with those access rights, as LAR shows them, and that limit."""
    value = access << 32
    if access >> 23 & 1:
        limit >>= 12
    return (value & ~(0xF << 48) | limit & 0xFFFF | (limit >> 16) << 48).to_bytes(8, "little")


SEGMENT_TYPES = [(s, kind) for s in (0, 1) for kind in range(16)]
# SDM vol. 2, LAR and LSL, tables of valid types; 64-bit mode has only 64-bit system descriptors.
LAR_LEGACY, LSL_LEGACY = {1, 2, 3, 4, 5, 9, 11, 12}, {1, 2, 3, 9, 11}
LAR_LONG, LSL_LONG = {2, 9, 11, 12}, {2, 9, 11}


@pytest.mark.parametrize("ring", [0, 3])
def test_every_type_of_descriptor_is_judged_as_the_manual_says(
    processors: Comparison, codes: dict[str, bytes], ring: int
) -> None:
    sregs = processors.state.sregs
    own = sregs.gdt
    try:
        sregs.gdt = DescriptorTable(GDT, 0x1F)
        for s, kind in SEGMENT_TYPES:
            for dpl in range(4):
                segment = Segment(8, 0x12345, 0x7_7FFF, type=kind, s=s, dpl=dpl, present=kind & 1)
                processors.memory.write(GDT + 8, encode_segment(segment))
                for rpl in range(4):
                    judge(processors, codes, ring, segment, 8 | rpl)
    finally:
        sregs.gdt = own


def judge(processors: Comparison, codes: dict[str, bytes], ring: int, segment: Segment, selector: int) -> None:
    code, data = segment.s and segment.type & 8, segment.s and not segment.type & 8
    conforming = code and segment.type & 4
    reach = conforming or segment.dpl >= max(ring, selector & 3)
    system = not segment.s
    expected = {
        "lar eax, ebx": reach and (not system or segment.type in LAR_LONG),
        "lsl eax, ebx": reach and (not system or segment.type in LSL_LONG),
        "verr bx": reach and bool(data or (code and segment.type & 2)),
        "verw bx": segment.dpl >= max(ring, selector & 3) and bool(data and segment.type & 2),
    }
    for source, good in expected.items():
        general = [0x1234_5678_9ABC_DEF0] * 16
        general[RBX] = selector
        after = perform_with(processors, codes[source], general, ring=ring)
        assert bool(after[17] & ZF) == good, (source, segment, hex(selector), ring)
        if source.startswith("v") or not good:
            assert after[RAX] == general[RAX]
        elif source.startswith("lsl"):
            assert after[RAX] == 0x7_7FFF
        else:
            access = segment.type | segment.s << 4 | segment.dpl << 5 | segment.present << 7
            assert after[RAX] & lar_mask(source) == access << 8


@pytest.mark.parametrize("selector", [0, 1, 2, 3, 0x20, 0x28, 0xFFF8, 0x1_0008, 0x0C])
def test_null_and_what_is_outside_the_table_is_no_descriptor(
    processors: Comparison, codes: dict[str, bytes], selector: int
) -> None:
    """The table ends at 0x1f, there is no LDT; bits above 15 of a register do not count."""
    sregs = processors.state.sregs
    own, ldt = sregs.gdt, sregs.ldt
    processors.memory.write(GDT, encode_segment(Segment(0, 0, 0xFFFF, type=3)) * 4)
    try:
        sregs.gdt, sregs.ldt = DescriptorTable(GDT, 0x1F), ldt.replace(unusable=1)
        for source in SELECTORS:
            general = [selector] * 16
            good = bool(perform_with(processors, codes[source], general)[17] & ZF)
            assert good == (selector == 0x1_0008), source
    finally:
        sregs.gdt, sregs.ldt = own, ldt


def test_a_selector_may_be_in_memory_and_in_the_local_table(processors: Comparison, codes: dict[str, bytes]) -> None:
    sregs = processors.state.sregs
    ldt = sregs.ldt
    processors.memory.write(GDT, bytes(8) + encode_segment(Segment(0, 0, 0xFFFF, type=3)))
    processors.memory.write(GDT + 0x100, (0x0C).to_bytes(2, "little"))
    try:
        sregs.ldt = Segment(0x30, GDT, 0xF, type=2, s=0)
        general = [GDT + 0x100] * 16
        assert perform_with(processors, codes["verw word ptr [rsi]"], general)[17] & ZF
        after = perform_with(processors, codes["lar eax, word ptr [rsi]"], general)
        assert (after[RAX], after[17] & ZF) == (0x9300, ZF)
    finally:
        sregs.ldt = ldt
