"""QEMU's firmware configuration device, as SeaBIOS reads it."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz_settings import PROFILE, PROPERTY_EXAMPLES
from kvmpy.devices.fw_cfg import FLOPPY_SIZES, DmaControl, FwCfg, Key
from kvmpy.errors import GuestMemoryError, UsageError
from kvmpy.memory import GuestMemory, MemoryRegion

DATA, DMA_HIGH, DMA_LOW = 1, 4, 8


class Ram:
    def __init__(self) -> None:
        self.content = bytearray(0x10000)

    def _check(self, address: int, length: int) -> None:
        if address + length > len(self.content):
            raise GuestMemoryError("outside RAM", address, length)

    def read(self, address: int, length: int) -> bytes:
        self._check(address, length)
        return bytes(self.content[address : address + length])

    def write(self, address: int, data: bytes) -> None:
        self._check(address, len(data))
        self.content[address : address + len(data)] = data

    guest_write = write


def item(device: FwCfg, key: int, length: int) -> bytes:
    device.write(0, 2, key)
    return bytes(device.read(DATA, 1) for _ in range(length))


def directory(device: FwCfg) -> dict[str, tuple[int, int]]:
    """name: (key, size), by the guest's steps."""
    device.write(0, 2, Key.FILE_DIR)
    (count,) = struct.unpack(">I", bytes(device.read(DATA, 1) for _ in range(4)))
    files = {}
    for _ in range(count):
        size, key, _, name = struct.unpack(">IHH56s", bytes(device.read(DATA, 1) for _ in range(64)))
        files[name.rstrip(b"\0").decode()] = (key, size)
    return files


def dma(device: FwCfg, ram: Ram, control: int, length: int, target: int, at: int = 0x100) -> int:
    """A transfer, started by the lower half alone as SeaBIOS does. The control word it ends with."""
    ram.write(at, struct.pack(">IIQ", control, length, target))
    device.write(DMA_LOW, 4, int.from_bytes(at.to_bytes(4, "big"), "little"))
    return int.from_bytes(ram.read(at, 4), "big")


def test_signature_and_revision() -> None:
    assert item(FwCfg(), Key.SIGNATURE, 4) == b"QEMU"
    assert item(FwCfg(), Key.ID, 4) == struct.pack("<I", 1)
    assert item(FwCfg(memory=Ram()), Key.ID, 4) == struct.pack("<I", 3)


def test_deferred_files_are_made_when_the_guest_first_looks_for_files() -> None:
    device = FwCfg(memory=Ram())
    asked: list[None] = []

    def add() -> None:
        asked.append(None)
        device.add_file("etc/late", b"made")

    device.defer(add)
    item(device, Key.SIGNATURE, 4)
    item(device, Key.MAX_CPUS, 2)
    assert asked == []
    assert directory(device) == {"etc/late": (0x20, 4)}
    assert item(device, 0x20, 5) == b"made\0"
    assert directory(device) == {"etc/late": (0x20, 4)}
    assert asked == [None]


def test_a_file_selected_by_a_guess_is_made_too() -> None:
    device = FwCfg()
    device.defer(lambda: device.add_file("etc/late", b"made"))
    assert item(device, 0x20, 4) == b"made"


def test_the_host_sees_deferred_files_too() -> None:
    device, saved = FwCfg(), FwCfg()
    device.defer(lambda: device.add_file("etc/late", b"made"))
    saved.defer(lambda: saved.add_file("etc/late", b"made"))
    assert device.files == ("etc/late",)
    copy = FwCfg()
    copy.defer(lambda: copy.add_file("etc/late", b"another"))
    copy.restore(saved.state())
    assert item(copy, 0x20, 7) == b"made\0\0\0"


def test_what_cannot_be_made_is_tried_again() -> None:
    device = FwCfg()
    failures = [OSError("not yet")]

    def add() -> None:
        if failures:
            raise failures.pop()
        device.add_file("etc/late", b"made")

    device.defer(add)
    with pytest.raises(OSError, match="not yet"):
        device.write(0, 2, Key.FILE_DIR)
    assert directory(device) == {"etc/late": (0x20, 4)}


def test_machine_description() -> None:
    device = FwCfg(cpus=3, ram_size=0x1_2345_0000, boot_menu=True)
    assert item(device, Key.NB_CPUS, 2) == b"\x03\0"
    assert item(device, Key.MAX_CPUS, 2) == b"\x03\0"
    assert item(device, Key.RAM_SIZE, 8) == struct.pack("<Q", 0x1_2345_0000)
    assert item(device, Key.BOOT_MENU, 2) == b"\x01\0"


