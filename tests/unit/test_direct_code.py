"""Code of ring 0 made fit for ring 3: what is put in the place of instructions, and the way back out of it."""

import struct

import pytest

from kvmpy.machine.direct_code import HLT, Code, StandIns, find_instructions, ways_into

PAGE, BASE, FLAGS, LINEAR = 0x1000, 0xFFFF_FFFF_4020_0000, 0xFFFF_FFFF_4000_A000, 0xFFFF_FFFF_8100_0000
IF = 0x200


def page_of(code: str, at: int = 0) -> Code:
    original = bytes(at) + bytes.fromhex(code)
    original += b"\xcc" * (PAGE - len(original))
    found = find_instructions(original + bytes(16), 0, {at}, None)
    assert found is not None
    return Code(original, found[0], at, -1, False)


def replaced(code: Code, at: int, entry: int | None = None) -> tuple[StandIns, bytearray]:
    memory = bytearray(0x1000)
    stand_ins = StandIns(BASE, memoryview(memory), FLAGS, FLAGS + 8)
    stand_ins.replace(code, at, LINEAR, entry)
    return stand_ins, memory


def target(code: Code, at: int) -> int:
    (distance,) = struct.unpack_from("<i", code.copy, at + 1)
    return LINEAR + at + 5 + int(distance)


@pytest.mark.parametrize(
    ("code", "size"),
    [("9c 58 0f 1f 44 00 00", 7), ("fa 66 0f 1f 44 00 00", 7), ("fb 66 0f 1f 44 00 00", 7), ("fa 90 90 90 90 90", 6)],
)
def test_with_nops_behind_it_a_jump_takes_the_place_of_an_instruction(code: str, size: int) -> None:
    page = page_of(code + " c3")
    stand_ins, _ = replaced(page, 0)
    assert page.copy[0] == 0xE9
    assert stand_ins.base <= target(page, 0) < stand_ins.end
    assert page.copy[size:] == page.original[size:]
    assert page.inside == {start for start in page.starts if 0 < start < size}
    stand_ins.release(page)
    assert page.stand_ins == []


@pytest.mark.parametrize("code", ["9c 5b fa 90 90 90 90", "fa c3", "9d", "0f a2", "48 cf", "fa 0f 1f 00"])
def test_without_room_it_is_a_halt_and_nothing_else_changes(code: str) -> None:
    page = page_of(code)
    replaced(page, 0)
    assert page.copy == bytes((HLT,)) + page.original[1:]


def test_what_the_processor_comes_back_into_the_midst_of_stays() -> None:
    page = page_of("9c 58 0f 1f 44 00 00 c3")
    replaced(page, 0, entry=2)
    assert page.copy == bytes((HLT,)) + page.original[1:]


def test_the_end_of_a_function_stays_readable() -> None:
    page = page_of("9c 58 e9 00 01 00 00", at=16)
    stand_ins, _ = replaced(page, 16)
    assert page.copy[16:18] == b"\xeb\x05"
    assert page.copy[18:23] == page.original[18:23]
    assert stand_ins.base <= target(page, 23) < stand_ins.end


@pytest.mark.parametrize("code", ["9c 58 0f 1f 44 00 00", "fa 66 0f 1f 44 00 00", "fb 66 0f 1f 44 00 00"])
def test_there_is_a_way_out_of_every_instruction_of_a_stand_in(code: str) -> None:
    capstone = pytest.importorskip("capstone")
    page = page_of(code + " c3")
    stand_ins, memory = replaced(page, 0)
    address = target(page, 0)
    body = bytes(memory[address - BASE : address - BASE + 32])
    pushed = 0
    rsp, saved = 0x8000, 0x246
    for at, _, name, _ in capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64).disasm_lite(body.rstrip(b"\0"), 0):
        rip, back, flags, enabled = stand_ins.settle(
            address + at, rsp - 8 * pushed, 0x246, lambda linear, size: saved.to_bytes(size, "little")
        )
        assert rip in (LINEAR, LINEAR + 7)
        assert back == rsp, f"{name} at {at}"
        assert flags == 0x246
        assert enabled == (code.startswith("fb") and at > 0)
        if name == "jmp":  # what follows is the slow way of STI: its flags are on the stack again
            pushed = 1
            continue
        pushed += {"pushfq": 1, "pop": -1, "popfq": -1}.get(name, 0)


def test_ways_fall_into_step_and_an_entry_rules_out_those_that_miss_it() -> None:
    before = bytes.fromhex("48 89 e5 53 48 83 ec 08 90 90 90 90 90 90 90 90")
    body = bytes.fromhex("fa 58 c3") + b"\x90" * (PAGE - 3)
    code = before + body + bytes(16)
    ways = ways_into(code, len(before))
    assert len(before) in ways
    found = find_instructions(code, len(before), ways, 0)
    assert found is not None
    assert {at - len(before) for at in found[0]} >= {0, 1, 2, 3}
    assert [at - len(before) for at in found[1]] == [0]
