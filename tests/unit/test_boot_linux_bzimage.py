"""bzImages: what their headers say, where the protected-mode kernel goes, and which are refused at which field."""

import struct
from pathlib import Path

import pytest

from kvmpy.boot import LinuxKernel
from kvmpy.boot.image import LoadedRange
from kvmpy.boot.image_source import ImageSource
from kvmpy.boot.linux.bzimage import BzImage
from kvmpy.errors import ImageError
from linux_images import KERNEL, MIB, BzImageFile, pack, ram, vmlinux

PACKED = pack(vmlinux())
SETUP = 5 * 512


def open_image(**lies: int) -> BzImage:
    return BzImage(ImageSource(BzImageFile(payload=PACKED, lies=lies).to_bytes()))


def test_a_header_is_read_by_the_names_of_the_document() -> None:
    header = open_image().header
    assert (header.protocol, header["pref_address"], header["init_size"]) == ("2.15", KERNEL, 0x40_0000)
    with pytest.raises(KeyError):
        header["pref_adress"]


def test_a_kernel_says_its_version() -> None:
    assert LinuxKernel(BzImageFile().to_bytes()).version == "6.1.0-test (builder@host) #1"
    for nowhere in (0, 4 * 512, 0xFFFF):
        assert open_image(kernel_version=nowhere).version_text == ""
    assert open_image(kernel_version=4 * 512 - 1).version_text == ""  # the last byte of the setup code


def test_fields_of_later_versions_than_the_kernels_do_not_count() -> None:
    header = open_image(version=0x209, xloadflags=0xFFFF).header
    assert ("setup_data" in header, "pref_address" in header) == (True, False)
    assert (header["xloadflags"], header["pref_address"]) == (0, 0)
    before = bytes(header.data)
    header["xloadflags"] = 1
    assert header.data == before, "the document forbids to write it"


def test_a_header_that_ends_early_has_no_fields_behind_its_end() -> None:
    header = open_image(jump=0xEB | 0x260 - 0x202 << 8).header
    assert ("pref_address" in header, "init_size" in header) == (True, False)


def test_no_setup_sectors_means_four() -> None:
    assert open_image(setup_sects=0).setup_size == SETUP


def test_before_version_2_04_the_kernel_is_the_rest_of_the_file() -> None:
    image = open_image(version=0x203, syssize=1)
    assert image.protected_size == image.source.size - SETUP


