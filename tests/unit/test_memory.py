"""Guest memory by itself: one door, checked, over regions with holes."""

from __future__ import annotations

import ctypes
import os
import tempfile
import warnings
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.errors import GuestMemoryError, KvmError, OverlapError, UsageError
from kvmpy.memory import GuestMemory, MemoryRegion
from kvmpy.memory.region import HUGE_PAGE, host_address_of

PAGE = 0x1000
LAST = (1 << 64) - 2 * PAGE  # the highest region that there can be

LAYOUT = ((0, PAGE), (2 * PAGE, PAGE), (3 * PAGE, 2 * PAGE), (LAST, PAGE))
"""A region, a hole, two that touch, a very large hole, one at the end of the address space."""


def memory_with(*places: tuple[int, int]) -> GuestMemory:
    memory = GuestMemory()
    for address, size in places:
        memory.add(MemoryRegion.anonymous(address, size, name=f"region at {address:#x}"))
    return memory


@pytest.fixture
def memory() -> GuestMemory:
    return memory_with(*LAYOUT)


class Model:
    """The same memory as a dict of bytes."""

    def __init__(self, *places: tuple[int, int]) -> None:
        self.bytes = {address + offset: 0 for address, size in places for offset in range(size)}

    def has(self, address: int, length: int) -> bool:
        return length >= 0 and all(address + offset in self.bytes for offset in range(length))

    def read(self, address: int, length: int) -> bytes:
        return bytes(self.bytes[address + offset] for offset in range(length))

    def write(self, address: int, data: bytes) -> None:
        self.bytes.update((address + offset, byte) for offset, byte in enumerate(data))


NEAR_EDGES = st.builds(
    lambda edge, offset: edge + offset,
    st.sampled_from([edge for address, size in LAYOUT for edge in (address, address + size)] + [1 << 64, 1 << 63]),
    st.integers(-20, 20),
)
WRITES = st.tuples(st.just("write"), NEAR_EDGES, st.binary(max_size=40))
FILLS = st.tuples(st.just("fill"), NEAR_EDGES, st.integers(-2, 3 * PAGE))
READS = st.tuples(st.just("read"), NEAR_EDGES, st.integers(-2, 40))


@given(st.lists(st.one_of(WRITES, FILLS, READS), max_size=12))
def test_reads_and_writes_equal_a_model(operations: list[tuple[str, int, bytes | int]]) -> None:
    memory, model = memory_with(*LAYOUT), Model(*LAYOUT)
    for number, (kind, address, what) in enumerate(operations):
        length = len(what) if isinstance(what, bytes) else what
        inside = length == 0 or model.has(address, length)
        refused = None
        try:
            if isinstance(what, bytes):
                memory.write(address, what)
                model.write(address, what)
            elif kind == "fill":
                memory.fill(address, what, number + 1)
                model.write(address, bytes([number + 1]) * what)
            else:
                assert memory.read(address, what) == model.read(address, what)
        except GuestMemoryError as error:
            refused = error.address, error.length
        assert refused == (None if inside else (address, length))
    for address, size in LAYOUT:
        assert memory.read(address, size) == model.read(address, size)


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 5)), max_size=8))
def test_regions_never_overlap(places: list[tuple[int, int]]) -> None:
    memory = GuestMemory()
    taken: set[int] = set()
    for first, pages in places:
        wanted = set(range(first, first + pages))
        region = MemoryRegion.anonymous(first * PAGE, pages * PAGE)
        if wanted & taken:
            with pytest.raises(OverlapError):
                memory.add(region)
        else:
            memory.add(region)
            taken |= wanted
    addresses = [region.address for region in memory.regions]
    assert addresses == sorted(addresses)
    for page in range(20):
        assert (memory.region_at(page * PAGE) is not None) == (page in taken)


