"""The memory map of a PC, and the places in its memory that a boot loader hands out."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.boot.boot_memory import BootMemory
from kvmpy.boot.e820 import BIOS_HOLE, E820Entry, E820Type, e820_map
from kvmpy.boot.field_table import Fields
from kvmpy.boot.firmware_tables import PlacedTables, place_tables
from kvmpy.boot.image import LoadedRange
from kvmpy.errors import ImageError, UsageError
from kvmpy.memory import GuestMemory, MemoryRegion

MIB = 0x10_0000


def ram(*regions: tuple[int, int]) -> GuestMemory:
    memory = GuestMemory()
    for address, size in regions:
        memory.add(MemoryRegion.anonymous(address, size))
    return memory


def listed(entries: Sequence[E820Entry]) -> list[tuple[int, int, int]]:
    return [(entry.address, entry.end, entry.type) for entry in entries]


LOW = [(0, 0x9_FC00, 1), (0x9_FC00, 0xA_0000, 2), (0xF_0000, MIB, 2)]


def test_a_pc_has_its_bios_below_1_mib() -> None:
    assert listed(e820_map(ram((0, 16 * MIB)))) == [*LOW, (MIB, 16 * MIB, 1)]
    assert listed(e820_map(ram((0, 16 * MIB), (1 << 32, MIB))))[-1] == (1 << 32, (1 << 32) + MIB, 1)


def test_ram_that_ends_below_the_bios_has_no_bios() -> None:
    assert listed(e820_map(ram((0, 0x8_0000)))) == [(0, 0x8_0000, 1)]
    assert listed(e820_map(ram((MIB, MIB)))) == [(MIB, 2 * MIB, 1)]


def test_rom_is_reserved() -> None:
    memory = ram((0, 16 * MIB))
    memory.add(MemoryRegion.anonymous(0xFFFE_0000, 0x2_0000, read_only=True))
    assert listed(e820_map(memory))[-1] == (0xFFFE_0000, 1 << 32, 2)


def test_what_is_reserved_wins_over_ram() -> None:
    memory = ram((0, 16 * MIB))
    acpi = E820Entry(15 * MIB, 0x1000, E820Type.ACPI)
    assert listed(e820_map(memory, [acpi, E820Entry(0x1000, 0)])) == [
        *LOW, (MIB, 15 * MIB, 1), (15 * MIB, 15 * MIB + 0x1000, 3), (15 * MIB + 0x1000, 16 * MIB, 1),
    ]  # fmt: skip


ADDRESSES = st.integers(0, 40).map(lambda page: page * 0x1_0000)


@given(st.lists(st.tuples(ADDRESSES, st.integers(0, 0x5_0000), st.sampled_from(list(E820Type)))))
def test_the_map_is_in_order_and_the_last_word_counts(reserved: list[tuple[int, int, E820Type]]) -> None:
    memory = ram((0, 2 * MIB))
    entries = e820_map(memory, [E820Entry(*each) for each in reserved])
    for entry, following in pairwise(entries):
        assert entry.size > 0
        assert entry.end < following.address or (entry.end == following.address and entry.type != following.type)
    for address in range(0, 3 * MIB, 0x8000):
        expected: int | None = E820Type.RAM if address < 2 * MIB else None
        if BIOS_HOLE.overlaps(address, 1):
            expected = E820Type.RESERVED if address >= 0xF_0000 else None
        for start, size, kind in reserved:
            if start <= address < start + size:
                expected = kind
        found = [entry.type for entry in entries if entry.address <= address < entry.end]
        assert found == ([] if expected is None else [expected])


# Places


def test_pieces_are_handed_out_from_0x8000_up_and_never_in_the_bios() -> None:
    area = BootMemory(ram((0, 16 * MIB)), [LoadedRange(0x9000, 0x1000, "kernel")], "image")
    assert area.place(0xFF8, "one") == 0x8000
    assert area.place(9, "two") == 0xA000
    assert area.put(b"three", "three") == 0x8FF8
    assert area.memory.read(0x8FF8, 5) == b"three"
    assert area.place(0x9_8000, "large", alignment=0x1000) == MIB
    area.reserved.append(LoadedRange(0xA009, 0x2_0000, "free"))
    assert area.place(8, "four") == 0x2_A010
    assert [used.name for used in area.ranges] == ["kernel", "one", "two", "three", "large", "four"]


def test_no_room_is_said_with_what_it_was_for() -> None:
    area = BootMemory(ram((0, 0xA000)), (), "vmlinuz")
    with pytest.raises(
        ImageError, match=r"vmlinuz: no 0x2001 bytes between 0x8000 and .* are left for the stack .*RAM"
    ):
        area.place(0x2001, "stack")
    assert area.ranges == []


class Tables:
    def __init__(self, size: int, rsdp: int = 0) -> None:
        self.size = size
        self.rsdp = rsdp

    def place(self, memory: GuestMemory, taken: Sequence[LoadedRange]) -> PlacedTables:
        start = max((used.end for used in taken), default=0xE_0000)
        placed = LoadedRange(start, self.size, "tables")
        return PlacedTables((placed,), (E820Entry(start, self.size, E820Type.ACPI),), self.rsdp)


def test_tables_are_placed_one_after_the_other_and_the_first_rsdp_counts() -> None:
    placed = place_tables([Tables(0x10), Tables(0x20, rsdp=5), Tables(1, rsdp=6)], ram((0, MIB)), ())
    assert [used.address for used in placed.ranges] == [0xE_0000, 0xE_0010, 0xE_0030]
    assert [entry.address for entry in placed.memory_map] == [0xE_0000, 0xE_0010, 0xE_0030]
    assert placed.rsdp == 5
    assert place_tables((), ram((0, MIB)), ()) == PlacedTables()


# Fields


def test_fields_are_read_and_written_by_name() -> None:
    fields = Fields({"low": (0x10, 2), "high": (0x14, 8)}, bytearray(12), base=0x10)
    fields["low"] = 0x1234
    fields["high"] = (1 << 64) - 1
    assert fields.data == bytes.fromhex("3412 0000") + b"\xff" * 8
    assert (fields["low"], fields["high"]) == (0x1234, (1 << 64) - 1)
    assert repr(fields) == "<Fields low=0x1234, high=0xffffffffffffffff>"
    for value in (-1, 0x1_0000):
        with pytest.raises(UsageError, match="low has 2 bytes"):
            fields["low"] = value
    with pytest.raises(KeyError):
        fields["middle"] = 0
