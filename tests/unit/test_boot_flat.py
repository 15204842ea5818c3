"""Flat images: where they go, how they start, and what is refused."""

import os
from pathlib import Path

import pytest

from kvmpy.boot import FlatImage
from kvmpy.errors import GuestMemoryError, ImageError, UsageError
from kvmpy.memory import GuestMemory, MemoryRegion
from kvmpy.x86 import entry_rules
from kvmpy.x86.page_walk import translate

KIB = 0x400
BOOT_SECTOR = b"\xf4".ljust(510, b"\0") + b"\x55\xaa"


def ram(*regions: tuple[int, int], read_only: tuple[int, int] | None = None) -> GuestMemory:
    memory = GuestMemory()
    for address, size in regions:
        memory.add(MemoryRegion.anonymous(address, size))
    if read_only is not None:
        memory.add(MemoryRegion.anonymous(*read_only, read_only=True, name="ROM"))
    return memory


def test_code_goes_to_0x1000_and_starts_there_in_real_mode() -> None:
    memory = ram((0, 64 * KIB))
    entry = FlatImage(b"\x90\xf4").load(memory)
    assert memory.read(0x1000, 2) == b"\x90\xf4"
    assert entry.state.sregs.cs.base + entry.state.regs.rip == 0x1000
    assert not entry.state.sregs.cr0 & 1
    assert (entry.low, entry.high) == (0x1000, 0x1002)


def test_a_boot_sector_goes_to_0x7c00_with_the_first_hard_disk_in_dl() -> None:
    memory = ram((0, 64 * KIB))
    entry = FlatImage(BOOT_SECTOR).load(memory)
    assert memory.read(0x7C00, 512) == BOOT_SECTOR
    assert entry.state.regs.rip == 0x7C00
    assert entry.state.regs.rdx & 0xFF == 0x80


@pytest.mark.parametrize("code", [BOOT_SECTOR[:-1] + b"\xab", BOOT_SECTOR + b"\0", BOOT_SECTOR[2:]])
def test_what_only_resembles_a_boot_sector_goes_to_0x1000(code: bytes) -> None:
    image = FlatImage(code)
    entry = image.load(ram((0, 64 * KIB)))
    assert image.address == 0x1000
    assert entry.state.regs.rdx == 0


def test_an_address_is_obeyed_for_a_boot_sector_too() -> None:
    assert FlatImage(BOOT_SECTOR, 0x8000).address == 0x8000


def test_a_boot_sector_in_another_mode_gets_no_drive_number() -> None:
    entry = FlatImage(BOOT_SECTOR, mode="protected").load(ram((0, 64 * KIB)))
    assert entry.state.regs.rip == 0x7C00
    assert entry.state.regs.rdx == 0


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_code_may_be_any_kind_of_bytes(kind: type) -> None:
    memory = ram((0, 64 * KIB))
    FlatImage(kind(b"\xeb\xfe")).load(memory)
    assert memory.read(0x1000, 2) == b"\xeb\xfe"


def test_later_changes_of_the_callers_buffer_do_not_reach_the_image() -> None:
    code = bytearray(b"\xeb\xfe")
    image = FlatImage(code)
    code[0] = 0
    memory = ram((0, 64 * KIB))
    image.load(memory)
    assert memory.read_u8(0x1000) == 0xEB


@pytest.mark.parametrize("as_path", [str, Path])
def test_code_may_be_a_file(tmp_path: Path, as_path: type) -> None:
    file = tmp_path / "code.bin"
    file.write_bytes(os.urandom(0x5123))
    memory = ram((0, 64 * KIB))
    FlatImage(as_path(file), 0x2345).load(memory)
    assert memory.read(0x2345, 0x5123) == file.read_bytes()


def test_one_image_can_be_loaded_into_many_guests() -> None:
    image = FlatImage(b"\xf4")
    first, second = ram((0, 64 * KIB)), ram((0, 64 * KIB))
    one, other = image.load(first), image.load(second)
    assert first.read_u8(0x1000) == second.read_u8(0x1000) == 0xF4
    assert one.state is not other.state
    assert one.state == other.state


def test_an_image_may_span_adjacent_regions(tmp_path: Path) -> None:
    data = bytes(range(256)) * 32
    file = tmp_path / "code.bin"
    file.write_bytes(data)
    for code in (data, file):
        memory = ram((0, 0x3000), (0x3000, 0x8000))
        FlatImage(code, 0x2800).load(memory)
        assert memory.read(0x2800, len(data)) == data


def test_an_image_may_fill_ram_exactly() -> None:
    data = b"\x90" * 0x1000
    memory = ram((0x1000, 0x1000))
    FlatImage(data).load(memory)
    assert memory.read(0x1000, 0x1000) == data


