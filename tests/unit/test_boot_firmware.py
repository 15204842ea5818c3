"""Raw firmware: a ROM that ends at 4 GiB, its last part under 1 MiB, started at the reset vector."""

import random
from pathlib import Path

import pytest

from kvmpy.boot import FirmwareImage
from kvmpy.errors import ImageError
from kvmpy.memory import GuestMemory, MemoryRegion
from kvmpy.x86 import entry_rules

KIB, MIB, GIB = 0x400, 0x10_0000, 0x4000_0000


def rom(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def machine_for(image: FirmwareImage, ram: int = MIB) -> GuestMemory:
    """Memory as a machine sets it up: RAM from 0, and what the image needs."""
    memory = GuestMemory()
    memory.add(MemoryRegion.anonymous(0, ram))
    for need in image.memory_needs():
        region = MemoryRegion.anonymous(need.address, need.size, read_only=need.read_only, name=need.name)
        region.buffer[:] = need.data
        memory.add(region)
    return memory


@pytest.mark.parametrize("size", [64 * KIB, 128 * KIB, 256 * KIB, 0x3_1000, 4 * MIB, 16 * MIB])
def test_the_rom_ends_at_4_gib_and_is_read_only(size: int) -> None:
    data = rom(size)
    (need,) = FirmwareImage(data).memory_needs()
    assert (need.address, need.size, need.read_only) == (4 * GIB - size, size, True)
    assert need.data == data


@pytest.mark.parametrize(
    ("size", "low"), [(64 * KIB, 0xF_0000), (0x1_F000, 0xE_1000), (128 * KIB, 0xE_0000), (256 * KIB, 0xE_0000)]
)
def test_its_last_128_kib_are_also_under_1_mib(size: int, low: int) -> None:
    data = rom(size)
    image = FirmwareImage(data)
    memory = machine_for(image)
    entry = image.load(memory)
    assert memory.read(low, MIB - low) == data[low - MIB :]
    assert memory.read(low - 0x1000, 0x1000) == bytes(0x1000)
    assert [(used.address, used.end) for used in entry.ranges] == [(low, MIB), (4 * GIB - size, 4 * GIB)]


def test_a_longer_shadow_can_be_asked_for() -> None:
    data = rom(256 * KIB)
    image = FirmwareImage(data, shadow=256 * KIB)
    memory = machine_for(image)
    image.load(memory)
    assert memory.read(0xC_0000, 256 * KIB) == data


@pytest.mark.parametrize("shadow", [0, 0xF000, 0x1_0800, 257 * KIB, -0x1_0000])
def test_an_impossible_shadow_is_refused(shadow: int) -> None:
    with pytest.raises(ImageError, match="shadow"):
        FirmwareImage(rom(128 * KIB), shadow=shadow)


def test_the_processor_starts_at_the_reset_vector() -> None:
    image = FirmwareImage(rom(128 * KIB))
    state = image.load(machine_for(image)).state
    assert state.sregs.cs.base + state.regs.rip == 0xFFFF_FFF0
    assert state.sregs.cs.selector == 0xF000
    assert not state.sregs.cr0 & 1
    assert not entry_rules.violations(state)


def test_the_first_instruction_is_the_same_at_both_addresses() -> None:
    image = FirmwareImage(rom(256 * KIB))
    memory = machine_for(image)
    image.load(memory)
    assert memory.read(0xFFFF_FFF0, 16) == memory.read(0xF_FFF0, 16)


@pytest.mark.parametrize("size", [0, 1, 0xF000, 0x1_0001, 0x1_0800, 16 * MIB + 0x1000])
def test_other_sizes_are_refused(size: int) -> None:
    with pytest.raises(ImageError, match=rf"has {size:#x} bytes; a firmware image has"):
        FirmwareImage(bytes(size))


@pytest.mark.parametrize("ram", [0xE_0000, 0xF_F000])
def test_a_guest_without_ram_under_1_mib_is_refused(ram: int) -> None:
    image = FirmwareImage(rom(128 * KIB))
    memory = machine_for(image, ram)
    with pytest.raises(ImageError, match=r"copy of the firmware under 1 MiB goes to 0xe0000\.\.0xfffff"):
        image.load(memory)
    assert memory.read(0, ram) == bytes(ram)


def test_firmware_may_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "bios.bin"
    file.write_bytes(rom(128 * KIB))
    image = FirmwareImage(file)
    file.unlink()  # it was read when the image was made
    memory = machine_for(image)
    image.load(memory)
    assert memory.read(0xE_0000, 128 * KIB) == rom(128 * KIB)
    assert "bios.bin" in repr(image)
