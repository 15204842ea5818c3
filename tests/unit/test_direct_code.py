"""Code of ring 0 made fit for ring 3: what is put in the place of instructions, and the way back out of it."""

import struct

import pytest

from kvmpy.machine.direct_execution.code import Code, find_instructions, ways_into
from kvmpy.machine.direct_execution.pieces import Cells, moved
from kvmpy.machine.direct_execution.stand_ins import HLT, HOLE, StandIns

PAGE, OURS, LINEAR = 0x1000, 0xFFFF_FFFF_7800_0000, 0xFFFF_FFFF_8100_0000
BASE = OURS + 0x20_0000
CELLS = Cells(*(OURS + 0xA000 + 8 * index for index in range(6)))
FAULTS = {HLT, 0x9A}
STAND_INS = [
    "9c 58 0f 1f 44 00 00", "9c 5b 48 89 c3", "9c 41 5c fa 48 8b 45 00", "9c 59 31 c0 90", "9c 8b 04 24 ff c0",
    "fa 31 c0 48 01 d0", "fb 66 0f 1f 44 00 00", "fb c3 0f 1f 00", "0f 01 f8 65 48 89 24 25 14 60 00 00",
    "0f 01 cb 48 8b 10", "8c d0 50 54 51", "66 8c c8 83 f8 18", "0f 20 d0 48 89 c3", "41 0f 20 d4 90",
    "48 cf 0f ba e2 09", "fa 8b 05 00 01 00 00", "74 01 fb 5b 5d c3",
    "68 00 01 00 00 48 cf 48 89 c3",
]  # fmt: skip


class Memory:
    """What stand-ins and the jumps to them are written to."""

    def __init__(self) -> None:
        self.slots = bytearray(0x1000)
        self.jumps: dict[int, bytes] = {}

    def jump_at(self, linear: int, code: bytes) -> bool:
        self.jumps[linear] = code
        return True


def page_of(code: str) -> Code:
    original = bytes.fromhex(code)
    original += b"\xcc" * (PAGE - len(original))
    return Code(original, bytes(16), 0, -1, False)


def replaced(code: Code, at: int = 0, linear: int = LINEAR) -> tuple[StandIns, Memory]:
    memory = Memory()
    stand_ins = StandIns(BASE, memoryview(memory.slots), CELLS, OURS, memory.jump_at)
    stand_ins.fit(code, [at], linear)
    return stand_ins, memory


def target(code: bytes, address: int) -> int:
    assert code[0] == 0xE9
    (distance,) = struct.unpack_from("<i", code, 1)
    return address + 5 + int(distance)


def site(code: str) -> int:
    """Where the instruction is that needs the stand-in: behind a jump over it, or a PUSH, if there is one."""
    return 2 if code.startswith("74") else 5 if code.startswith("68") else 0


@pytest.mark.parametrize("code", STAND_INS)
def test_a_jump_leads_to_a_stand_in_and_each_byte_of_it_but_the_first_faults(code: str) -> None:
    page = page_of(code)
    stand_ins, memory = replaced(page, site(code))
    arrival = target(bytes(page.copy), LINEAR)
    assert HOLE <= arrival < OURS
    assert stand_ins.base <= target(memory.jumps[arrival], arrival) < stand_ins.end
    assert set(page.copy[1 : page.replaced]) <= FAULTS
    assert page.replaced >= 5
    assert page.copy[page.replaced :] == page.original[page.replaced :]
    assert set(page.moved) <= page.starts
    stand_ins.release(page)
    assert page.stand_ins == []


@pytest.mark.parametrize("code", STAND_INS)
def test_there_is_a_way_out_of_every_instruction_of_a_stand_in(code: str) -> None:
    capstone = pytest.importorskip("capstone")
    page = page_of(code)
    stand_ins, memory = replaced(page, site(code))
    arrival = next(iter(memory.jumps))
    assert stand_ins.place(arrival).here == LINEAR
    start = target(memory.jumps[arrival], arrival)
    body = bytes(memory.slots[start - BASE :]).rstrip(b"\0")
    starts = {LINEAR + at for at in page.starts} | {LINEAR + page.replaced}
    begins = []
    for at, _, name, operands in capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64).disasm_lite(body, start):
        place = stand_ins.place(at)
        assert {place.here, place.following} <= starts, f"{name} {operands}"
        begins.append(at)
        if page.replaced + LINEAR == place.here:  # the jump back
            break
    assert set(page.moved.values()) <= set(begins)
    assert begins[0] == start


