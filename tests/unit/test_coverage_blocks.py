"""Basic blocks of machine code, and blocks made of executed instructions. No KVM."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gnu_toolchain import assemble_with_symbols
from kvmpy.debug.coverage.basic_blocks import BasicBlock, Function, find_blocks
from kvmpy.debug.coverage.control_flow import Flow, flow_at
from kvmpy.debug.coverage.executed_blocks import blocks_of_steps, merged_blocks
from kvmpy.debug.disassembly import Disassembler
from kvmpy.errors import UsageError

pytest.importorskip("capstone")

CODE = 0x1000
NOWHERE = 0x1234_5678


def flow(code: str, bits: int = 64) -> Flow | None:
    return flow_at(Disassembler(), bytes.fromhex(code), CODE, bits)


def blocks(source: str, bits: int = 64, *, size: bool = False, starts: tuple[str, ...] = ()) -> dict[str, BasicBlock]:
    """Label -> the block that starts there. Every block must have a label."""
    code, symbols = assemble_with_symbols(source, address=CODE, bits=bits)

    def read(address: int, length: int) -> bytes:
        offset = address - CODE
        return code[offset : offset + length] if 0 <= offset < len(code) else b""

    functions = [Function(CODE, bits, len(code) if size else 0)]
    functions += [Function(symbols[name], bits) for name in starts]
    names = {address: name for name, address in symbols.items()}
    found = {names[block.start]: block for block in find_blocks(functions, read)}
    for block in found.values():
        assert block.bits == bits
        assert block.instructions[0] == block.start
    return found


# One instruction


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("90", Flow(1, padding=True)),
        ("0f 1f 44 00 00", Flow(5, padding=True)),
        ("cc", Flow(1, anywhere=True, ends=True, padding=True)),
        ("48 89 c3", Flow(3)),
        ("eb 10", Flow(2, falls=False, target=CODE + 0x12, ends=True)),
        ("e9 fb ff ff ff", Flow(5, falls=False, target=CODE, ends=True)),
        ("ff e0", Flow(2, falls=False, anywhere=True, ends=True)),
        ("f2 ff 25 00 00 00 00", Flow(7, falls=False, anywhere=True, ends=True)),  # bnd jmp
        ("74 fe", Flow(2, target=CODE, ends=True)),
        ("0f 84 00 01 00 00", Flow(6, target=CODE + 0x106, ends=True)),
        ("e2 fe", Flow(2, target=CODE, ends=True)),  # loop
        ("e3 00", Flow(2, target=CODE + 2, ends=True)),  # jrcxz
        ("e8 00 01 00 00", Flow(5, target=CODE + 0x105, ends=True)),
        ("ff d0", Flow(2, anywhere=True, ends=True)),
        ("c3", Flow(1, falls=False, anywhere=True, ends=True)),
        ("f3 c3", Flow(2, falls=False, anywhere=True, ends=True)),
        ("c2 08 00", Flow(3, falls=False, anywhere=True, ends=True)),
        ("cb", Flow(1, falls=False, anywhere=True, ends=True)),
        ("48 cf", Flow(2, falls=False, anywhere=True, ends=True)),
        ("48 0f 07", Flow(3, falls=False, anywhere=True, ends=True)),
        ("0f 05", Flow(2, anywhere=True, ends=True)),
        ("cd 80", Flow(2, anywhere=True, ends=True)),
        ("0f 0b", Flow(2, falls=False, ends=True)),
        ("f4", Flow(1, ends=True, halts=True)),
        ("e6 80", Flow(2, ends=True)),
        ("f3 6e", Flow(2, ends=True)),
        ("e4 80", Flow(2)),
        ("f3 a4", Flow(2)),
        ("06", None),
        ("0f", None),
    ],
)
def test_the_flow_of_an_instruction(code: str, expected: Flow | None) -> None:
    assert flow(code) == expected


@pytest.mark.parametrize(
    ("code", "bits", "target", "falls"),
    [
        ("eb fe", 16, CODE, False), ("e8 0d 00", 16, CODE + 0x10, True), ("66 e8 0a 00 00 00", 16, CODE + 0x10, True),
        ("ea 00 10 00 00", 16, None, False), ("ea 00 00 01 00 08 00", 32, None, False), ("cf", 32, None, False),
    ],
)  # fmt: skip
def test_the_flow_in_other_widths(code: str, bits: int, target: int | None, falls: bool) -> None:
    found = flow(code, bits)
    assert found is not None
    assert (found.target, found.falls, found.size) == (target, falls, len(bytes.fromhex(code)))


def test_what_may_follow_an_instruction() -> None:
    branch = Flow(2, target=NOWHERE, ends=True)
    assert branch.leads(CODE, CODE + 2)
    assert branch.leads(CODE, NOWHERE)
    assert branch.leads(CODE, CODE)  # a round of REP
    assert not branch.leads(CODE, CODE + 3)
    assert not Flow(2, falls=False, target=NOWHERE).leads(CODE, CODE + 2)
    assert Flow(1, falls=False, anywhere=True).leads(CODE, CODE + 77)


# Blocks


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_blocks_start_at_starts_targets_and_behind_jumps_and_calls(bits: int) -> None:
    found = blocks(
        """
        _start: mov ecx, 5
        again:  call work
        back:   dec ecx
                jnz again
        through:
                nop
                jmp work
        work:   inc eax
                ret
        """,
        bits,
    )
    assert found.keys() == {"_start", "again", "back", "through", "work"}
    assert [len(found[name].instructions) for name in ("_start", "again", "back", "through", "work")] == [1, 1, 2, 2, 2]
    ends = [block.end for block in found.values()]
    assert ends[:-1] == [block.start for block in found.values()][1:]


def test_without_a_size_only_what_direct_jumps_and_calls_reach_is_code() -> None:
    source = """
    _start: jmp over
    text:   .ascii "This is data"
    over:   call f
    next:   jmp next
    g:      nop
            ret
    f:      ret
    """
    assert blocks(source).keys() == {"_start", "over", "next", "f"}
    assert blocks(source, starts=("g",)).keys() == {"_start", "over", "next", "f", "g"}


def test_with_a_size_all_of_it_is_code_but_padding_behind_jumps_is_none() -> None:
    source = """
    _start: jmp over
            nop
            .nops 7, 7
            int3
    case1:  inc eax
            ret
            .nops 6
    over:   lea rax, [rip + case1]
            jmp rax
            ud2
    """
    source = source.replace("jmp rax\n            ud2", "jmp rax\n    last:   ud2")
    assert blocks(source, size=True).keys() == {"_start", "case1", "over", "last"}


def test_padding_that_something_jumps_to_is_code() -> None:
    found = blocks("_start: jz there\nnext: ret\nthere: nop; nop; ret", size=True)
    assert found.keys() == {"_start", "next", "there"}
    assert len(found["there"].instructions) == 3


def test_a_target_within_an_instruction_of_another_block_starts_none() -> None:
    source = """
    _start: jz skip
    locked: .byte 0xf0                  # lock, which a jump skips
    skip:   inc dword ptr [rax]
            ret
    """
    found = blocks(source, size=True)
    assert found.keys() == {"_start", "locked"}


def test_what_cannot_be_decoded_ends_a_function() -> None:
    found = blocks("_start: jz next\nother: .byte 0x06\nlost: ret\nnext: ret", size=True)
    assert found.keys() == {"_start", "next"}


def test_behind_hlt_only_a_way_back_is_code() -> None:
    source = """
    _start: nop
    halt:   hlt
    {label} {what}
    """
    assert blocks(source.format(label="loop:", what="jmp halt")).keys() == {"_start", "halt", "loop"}
    found = blocks(source.format(label="check:", what="cmp eax, 3; jb halt\nthen: ret"))
    assert found.keys() == {"_start", "halt", "check", "then"}
    for what in ('.ascii "Halted."', ".long 0, 0, 0, 0, 0", "", "jmp . + 2"):
        assert blocks(source.format(label="data:", what=what)).keys() == {"_start"}


def test_code_that_runs_out_of_the_program_ends_there() -> None:
    assert blocks("_start: nop; nop; nop")["_start"].size == 3
    assert blocks(f"_start: call {NOWHERE}\nnext: jmp {NOWHERE}").keys() == {"_start", "next"}


def test_a_long_stretch_is_followed_across_what_is_read_at_once() -> None:
    found = blocks("_start: " + "mov rax, 0x1122334455667788\n" * 200 + "jz _start\nlast: ret")
    assert len(found["_start"].instructions) == 201
    assert found.keys() == {"_start", "last"}


@given(st.binary(min_size=1, max_size=200), st.sampled_from([16, 32, 64]), st.booleans())
def test_any_bytes_give_blocks_of_whole_instructions(code: bytes, bits: int, swept: bool) -> None:
    def read(address: int, length: int) -> bytes:
        return code[address - CODE :][:length] if address >= CODE else b""

    found = find_blocks([Function(CODE, bits, len(code) if swept else 0)], read)
    places = {address for block in found for address in block.instructions}
    for block in found:
        assert CODE <= block.start < block.end <= CODE + len(code)
        known = [flow_at(Disassembler(), read(address, 15), address, bits) for address in block.instructions]
        ends = [
            address + flow.size for address, flow in zip(block.instructions, known, strict=True) if flow is not None
        ]
        assert (*block.instructions[1:], block.end) == tuple(ends)
        within = {address + byte for address, end in zip(block.instructions, ends, strict=True)
                  for byte in range(1, end - address)}  # fmt: skip
        assert not within & {other.start for other in found}
    assert len({block.start for block in found}) == len(found)
    assert places <= set(range(CODE, CODE + len(code)))


def test_without_capstone_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Disassembler, "available", property(lambda _: False))
    with pytest.raises(UsageError, match=r"kvmpy\[debug\]"):
        find_blocks([Function(CODE, 64)], lambda address, length: b"\xc3")


# Executed blocks


def test_blocks_of_steps_are_cut_where_the_guest_came_in_and_left() -> None:
    sizes = {0x10: 2, 0x12: 1, 0x13: 2, 0x15: 1, 0x20: 1}
    pairs = [(0x10, 0x12), (0x12, 0x13), (0x13, 0x12), (0x13, 0x15), (0x15, 0x20), (0x20, 0x20)]
    found = blocks_of_steps(sizes, sizes, pairs)
    assert [(block.start, block.size) for block in found] == [(0x10, 2), (0x12, 3), (0x15, 1), (0x20, 1)]
    assert [block.instructions for block in found] == [(0x10,), (0x12, 0x13), (0x15,), (0x20,)]


def test_instructions_of_unknown_size_are_blocks_of_a_byte() -> None:
    assert blocks_of_steps({0x10, 0x11, 0x18}, {}, []) == [
        BasicBlock(0x10, 2, (0x10, 0x11)),
        BasicBlock(0x18, 1, (0x18,)),
    ]
    assert blocks_of_steps((), {}, []) == []


def test_merged_blocks_are_cut_where_others_start() -> None:
    large = BasicBlock(0x10, 10, (0x10, 0x12, 0x15, 0x18))
    small = [BasicBlock(0x10, 2, (0x10,), 64), BasicBlock(0x15, 5, (0x15, 0x18), 64)]
    found = merged_blocks([large, *small])
    assert [(block.start, block.size, block.instructions) for block in found] == [
        (0x10, 5, (0x10, 0x12)), (0x15, 5, (0x15, 0x18)),
    ]  # fmt: skip
    assert merged_blocks([*small, large]) == merged_blocks([large, *small])
    assert merged_blocks([]) == []


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20))))
def test_merged_blocks_cover_the_same_bytes_once(parts: list[tuple[int, int]]) -> None:
    given_blocks = [BasicBlock(start, size, tuple(range(start, start + size))) for start, size in parts]
    merged = merged_blocks(given_blocks)
    covered = [address for block in merged for address in range(block.start, block.end)]
    assert len(covered) == len(set(covered))
    assert set(covered) == {address for block in given_blocks for address in block.instructions}
    assert [address for block in merged for address in block.instructions] == covered
