"""The XSAVE family in software, against the processor.

XSAVES and XRSTORS are for ring 0 only, where the processor cannot be asked on every host: they are compared with XSAVEC
and XRSTOR, from which they differ by what the manual says (SDM vol. 1, 13.11 and 13.12).
"""

from __future__ import annotations

import random
import struct
import threading
from collections.abc import Iterator

import pytest

from gnu_toolchain import assemble
from instruction_batch import ROOM, Batch, assemble_each, batch, canonical, compare_batch, counted, xsave_image
from instruction_comparison import AREA, DATA, RAM, Comparison, Given, comparison, components, xcr0
from kvmpy.kvm import kick
from kvmpy.machine.xsave_layout import xsave_layout

pytestmark = pytest.mark.kvm

XMM, MXCSR, XSTATE_BV, XCOMP_BV, HEADER = 160, 24, 512, 520, 576
COMPACTED = 1 << 63
RAX, RDX, RSI = 0, 3, 4
GP, UD, NM = 13, 6, 7

SAVES = ["xsave [rsi]", "xsave64 [rsi]", "xsaveopt [rsi]", "xsaveopt64 [rsi]", "xsavec [rsi]", "xsavec64 [rsi]"]
RESTORES = ["xrstor [rsi]", "xrstor64 [rsi]"]
RING_0 = ["xsaves [rsi]", "xsaves64 [rsi]", "xrstors [rsi]", "xrstors64 [rsi]"]


@pytest.fixture(scope="module")
def codes() -> dict[str, bytes]:
    return assemble_each([*SAVES, *RESTORES, *RING_0])


def random_mask(chance: random.Random) -> int:
    """EDX:EAX: often all or few components."""
    return chance.choice(((1 << 64) - 1, chance.getrandbits(64), 1 << chance.randrange(10), chance.getrandbits(10)))


def saving(chance: random.Random, number: int, place: int) -> Given:
    given = Given.random(chance, AREA)
    mask = random_mask(chance)
    given.general[RAX], given.general[RDX], given.general[RSI] = mask & 0xFFFF_FFFF, mask >> 32, place
    given.xsave = xsave_image(chance, chance.getrandbits(64) & xcr0(), unmasked=True)
    return given


@pytest.fixture(scope="module")
def saves() -> Iterator[Batch]:
    with batch(saving, "saves") as made:
        yield made


@pytest.mark.parametrize("source", SAVES)
def test_saving_writes_what_the_processor_writes(saves: Batch, codes: dict[str, bytes], source: str) -> None:
    compare_batch(saves, codes[source], saves=True)


@pytest.fixture(scope="module")
def restores(codes: dict[str, bytes]) -> Iterator[Batch]:
    """States with an area in memory that the processor saved of another state, and now and then damaged."""
    with batch(saving, "restores") as made:
        areas: list[list[bytes]] = []
        for save in ("xsave64 [rsi]", "xsavec64 [rsi]"):
            empty = [Given(list(given.general), 0, bytes(ROOM), given.xsave) for given in made.cases]
            for given in empty:
                given.general[RAX] = given.general[RDX] = 0xFFFF_FFFF if save == "xsave64 [rsi]" else 0xFFFF_FFF7
            made.load(empty)
            areas.append([outcome.data for outcome in made.native(codes[save])])
        chance = random.Random("restores")
        made.load(
            [
                Given(given.general, given.flags, damaged(chance, bytearray(areas[number % 2][-number])), given.xsave)
                for number, given in enumerate(
                    [saving(chance, number, made.place(number)) for number in range(len(empty))]
                )
            ]
        )
        yield made


def damaged(chance: random.Random, area: bytearray) -> bytes:
    """The area as it is, with other components in its header, or with something that XRSTOR refuses."""
    kind = chance.randrange(8)
    (present,) = struct.unpack_from("<Q", area, XSTATE_BV)
    if kind == 1:
        struct.pack_into("<Q", area, XSTATE_BV, present & chance.getrandbits(10))
    elif kind == 2:
        struct.pack_into("<Q", area, XSTATE_BV, present | 1 << chance.randrange(64))
    elif kind == 3:
        area[chance.randrange(XCOMP_BV, HEADER)] ^= 1 << chance.randrange(8)
    elif kind == 4:
        struct.pack_into("<I", area, MXCSR, chance.getrandbits(32) & chance.getrandbits(32))
    elif kind == 5:
        area[:24] = chance.randbytes(24)
        struct.pack_into("<QQ", area, 8, chance.getrandbits(47), chance.getrandbits(47))
    return bytes(area)


