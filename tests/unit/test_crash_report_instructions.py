"""Instructions taken apart for crash reports: their length, what memory they touch, where code goes."""

from __future__ import annotations

import random

import pytest

from crash_states import CODE, STACK, Scene
from kvmpy.debug.crash_report.control_flow import find_loop, ways_out
from kvmpy.debug.crash_report.first_event.decoder import decode
from kvmpy.debug.crash_report.first_event.memory_access import memory_accesses
from kvmpy.debug.crash_report.memory_overlay import CopyOnWriteMemory
from kvmpy.errors import GuestMemoryError
from kvmpy.memory import GuestMemory
from kvmpy.memory.region import MemoryRegion

NOT_COMPARED = ("ud0", "ud1", "ret")
"""Capstone gives the first two no ModRM, though the processor reads one (SDM vol. 2, UD), and RET with 66 and REX four
bytes of immediate."""


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_lengths_are_those_of_a_disassembler(bits: int) -> None:
    capstone = pytest.importorskip("capstone")
    mode = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}[bits]
    engine = capstone.Cs(capstone.CS_ARCH_X86, mode)
    noise = random.Random(bits)
    compared = 0
    for _ in range(6000):
        code = noise.choice((b"", b"\x0f", b"\x66", b"\x48")) + noise.randbytes(15)
        found = next(engine.disasm_lite(code[:15], 0, 1), None)
        decoded = decode(code[:15], bits)
        if found is None or decoded is None or found[2] in NOT_COMPARED:
            continue
        compared += 1
        assert decoded.length == found[1], (bits, found, code.hex(" "))
    assert compared > 4000


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_bytes_that_end_too_soon_are_not_decoded(bits: int) -> None:
    code = bytes.fromhex("66 81 84 88 78 56 34 12 21 43 65 87")
    lengths = {decode(code[:length], bits).length for length in range(13) if decode(code[:length], bits)}  # type: ignore[union-attr]
    assert len(lengths) == 1


def accesses(mode: str, code: str, **registers: int) -> list[tuple[str, str, int, int]]:
    """(segment, "read" or "write", offset, size) of what an instruction touches."""
    scene = Scene(mode, code)
    for name, value in registers.items():
        setattr(scene.regs, name, value)
    execution = scene.case().execution
    assert execution.decoded is not None
    return [
        (access.segment, access.access.value, access.offset, access.size)
        for access in memory_accesses(execution, execution.decoded)
    ]


