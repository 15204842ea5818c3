"""Disassembly: the instructions that objdump sees, those before an address, symbols in their text, and no capstone."""

import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from debug_info_programs import objdump, program
from gnu_toolchain import assemble, assemble_with_symbols
from kvmpy.debug import capstone_library, disassembly
from kvmpy.debug.capstone_library import library_decoder
from kvmpy.debug.disassembly import BYTES, Disassembler, Instruction, annotate
from kvmpy.debug.symbols import Symbol, SymbolTable
from kvmpy.errors import UsageError

HELLO = "mov dx, 0x3f8; again: lodsb; test al, al; je done; out dx, al; jmp again; done: hlt"


def texts(instructions: list[Instruction]) -> list[str]:
    return [str(instruction) for instruction in instructions]


@pytest.fixture
def without_capstone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "capstone", None)  # importing it is an ImportError then
    _forget_the_decoders()
    yield
    _forget_the_decoders()


def _forget_the_decoders() -> None:
    disassembly._engines.by_width.clear()
    capstone_library._library.cache_clear()


# Forwards


def test_instructions_have_addresses_bytes_and_intel_syntax() -> None:
    code = assemble("mov rax, [rbx + 8 * rcx + 0x10]; push 0x1234; ret", bits=64)
    first, second, third = Disassembler().disassemble(code, 0x1000, 64)
    assert first == Instruction(0x1000, code[:5], "mov", "rax, qword ptr [rbx + rcx*8 + 0x10]")
    assert str(first) == "mov rax, qword ptr [rbx + rcx*8 + 0x10]"
    assert (second.address, second.end, str(second)) == (0x1005, 0x100A, "push 0x1234")
    assert str(third) == "ret"


def test_the_width_decides_what_bytes_mean() -> None:
    code = bytes.fromhex("40b801020304")
    first = {bits: texts(Disassembler().disassemble(code, 0, bits, count=2)) for bits in (16, 32, 64)}
    assert first[16] == ["inc ax", "mov ax, 0x201"]
    assert first[32] == ["inc eax", "mov eax, 0x4030201"]
    assert first[64] == ["mov eax, 0x4030201"]


@pytest.mark.parametrize("bits", [32, 64])
def test_a_program_has_the_instructions_that_objdump_sees(bits: int) -> None:
    expected = objdump(program("-O2", bits=bits).elf)
    code = b"".join(data for _, data, _ in expected)
    found = Disassembler().disassemble(code, expected[0][0], bits)
    assert [(instruction.address, instruction.bytes) for instruction in found] == [
        (address, data) for address, data, _ in expected
    ]
    words = {instruction.mnemonic for instruction in found}
    assert {"push", "mov", "call", "ret", "add"} <= words
    assert BYTES not in words


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_more_than_one_chunk_is_decoded_without_a_seam(bits: int) -> None:
    one = assemble("mov ax, 0x1234; add bx, 0x5555; shl dx, 3", bits=bits)
    found = Disassembler().disassemble(one * 3000, 0x10_0000, bits)
    assert len(found) == 9000
    assert all(before.end == after.address for before, after in pairwise(found))
    assert found[-1].end == 0x10_0000 + 3000 * len(one)


def test_count_limits_what_is_decoded() -> None:
    code = assemble("nop; nop; inc eax; ret", bits=32)
    assert texts(Disassembler().disassemble(code, 0, 32, count=3)) == ["nop", "nop", "inc eax"]
    assert Disassembler().disassemble(code, 0, 32, count=0) == []
    assert Disassembler().disassemble(b"", 0, 32) == []


def test_what_is_no_instruction_is_shown_as_bytes() -> None:
    code = b"\x90\x06\x07\x90\x0f"  # push es and pop es are none in 64-bit mode; the last one is not complete
    found = Disassembler().disassemble(code, 0x1000, 64)
    assert found == [
        Instruction(0x1000, b"\x90", "nop", ""),
        Instruction(0x1001, b"\x06\x07", BYTES, "0x06, 0x07"),
        Instruction(0x1003, b"\x90", "nop", ""),
        Instruction(0x1004, b"\x0f", BYTES, "0x0f"),
    ]
    assert Disassembler().disassemble(code, 0x1000, 64, count=2) == found[:2]
    assert Disassembler().disassemble(b"\x06" * 10_000, 0, 64) == [
        Instruction(0, b"\x06" * 10_000, BYTES, ", ".join(["0x06"] * 10_000))
    ]


def test_code_may_stand_at_the_end_of_the_address_space() -> None:
    top = (1 << 64) - 2
    assert [instruction.address for instruction in Disassembler().disassemble(b"\x90\x90", top, 64)] == [top, top + 1]


@pytest.mark.parametrize("bits", [0, 8, 128])
def test_code_of_another_width_is_refused(bits: int) -> None:
    with pytest.raises(UsageError, match=f"16, 32 or 64 bits wide, not {bits}"):
        Disassembler().disassemble(b"\x90", 0, bits)


