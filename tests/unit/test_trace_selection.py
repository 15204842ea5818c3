"""Which events pass the filters of a trace."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.debug.trace import KINDS, Selection
from kvmpy.debug.trace.subject import Subject
from kvmpy.errors import UsageError


def port(number: int, size: int = 1, device: str = "uart16550") -> Subject:
    return Subject("port", "read", number, size, f"in {number:#x}", device=device)


def memory(address: int, size: int = 4, device: str = "hpet") -> Subject:
    return Subject("mmio", "read", address, size, f"read {address:#x}", device=device)


def of_kind(kind: str) -> Subject:
    return Subject(kind, None, None, None, kind)


EVERYTHING = [port(0x3F8), memory(0xFED0_0000), *map(of_kind, KINDS)]


def test_without_filters_everything_passes() -> None:
    assert all(map(Selection().takes, EVERYTHING))


def test_kinds_are_chosen_by_name() -> None:
    assert [subject.kind for subject in EVERYTHING if Selection(kinds="mmio").takes(subject)] == ["mmio", "mmio"]
    chosen = Selection(kinds=("hlt", "port"))
    assert {subject.kind for subject in EVERYTHING if chosen.takes(subject)} == {"hlt", "port"}


def test_ports_choose_accesses_that_touch_them_and_nothing_else() -> None:
    chosen = Selection(ports=(0x70, range(0x3F8, 0x400)))
    assert chosen.takes(port(0x70))
    assert chosen.takes(port(0x3FF))
    assert chosen.takes(port(0x3F6, 4))  # its last two bytes
    assert not chosen.takes(port(0x71))
    assert not chosen.takes(port(0x3F6, 2))
    assert not chosen.takes(port(0x400, 4))
    assert not chosen.takes(memory(0x70))
    assert not chosen.takes(of_kind("hlt"))


def test_addresses_choose_memory_accesses_and_instructions() -> None:
    chosen = Selection(addresses=range(0x1000, 0x2000))
    assert chosen.takes(memory(0x1FFF))
    assert chosen.takes(Subject("step", None, 0x1000, 1, "nop"))
    assert not chosen.takes(Subject("step", None, 0x2000, 1, "nop"))
    assert not chosen.takes(port(0x1000))


def test_kinds_named_beside_ports_pass_as_a_whole() -> None:
    chosen = Selection(kinds=("port", "irq"), ports=0x70)
    assert chosen.takes(of_kind("irq"))
    assert chosen.takes(port(0x70))
    assert not chosen.takes(port(0x71))


def test_devices_are_chosen_by_a_part_of_their_name_in_any_case() -> None:
    chosen = Selection(devices=("UART", "nobody"))
    assert chosen.takes(port(0x3F8))
    assert chosen.takes(port(0x1F0, device="nobody"))
    assert not chosen.takes(memory(0xFED0_0000))
    assert not chosen.takes(of_kind("hlt"))


@given(
    ranges=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 10)), min_size=1, max_size=4),
    address=st.integers(0, 60),
    size=st.sampled_from((1, 2, 4, 8)),
)
def test_an_access_passes_when_one_of_its_bytes_is_there(
    ranges: list[tuple[int, int]], address: int, size: int
) -> None:
    wanted = [range(start, start + length) for start, length in ranges]
    there = {byte for place in wanted for byte in place}
    assert Selection(ports=wanted).takes(port(address, size)) == bool(there & set(range(address, address + size)))


@pytest.mark.parametrize(
    "filters",
    [
        {"kinds": "exits"}, {"kinds": ["port", 7]}, {"ports": "0x3f8"}, {"ports": -1}, {"ports": range(5, 5)},
        {"ports": range(0, 10, 2)}, {"addresses": [1.5]}, {"minimum": -1}, {"minimum": float("nan")},
        {"minimum": "1"},
    ],
)  # fmt: skip
def test_filters_that_cannot_be_are_refused(filters: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Selection(**filters)