def test_memory_map_and_boot_order_are_files() -> None:
    device = FwCfg(e820=[(0, 0xA0000, 1), (1 << 32, 1 << 30, 2)], boot_order=["/pci@i0cf8/a", "/b"])
    files = directory(device)
    key, size = files["etc/e820"]
    assert item(device, key, size) == struct.pack("<QQIQQI", 0, 0xA0000, 1, 1 << 32, 1 << 30, 2)
    key, size = files["bootorder"]
    assert item(device, key, size) == b"/pci@i0cf8/a\n/b\0"


def test_file_is_found_by_its_name_and_can_be_replaced() -> None:
    device = FwCfg()
    assert directory(device) == {}
    key = device.add_file("opt/a", b"one")
    assert device.add_file("opt/b", b"three") == key + 1
    assert device.add_file("opt/a", b"uno") == key
    assert directory(device) == {"opt/a": (key, 3), "opt/b": (key + 1, 5)}
    assert item(device, key, 3) == b"uno"


def test_selecting_starts_the_item_again() -> None:
    device = FwCfg()
    assert item(device, Key.SIGNATURE, 2) == b"QE"
    assert item(device, Key.SIGNATURE, 2) == b"QE"
    assert item(device, Key.SIGNATURE | 0x4000, 2) == b"QE"


@pytest.mark.parametrize("key", [0x7777, 0xFFFF, 0x8000])
def test_without_an_item_there_are_zeros(key: int) -> None:
    assert item(FwCfg(), key, 8) == bytes(8)


def test_beyond_the_end_there_are_zeros() -> None:
    assert item(FwCfg(), Key.SIGNATURE, 8) == b"QEMU\0\0\0\0"


def test_guest_cannot_write_items() -> None:
    device = FwCfg()
    device.write(0, 2, Key.SIGNATURE)
    device.write(DATA, 1, 0x58)
    assert item(device, Key.SIGNATURE, 4) == b"QEMU"
    assert device.counters["ignored_write"] == 1


@pytest.mark.parametrize("name", ["", "x" * 56, "a\0b", "\u00e9"])
def test_file_name_that_does_not_fit_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"name|ascii"):
        FwCfg().add_file(name, b"")


@pytest.mark.parametrize("key", [-1, 0x10000, 0x4000])
def test_key_that_does_not_exist_is_refused(key: int) -> None:
    with pytest.raises(ValueError, match="key"):
        FwCfg().add_item(key, b"")


# --- DMA -----------------------------------------------------------------------------------------------------------


def test_dma_is_there_only_with_memory() -> None:
    assert [region.start for region in FwCfg().regions()] == [0x510]
    device = FwCfg(memory=Ram())
    assert [(region.start, region.length) for region in device.regions()] == [(0x510, 2), (0x514, 8)]
    signature = device.read(DMA_HIGH, 4) | device.read(DMA_LOW, 4) << 32
    assert signature.to_bytes(8, "little") == b"QEMU CFG"
    assert FwCfg().read(DMA_HIGH, 4) == 0xFFFF_FFFF


def test_dma_selects_reads_and_goes_on() -> None:
    ram = Ram()
    device = FwCfg(memory=ram)
    key = device.add_file("opt/x", b"0123456789")
    assert dma(device, ram, key << 16 | DmaControl.SELECT | DmaControl.READ, 3, 0x2000) == 0
    assert ram.read(0x2000, 4) == b"012\0"
    assert dma(device, ram, DmaControl.SKIP, 2, 0) == 0
    assert dma(device, ram, DmaControl.READ, 7, 0x2000) == 0
    assert ram.read(0x2000, 7) == b"56789\0\0"


def test_dma_address_has_two_halves() -> None:
    ram = Ram()
    device = FwCfg(memory=ram)
    device.write(DMA_HIGH, 4, int.from_bytes((1).to_bytes(4, "big"), "little"))
    device.write(DMA_LOW, 4, 0)
    assert device.counters["dma_error"] == 1  # 4 GiB is outside
    assert dma(device, ram, DmaControl.SELECT | DmaControl.READ, 4, 0x2000) == 0  # the high half does not linger
    assert ram.read(0x2000, 4) == b"QEMU"


@pytest.mark.parametrize(
    ("control", "length", "target"),
    [
        (DmaControl.READ, 16, 0xFFF8),
        (DmaControl.READ, 0xFFFF_FFFF, 0x2000),
        (DmaControl.READ, 4, 0xFFFF_FFFF_FFFF_FFFE),
        (DmaControl.WRITE, 4, 0x2000),
    ],
)
def test_dma_that_fails_sets_the_error_bit(control: int, length: int, target: int) -> None:
    ram = Ram()
    device = FwCfg(memory=ram)
    assert dma(device, ram, control, length, target) == DmaControl.ERROR
    assert device.counters["dma_error"] == 1