@pytest.mark.parametrize("source", RESTORES)
def test_restoring_gives_the_registers_of_the_processor(restores: Batch, codes: dict[str, bytes], source: str) -> None:
    compare_batch(restores, codes[source])


# One by one, through KVM_SET_XSAVE and KVM_GET_XSAVE, as the emulator gets and sets them.


@pytest.fixture(scope="module")
def processors() -> Iterator[Comparison]:
    with comparison() as pair:
        yield pair


@pytest.mark.parametrize("source", ["xsave64 [rsi]", "xsavec64 [rsi]", "xrstor64 [rsi]"])
def test_the_area_that_kvm_gives_and_takes_does_the_same(
    processors: Comparison, codes: dict[str, bytes], source: str
) -> None:
    chance = random.Random(source)
    code = codes[source]
    for number in range(200):
        given = saving(chance, number, DATA)
        given.xsave += bytes(0x1000 - AREA)
        if source in RESTORES:
            given.data = xsave_image(chance, chance.getrandbits(64) & xcr0())
        native = processors.native(code, given)
        if source in SAVES:
            given = counted(given, struct.unpack_from("<Q", native.xsave, XSTATE_BV)[0])
        software = processors.software(code, given)
        assert canonical(software.xsave) == canonical(native.xsave), number
        assert (software.data, software.general, software.exception) == (native.data, native.general, native.exception)


def in_ring_0(processors: Comparison, code: bytes, given: Given) -> tuple[object, ...]:
    """By the emulator, at CPL 0: memory, registers, exception."""
    sregs = processors.state.sregs
    user = sregs.ss
    sregs.ss = user.replace(dpl=0)
    try:
        result = processors.software(code, given)
    finally:
        sregs.ss = user
    return result.data, canonical(result.xsave), result.general, result.exception


def test_xsaves_writes_what_xsavec_writes(processors: Comparison, codes: dict[str, bytes]) -> None:
    chance = random.Random("xsaves")
    for number in range(1000):
        given = saving(chance, number, DATA)
        for wide in ("", "64"):
            expected = in_ring_0(processors, codes[f"xsavec{wide} [rsi]"], given)
            assert in_ring_0(processors, codes[f"xsaves{wide} [rsi]"], given) == expected


def test_xrstors_restores_what_xrstor_restores_but_takes_no_standard_format(
    processors: Comparison, codes: dict[str, bytes]
) -> None:
    chance = random.Random("xrstors")
    refused = 0
    for number in range(1000):
        given = saving(chance, number, DATA)
        given.data = bytes(AREA)
        saved = in_ring_0(processors, codes["xsavec64 [rsi]" if number % 4 else "xsave64 [rsi]"], given)[0]
        assert isinstance(saved, bytes)
        again = saving(chance, number, DATA)
        again.data = damaged(chance, bytearray(saved[:AREA]))
        compacted = struct.unpack_from("<Q", again.data, XCOMP_BV)[0] & COMPACTED
        expected = in_ring_0(processors, codes["xrstor64 [rsi]"], again)
        restored = in_ring_0(processors, codes["xrstors64 [rsi]"], again)
        if compacted:
            assert restored == expected
        else:
            assert restored[3] == (GP, 0, None)
        refused += restored[3] is not None
    assert 300 < refused < 900


@pytest.mark.parametrize("source", RING_0)
def test_the_supervisor_forms_are_for_ring_0(processors: Comparison, codes: dict[str, bytes], source: str) -> None:
    given = saving(random.Random(0), 0, DATA)
    assert processors.software(codes[source], given).exception == (GP, 0, None)


@pytest.mark.parametrize("source", [*SAVES, *RESTORES])
def test_an_area_is_aligned_to_64_bytes(processors: Comparison, source: str) -> None:
    given = saving(random.Random(0), 0, DATA + 16)
    assert processors.software(assemble(source, bits=64), given).exception == (GP, 0, None)


