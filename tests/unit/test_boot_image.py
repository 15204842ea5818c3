"""The values that images give, the file behind an image, and where in RAM there is room."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvmpy.boot
from kvmpy.boot.image import Entry, LoadedRange, RomMapping
from kvmpy.boot.image_source import ImageSource
from kvmpy.boot.placement import highest_free, lowest_free, ram_spans
from kvmpy.errors import ImageError
from kvmpy.memory import GuestMemory, MemoryRegion
from kvmpy.x86.registers import CpuState


def ram(*regions: tuple[int, int]) -> GuestMemory:
    memory = GuestMemory()
    for address, size in regions:
        memory.add(MemoryRegion.anonymous(address, size))
    return memory


def test_every_public_name_resolves() -> None:
    for name in kvmpy.boot.__all__:
        assert getattr(kvmpy.boot, name).__name__ == name
    assert set(kvmpy.boot.__all__) <= set(dir(kvmpy.boot))
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        kvmpy.boot.Nothing  # type: ignore[attr-defined]  # noqa: B018


def test_the_values_do_not_change_and_compare() -> None:
    mapping, loaded = RomMapping(0x1000, b"rom"), LoadedRange(0x1000, 0x10, "code")
    assert mapping == RomMapping(0x1000, b"rom") != RomMapping(0x1000, b"rom", read_only=False)
    assert loaded == LoadedRange(0x1000, 0x10, "code") != LoadedRange(0x1000, 0x11, "code")
    assert len({loaded, LoadedRange(0x1000, 0x10, "code")}) == 1
    assert loaded != mapping  # type: ignore[comparison-overlap]
    for value in (mapping, loaded):
        with pytest.raises(AttributeError, match="does not change"):
            value.address = 0  # type: ignore[misc]


def test_a_rom_mapping_is_read_only_by_default() -> None:
    mapping = RomMapping(0xFFFE_0000, bytes(0x2_0000), name="BIOS")
    assert mapping.read_only
    assert repr(mapping) == "<RomMapping BIOS 0xfffe0000..0xffffffff>"


def test_an_entry_sorts_its_ranges_and_knows_the_outermost() -> None:
    outer, inner = LoadedRange(0x1000, 0x5000, "outer"), LoadedRange(0x2000, 0x10, "inner")
    entry = Entry(CpuState(), [inner, outer])
    assert entry.ranges == (outer, inner)
    assert (entry.low, entry.high) == (0x1000, 0x6000)


@pytest.mark.parametrize(
    ("address", "size", "expected"),
    [
        (0, 0x1000, False),
        (0, 0x1001, True),
        (0x100F, 1, True),
        (0x1010, 1, False),
        (0x1008, 0, False),
        (0, 1 << 64, True),
    ],
)
def test_ranges_overlap_when_they_share_a_byte(address: int, size: int, expected: bool) -> None:
    assert LoadedRange(0x1000, 0x10, "it").overlaps(address, size) is expected


def test_reading_never_leaves_the_image(tmp_path: Path) -> None:
    file = tmp_path / "image"
    file.write_bytes(b"0123456789")
    for source in (ImageSource(b"0123456789"), ImageSource(file)):
        assert source.read(3, 7, "it") == b"3456789"
        assert source.read(10, 0, "it") == b""
        for offset, length in ((3, 8), (11, 0), (-1, 2), (0, -1), (1 << 64, 1)):
            with pytest.raises(ImageError, match="it "):
                source.read(offset, length, "it")


def test_a_file_of_the_same_size_that_replaced_the_image_is_noticed(tmp_path: Path) -> None:
    file, other = tmp_path / "image", tmp_path / "other"
    file.write_bytes(b"first")
    other.write_bytes(b"other")
    source = ImageSource(file)
    other.replace(file)
    with pytest.raises(ImageError, match="has changed"):
        source.read(0, 5, "it")


def test_an_image_leaves_no_descriptor_open(tmp_path: Path) -> None:
    file = tmp_path / "image"
    file.write_bytes(bytes(0x1000))
    before = len(os.listdir("/proc/self/fd"))
    source = ImageSource(file)
    source.copy_to(ram((0, 0x1000)), 0, 0, 0x1000, "it")
    with pytest.raises(ImageError):
        source.copy_to(ram((0, 0x1000)), 1, 0, 0x1000, "it")
    assert len(os.listdir("/proc/self/fd")) == before


def test_adjacent_regions_are_one_stretch_of_ram_and_rom_is_none() -> None:
    memory = ram((0, 0x1000), (0x1000, 0x2000), (0x4000, 0x1000))
    memory.add(MemoryRegion.anonymous(0x5000, 0x1000, read_only=True))
    assert ram_spans(memory) == [(0, 0x3000), (0x4000, 0x5000)]


PAGES = st.integers(0, 24)


@given(
    spans=st.lists(st.tuples(PAGES, st.integers(1, 6)), min_size=1, max_size=4),
    taken=st.lists(st.tuples(st.integers(0, 25 * 0x1000), st.integers(0, 0x3000)), max_size=5),
    size=st.integers(1, 0x4000),
    below=st.integers(0, 32).map(lambda page: page * 0x1000),
)
def test_the_highest_and_the_lowest_free_place_are_free_and_the_outermost(
    spans: list[tuple[int, int]], taken: list[tuple[int, int]], size: int, below: int
) -> None:
    memory = GuestMemory()
    for page, pages in spans:
        if all(not (page < (r.address + r.size) >> 12 and r.address >> 12 < page + pages) for r in memory.regions):
            memory.add(MemoryRegion.anonymous(page << 12, pages << 12))
    used = [LoadedRange(address, length, "taken") for address, length in taken]

    def fits(address: int) -> bool:
        inside = any(start <= address and address + size <= min(end, below) for start, end in ram_spans(memory))
        return inside and not any(loaded.overlaps(address, size) for loaded in used)

    expected = [page << 12 for page in range(41) if fits(page << 12)]
    assert highest_free(memory, size, used, below=below) == (expected[-1] if expected else None)
    assert lowest_free(memory, size, used, below=below) == (expected[0] if expected else None)
    later = [address for address in expected if address >= 0x5000]
    assert lowest_free(memory, size, used, above=0x4001, below=below) == (later[0] if later else None)