def test_guest_writes_no_rom() -> None:
    memory = GuestMemory()
    memory.add(MemoryRegion.anonymous(0, 0x1000))
    memory.add(MemoryRegion.anonymous(0x1000, 0x1000, read_only=True))
    device = FwCfg(memory=memory)
    for target in (0xFFE, 0x1000, 0x1FFC):
        memory.write(0x100, struct.pack(">IIQ", DmaControl.SELECT | DmaControl.READ, 4, target))
        device.write(DMA_LOW, 4, int.from_bytes((0x100).to_bytes(4, "big"), "little"))
        assert memory.read(0x100, 4) == struct.pack(">I", DmaControl.ERROR)
    memory.write(0x1000, struct.pack(">IIQ", DmaControl.SELECT, 0, 0))  # a descriptor there is not written, either
    device.write(DMA_LOW, 4, int.from_bytes((0x1000).to_bytes(4, "big"), "little"))
    assert device.counters["dma_error"] == 4
    assert memory.read(0xFFE, 2) == bytes(2)
    assert memory.read(0x1000, 0x1000) == struct.pack(">IIQ", DmaControl.SELECT, 0, 0) + bytes(0xFF0)


def test_dma_descriptor_outside_memory_is_counted() -> None:
    device = FwCfg(memory=Ram())
    device.write(DMA_LOW, 4, int.from_bytes((0xFFF8).to_bytes(4, "big"), "little"))
    assert device.counters["dma_error"] == 1


def test_state_keeps_selection_place_and_items() -> None:
    device, copy = FwCfg(), FwCfg()
    key = device.add_file("opt/x", b"0123456789")
    item(device, key, 4)
    copy.restore(device.state())
    assert bytes(copy.read(DATA, 1) for _ in range(6)) == b"456789"
    assert copy.files == ("opt/x",)


# --- what SeaBIOS looks for ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "offered"),
    [
        (1, 1440), (512, 1440), (360 * 1024, 360), (360 * 1024 + 1, 1440), (1440 * 1024, 1440),
        (1440 * 1024 + 1, 2880), (2880 * 1024, 2880),
    ],
)  # fmt: skip
def test_floppy_is_filled_up_to_a_size_that_seabios_knows(size: int, offered: int) -> None:
    device = FwCfg()
    key = device.add_floppy(b"\x5a" * size)
    assert directory(device) == {"floppyimg/floppy.img": (key, offered * 1024)}
    assert offered * 1024 in FLOPPY_SIZES
    assert dict(device.state()["items"])[key] == (b"\x5a" * size).ljust(offered * 1024, b"\0")


@pytest.mark.parametrize("size", [0, 2880 * 1024 + 1])
def test_floppy_that_is_none_is_refused(size: int) -> None:
    device = FwCfg()
    with pytest.raises(UsageError, match=rf"1 to 2949120 bytes \(2880 KiB\), not {size}"):
        device.add_floppy(bytes(size))
    assert device.files == ()


def test_video_bios_is_where_seabios_looks_for_roms() -> None:
    device = FwCfg()
    key = device.add_video_bios(b"\x55\xaa\x01")
    assert directory(device) == {"vgaroms/vgabios.bin": (key, 3)}


NAMES = st.text(st.characters(min_codepoint=1, max_codepoint=0x7F), min_size=1, max_size=55)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["select", "select", "read", "address", "transfer"]), st.integers(0, 0xFFFF_FFFF),
        st.sampled_from([1, 2, 4]),
    ),
    max_size=20,
)  # fmt: skip


@given(files=st.dictionaries(NAMES, st.binary(max_size=100), max_size=20), steps=STEPS)
@settings(max_examples=PROPERTY_EXAMPLES[PROFILE])
def test_directory_lists_every_file_whatever_a_guest_did_before(
    files: dict[str, bytes], steps: list[tuple[str, int, int]]
) -> None:
    device = FwCfg(memory=Ram())
    keys = {name: device.add_file(name, data) for name, data in files.items()}
    for what, value, size in steps:
        if what == "select":
            device.write(0, 2, value & 0xFFFF)
        elif what == "read":
            assert 0 <= device.read(DATA, size) < 1 << 8 * size
        else:
            device.write(DMA_HIGH if what == "address" else DMA_LOW, 4, value)
    listed = directory(device)
    assert listed == {name: (keys[name], len(data)) for name, data in files.items()}
    for name, data in files.items():
        assert item(device, keys[name], len(data) + 1) == data + b"\0"