def test_branches_have_targets() -> None:
    source = "start: je start; call start; loop start; jmp start; jmp rax; call [rax]; mov eax, 0x1000; ret"
    found = Disassembler().disassemble(assemble(source, bits=64), 0x1000, 64)
    assert [instruction.target for instruction in found] == [0x1000] * 4 + [None] * 4


# Backwards


@pytest.mark.parametrize("bits", [32, 64])
def test_the_instructions_before_each_address_of_a_program_are_found(bits: int) -> None:
    listed = objdump(program("-O1", bits=bits).elf)
    code, start = b"".join(data for _, data, _ in listed), listed[0][0]
    disassembler = Disassembler()
    everything = disassembler.disassemble(code, start, bits)
    for index, (rip, _, _) in enumerate(listed):
        exact = disassembler.before(code, start, rip, bits, 5, start=start)
        assert exact == everything[max(index - 5, 0) : index]
        guessed = disassembler.before(code, start, rip, bits, 5)
        if index >= 5 + 8:  # enough to fall into step
            assert guessed == exact


def test_the_first_addresses_have_fewer_instructions_before_them() -> None:
    code = assemble("xor eax, eax; inc eax; ret", bits=32)
    assert texts(Disassembler().before(code, 0x1000, 0x1004 - 1, 32, 5, start=0x1000)) == ["xor eax, eax", "inc eax"]
    assert Disassembler().before(code, 0x1000, 0x1000, 32, 5) == []
    assert Disassembler().before(code, 0x1000, 0x1003, 32, 0) == []
    assert Disassembler().before(code, 0x1000, 0x1003, 32, -1) == []


def test_a_start_that_does_not_lead_to_the_address_is_not_believed() -> None:
    code = assemble("mov eax, 0x12345678; mov ebx, 0x9abcdef0; nop; nop", bits=32)
    wrong = Disassembler().before(code, 0x1000, 0x100A, 32, 2, start=0x1007)
    assert texts(wrong) == ["mov eax, 0x12345678", "mov ebx, 0x9abcdef0"]
    assert Disassembler().before(code, 0x1000, 0x100A, 32, 2, start=0x5000) == wrong


def test_the_longest_way_is_taken() -> None:
    # From each byte of the operands a way leads to the same end, too.
    code = assemble("mov eax, 0x90909090; mov ecx, 0x90909090; mov edx, 0x90909090", bits=32)
    found = Disassembler().before(code, 0x1000, 0x1000 + len(code), 32, 3)
    assert texts(found) == ["mov eax, 0x90909090", "mov ecx, 0x90909090", "mov edx, 0x90909090"]


def test_an_address_that_no_instruction_ends_at_has_none_before_it() -> None:
    assert Disassembler().before(b"\x06" * 40, 0x1000, 0x1028, 64, 3) == []
    assert texts(Disassembler().before(b"\x06" * 30 + b"\x90\x90", 0x1000, 0x1020, 64, 5)) == ["nop", "nop"]


@pytest.mark.parametrize("rip", [0xFFF, 0x1005])
def test_an_address_outside_the_code_is_refused(rip: int) -> None:
    with pytest.raises(UsageError, match=f"rip {rip:#x} is not in the code, 0x4 bytes at 0x1000"):
        Disassembler().before(bytes(4), 0x1000, rip, 64, 1)


# Symbols in the text

SYMBOLS = SymbolTable([Symbol("puts", 0x1010, 0x10, "function"), Symbol("table", 0x40_2000, 0x40, "object")])


@pytest.mark.parametrize(
    ("source", "bits", "text"),
    [
        ("call 0x1010", 64, "call 0x1010 <puts>"),
        ("jne 0x1014", 64, "jne 0x1014 <puts+0x4>"),
        ("jmp 0x5000", 64, "jmp 0x5000"),
        ("call 0x1010", 16, "call 0x1010 <puts>"),
        ("lea rdi, [rip + 0x400ffd]", 64, "lea rdi, [rip + 0x400ffd] # 0x402004 <table+0x4>"),
        ("mov eax, [rip - 0x10]", 64, "mov eax, dword ptr [rip - 0x10] # 0xff6"),
        ("mov eax, [0x402008]", 32, "mov eax, dword ptr [0x402008] # 0x402008 <table+0x8>"),
        ("mov eax, [rcx * 4 + 0x402000]", 64, "mov eax, dword ptr [rcx*4 + 0x402000] # 0x402000 <table>"),
        ("mov edi, 0x402000", 64, "mov edi, 0x402000 # 0x402000 <table>"),
        ("mov edi, 0x402004", 64, "mov edi, 0x402004"),
        ("mov eax, fs:[0x402000]", 32, "mov eax, dword ptr fs:[0x402000]"),
        ("add eax, 0x10", 64, "add eax, 0x10"),
        ("ret", 64, "ret"),
    ],
)
def test_symbols_are_told_for_the_addresses_in_an_instruction(source: str, bits: int, text: str) -> None:
    first = Disassembler().disassemble(assemble(source, address=0x1000, bits=bits), 0x1000, bits)[0]
    assert annotate(first, SYMBOLS) == text