@pytest.mark.parametrize("source", [*SAVES, *RESTORES, *RING_0])
def test_the_control_registers_can_forbid_all_of_them(
    processors: Comparison, codes: dict[str, bytes], source: str
) -> None:
    given, sregs = saving(random.Random(0), 0, DATA), processors.state.sregs
    cr0, cr4 = sregs.cr0, sregs.cr4
    try:
        sregs.cr0 |= 1 << 3  # TS
        assert in_ring_0(processors, codes[source], given)[3] == (NM, None, None)
        sregs.cr4 &= ~(1 << 18)  # OSXSAVE
        assert in_ring_0(processors, codes[source], given)[3] == (UD, None, None)
    finally:
        sregs.cr0, sregs.cr4 = cr0, cr4


@pytest.mark.parametrize("source", [*SAVES, *RESTORES])
def test_an_area_that_ends_outside_is_a_page_fault(
    processors: Comparison, codes: dict[str, bytes], source: str
) -> None:
    """All of it is asked for, the header is there, the last components are not: SSE state has changed nowhere."""
    at = RAM - HEADER
    given = saving(random.Random(0), 0, at)
    given.general[RAX] = 0xFFFF_FFFF
    given.xsave = xsave_image(random.Random(1), xcr0()) + bytes(0x1000 - AREA)
    processors.memory.write(at, given.xsave[:HEADER])
    if "xrstor" not in source:
        processors.memory.write(at + XSTATE_BV, bytes(64))
    native, software = processors.native(codes[source], given), processors.software(codes[source], given)
    for result in (native, software):  # the address is any in the page
        assert result.exception is not None
        vector, error, address = result.exception
        assert (vector, error) == (14, 4 if source in RESTORES else 6)
        assert address is not None
        assert address & ~0xFFF == RAM
    assert canonical(software.xsave) == canonical(native.xsave) == canonical(given.xsave)


def test_only_eight_registers_of_a_kind_outside_64_bit_mode(processors: Comparison) -> None:
    from instruction_comparison import PlainProcessor
    from kvmpy.x86.emulator import perform

    state = processors.state.copy()
    state.sregs.cs = state.sregs.cs.replace(l=0, db=1)
    area = xsave_image(random.Random(5), xcr0())
    for save, restore in ((b"\x0f\xae\x26", b"\x0f\xae\x2e"), (b"\x0f\xc7\x26", b"\x0f\xae\x2e")):  # [esi]
        general = [0xFFFF_FFFF] * 16 + [0x1000, 2]
        general[RSI] = DATA
        processors.memory.write(DATA, b"\xcc" * AREA)
        processors.memory.write(DATA + XSTATE_BV, bytes(64))
        perform(PlainProcessor(processors.memory, state.sregs, general, area), save + bytes(15), 32)
        saved = processors.memory.read(DATA, AREA)
        assert saved[XMM : XMM + 128] == area[XMM : XMM + 128]
        assert saved[XMM + 128 : XMM + 256] == b"\xcc" * 128
        if save[1] == 0xAE:
            offset, size, _ = components()[2]
            assert saved[offset : offset + size // 2] == area[offset : offset + size // 2]
            assert saved[offset + size // 2 : offset + size] == b"\xcc" * (size // 2)
        other = xsave_image(random.Random(6), xcr0())
        cpu = PlainProcessor(processors.memory, state.sregs, general, other)
        perform(cpu, restore + bytes(15), 32)
        assert [cpu.extended.ymm(number) for number in range(16)] == [
            PlainProcessor(processors.memory, state.sregs, general, area if number < 8 else other).extended.ymm(number)
            for number in range(16)
        ]


def test_the_layout_is_the_same_while_somebody_kicks_the_thread_that_asks() -> None:
    expected = xsave_layout()
    thread, enough = kick.prepare_thread().tid, threading.Event()

    def disturb() -> None:
        while not enough.wait(0.0002):
            kick.send(thread)

    kicker = threading.Thread(target=disturb)
    kicker.start()
    try:
        assert [xsave_layout.__wrapped__() for _ in range(30)] == [expected] * 30
    finally:
        enough.set()
        kicker.join()
