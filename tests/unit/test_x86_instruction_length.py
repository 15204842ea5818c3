"""Lengths of instructions, against a disassembler; and which behave otherwise in ring 3 without a fault."""

import random

import pytest

from kvmpy.x86.instruction_length import length_and_kind, modrm_at, sweep

REST = bytes.fromhex("84 24 10 20 30 40 50 60 70 80 90 a0")


@pytest.mark.parametrize(
    ("code", "length"),
    [
        ("90", 1), ("f3 0f 1e fa", 4), ("66 2e 0f 1f 84 00 00 00 00 00", 10), ("48 b8 01 02 03 04 05 06 07 08", 10),
        ("66 b8 01 02", 4), ("b8 01 02 03 04", 5), ("48 c7 c0 01 02 03 04", 7), ("f7 c0 01 02 03 04", 6),
        ("f7 d0", 2), ("f6 04 25 01 02 03 04 05", 8), ("48 8b 05 01 02 03 04", 7), ("48 8b 44 24 08", 5),
        ("48 8b 04 85 01 02 03 04", 8), ("c8 10 00 01", 4), ("0f 84 01 02 03 04", 6), ("0f ba e0 05", 4),
        ("c5 f8 77", 3), ("c4 e3 7d 19 c1 01", 6), ("62 f1 7c 48 10 44 24 01", 8), ("f0 48 0f c7 0e", 5),
        ("65 48 8b 04 25 28 00 00 00", 9), ("a0 01 02 03 04 05 06 07 08", 9), ("06", 0), ("0f 04", 0),
    ],
)  # fmt: skip
def test_an_instruction_is_as_long_as_the_manual_says(code: str, length: int) -> None:
    assert length_and_kind(bytes.fromhex(code) + bytes(16), 0)[0] == length


@pytest.mark.parametrize(
    "code",
    ["9c", "9d", "fa", "fb", "cf", "48 cf", "cb", "0f a2", "8c d8", "66 8c c0", "8e d0", "0f 00 e8", "0f 03 c0",
     "0f 01 d0", "0f 01 f9", "0f 01 e0", "f3 0f c7 f8", "f3 48 0f ae d8", "0f a9", "ff 18", "0f 05",
     "6e", "f3 6c"],
)  # fmt: skip
def test_what_ring_3_does_in_silence_and_otherwise_is_sensitive(code: str) -> None:
    assert length_and_kind(bytes.fromhex(code) + bytes(16), 0)[1]


@pytest.mark.parametrize("code", ["0f 01 ca", "0f 01 cb", "0f 01 f8", "0f 20 d0", "41 0f 20 d4"])
def test_so_is_what_faults_all_the_time(code: str) -> None:
    assert length_and_kind(bytes.fromhex(code) + bytes(16), 0)[1]


@pytest.mark.parametrize(
    "code", ["90", "f4", "0f 30", "0f 20 d8", "0f 22 d0", "0f 22 d8", "ff 10", "0f ae e8", "50", "ec", "cc"]
)
def test_what_faults_in_ring_3_or_is_the_same_there_is_not(code: str) -> None:
    assert not length_and_kind(bytes.fromhex(code) + bytes(16), 0)[1]


@pytest.mark.parametrize(
    ("code", "at"), [("90", 0), ("8b 05", 1), ("48 8b 05", 2), ("65 48 8b 05", 3), ("0f b6 05", 2), ("0f 38 00 05", 3)]
)
def test_the_modrm_byte_is_found(code: str, at: int) -> None:
    assert modrm_at(bytes.fromhex(code) + bytes(8), 0) == at


def test_random_bytes_are_as_long_as_a_disassembler_finds() -> None:
    capstone = pytest.importorskip("capstone")
    disassembler = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    chance = random.Random(1)
    compared = 0
    for _ in range(30_000):
        prefix = chance.choice((b"", b"", b"\x48", b"\x66", b"\xf3", b"\x0f", b"\x48\x0f", b"\x66\x0f", b"\xf3\x0f"))
        code = prefix + chance.randbytes(14)
        found = next(disassembler.disasm_lite(code, 0), None)
        length = length_and_kind(code, 0)[0]
        # UD0 and UD1 have operands or not, 0F 8x with 66 is of AMD's or Intel's kind; RET is the disassembler's fault.
        if found is None or not length or found[2] in ("ud0", "ud1", "ret") or found[2][0] == "j":
            continue
        assert length == found[1], f"{code.hex(' ')}: {found[2]} {found[3]}"
        compared += 1
    assert compared > 20_000


def test_a_sweep_goes_from_instruction_to_instruction_and_past_what_is_none() -> None:
    code = bytes.fromhex("90 9c 58 06 b8 01 02 03 9c fa c3") + bytes(16)
    assert sweep(code, 0, 11) == ({0, 1, 2, 3, 4, 9, 10}, [1, 9])
    assert sweep(code[:6], 0, 11) == ({0, 1, 2, 3, 4}, [1])