@pytest.mark.parametrize(
    ("address", "length"),
    [
        (PAGE, 1), (PAGE - 1, 2), (5 * PAGE, 1), (5 * PAGE - 4, 8), (2 * PAGE - 1, 1), (-1, 1), (-1, 2), (-PAGE, PAGE),
        ((1 << 64) - PAGE, 1), ((1 << 64) - 1, 1), (1 << 64, 1), ((1 << 64) + 5, 1), (LAST + PAGE - 1, 2),
        (0, 1 << 64), (LAST, 1 << 64), (0, -1), (3 * PAGE, -5), (PAGE // 2, PAGE),
    ],
)  # fmt: skip
def test_an_access_outside_carries_address_and_length(memory: GuestMemory, address: int, length: int) -> None:
    calls: list[Callable[[], object]] = [
        lambda: memory.read(address, length),
        lambda: memory.view(address, length),
        lambda: memory.host_address(address, length),
        lambda: memory.fill(address, length),
    ]
    for call in calls:
        with pytest.raises(GuestMemoryError, match="not in guest memory") as refused:
            call()
        assert (refused.value.address, refused.value.length) == (address, length)


@pytest.mark.parametrize("address", [PAGE - 3, 5 * PAGE - 3, LAST + PAGE - 3])
def test_nothing_is_written_when_any_part_is_outside(memory: GuestMemory, address: int) -> None:
    before = memory.read(address, 3)
    calls: list[Callable[[], object]] = [
        lambda: memory.write(address, b"abcd"),
        lambda: memory.fill(address, 4, 0xFF),
        lambda: memory.write_u32(address, 0x1234_5678),
        lambda: memory.write_struct(address, Pair(1, 2)),
    ]
    for call in calls:
        with pytest.raises(GuestMemoryError):
            call()
    assert memory.read(address, 3) == before == b"\0\0\0"


def test_accesses_span_regions_that_touch(memory: GuestMemory) -> None:
    memory.write(3 * PAGE - 4, b"ABCDEFGH")
    assert memory.read(3 * PAGE - 4, 8) == b"ABCDEFGH"
    assert memory.read_u64(3 * PAGE - 4) == int.from_bytes(b"ABCDEFGH", "little")
    assert memory.read(3 * PAGE, 4) == b"EFGH"
    with pytest.raises(GuestMemoryError):
        memory.view(3 * PAGE - 4, 8)  # a view is one piece of host memory
    memory.fill(3 * PAGE - 2, 4, 0x7A)
    assert memory.read(3 * PAGE - 4, 8) == b"ABzzzzGH"


def test_numbers_are_little_endian_and_checked(memory: GuestMemory) -> None:
    memory.write_u64(8, 0x1122_3344_5566_7788)
    assert memory.read(8, 8) == bytes.fromhex("8877665544332211")
    assert (memory.read_u8(8), memory.read_u16(8), memory.read_u32(8)) == (0x88, 0x7788, 0x5566_7788)
    for width, write in ((8, memory.write_u8), (16, memory.write_u16), (32, memory.write_u32), (64, memory.write_u64)):
        write(16, (1 << width) - 1)
        for value in (-1, 1 << width):
            with pytest.raises(UsageError):
                write(16, value)
    with pytest.raises(ValueError, match="range"):
        memory.fill(0, 4, 256)
    with pytest.raises(ValueError, match="range"):
        memory.fill(0, 4, -1)


def test_anything_with_bytes_in_it_can_be_written(memory: GuestMemory) -> None:
    numbers = (ctypes.c_uint16 * 2)(0x4241, 0x4443)
    for source in (b"ABCD", bytearray(b"ABCD"), memoryview(b"ABCD"), memoryview(b"ABCD").cast("H"), numbers):
        memory.fill(0, 8)
        memory.write(0, source)  # type: ignore[arg-type]
        assert memory.read(0, 5) == b"ABCD\0"
    memory.write(1 << 70, b"")  # nothing, anywhere
    with pytest.raises(TypeError):
        memory.write(0, "text")  # type: ignore[arg-type]


class Pair(ctypes.Structure):
    _fields_ = [("first", ctypes.c_uint16), ("second", ctypes.c_uint32)]


def test_structures_are_read_written_and_seen_live(memory: GuestMemory) -> None:
    memory.write_struct(0x10, Pair(1, 2))
    copy, live = memory.read_struct(0x10, Pair), memory.view_struct(0x10, Pair)
    live.second = 7
    assert memory.read_u32(0x14) == 7
    assert (copy.first, copy.second) == (1, 2)
    memory.write_u16(0x10, 99)
    assert live.first == 99
    with pytest.raises(GuestMemoryError):
        memory.view_struct(PAGE - 4, Pair)
    with pytest.raises(GuestMemoryError):
        memory.read_struct(PAGE - 4, Pair)


def test_strings_end_at_a_zero_byte_at_the_limit_or_with_ram(memory: GuestMemory) -> None:
    memory.write(3 * PAGE - 3, b"hello\0more")
    assert memory.read_cstring(3 * PAGE - 3) == b"hello"  # across two regions
    assert memory.read_cstring(3 * PAGE - 3, limit=4) == b"hell"
    assert memory.read_cstring(3 * PAGE - 3, limit=0) == b""
    assert memory.read_cstring(0) == b""
    memory.write(PAGE - 3, b"end")
    assert memory.read_cstring(PAGE - 3) == b"end"
    with pytest.raises(GuestMemoryError):
        memory.read_cstring(PAGE)


def test_views_share_and_outlive(memory: GuestMemory) -> None:
    view = memory.view(0x20, 4)
    view[:] = b"seen"
    assert memory.read(0x20, 4) == b"seen"
    memory.remove(memory.regions[0])
    with pytest.raises(GuestMemoryError):
        memory.read(0x20, 4)
    assert view.tobytes() == b"seen"
    assert len(memory.view(2 * PAGE, 0)) == 0


def test_the_host_address_is_where_the_bytes_are(memory: GuestMemory) -> None:
    memory.write(3 * PAGE + 5, b"here")
    assert ctypes.string_at(memory.host_address(3 * PAGE + 5, 4), 4) == b"here"


def test_it_prints_its_regions(memory: GuestMemory) -> None:
    assert "region at 0x2000 0x2000..0x2fff" in repr(memory)
    assert repr(GuestMemory()) == "<GuestMemory empty>"
    with pytest.raises(GuestMemoryError, match="there is: none"):
        GuestMemory().read(0, 1)


def test_overlap_names_both(memory: GuestMemory) -> None:
    with pytest.raises(OverlapError) as refused:
        memory.add(MemoryRegion.anonymous(4 * PAGE, 2 * PAGE, name="new"))
    assert refused.value.new == "new 0x4000..0x5fff"
    assert refused.value.existing == "region at 0x3000 0x3000..0x4fff"
    assert len(memory.regions) == len(LAYOUT)


# Regions


@pytest.mark.parametrize(
    ("address", "size"),
    [(0, 0), (0, -PAGE), (1, PAGE), (0, 1), (PAGE - 1, PAGE), (-PAGE, PAGE), ((1 << 64) - PAGE, PAGE), (1 << 64, PAGE)],
)
def test_regions_that_cannot_be_are_refused(address: int, size: int) -> None:
    with pytest.raises(UsageError):
        MemoryRegion.anonymous(address, size)
    with pytest.raises(UsageError):
        MemoryRegion.shared_memory(address, size)
    with pytest.raises(UsageError):
        MemoryRegion.from_file(address, 0, size)


def test_a_region_larger_than_any_process_is_refused() -> None:
    with pytest.raises(UsageError, match="no process has room"):
        MemoryRegion.anonymous(0, 1 << 63)
    with pytest.raises(KvmError, match="mmap"):
        MemoryRegion.anonymous(0, 1 << 60)


@pytest.mark.parametrize("address", [0, PAGE, HUGE_PAGE, 5 * HUGE_PAGE + 3 * PAGE])
def test_large_regions_agree_with_the_host_modulo_two_mib(address: int) -> None:
    region = MemoryRegion.anonymous(address, 2 * HUGE_PAGE)
    assert region.host_address % HUGE_PAGE == address % HUGE_PAGE
    region.buffer[0], region.buffer[-1] = 1, 2
    assert (region.size, region.end) == (2 * HUGE_PAGE, address + 2 * HUGE_PAGE)


def test_memory_is_private_to_a_child_process() -> None:
    region = MemoryRegion.anonymous(0, PAGE)
    shared = MemoryRegion.shared_memory(0, PAGE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the session has a thread of faulthandler's
        child = os.fork()
    if child == 0:
        region.buffer[0] = shared.buffer[0] = 5
        os._exit(0)
    os.waitpid(child, 0)
    assert (region.buffer[0], shared.buffer[0]) == (0, 5)


def test_a_file_too_short_is_refused() -> None:
    with tempfile.TemporaryFile() as file:
        file.truncate(3 * PAGE - 1)
        for offset, size in ((0, 3 * PAGE), (2 * PAGE, PAGE), (4 * PAGE, PAGE)):
            with pytest.raises(UsageError, match="the file has 0x2fff bytes"):
                MemoryRegion.from_file(0, file.fileno(), size, offset=offset)
        for offset in (1, -PAGE):
            with pytest.raises(UsageError, match="offset"):
                MemoryRegion.from_file(0, file.fileno(), PAGE, offset=offset)
        assert MemoryRegion.from_file(0, file.fileno(), 2 * PAGE).size == 2 * PAGE


def test_a_read_only_file_is_never_written() -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"rom".ljust(PAGE, b"\xff"))
        file.flush()
        with open(file.name, "rb") as reader:
            region = MemoryRegion.from_file(PAGE, reader.fileno(), PAGE, read_only=True)
            private = MemoryRegion.from_file(3 * PAGE, reader.fileno(), PAGE, read_only=True, shared=False)
        memory = GuestMemory()
        memory.add(MemoryRegion.anonymous(0, PAGE))
        memory.add(region)
        memory.add(private)
        assert memory.read(PAGE, 3) == b"rom"
        with pytest.raises(GuestMemoryError, match="only be read") as refused:
            memory.write(PAGE - 2, b"abcd")
        assert (refused.value.address, refused.value.length) == (PAGE - 2, 4)
        assert memory.read(PAGE - 2, 4) == b"\0\0ro"
        assert ctypes.string_at(memory.host_address(PAGE), 3) == b"rom"
        memory.write(3 * PAGE, b"ram")
        assert file.name
        with open(file.name, "rb") as reader:
            assert reader.read(3) == b"rom"


@pytest.mark.parametrize("make", [bytes, bytearray, lambda data: memoryview(bytearray(data))])
def test_the_address_of_a_buffer_is_found_whether_it_can_be_written_or_not(make: type[bytearray]) -> None:
    data = make(b"find me")
    assert ctypes.string_at(host_address_of(data), 7) == b"find me"


def test_a_device_writes_no_rom_for_the_guest() -> None:
    memory = GuestMemory()
    memory.add(MemoryRegion.anonymous(0, PAGE))
    memory.add(MemoryRegion.anonymous(PAGE, PAGE, read_only=True))
    memory.write(PAGE, b"rom")  # the host does
    memory.guest_write(PAGE - 3, b"abc")
    for address, length in ((PAGE, 1), (PAGE - 1, 2), (2 * PAGE - 1, 1)):
        with pytest.raises(GuestMemoryError, match="read-only for the guest") as caught:
            memory.guest_write(address, bytes(length))
        assert (caught.value.address, caught.value.length) == (address, length)
    assert memory.read(PAGE - 3, 6) == b"abcrom"
