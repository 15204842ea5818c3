"""Task-state segments: offsets by the manual's figures, the I/O permission bitmap port by port."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.errors import RegisterValueError, UsageError
from kvmpy.x86.task_state import ALL_PORTS, IoBitmap, Tss32, Tss64


@pytest.mark.parametrize(
    ("field", "offset"),
    [
        # SDM vol. 3, figure 7-11.
        ("rsp0", 0x04),
        ("rsp1", 0x0C),
        ("rsp2", 0x14),
        ("ist1", 0x24),
        ("ist2", 0x2C),
        ("ist7", 0x54),
    ],
)
def test_64_bit_fields_stand_where_the_manual_says(field: str, offset: int) -> None:
    tss = Tss64()
    setattr(tss, field, 0x1122_3344_5566_7788)
    data = tss.to_bytes()
    assert len(data) == 0x68
    assert struct.unpack_from("<Q", data, offset) == (0x1122_3344_5566_7788,)
    assert data.count(0) == 0x68 - 8 - 1  # and the bitmap base, 0x68


@pytest.mark.parametrize(
    ("field", "offset"),
    [
        # SDM vol. 3, figure 7-2.
        ("link", 0),
        ("esp0", 4),
        ("ss0", 8),
        ("esp2", 20),
        ("ss2", 24),
        ("cr3", 28),
        ("eip", 32),
        ("eax", 40),
        ("ecx", 44),
        ("edx", 48),
        ("ebx", 52),
        ("esp", 56),
        ("edi", 68),
        ("es", 72),
        ("cs", 76),
        ("ss", 80),
        ("gs", 92),
        ("ldt", 96),
        ("trap", 100),
    ],
)
def test_32_bit_fields_stand_where_the_manual_says(field: str, offset: int) -> None:
    tss = Tss32()
    setattr(tss, field, 0x1122)
    data = tss.to_bytes()
    assert len(data) == 0x68
    assert struct.unpack_from("<H", data, offset) == (0x1122,)


def test_without_a_bitmap_its_base_is_past_the_limit() -> None:
    tss = Tss64()
    assert struct.unpack_from("<H", tss.to_bytes(), 0x66) == (0x68,)
    assert tss.limit == 0x67


def test_allowing_a_port_brings_the_bitmap_and_its_last_byte_of_ones() -> None:
    tss = Tss64()
    tss.allow(0x3F8, 8)
    data = tss.to_bytes()
    assert tss.limit == len(data) - 1 == 0x2068
    bitmap = data[0x68:]
    assert bitmap[0x3F8 // 8] == 0
    assert bitmap.count(0xFF) == len(bitmap) - 1
    assert bitmap[-1] == 0xFF


@given(st.integers(0, 0xFFFF), st.integers(1, 64))
def test_exactly_the_granted_ports_are_clear_bits(port: int, count: int) -> None:
    count = min(count, 0x1_0000 - port)
    bitmap = IoBitmap([(port, count)])
    data = bitmap.to_bytes()
    clear = [
        number
        for number in range(max(port - 9, 0), min(port + count + 9, 0x1_0000))
        if not data[number // 8] >> number % 8 & 1
    ]
    assert clear == list(range(port, port + count))
    assert int.from_bytes(data[:-1], "little").bit_count() == 0x1_0000 - count
    assert bitmap.allowed(port, count)
    assert IoBitmap.decode(data) == bitmap


def test_an_access_needs_all_its_ports() -> None:
    bitmap = IoBitmap([(0x60, 3)])
    assert bitmap.allowed(0x60, 2)
    assert not bitmap.allowed(0x60, 4)
    assert not bitmap.allowed(0x5F, 2)
    bitmap.deny(0x61)
    assert not bitmap.allowed(0x60, 2)


def test_all_ports_leave_only_the_last_byte() -> None:
    assert IoBitmap(ALL_PORTS).to_bytes() == bytes(0x2000) + b"\xff"


def test_a_short_bitmap_denies_the_ports_of_its_last_byte() -> None:
    """SDM vol. 1, 18.5.2: the processor reads two bytes, both must be inside the limit."""
    bitmap = IoBitmap.decode(bytes(3))
    assert bitmap.allowed(0, 16)
    assert not bitmap.allowed(16)


@pytest.mark.parametrize(("port", "count"), [(-1, 1), (0x1_0000, 1), (0xFFFF, 2), (0, 0)])
def test_ranges_outside_the_ports_are_refused(port: int, count: int) -> None:
    with pytest.raises(UsageError):
        Tss64().allow(port, count)


def test_both_forms_round_trip() -> None:
    tss64 = Tss64(rsp0=1 << 63, ist7=7, io_bitmap=IoBitmap([(0x80, 1)]))
    assert Tss64.decode(tss64.to_bytes()) == tss64
    assert Tss64.decode(Tss64(rsp1=5).to_bytes()) == Tss64(rsp1=5)
    tss32 = Tss32(esp0=0xFFFF_FFFF, ss0=0x10, ldt=0x18, trap=1, io_bitmap=IoBitmap())
    assert Tss32.decode(tss32.to_bytes()) == tss32


def test_values_too_wide_and_data_too_short_are_refused() -> None:
    with pytest.raises(RegisterValueError):
        Tss64(rsp0=1 << 64).to_bytes()
    with pytest.raises(RegisterValueError):
        Tss32(ss0=1 << 16).to_bytes()
    with pytest.raises(UsageError):
        Tss32.decode(bytes(0x67))
