"""Gates and IDTs: bytes by the manual's figures, round trips, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.errors import RegisterValueError, UsageError
from kvmpy.x86.gates import Gate, GateKind, Idt
from kvmpy.x86.registers import DescriptorTable


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        # SDM vol. 3, figure 6-2: offset 15:0, selector, zero, access, offset 31:16.
        (Gate("interrupt", 0x1234_5678, 0x08, bits=32), "78560800008e3412"),
        (Gate("trap", 0x1234_5678, 0x08, bits=32, dpl=3), "7856080000ef3412"),
        (Gate("task", selector=0x28, bits=32), "0000280000850000"),
        (Gate("interrupt", 0x5678, 0x10, bits=16), "7856100000860000"),
        (Gate("trap", 0x5678, 0x10, bits=16, present=0), "7856100000070000"),
        (Gate("call", 0x1234_5678, 0x08, bits=32, dpl=3, parameters=5), "7856080005ec3412"),
        # Figure 6-8: the IST in bits 34:32, offset 63:32 in the third doubleword.
        (Gate("interrupt", 0xFFFF_FFFF_8123_4567, 0x10, ist=3), "67451000038e2381ffffffff00000000"),
        (Gate("trap", 0x1000, 0x08, dpl=3), "0010080000ef00000000000000000000"),
        (Gate("call", 0x1_0000_2000, 0x08), "0020080000 8c0000 0100000000000000"),
    ],
)
def test_gate_bytes(gate: Gate, expected: str) -> None:
    assert gate.to_bytes() == bytes.fromhex(expected)
    assert Gate.decode(gate.to_bytes(), long_mode=gate.bits == 64) == gate


@st.composite
def gates(draw: st.DrawFn) -> Gate:
    bits = draw(st.sampled_from((16, 32, 64)))
    kinds: list[GateKind] = ["interrupt", "trap", "call"] if bits != 32 else ["interrupt", "trap", "call", "task"]
    kind = draw(st.sampled_from(kinds))
    return Gate(
        kind,
        draw(st.integers(0, (1 << bits) - 1)) if kind != "task" else 0,
        draw(st.integers(0, 0xFFFF)),
        dpl=draw(st.integers(0, 3)),
        bits=bits,
        ist=draw(st.integers(0, 7)) if bits == 64 and kind != "call" else 0,
        present=draw(st.integers(0, 1)),
        parameters=draw(st.integers(0, 31)) if bits != 64 and kind == "call" else 0,
    )


@given(gates())
def test_gates_round_trip(gate: Gate) -> None:
    assert Gate.decode(gate.to_bytes(), long_mode=gate.bits == 64) == gate


@given(st.binary(min_size=16, max_size=16), st.booleans())
def test_any_bytes_decode_to_a_gate_or_none(data: bytes, long_mode: bool) -> None:
    gate = Gate.decode(data, long_mode=long_mode)
    if data[5] & 0x10 or data[5] & 0xF in (0, 1, 2, 3, 8, 9, 10, 11, 13):
        assert gate is None
    elif long_mode:
        assert (gate is None) == (data[5] & 0xF < 12)
    else:
        assert gate is not None


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "interrupt", "offset": 1 << 32, "bits": 32},
        {"kind": "interrupt", "offset": 1 << 16, "bits": 16},
        {"kind": "interrupt", "selector": 1 << 16},
        {"kind": "interrupt", "ist": 8},
        {"kind": "interrupt", "dpl": 4},
        {"kind": "call", "bits": 32, "parameters": 32},
    ],
)
def test_fields_too_wide_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RegisterValueError):
        Gate(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "door"},
        {"kind": "interrupt", "bits": 8},
        {"kind": "task", "bits": 64},
        {"kind": "interrupt", "bits": 32, "ist": 1},
        {"kind": "call", "bits": 64, "ist": 1},
        {"kind": "interrupt", "bits": 32, "parameters": 1},
    ],
)
def test_forms_that_do_not_exist_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Gate(**fields)


def test_long_mode_idt_places_gates_16_bytes_apart() -> None:
    idt = Idt()
    gate = Gate("interrupt", 0x1000)
    idt[14] = gate
    data = idt.to_bytes()
    assert len(data) == 0x1000
    assert data[14 * 16 : 15 * 16] == gate.to_bytes()
    assert data.count(0) == 0x1000 - 3  # offset 0x10 00, selector 0x08, access 0x8e
    assert idt.register(0x8000) == DescriptorTable(0x8000, 0xFFF)


def test_protected_mode_idt_takes_16_and_32_bit_gates_8_bytes_apart() -> None:
    idt = Idt(bits=32)
    idt[0] = Gate("trap", 0x1000, bits=16)
    idt[8] = Gate("task", selector=0x28, bits=32)
    idt[255] = Gate("interrupt", 0x8_0000, bits=32)
    assert len(idt.to_bytes()) == 0x800
    assert idt.register(0).limit == 0x7FF
    again = Idt.decode(idt.to_bytes(), bits=32)
    assert {vector: again[vector] for vector in again} == {vector: idt[vector] for vector in idt}
    assert list(again) == [0, 8, 255]
    assert 8 in again
    assert 9 not in again


def test_set_all_points_every_vector_at_its_own_stub() -> None:
    idt = Idt()
    idt.set_all(Gate("interrupt", 0x4000), stride=8)
    assert len(idt) == 256
    assert (idt[0].offset, idt[14].offset, idt[255].offset) == (0x4000, 0x4070, 0x47F8)


@pytest.mark.parametrize(
    ("vector", "gate"),
    [
        (256, Gate("interrupt")),
        (-1, Gate("interrupt")),
        (3, Gate("interrupt", bits=32)),
        (3, Gate("call")),
    ],
)
def test_an_idt_refuses_what_does_not_fit(vector: int, gate: Gate) -> None:
    with pytest.raises(UsageError):
        Idt()[vector] = gate


def test_an_unset_vector_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        Idt()[3]
    with pytest.raises(UsageError):
        Idt(bits=16)


def test_short_gates_are_refused() -> None:
    with pytest.raises(UsageError, match="16 bytes"):
        Gate.decode(bytes(8), long_mode=True)
    with pytest.raises(UsageError, match="8 bytes"):
        Gate.decode(bytes(7))


def test_decoding_a_short_idt_takes_the_whole_gates() -> None:
    data = Gate("interrupt", 0x1000).to_bytes() * 3
    assert list(Idt.decode(data[:-1])) == [0, 1]
