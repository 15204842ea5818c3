"""Building page tables: entries by hand-written bytes, and every map is what the walker finds."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.errors import GuestMemoryError, OverlapError, UsageError
from kvmpy.memory import GuestMemory, MemoryRegion
from kvmpy.x86.flags import Cr0, Cr4, Efer
from kvmpy.x86.page_tables import PageTables
from kvmpy.x86.page_walk import walk
from kvmpy.x86.paging import PageFlag, PagingMode
from kvmpy.x86.registers import SystemRegisters

BASE = 0x10_0000
MODES = [PagingMode.BITS32, PagingMode.PAE, PagingMode.LEVEL4, PagingMode.LEVEL5]


def ram(size: int = 0x40_0000) -> GuestMemory:
    memory = GuestMemory()
    memory.add(MemoryRegion.anonymous(0, size))
    return memory


def registers(mode: PagingMode, cr3: int) -> SystemRegisters:
    sregs = SystemRegisters()
    sregs.cr3 = cr3
    sregs.cr0 = Cr0.PE | Cr0.PG
    if mode is PagingMode.BITS32:
        sregs.cr4 = Cr4.PSE
    else:
        sregs.cr4 = Cr4.PAE | Cr4.PGE | (Cr4.LA57 if mode is PagingMode.LEVEL5 else 0)
        sregs.efer = Efer.NXE | (Efer.LMA | Efer.LME if mode is not PagingMode.PAE else 0)
    return sregs


def qwords(memory: GuestMemory, address: int, count: int = 1) -> tuple[int, ...]:
    return struct.unpack(f"<{count}Q", memory.read(address, 8 * count))


def test_one_4k_page_in_4_levels_is_these_four_entries() -> None:
    memory = ram()
    tables = PageTables(memory, PagingMode.LEVEL4, BASE)
    tables.map(0xFFFF_8123_4567_8000, 0xAB_C000, 0x1000, writable=False, no_execute=True)
    assert tables.cr3 == BASE
    # Indices of 0xffff812345678000: PML4 0x102, PDPT 0x8d, PD 0x2b, PT 0x78.
    assert qwords(memory, BASE + 8 * 0x102) == (0x10_1007,)
    assert qwords(memory, 0x10_1000 + 8 * 0x8D) == (0x10_2007,)
    assert qwords(memory, 0x10_2000 + 8 * 0x2B) == (0x10_3007,)
    assert qwords(memory, 0x10_3000 + 8 * 0x78) == (0x8000_0000_00AB_C001,)
    assert tables.end == BASE + 0x4000


def test_2m_pages_follow_each_other_in_one_directory() -> None:
    memory = ram()
    PageTables(memory, PagingMode.LEVEL4, BASE).map(0, 0x4000_0000, 0x60_0000, user=True)
    assert qwords(memory, 0x10_2000, 4) == (0x4000_0087, 0x4020_0087, 0x4040_0087, 0)


def test_32_bit_paging_has_4_byte_entries() -> None:
    memory = ram()
    tables = PageTables(memory, PagingMode.BITS32, BASE)
    tables.map(0xC000_0000, 0, 0x40_0000, user=True)
    tables.map(0x0804_8000, 0x9000, 0x1000, writable=False, user=True)
    assert memory.read(BASE + 4 * 0x300, 4) == (0x87).to_bytes(4, "little")
    assert memory.read(BASE + 4 * 0x20, 4) == (0x10_1007).to_bytes(4, "little")
    assert memory.read(0x10_1000 + 4 * 0x48, 4) == (0x9005).to_bytes(4, "little")


def test_pae_pointers_carry_only_the_present_bit() -> None:
    """SDM vol. 3, table 4-8: RW and US are reserved there."""
    memory = ram()
    PageTables(memory, PagingMode.PAE, BASE).map(0xC000_0000, 0, 0x20_0000)
    assert qwords(memory, BASE, 4) == (0, 0, 0, 0x10_1001)
    assert qwords(memory, 0x10_1000) == (0x83,)


def test_five_levels_start_at_bit_48() -> None:
    memory = ram()
    PageTables(memory, PagingMode.LEVEL5, BASE).map(0x00AB_0000_0000_0000, 0, 0x1000)
    assert qwords(memory, BASE + 8 * 0xAB) == (0x10_1007,)


def test_the_largest_page_that_fits_is_chosen_part_by_part() -> None:
    memory = ram()
    tables = PageTables(memory, PagingMode.LEVEL4, BASE, gigabyte_pages=True)
    tables.map(0x3FFF_F000, 0x3FFF_F000, 0x1000 + 0x4000_0000 + 0x20_0000 + 0x1000)
    sregs = registers(PagingMode.LEVEL4, tables.cr3)
    for address, size in (
        (0x3FFF_F000, 0x1000),
        (0x4000_0000, 0x4000_0000),
        (0x8000_0000, 0x20_0000),
        (0x8020_0000, 0x1000),
    ):
        found = walk(memory, sregs, address)
        assert (found.physical, found.page_size) == (address, size)
    assert walk(memory, sregs, 0x8020_1000).physical is None


def test_1g_pages_are_taken_only_when_offered_or_asked_for() -> None:
    memory = ram()
    tables = PageTables(memory, PagingMode.LEVEL4, BASE)
    tables.map(0, 0, 0x4000_0000)
    assert walk(memory, registers(PagingMode.LEVEL4, tables.cr3), 0).page_size == 0x20_0000
    tables.map(0x4000_0000, 0, 0x4000_0000, page_size=0x4000_0000)
    assert walk(memory, registers(PagingMode.LEVEL4, tables.cr3), 0x4000_0000).page_size == 0x4000_0000


def test_misaligned_physical_addresses_need_small_pages() -> None:
    memory = ram()
    tables = PageTables(memory, PagingMode.LEVEL4, BASE)
    tables.map(0x20_0000, 0x1000, 0x20_0000)
    assert walk(memory, registers(PagingMode.LEVEL4, tables.cr3), 0x20_0000).page_size == 0x1000


def test_a_small_page_inside_a_large_one_splits_it() -> None:
    memory = ram()
    for mode in MODES:
        tables = PageTables(memory, mode, BASE)
        tables.map(0, 0, 0x80_0000, user=True)
        tables.map(0x5000, 0x8000, 0x1000, writable=False)
        sregs = registers(mode, tables.cr3)
        changed, below, above = (walk(memory, sregs, address) for address in (0x5123, 0x4123, 0x6123))
        assert (changed.physical, changed.writable, changed.user) == (0x8123, False, False)
        for same, address in ((below, 0x4123), (above, 0x6123)):
            assert (same.physical, same.writable, same.user, same.page_size) == (address, True, True, 0x1000)
        assert walk(memory, sregs, 0x40_0000).page_size == mode.page_sizes[1]


def test_splitting_moves_pat_from_bit_12_to_bit_7() -> None:
    memory = ram()
    tables = PageTables(memory, PagingMode.LEVEL4, BASE)
    tables.map(0, 0, 0x4000_0000, page_size=0x4000_0000, flags=PageFlag.PAT_LARGE | PageFlag.PWT)
    tables.map(0, 0, 0x1000)  # 1 GiB to 2 MiB to 4 KiB
    directory = 0x10_2000
    table = qwords(memory, directory)[0] & ~0xFFF
    assert qwords(memory, directory + 8) == (0x20_0000 | 0x1000 | 0x8B,)
    assert qwords(memory, table + 8) == (0x1000 | 0x8B,)


def test_splitting_keeps_bit_7_clear_without_pat() -> None:
    memory = ram()
    tables = PageTables(memory, PagingMode.LEVEL4, BASE)
    tables.map(0, 0, 0x20_0000)
    tables.map(0, 0, 0x1000)
    table = qwords(memory, 0x10_2000)[0] & ~0xFFF
    assert qwords(memory, table + 8) == (0x1003,)


def test_a_large_page_over_a_table_is_an_overlap() -> None:
    memory = ram()
    tables = PageTables(memory, PagingMode.LEVEL4, BASE)
    tables.map(0x5000, 0x5000, 0x1000)
    with pytest.raises(OverlapError):
        tables.map(0, 0, 0x20_0000)
    tables.unmap(0, 0x20_0000)
    tables.map(0, 0, 0x20_0000)
    assert walk(memory, registers(PagingMode.LEVEL4, tables.cr3), 0x5000).page_size == 0x20_0000


def test_unmapping_splits_what_it_cuts() -> None:
    memory = ram()
    for mode in MODES:
        tables = PageTables(memory, mode, BASE)
        tables.map(0, 0, 0x100_0000)
        tables.unmap(0x3F_F000, 0x40_2000)
        sregs = registers(mode, tables.cr3)
        mapped = [
            walk(memory, sregs, address).physical for address in (0x3F_EFFF, 0x3F_F000, 0x50_0000, 0x80_0FFF, 0x80_1000)
        ]
        assert mapped == [0x3F_EFFF, None, None, None, 0x80_1000]


def test_unmapping_what_is_not_mapped_costs_no_tables() -> None:
    memory = ram()
    tables = PageTables(memory, PagingMode.LEVEL4, BASE)
    tables.unmap(0, 1 << 46)
    assert tables.end == BASE + 0x1000


def test_tables_stay_within_their_size() -> None:
    memory = ram()
    tables = PageTables(memory, PagingMode.LEVEL4, BASE, size=0x3000)
    tables.map(0, 0, 0x20_0000)
    memory.write(BASE + 0x3000, b"mine")
    with pytest.raises(UsageError, match="used up"):
        tables.map(0x20_0000, 0, 0x1000)
    assert memory.read(BASE + 0x3000, 4) == b"mine"


def test_tables_outside_memory_are_a_memory_error() -> None:
    with pytest.raises(GuestMemoryError):
        PageTables(ram(0x20_0000), PagingMode.LEVEL4, 0x1F_E000).map(0, 0, 0x1000)


def test_the_tables_pages_are_cleared_first() -> None:
    memory = ram()
    memory.fill(BASE, 0x10_000, 0xFF)
    tables = PageTables(memory, PagingMode.LEVEL4, BASE)
    tables.map(0, 0, 0x1000)
    assert walk(memory, registers(PagingMode.LEVEL4, tables.cr3), 0x1000).physical is None


@pytest.mark.parametrize(
    ("mode", "arguments"),
    [
        (PagingMode.LEVEL4, {"virtual": 0x800}),
        (PagingMode.LEVEL4, {"physical": 0x800}),
        (PagingMode.LEVEL4, {"length": 0x800}),
        (PagingMode.LEVEL4, {"length": 0}),
        (PagingMode.LEVEL4, {"virtual": -0x1000}),
        (PagingMode.LEVEL4, {"virtual": 1 << 47}),
        (PagingMode.LEVEL4, {"virtual": (1 << 47) - 0x1000, "length": 0x2000}),
        (PagingMode.LEVEL4, {"virtual": 0, "length": 1 << 64}),
        (PagingMode.LEVEL4, {"physical": 1 << 52}),
        (PagingMode.LEVEL4, {"page_size": 0x40_0000}),
        (PagingMode.LEVEL4, {"page_size": 0x20_0000}),
        (PagingMode.LEVEL5, {"virtual": 1 << 56}),
        (PagingMode.BITS32, {"virtual": 1 << 32}),
        (PagingMode.BITS32, {"virtual": 0xFFFF_F000, "length": 0x2000}),
        (PagingMode.BITS32, {"physical": 1 << 32}),
        (PagingMode.BITS32, {"no_execute": True}),
        (PagingMode.PAE, {"page_size": 0x4000_0000, "length": 0x4000_0000}),
    ],
)
def test_impossible_mappings_are_refused(mode: PagingMode, arguments: dict[str, Any]) -> None:
    tables = PageTables(ram(), mode, BASE)
    with pytest.raises(UsageError):
        tables.map(**({"virtual": 0, "physical": 0, "length": 0x1000} | arguments))


def test_impossible_tables_are_refused() -> None:
    with pytest.raises(UsageError):
        PageTables(ram(), PagingMode.NONE, BASE)
    with pytest.raises(UsageError):
        PageTables(ram(), PagingMode.LEVEL4, BASE + 0x10)
    with pytest.raises(UsageError, match="4 GiB"):
        PageTables(ram(), PagingMode.PAE, 1 << 32)


def test_a_mapping_that_is_refused_maps_nothing() -> None:
    memory = ram()
    tables = PageTables(memory, PagingMode.LEVEL4, BASE)
    tables.map(0x4000_0000, 0, 0x1000)
    with pytest.raises(OverlapError):
        tables.map(0, 0, 0x8000_0000)
    assert walk(memory, registers(PagingMode.LEVEL4, tables.cr3), 0x3FFF_FFFF).physical is None


@st.composite
def mappings(draw: st.DrawFn, mode: PagingMode) -> tuple[int, int, int, dict[str, bool]]:
    size = draw(st.sampled_from(mode.page_sizes))
    bits = mode.address_bits
    virtual = draw(st.integers(0, (1 << bits) - 1)) // size * size
    if bits > 32 and virtual >> (bits - 1):
        virtual |= (1 << 64) - (1 << bits)
    length = size * draw(st.integers(1, 3))
    half = 1 << (bits - 1 if bits > 32 else bits)
    length = min(length, half - virtual % half)
    physical = draw(st.integers(0, (1 << 32) - length)) // size * size
    options = {name: draw(st.booleans()) for name in ("writable", "user", "global_page")}
    options["no_execute"] = draw(st.booleans()) and mode is not PagingMode.BITS32
    return virtual, physical, length, options


@given(st.data(), st.sampled_from(MODES))
def test_what_is_mapped_is_what_the_walk_finds(data: st.DataObject, mode: PagingMode) -> None:
    """Against a dictionary of 4 KiB pages: the last mapping of a page wins, others are absent."""
    memory = ram()
    tables = PageTables(memory, mode, BASE)
    sregs = registers(mode, tables.cr3)
    ranges: list[tuple[int, int, int, dict[str, bool]]] = []
    for _ in range(data.draw(st.integers(1, 4))):
        mapping = data.draw(mappings(mode))
        virtual, physical, length, options = mapping
        try:
            tables.map(virtual, physical, length, **options)
        except OverlapError:
            continue
        ranges.append(mapping)
    for virtual, _, length, _ in ranges:
        for probe in (virtual - 1, virtual, virtual + length // 2 + 0x123, virtual + length - 1, virtual + length):
            address = probe & ((1 << 64) - 1 if mode.address_bits > 32 else 0xFFFF_FFFF)
            if not mode.is_canonical(address):
                continue
            found = walk(memory, sregs, address)
            expected = next((m for m in reversed(ranges) if m[0] <= address < m[0] + m[2]), None)
            if expected is None:
                assert found.physical is None
                continue
            start, target, _, options = expected
            assert found.physical == target + address - start
            assert (found.writable, found.user, found.executable) == (
                options["writable"],
                options["user"],
                not options["no_execute"],
            )
            assert found.global_page == (options["global_page"] and bool(sregs.cr4 & Cr4.PGE))