def test_negative_displacements_are_addresses_near_the_top() -> None:
    table = SymbolTable([Symbol("stacks", 0xFFFF_FFFF_8200_0000, 0x100, "object")])
    code = assemble("mov rax, [rdi * 8 - 0x7e000000]", bits=64)
    assert annotate(Disassembler().disassemble(code, 0, 64)[0], table).endswith("# 0xffffffff82000000 <stacks>")
    table = SymbolTable([Symbol("stacks", 0xC010_0000, 0x100, "object")])
    code = assemble("mov eax, [edi * 4 - 0x3ff00000]", bits=32)
    assert annotate(Disassembler().disassemble(code, 0, 32)[0], table).endswith("# 0xc0100000 <stacks>")


def test_without_symbols_only_addresses_are_told() -> None:
    call, load = Disassembler().disassemble(assemble("call 0x1010; mov eax, [rip + 0x100]", bits=64), 0x1000, 64)
    for table in (None, SymbolTable()):
        assert annotate(call, table) == "call 0x1010"
        assert annotate(load, table) == "mov eax, dword ptr [rip + 0x100] # 0x110b"


def test_bytes_are_not_annotated() -> None:
    table = SymbolTable.from_dict({"low": 0x0})
    assert annotate(Instruction(0, b"\x06", BYTES, "0x06"), table) == ".byte 0x06"


def test_real_mode_code_is_decoded_at_its_linear_address() -> None:
    code, labels = assemble_with_symbols(HELLO, address=0x7C00)
    table = SymbolTable.from_dict(labels)
    found = Disassembler().disassemble(code, 0x7C00, 16)
    assert [annotate(instruction, table) for instruction in found] == [
        "mov dx, 0x3f8", "lodsb al, byte ptr [si]", "test al, al", "je 0x7c0b <done>", "out dx, al",
        "jmp 0x7c03 <again>", "hlt",
    ]  # fmt: skip


# Without capstone


def test_capstone_is_there() -> None:
    assert Disassembler().available
    assert Disassembler().advice == ""


@given(st.binary(min_size=1, max_size=64), st.sampled_from([16, 32, 64]), st.sampled_from([0, 1, 3]))
def test_the_library_says_what_the_package_says(code: bytes, bits: int, count: int) -> None:
    library, package = library_decoder(bits), disassembly._capstone_engine(bits)
    assert library is not None
    assert list(library.disasm_lite(code, 0x1000, count)) == list(package.disasm_lite(code, 0x1000, count))


def test_a_library_of_another_version_is_left_to_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "capstone/lib").mkdir(parents=True)
    (tmp_path / "capstone/__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "capstone", raising=False)
    source = tmp_path / "version.c"
    source.write_text("unsigned cs_version(int *major, int *minor) { return 4 << 8; }")
    _forget_the_decoders()
    try:
        assert library_decoder(64) is None
        library = tmp_path / "capstone/lib/libcapstone.so"
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True, timeout=60)
        _forget_the_decoders()
        assert library_decoder(64) is None
        library.unlink()  # it is mapped: never written over
        library.write_bytes(b"no library")
        _forget_the_decoders()
        assert library_decoder(64) is None
    finally:
        _forget_the_decoders()


@pytest.mark.usefixtures("without_capstone")
def test_without_capstone_there_are_bytes_and_advice() -> None:
    disassembler = Disassembler()
    assert not disassembler.available
    assert "pip install 'kvmpy[debug]'" in disassembler.advice
    whole = Instruction(0x1000, b"\x90\xc3", BYTES, "0x90, 0xc3")
    assert disassembler.disassemble(b"\x90\xc3", 0x1000, 64) == [whole]
    assert disassembler.disassemble(b"\x90\xc3", 0x1000, 64, count=1) == [whole]
    assert disassembler.disassemble(b"", 0x1000, 64) == disassembler.disassemble(b"\x90", 0, 64, count=0) == []
    assert disassembler.before(b"\x90\xc3\xcc", 0x1000, 0x1002, 64, 5) == [whole]
    assert disassembler.before(b"\x90", 0x1000, 0x1000, 64, 5) == []
    (last,) = disassembler.before(bytes(range(40)), 0x1000, 0x1028, 64, 5, start=0x1000)
    assert (last.address, last.bytes) == (0x1019, bytes(range(25, 40)))
    with pytest.raises(UsageError):
        disassembler.disassemble(b"\x90", 0, 8)
    assert annotate(whole, SYMBOLS) == ".byte 0x90, 0xc3"