@pytest.mark.parametrize(
    ("mode", "code", "registers", "expected"),
    [
        ("long", "01 08", {"rax": 0x2000}, [("ds", "read", 0x2000, 4), ("ds", "write", 0x2000, 4)]),  # add [rax], ecx
        ("long", "39 08", {"rax": 0x2000}, [("ds", "read", 0x2000, 4)]),  # cmp
        ("long", "83 38 01", {"rax": 0x2000}, [("ds", "read", 0x2000, 4)]),
        ("long", "48 89 04 cd 10 00 00 00", {"rcx": 4}, [("ds", "write", 0x30, 8)]),  # mov [rcx * 8 + 0x10], rax
        ("long", "8b 05 10 00 00 00", {}, [("ds", "read", CODE + 0x16, 4)]),  # mov eax, [rip + 0x10]
        ("long", "65 8b 04 25 08 00 00 00", {}, [("gs", "read", 8, 4)]),
        ("long", "50", {}, [("ss", "write", STACK - 8, 8)]),
        ("long", "66 50", {}, [("ss", "write", STACK - 2, 2)]),
        ("long", "ff 30", {"rax": 0x2000}, [("ds", "read", 0x2000, 8), ("ss", "write", STACK - 8, 8)]),  # push [rax]
        ("long", "8f 00", {"rax": 0x2000}, [("ss", "read", STACK, 8), ("ds", "write", 0x2000, 8)]),  # pop [rax]
        ("long", "c9", {"rbp": 0x3000}, [("ss", "read", 0x3000, 8)]),  # leave
        ("long", "48 cf", {}, [("ss", "read", STACK, 40)]),
        ("long", "0f 11 00", {"rax": 0x2001}, [("ds", "write", 0x2001, 16)]),  # movups
        ("long", "f3 0f 11 00", {"rax": 0x2001}, [("ds", "write", 0x2001, 4)]),  # movss
        ("protected", "a5", {"rsi": 0x2000, "rdi": 0x3000}, [("ds", "read", 0x2000, 4), ("es", "write", 0x3000, 4)]),
        ("protected", "6d", {"rdi": 0x3000}, [("es", "write", 0x3000, 4)]),  # insd
        ("protected", "60", {}, [("ss", "write", STACK - 4 * number, 4) for number in range(1, 9)]),  # pusha
        ("protected", "d7", {"rbx": 0x2000, "rax": 0x105}, [("ds", "read", 0x2005, 1)]),  # xlat
        ("protected", "a2 00 20 00 00", {}, [("ds", "write", 0x2000, 1)]),
        ("protected", "0f 01 15 00 20 00 00", {}, [("ds", "read", 0x2000, 6)]),  # lgdt
        ("real", "8b 42 fe", {"rbp": 0x100, "rsi": 0x10}, [("ss", "read", 0x10E, 2)]),  # mov ax, [bp + si - 2]
        ("real", "26 8a 07", {"rbx": 5}, [("es", "read", 5, 1)]),
        ("real", "e8 00 00", {}, [("ss", "write", STACK - 2, 2)]),
        ("real", "90", {}, []),
    ],
)
def test_what_memory_an_instruction_touches(
    mode: str, code: str, registers: dict[str, int], expected: list[tuple[str, str, int, int]]
) -> None:
    assert accesses(mode, code, **registers) == expected


@pytest.mark.parametrize(
    ("mode", "code", "length", "out"),
    [
        ("real", "eb fe", 1, 0),
        ("real", "ec a8 80 75 fb", 3, 1),  # in; test; jnz
        ("protected", "e8 fb ff ff ff 75 f9", 2, 1),  # call; jnz: calls return
        ("long", "eb 02 0f 0b 90 eb f9", 3, 0),  # jmp over; nop; jmp back
        ("long", "f4 c3", 0, 0),  # hlt; ret
        ("long", "90 0f 0b", 0, 0),
        ("real", "e2 fe", 1, 1),  # loop
    ],
)
def test_the_loop_from_an_instruction_on(mode: str, code: str, length: int, out: int) -> None:
    execution = Scene(mode, code).case().execution
    loop = find_loop(execution, execution.regs.rip)
    assert (len(loop), len(ways_out(execution, loop))) == (length, out)
    if loop:
        assert loop[0].offset == execution.regs.rip


def test_an_overlay_keeps_what_is_written_to_itself() -> None:
    memory = GuestMemory()
    memory.add(MemoryRegion.anonymous(0, 0x1000))
    memory.add(MemoryRegion.anonymous(0x1000, 0x1000, read_only=True, name="ROM"))
    overlay = CopyOnWriteMemory(memory)
    overlay.write(0xFFE, b"abcd")
    assert overlay.read(0xFFC, 8) == b"\0\0ab\0\0\0\0"  # the ROM stays as it is
    assert memory.read(0xFFC, 8) == bytes(8)
    above = overlay.fork()
    above.write(0xFFE, b"x")
    assert (above.read(0xFFE, 2), overlay.read(0xFFE, 2)) == (b"xb", b"ab")
    assert (overlay.contains(0x1FFF), overlay.contains(0x2000), overlay.contains(1 << 70)) == (True, False, False)
    with pytest.raises(GuestMemoryError):
        overlay.write(0x1FFF, b"xy")
    with pytest.raises(GuestMemoryError):
        overlay.read(0x1FFF, 2)