@pytest.mark.parametrize(
    ("address", "size"), [(0x1000, 0x1001), (0x1001, 0x1000), (0, 0x1000), (0x0FFF, 2), (0x2000, 1), (0x5000, 1)]
)
def test_an_image_that_is_not_wholly_in_ram_is_refused_and_nothing_written(address: int, size: int) -> None:
    memory = ram((0x1000, 0x1000))
    with pytest.raises(ImageError, match=r"not all in RAM \(the guest has RAM 0x1000\.\.0x1fff\)"):
        FlatImage(b"\x90" * size, address).load(memory)
    assert memory.read(0x1000, 0x1000) == bytes(0x1000)


def test_an_image_across_a_hole_is_refused() -> None:
    with pytest.raises(ImageError, match=r"RAM 0x0\.\.0x1fff, 0x3000\.\.0x4fff"):
        FlatImage(b"\x90" * 0x2000, 0x1000).load(ram((0, 0x2000), (0x3000, 0x2000)))


def test_rom_is_not_ram() -> None:
    memory = ram((0, 0x2000), read_only=(0x2000, 0x1000))
    with pytest.raises(ImageError, match="not all in RAM"):
        FlatImage(b"\x90" * 0x1001).load(memory)
    assert memory.read(0x2000, 0x1000) == bytes(0x1000)


def test_a_guest_without_ram_is_refused() -> None:
    with pytest.raises(ImageError, match="no RAM"):
        FlatImage(b"\xf4").load(GuestMemory())


def test_an_empty_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is empty"):
        FlatImage(b"")
    file = tmp_path / "nothing.bin"
    file.touch()
    with pytest.raises(ImageError, match=r"nothing\.bin: is empty"):
        FlatImage(file)


@pytest.mark.parametrize(("address", "code"), [(-1, b"\xf4"), ((1 << 64) - 1, b"\xf4\xf4"), (1 << 64, b"\xf4")])
def test_an_impossible_address_is_refused(address: int, code: bytes) -> None:
    with pytest.raises(ImageError, match="64-bit addresses"):
        FlatImage(code, address)


def test_a_missing_file_is_an_os_error() -> None:
    with pytest.raises(FileNotFoundError):
        FlatImage("/nonexistent/code.bin")


@pytest.mark.parametrize("entry", [0, 0xFFF, 0x1002, -1, 1 << 64])
def test_an_entry_outside_of_the_image_is_refused(entry: int) -> None:
    with pytest.raises(ImageError, match=r"is not in the image, 0x1000\.\.0x1001"):
        FlatImage(b"\x90\xf4", entry=entry)


def test_the_entry_may_be_inside_the_image() -> None:
    entry = FlatImage(b"\0\0\xf4", entry=0x1002).load(ram((0, 64 * KIB)))
    assert entry.state.regs.rip == 0x1002


def test_a_real_mode_entry_out_of_reach_is_refused_naming_the_image() -> None:
    memory = ram((0, 4 * KIB * KIB))
    with pytest.raises(ImageError, match=r"image of 0x1 bytes.*real mode reaches"):
        FlatImage(b"\xf4", 0x20_0000).load(memory)


@pytest.mark.parametrize("mode", ["Long", "32", "", "pae"])
def test_an_unknown_mode_is_refused(mode: str) -> None:
    with pytest.raises(UsageError, match="real, protected16, protected, long"):
        FlatImage(b"\xf4", mode=mode)


@pytest.mark.parametrize(
    ("mode", "ring"), [("real", 3), ("protected16", 3), ("long", 1), ("protected", 4), ("long", -1)]
)
def test_an_impossible_ring_is_refused(mode: str, ring: int) -> None:
    with pytest.raises(UsageError, match="ring"):
        FlatImage(b"\xf4", mode=mode, ring=ring)


@pytest.mark.parametrize(
    ("mode", "ring"),
    [("real", 0), ("protected16", 0), ("protected", 0), ("protected", 3), ("long", 0), ("long", 3)],
)
@pytest.mark.parametrize("address", [0x1000, 0x7C00, 0x2_0000])
def test_every_mode_starts_at_the_entry_by_the_rules_of_all_processors(mode: str, ring: int, address: int) -> None:
    memory = ram((0, 1024 * KIB))
    entry = FlatImage(b"\xf4\xf4", address, mode=mode, entry=address + 1, ring=ring).load(memory)
    state = entry.state
    assert not entry_rules.violations(state)
    assert translate(memory, state.sregs, state.sregs.cs.base + state.regs.rip) == address + 1
    assert state.sregs.cs.selector & 3 == ring or mode == "real"


@pytest.mark.parametrize("mode", ["protected16", "protected", "long"])
def test_tables_and_stack_are_at_the_top_of_ram(mode: str) -> None:
    memory = ram((0, 1024 * KIB))
    entry = FlatImage(b"\xf4", mode=mode).load(memory)
    image, tables = entry.ranges
    assert (image.address, tables.name, tables.end) == (0x1000, "tables", 0x10_0000)
    assert entry.state.regs.rsp == tables.address
    assert entry.state.sregs.gdt.base == tables.address
    assert entry.high == 0x10_0000