@pytest.mark.parametrize(
    ("lies", "offset", "message"),
    [
        ({"boot_flag": 0x55AA}, 0x1FE, "boot_flag is 0x55aa: not 0xaa55"),
        ({"header": 0}, 0x202, 'there is no "HdrS" here'),
        ({"version": 0x1FF}, 0x206, "version is 0x1ff"),
        ({"jump": 0x6AE9}, 0x200, "jump is 0x6ae9: not a short jump"),
        ({"jump": 0x00EB}, 0x200, "the header would end at 0x202"),
        ({"jump": 0xFFEB}, 0x200, "the header would end at 0x301"),
        ({"setup_sects": 64}, 0x1F1, "real-mode code of 0x8200 bytes"),
        ({"setup_sects": 63}, 0x1F1, "the file ends .* before the protected-mode kernel"),
        ({"syssize": 0}, 0x1F4, "there is no protected-mode kernel"),
        ({"syssize": 0xFFFF_FFFF}, 0x1F4, "truncated"),
        ({"kernel_alignment": 0}, 0x230, "not a power of two"),
        ({"kernel_alignment": 0x30_0000}, 0x230, "not a power of two"),
        ({"min_alignment": 22}, 0x235, "more than kernel_alignment, 0x200000"),
    ],
)
def test_a_header_that_cannot_be_is_refused_at_the_field(lies: dict[str, int], offset: int, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        open_image(**lies)
    assert caught.value.offset == offset


@pytest.mark.parametrize("length", [0, 1, 0x1F1, 0x200, 0x28F, 0x290, 0x9FF, 0xA00, 0xDFF])
def test_a_truncated_file_is_refused(length: int) -> None:
    with pytest.raises(ImageError):
        LinuxKernel(BzImageFile(payload=PACKED).to_bytes()[:length])


def test_a_file_of_another_kind_is_refused_and_named(tmp_path: Path) -> None:
    file = tmp_path / "vmlinuz"
    file.write_bytes(b"#!/bin/sh\n" + bytes(0x1000))
    with pytest.raises(ImageError, match=r"vmlinuz at offset 0x1fe: boot_flag is 0x0: .*no Linux kernel image"):
        LinuxKernel(file)
    with pytest.raises(FileNotFoundError):
        LinuxKernel(tmp_path / "nothing")


# The payload


@pytest.mark.parametrize(
    ("lies", "offset", "message"),
    [
        ({"payload_offset": 0x7FFF_FFFF}, 0x248, "ends behind the kernel"),
        ({"payload_length": 0x7FFF_FFFF}, 0x24C, "ends behind the kernel"),
        ({"payload_length": 7}, 0x24C, "too short"),
        ({"payload_length": len(PACKED) - 1}, None, "the payload"),
        ({"payload_offset": 0x3FF}, SETUP + 0x3FF, "of no known kind: f4 1f 8b"),
        ({"init_size": 0x100}, SETUP + 0x400 + len(PACKED) - 4, "says that it unpacks to"),
    ],
)
def test_a_payload_that_cannot_be_is_refused(lies: dict[str, int], offset: int | None, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        LinuxKernel(BzImageFile(payload=PACKED, lies=lies).to_bytes())
    if offset is not None:
        assert caught.value.offset == offset


def test_what_the_payload_holds_is_named_in_its_errors() -> None:
    with pytest.raises(ImageError, match=r"^kernel in image of 0x\w+ bytes at offset 0x0: not an ELF file"):
        LinuxKernel(BzImageFile(payload=pack(b"hello" * 10)).to_bytes())


def test_a_payload_that_is_not_compressed_is_booted_too() -> None:
    kernel = LinuxKernel(BzImageFile(payload=vmlinux()).to_bytes())
    assert kernel.elf is not None
    assert kernel.elf.segments[0].address == KERNEL


def test_a_bomb_fills_no_more_memory_than_it_said() -> None:
    bomb = bytearray(pack(vmlinux() + bytes(64 * MIB)))
    bomb[-4:] = struct.pack("<I", 0x1000)
    with pytest.raises(ImageError, match="decompresses to more than the 0x1000 bytes"):
        LinuxKernel(BzImageFile(payload=bytes(bomb)).to_bytes())


# Placing the protected-mode kernel


def place(image: BzImage, *regions: tuple[int, int], taken: tuple[LoadedRange, ...] = ()) -> tuple[int, int]:
    placement = image.place(ram(*regions), taken)
    return placement.loaded.address, placement.alignment


def test_a_relocatable_kernel_goes_where_it_prefers() -> None:
    assert place(open_image()) == (KERNEL, 0x20_0000)


def test_with_little_ram_it_goes_to_the_lowest_aligned_place_above_1_mib() -> None:
    assert place(open_image(), (0, 12 * MIB)) == (2 * MIB, 0x20_0000)
    assert place(open_image(), (0, MIB), (5 * MIB, 12 * MIB)) == (6 * MIB, 0x20_0000)


def test_what_is_taken_already_is_left_alone() -> None:
    taken = (LoadedRange(KERNEL + 0x1000, 1, "something"), LoadedRange(3 * MIB, 1, "something"))
    assert place(open_image(), taken=taken) == (4 * MIB, 0x20_0000)


def test_the_alignment_is_lessened_as_far_as_the_kernel_allows() -> None:
    tight = (0x11_0000, 0x41_0000)  # room for init_size, but not at a multiple of 2 MiB
    assert place(open_image(min_alignment=12), tight) == (0x12_0000, 0x2_0000)
    with pytest.raises(ImageError, match="init_size is 0x400000: no 0x400000 bytes for the kernel are free") as caught:
        place(open_image(), tight)
    assert caught.value.offset == 0x260


def test_a_kernel_that_is_not_relocatable_needs_its_two_places() -> None:
    image = open_image(relocatable_kernel=0)
    placement = image.place(ram(), ())
    assert (placement.loaded.address, placement.unpacked.address) == (MIB, KERNEL)
    with pytest.raises(ImageError, match="runs only where it is linked for") as caught:
        image.place(ram((0, 18 * MIB)), ())  # init_size does not fit
    assert caught.value.offset == 0x234


def test_a_zimage_goes_to_64_kib() -> None:
    assert place(open_image(loadflags=0, version=0x203)) == (0x1_0000, 0)


def test_a_preferred_address_outside_of_everything_is_not_taken() -> None:
    for address in (0, 0x8_0000, 31 * MIB, 1 << 32, (1 << 64) - 0x20_0000, KERNEL + 0x1000):
        assert place(open_image(pref_address=address)) == (2 * MIB, 0x20_0000)
