"""Segment descriptors and GDTs: bytes known from other systems, round trips, what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.errors import RegisterValueError, UsageError
from kvmpy.x86 import descriptors
from kvmpy.x86.descriptors import Gdt, decode_segment, encode_segment, ldt_segment, tss_segment
from kvmpy.x86.gates import Gate
from kvmpy.x86.registers import DescriptorTable, Segment

bit = st.integers(0, 1)


@st.composite
def segments(draw: st.DrawFn, *, s: int | None = None, base_bits: int = 32) -> Segment:
    g = draw(bit)
    limit = draw(st.integers(0, 0xF_FFFF))
    return Segment(
        0,
        draw(st.integers(0, (1 << base_bits) - 1)),
        limit << 12 | 0xFFF if g else limit,
        type=draw(st.integers(1, 15)),
        present=draw(bit),
        dpl=draw(st.integers(0, 3)),
        db=draw(bit),
        s=draw(bit) if s is None else s,
        l=draw(bit),
        g=g,
        avl=draw(bit),
    )


@pytest.mark.parametrize(
    ("segment", "value"),
    [
        # As every flat-model kernel has them, with the accessed bit set (SDM vol. 3, figure 3-8).
        (descriptors.CODE64, 0x00AF_9B00_0000_FFFF),
        (descriptors.CODE32, 0x00CF_9B00_0000_FFFF),
        (descriptors.DATA32, 0x00CF_9300_0000_FFFF),
        (descriptors.CODE16, 0x0000_9B00_0000_FFFF),
        (descriptors.DATA16, 0x0000_9300_0000_FFFF),
        (descriptors.USER_CODE64, 0x00AF_FB00_0000_FFFF),
        (descriptors.USER_CODE32, 0x00CF_FB00_0000_FFFF),
        (descriptors.USER_DATA32, 0x00CF_F300_0000_FFFF),
        (tss_segment(0x1234_5678), 0x1200_8934_5678_0067),
        (tss_segment(0x1234_5678, busy=True, dpl=3), 0x1200_EB34_5678_0067),
        (ldt_segment(0xABCD_E000, 0x1F), 0xAB00_82CD_E000_001F),
        (Segment(0, 0xDEAD_BEEF, 0xF_1234, type=0xA, dpl=2, avl=1), 0xDE1F_DAAD_BEEF_1234),
    ],
)
def test_descriptor_bytes(segment: Segment, value: int) -> None:
    assert encode_segment(segment) == value.to_bytes(8, "little")
    assert decode_segment(value.to_bytes(8, "little")) == segment


def test_long_mode_stretches_system_descriptors_only() -> None:
    encoded = encode_segment(tss_segment(0xFFFF_8000_1234_5678), long_mode=True)
    assert encoded.hex() == "6700785634890012" + "0080ffff00000000"
    assert decode_segment(encoded, 0x40, long_mode=True).base == 0xFFFF_8000_1234_5678
    assert len(encode_segment(descriptors.CODE64, long_mode=True)) == 8


def test_granularity_scales_the_limit() -> None:
    page_granular = decode_segment(bytes.fromhex("00000000009bc000"))
    assert page_granular.limit == 0xFFF
    assert decode_segment(bytes.fromhex("00000000009b4000")).limit == 0


@given(segments())
def test_8_byte_descriptors_round_trip(segment: Segment) -> None:
    assert decode_segment(encode_segment(segment)) == segment


@given(segments(s=0, base_bits=64))
def test_16_byte_descriptors_round_trip(segment: Segment) -> None:
    assert decode_segment(encode_segment(segment, long_mode=True), long_mode=True) == segment


@given(st.binary(min_size=16, max_size=16), st.booleans())
def test_any_bytes_decode(data: bytes, long_mode: bool) -> None:
    segment = decode_segment(data, 0x18, long_mode=long_mode)
    assert segment.selector == 0x18
    if not (long_mode and not segment.s and segment.type):
        assert encode_segment(segment) == data[:8]


@pytest.mark.parametrize(
    "segment",
    [
        Segment(base=1 << 32),
        Segment(limit=1 << 32, g=1),
        Segment(type=16),
        Segment(dpl=4),
        Segment(db=2),
        Segment(present=-1),
    ],
)
def test_fields_too_wide_are_refused(segment: Segment) -> None:
    with pytest.raises(RegisterValueError):
        encode_segment(segment)


@pytest.mark.parametrize("segment", [Segment(limit=0x10_0000), Segment(limit=0x1000, g=1)])
def test_limits_that_the_granularity_cannot_express_are_refused(segment: Segment) -> None:
    with pytest.raises(UsageError, match=r"limit|granularity"):
        encode_segment(segment)


def test_short_data_is_refused() -> None:
    with pytest.raises(UsageError, match="8 bytes"):
        decode_segment(bytes(7))
    with pytest.raises(UsageError, match="16 bytes"):
        decode_segment(encode_segment(tss_segment(0)), long_mode=True)


def test_gdt_hands_out_selectors_with_the_privilege_of_the_segment() -> None:
    gdt = Gdt()
    assert gdt.append("code32") == 0x08
    assert gdt.append("data32") == 0x10
    assert gdt.append("user_code32") == 0x1B
    assert gdt.append(tss_segment(0x5000, dpl=3)) == 0x20
    assert gdt.append(None) == 0x28
    assert gdt.append(descriptors.USER_DATA32) == 0x33
    assert len(gdt) == 0x38
    assert gdt.register(0x800) == DescriptorTable(0x800, 0x37)
    assert gdt.to_bytes()[:16].hex() == "0000000000000000ffff0000009bcf00"


def test_long_mode_tss_takes_two_places() -> None:
    gdt = Gdt(long_mode=True)
    gdt.append("code64")
    assert gdt.append(tss_segment(0x1_0000_5000)) == 0x10
    assert gdt.append("data32") == 0x20
    assert gdt.segment(0x10).base == 0x1_0000_5000


def test_a_loaded_segment_has_its_selector_and_a_loaded_tss_is_busy() -> None:
    gdt = Gdt()
    user = gdt.append("user_data32")
    task = gdt.append(tss_segment(0x5000))
    assert gdt.segment(user) == descriptors.USER_DATA32.replace(selector=user)
    old = gdt.append(Segment(base=0x6000, limit=0x2B, type=1, s=0))
    assert gdt.segment(task).type == 11
    assert gdt.segment(old).type == 3


@pytest.mark.parametrize("selector", [0x0C, 0x10, 0xFFF8])
def test_selectors_outside_the_table_are_refused(selector: int) -> None:
    gdt = Gdt()
    gdt.append("code32")
    with pytest.raises(UsageError, match=hex(selector)):
        gdt.segment(selector)


def test_a_table_read_back_lists_segments_gates_and_empty_places() -> None:
    gdt = Gdt(long_mode=True)
    gdt.append("code64")
    gdt.append(tss_segment(0x5000))
    gdt.append(Gate("call", 0x1234_5678_9ABC, 0x08, dpl=3))
    gdt.append("user_data32")
    again = Gdt.decode(gdt.to_bytes() + b"tail", long_mode=True)
    assert dict(again) == {
        0x00: None,
        0x08: descriptors.CODE64.replace(selector=0x08),
        0x10: tss_segment(0x5000).replace(selector=0x10),
        0x20: Gate("call", 0x1234_5678_9ABC, 0x08, dpl=3),
        0x30: descriptors.USER_DATA32.replace(selector=0x30),
    }


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_can_be_listed_as_a_table(data: bytes, long_mode: bool) -> None:
    places = [place for place, _ in Gdt.decode(data, long_mode=long_mode)]
    assert places == sorted(set(places))
    assert all(place % 8 == 0 for place in places)


def test_what_does_not_belong_into_a_gdt_is_refused() -> None:
    with pytest.raises(UsageError, match="code65"):
        Gdt().append("code65")
    with pytest.raises(UsageError, match="IDT"):
        Gdt().append(Gate("interrupt", 0, bits=32))
    with pytest.raises(UsageError, match="gate"):
        Gdt(long_mode=True).append(Gate("call", 0, bits=32))


def test_a_full_table_is_refused() -> None:
    gdt = Gdt.decode(bytes(0xFFF8))
    assert gdt.append("code32") == 0xFFF8
    assert gdt.register(0).limit == 0xFFFF
    with pytest.raises(UsageError, match="64 KiB"):
        gdt.append("code32")