def test_the_tables_stay_below_4_gib() -> None:
    memory = ram((0, 0x10_0000), (0x1_0000_0000, 0x10_0000))
    entry = FlatImage(b"\xf4", mode="long").load(memory)
    assert entry.ranges[-1].end == 0x10_0000


def test_the_tables_avoid_an_image_at_the_top() -> None:
    memory = ram((0, 0x10_0000))
    entry = FlatImage(b"\xf4" * 0x1800, 0xF_E000, mode="long").load(memory)
    tables, image = entry.ranges
    assert tables.end <= image.address
    assert memory.read(0xF_E000, 0x1800) == b"\xf4" * 0x1800


def test_the_tables_go_where_they_are_wanted() -> None:
    memory = ram((0, 0x10_0000))
    entry = FlatImage(b"\xf4", 0x8_0000, mode="long", tables=0x2000).load(memory)
    assert entry.ranges[0].address == entry.state.sregs.gdt.base == 0x2000
    assert entry.state.regs.rsp == 0x10_0000


def test_the_stack_is_below_tables_that_were_put_at_the_top() -> None:
    entry = FlatImage(b"\xf4", mode="protected", tables=0xF_C000).load(ram((0, 0x10_0000)))
    assert entry.ranges[-1].end == 0x10_0000
    assert entry.state.regs.rsp == 0xF_C000


@pytest.mark.parametrize(
    ("tables", "why"),
    [(0x2001, "multiple of 4 KiB"), (0xF_8000, "not all in RAM"), (0x7_F000, "overlap"), (-0x1000, "below 4 GiB")],
)
def test_a_place_for_tables_that_cannot_be_is_refused(tables: int, why: str) -> None:
    with pytest.raises(ImageError, match=why):
        FlatImage(b"\xf4", 0x8_0000, mode="long", tables=tables).load(ram((0, 0x10_0000)))


def test_a_stack_is_obeyed_and_the_tables_avoid_it() -> None:
    for mode in ("protected", "long"):
        entry = FlatImage(b"\xf4", mode=mode, stack=0x10_0000).load(ram((0, 0x10_0000)))
        assert entry.state.regs.rsp == 0x10_0000
        assert entry.ranges[-1].end <= 0x10_0000 - 0x1000


def test_no_room_for_tables_is_an_error_that_says_how_much_is_needed() -> None:
    with pytest.raises(ImageError, match=r"no 0xb000 bytes below 4 GiB.*RAM 0x1000\.\.0xbfff"):
        FlatImage(b"\xf4", mode="long").load(ram((0x1000, 0xB000)))
    FlatImage(b"\xf4", mode="long").load(ram((0x1000, 0xC000)))


def test_real_mode_pushes_below_the_image() -> None:
    state = FlatImage(BOOT_SECTOR).load(ram((0, 64 * KIB))).state
    assert state.sregs.ss.base + state.regs.rsp == 0x7C00


def test_real_mode_without_ram_below_the_image_pushes_to_the_end_of_ram() -> None:
    state = FlatImage(b"\xf4").load(ram((0x1000, 0x1000))).state
    assert state.sregs.ss.base + state.regs.rsp == 0x2000


def test_a_real_mode_stack_stays_off_the_interrupt_vectors() -> None:
    state = FlatImage(b"\xf4", 0x500).load(ram((0, 64 * KIB))).state
    assert (state.sregs.ss.base, state.regs.rsp) == (0, 0)  # the first push wraps to 0xFFFE


def test_long_mode_reaches_code_above_4_gib() -> None:
    address = 0x1_4000_1000
    memory = ram((0, 0x10_0000), (0x1_4000_0000, 0x40_0000))
    entry = FlatImage(b"\xf4" * 0x20_1000, address, mode="long").load(memory)
    assert entry.state.regs.rip == address
    for place in (address, address + 0x20_0FFF, 0xFEE0_0000, entry.state.regs.rsp - 8):
        assert translate(memory, entry.state.sregs, place) == place


def test_protected_mode_cannot_reach_code_above_4_gib() -> None:
    memory = ram((0, 0x10_0000), (0x1_4000_0000, 0x1000))
    with pytest.raises(ImageError, match="32 bits"):
        FlatImage(b"\xf4", 0x1_4000_0000, mode="protected").load(memory)


def test_a_flat_image_needs_no_memory_of_its_own() -> None:
    assert FlatImage(b"\xf4").memory_needs() == ()


def test_a_file_that_changed_since_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "code.bin"
    file.write_bytes(b"\x90" * 100)
    image = FlatImage(file)
    file.write_bytes(b"\x90" * 50)
    with pytest.raises(ImageError, match="has changed"):
        image.load(ram((0, 64 * KIB)))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path, make: object) -> None:
    path = tmp_path / "thing"
    make(path)  # type: ignore[operator]
    with pytest.raises(ImageError, match="not a regular file"):
        FlatImage(path)


def test_image_errors_are_value_errors_but_not_memory_errors() -> None:
    assert issubclass(ImageError, ValueError)
    assert not issubclass(ImageError, GuestMemoryError)