@pytest.mark.parametrize(
    "code", ["fa c3 41 57 41 56", "9d", "0f a2", "fa e8 00 01 00 00", "fb eb 10 31 c0", "fa 0f 1f 44 00 00",
             "fb 66 90 31 c0", "fa 0f 0b 31 c0", "fa ff d0 31 c0", "fb f4 31 c0 90", "8e d8 31 c0 90",
             "fa 66 66 48 31 c0"],
)  # fmt: skip
def test_without_room_it_faults_and_nothing_else_changes(code: str) -> None:
    page = page_of(code)
    replaced(page)
    assert page.copy[1:] == page.original[1:]
    assert page.copy[0] == (page.original[0] if page.original[0] in (0xFA, 0xFB) else HLT)


def test_a_guest_that_jumps_among_the_stand_ins_by_itself_is_there() -> None:
    stand_ins, _ = replaced(page_of("fa 31 c0 48 01 d0"))
    for rip in (BASE + 1, BASE + 0x7FF, OURS + 0x100):
        place = stand_ins.place(rip)
        assert place.here == place.following == rip


def test_the_end_of_a_function_stays_readable() -> None:
    capstone = pytest.importorskip("capstone")
    page = page_of("9c 58 e9 00 01 00 00")
    stand_ins, memory = replaced(page)
    assert page.copy[:8] == bytes.fromhex("eb 06 e9 00 01 00 00 cc")
    assert page.detours == {8: 0}
    start = target(bytes(page.copy[8:]), LINEAR + 8)
    body = bytes(memory.slots[start - BASE :]).rstrip(b"\0")
    for at, *_ in capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64).disasm_lite(body, start):
        assert {stand_ins.place(at).here, stand_ins.place(at).following} <= {LINEAR, LINEAR + 2}
    page = page_of("9c 58 e9 00 01 00 00 cc cc cc 55")
    replaced(page)
    assert page.copy == bytes((HLT,)) + page.original[1:]


def test_where_the_fixed_distance_leads_elsewhere_there_are_no_jumps() -> None:
    for linear in (0x1000, 0xFFFF_8880_0000_0000, 0xFFFF_FFFF_F000_0000):
        page = page_of("fa 31 c0 48 01 d0")
        _, memory = replaced(page, 0, linear)
        assert page.copy == page.original
        assert not memory.jumps


def test_instructions_of_the_guest_itself_stay_if_it_has_enabled_them() -> None:
    for enabled in (False, True):
        page = page_of("f3 48 0f ae c8")
        stand_ins = StandIns(BASE, memoryview(bytearray(0x1000)), CELLS, OURS, lambda linear, code: True)
        stand_ins.has_gs_base_instructions = enabled
        stand_ins.fit(page, [0], LINEAR)
        assert (page.copy[0] == HLT) is not enabled
        assert page.has_gs_base
        page = page_of("0f 01 f8 f3 48 0f ae c8 0f 01 f8 c3")
        stand_ins.fit(page, [0, 3, 8], LINEAR)
        assert (page.copy[0] == 0xE9) is enabled
        assert page.has_gs_base


def test_what_is_relative_to_rip_is_moved_so_that_it_means_the_same() -> None:
    assert moved(bytes.fromhex("8b 05 00 01 00 00") + bytes(15), 0, 0x2000, 0x1000) == (
        6, bytes.fromhex("8b 05 00 f1 ff ff"), False,
    )  # fmt: skip
    assert moved(bytes.fromhex("75 fe") + bytes(15), 0, 0x2000, 0x1000) == (
        2,
        bytes.fromhex("0f 85 fa ef ff ff"),
        False,
    )
    assert moved(bytes.fromhex("c3") + bytes(15), 0, 0x2000, 0x1000) == (1, b"\xc3", True)


def test_ways_fall_into_step_and_an_entry_rules_out_those_that_miss_it() -> None:
    before = bytes.fromhex("48 89 e5 53 48 83 ec 08 90 90 90 90 90 90 90 90")
    body = bytes.fromhex("fa 58 c3") + b"\x90" * (PAGE - 3)
    code = before + body + bytes(16)
    ways = ways_into(code, len(before))
    assert len(before) in ways
    found = find_instructions(code, len(before), ways, 0)
    assert found is not None
    assert found == (len(before), len(before) + PAGE, [len(before)])


def test_ways_that_do_not_agree_do_so_after_some_instructions() -> None:
    body = bytes.fromhex("b8 90 90 90 90 fa 31 c0") + b"\x90" * (PAGE - 8)
    assert find_instructions(body + bytes(16), 0, {0, 1}, None) == (5, PAGE, [5])
    assert find_instructions(body + bytes(16), 0, {0, 1}, 1) == (1, PAGE, [5])
    assert find_instructions(body + bytes(16), 0, {1}, 0) == (0, PAGE, [5])
