"""What is typed at the prompt: addresses, completion, and the terminal that the guest writes to meanwhile."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy import UsageError
from kvmpy.cli.guest_output import GuestOutput, StandardOutput
from kvmpy.debug.prompt import GuestPrompt
from kvmpy.debug.prompt.addresses import resolve
from kvmpy.debug.prompt.completion import Completer, within_string
from kvmpy.debug.symbols import Symbol, SymbolTable, UnknownSymbolError
from kvmpy.kvm import Vcpu
from kvmpy.machine import Machine
from kvmpy.x86 import modes
from kvmpy.x86.registers import CpuState

SYMBOLS = SymbolTable(
    [
        Symbol("main", 0x1000, 0x20, "function"),
        Symbol("make", 0x2000, 0x20, "function"),
        Symbol("a-b", 0x3000, 0x20, "function"),
        Symbol("r9", 0x4000, 0x20, "function"),
    ]
)


def machine(symbols: SymbolTable = SYMBOLS) -> Machine:
    return cast(Machine, SimpleNamespace(symbols=symbols, lines=None))


def address(where: Any, state: CpuState | None = None) -> int:
    return resolve(where, machine(), cast(Vcpu, state or modes.long_mode(0x1234, 0x2000, stack=0x8000)))


# Addresses


@pytest.mark.parametrize(
    ("where", "found"),
    [
        (0x10, 0x10),
        ("main", 0x1000),
        ("main+0x10", 0x1010),
        ("main + 16", 0x1010),
        ("make-1", 0x1FFF),
        ("a-b", 0x3000),
        ("a-b-8", 0x2FF8),
        ("r9", 0x4000),
        ("r10", 0),
        ("r10-8", (1 << 64) - 8),
        ("rip", 0x1234),
        ("rsp+8", 0x8008),
        ("cr3", 0x2000),
        ("0x10", 0x10),
        ("0x10+0x20", 0x30),
    ],
)
def test_an_address_is_a_number_a_symbol_or_a_register_and_a_distance(where: int | str, found: int) -> None:
    assert address(where) == found


def test_outside_of_64_bit_mode_segments_have_bases() -> None:
    state = modes.real_mode(segment=0x1000, offset=0x10)
    state.sregs.ss = state.sregs.ss.replace(base=0x2_0000, selector=0x2000)
    state.regs.rsp = 0xABCD_FFF0
    state.regs.rax = 0x55
    assert (address("rip", state), address("rsp", state), address("rax", state)) == (0x1_0010, 0x2_FFF0, 0x55)


@pytest.mark.parametrize("where", [-1, 1 << 64, 1.5, None, True, b"main", "", "+", "nothing", "main+", "rip+1+1x"])
def test_what_is_no_address_is_a_usage_error(where: object) -> None:
    with pytest.raises(UsageError):
        address(where)


def test_a_name_that_is_misspelt_gets_similar_ones() -> None:
    with pytest.raises(UnknownSymbolError, match="main"):
        address("mian")


def test_a_line_of_an_image_without_lines_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="has no source lines"):
        address("main.c:12")


# Completion


def completer(**names: object) -> Completer:
    prompt = cast(GuestPrompt, SimpleNamespace(machine=machine()))
    return Completer(prompt, dict(names))


def completed(line: str, **names: object) -> list[str]:
    """What Tab offers at the end of `line`, of which readline completes the last word."""
    begin = max((line.rfind(character) for character in " ('\"=+-"), default=-1) + 1
    return completer(**names).complete(line, begin, line[begin:])


def test_names_and_attributes_are_completed() -> None:
    regs = modes.long_mode(0, 0).regs
    assert completed("regs.r1", regs=regs) == [f"regs.r1{digit}" for digit in range(6)]
    assert completed("x = mach", machine=1) == ["machine"]
    assert completed("nothing_is_called_so") == []


def test_symbols_and_registers_are_completed_within_strings() -> None:
    assert completed('br("ma') == ["main", "make"]
    assert sorted(completed("dump('rs")) == ["rsi", "rsp"]
    assert completed('dump("r9') == ["r9"]
    assert "main" in completed('br("')
    assert completed('br("main") + mak', make=1) == ["make"]
    assert "main" not in completed('br("main") + ma')


def test_other_symbols_are_offered_when_the_machine_has_others() -> None:
    prompt = SimpleNamespace(machine=SimpleNamespace(symbols=SYMBOLS))
    typed = Completer(cast(GuestPrompt, prompt), {})
    assert typed.complete('"ma', 1, "ma") == ["main", "make"]
    prompt.machine = SimpleNamespace(symbols=SymbolTable([Symbol("malloc", 1)]))
    assert typed.complete('"ma', 1, "ma") == ["malloc"]


def test_of_very_many_symbols_some_are_offered() -> None:
    many = SymbolTable([Symbol(f"f{number}", number) for number in range(10_000)])
    typed = Completer(cast(GuestPrompt, SimpleNamespace(machine=machine(many))), {})
    assert len(typed.complete('"', 1, "f")) == 500


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("", False),
        ("'", True),
        ("'a'", False),
        ("'\"", True),
        ("'\\'", True),
        ("'''a' ", True),
        ("'''a'''", False),
        ("# '", False),
        ("'# ", True),
        ("f('a', \"", True),
        ("''", False),
    ],
)
def test_where_a_string_begins_and_ends(text: str, inside: bool) -> None:
    assert within_string(text) is inside


@given(st.text())
def test_every_literal_ends_with_its_last_quote(text: str) -> None:
    assert not within_string(repr(text))
    assert within_string(repr(text)[:-1])


# What the guest writes meanwhile


@contextmanager
def standard_output() -> Iterator[io.FileIO]:
    """Descriptor 1 as a pipe to read from. No fixture, for pytest puts its own descriptor there before the test."""
    reading, writing = os.pipe()
    before = os.dup(1)
    os.dup2(writing, 1)
    os.close(writing)
    os.set_blocking(reading, False)
    try:
        with open(reading, "rb", buffering=0) as reader:
            yield reader
    finally:
        os.dup2(before, 1)
        os.close(before)


def test_output_is_passed_on_at_once() -> None:
    with standard_output() as terminal:
        output = GuestOutput()
        output.write(b"a")
        output.write(b"b\n")
        output.finish_line()
        assert terminal.read() == b"ab\n"


def test_a_line_that_the_guest_began_is_ended_for_others() -> None:
    with standard_output() as terminal:
        output = GuestOutput()
        output.write(b"login: ")
        output.finish_line()
        output.finish_line()
        assert terminal.read() == b"login: \n"


def test_lines_of_the_prompt_begin_at_the_left() -> None:
    with standard_output() as terminal:
        output = GuestOutput()
        output.show("0x1")
        output.write(b"log")
        output.show("0x2\n0x3")
        output.finish_line()
        assert terminal.read() == b"0x1\nlog\n0x2\n0x3\n"


def test_while_a_line_is_typed_whole_lines_are_taken() -> None:
    with standard_output() as terminal:
        output = GuestOutput()
        output.hold()
        output.write(b"one\ntw")
        assert output.take() == b"one\n"
        assert output.take() == b""
        output.write(b"o\n")
        assert output.take() == b"two\n"
        assert terminal.read() is None


def test_a_part_of_a_line_is_taken_when_nothing_comes_for_a_while() -> None:
    with standard_output():
        output = GuestOutput()
        output.hold()
        output.write(b"login: ")
        taken = [output.take() for _ in range(40)]
        assert taken.count(b"login: ") == 1
        assert taken.index(b"login: ") > 1
        output.write(b"x")
        assert output.take(everything=True) == b"x"


def test_what_was_not_taken_comes_when_the_line_is_typed() -> None:
    with standard_output() as terminal:
        output = GuestOutput()
        output.hold()
        output.hold()
        output.write(b"late")
        output.release()
        assert terminal.read() == b"late"
        output.release()
        output.finish_line()
        assert terminal.read() == b"\n"


def test_a_guest_that_floods_the_prompt_does_not_fill_memory() -> None:
    output = GuestOutput()
    output.hold()
    for number in range(64):
        output.write(bytes([number]) * (1 << 16))
    taken = output.take(everything=True)
    assert len(taken) == 1 << 20
    assert taken[-1] == 63


def test_only_the_main_thread_prints_directly() -> None:
    with standard_output():
        stream = io.StringIO()
        output = GuestOutput()
        shared = StandardOutput(stream, output)
        print("mine", file=cast(Any, shared))
        output.hold()
        other = threading.Thread(target=lambda: print("a handler's", file=cast(Any, shared)))
        other.start()
        other.join()
        assert stream.getvalue() == "mine\n"
        assert output.take() == b"a handler's\n"
        assert shared.encoding == stream.encoding
