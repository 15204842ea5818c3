"""Multiboot kernels: headers that are found, obeyed and refused, and what a kernel is told, by both specifications."""

import itertools
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from elf_files import ET_DYN, ElfFile, Segment
from gnu_toolchain import compile_c
from kvmpy.boot import MultibootKernel, MultibootModule
from kvmpy.boot.e820 import E820Entry, E820Type
from kvmpy.boot.firmware_tables import PlacedTables
from kvmpy.boot.image import Entry, LoadedRange
from kvmpy.errors import ImageError, UsageError
from kvmpy.memory import GuestMemory
from kvmpy.x86 import entry_rules
from linux_images import MIB, ram
from multiboot_files import LOAD, Header1, Header2, elf_kernel, flat_kernel, tag

CODE = b"\xb0\x2a\xf4"
FLAT_ADDRESSES = (LOAD + 8, LOAD, 0, 0, LOAD + 8 + 32)
HEADERS = {1: Header1().to_bytes(), 2: Header2().to_bytes()}
both_versions = pytest.mark.parametrize("version", [1, 2])


def load(kernel: MultibootKernel, memory: GuestMemory | None = None) -> tuple[Entry, GuestMemory]:
    memory = memory or ram((0, 16 * MIB))
    entry = kernel.load(memory)
    assert not entry_rules.violations(entry.state)
    for one, other in itertools.combinations(entry.ranges, 2):
        assert not one.overlaps(other.address, other.size), (one, other)
    return entry, memory


def information(entry: Entry, memory: GuestMemory) -> dict[str, int]:
    """The structure of Multiboot 1 by the names of its specification."""
    names = [
        "flags", "mem_lower", "mem_upper", "boot_device", "cmdline", "mods_count", "mods_addr", "num", "size", "addr",
        "shndx", "mmap_length", "mmap_addr", "drives_length", "drives_addr", "config_table", "boot_loader_name",
    ]  # fmt: skip
    words = struct.unpack("<17I", memory.read(entry.state.regs.rbx, 68))
    return dict(zip(names, words, strict=True))


def tags(entry: Entry, memory: GuestMemory) -> Iterator[tuple[int, bytes]]:
    """(type, data) of the tags of Multiboot2, with the last one."""
    start = entry.state.regs.rbx
    assert start % 8 == 0
    total, reserved = struct.unpack("<II", memory.read(start, 8))
    assert reserved == 0
    position = 8
    while True:
        assert position % 8 == 0
        kind, size = struct.unpack("<II", memory.read(start + position, 8))
        yield kind, memory.read(start + position + 8, size - 8)
        if kind == 0:
            assert position + size == total
            return
        position += size + 7 & -8


def tag_of(kind: int, entry: Entry, memory: GuestMemory) -> bytes:
    (data,) = [data for found, data in tags(entry, memory) if found == kind]
    return data


# Finding the header


@both_versions
def test_a_kernel_starts_in_protected_mode_with_the_magic_number_in_eax(version: int) -> None:
    entry, memory = load(MultibootKernel(elf_kernel(HEADERS[version], CODE)))
    regs, sregs = entry.state.regs, entry.state.sregs
    assert regs.rax == {1: 0x2BAD_B002, 2: 0x36D7_6289}[version]
    assert memory.read(regs.rip, 3) == CODE
    assert (sregs.cs.base, sregs.cs.limit, sregs.cs.db, sregs.ds.limit, sregs.ss.base) == (
        0,
        0xFFFF_FFFF,
        1,
        0xFFFF_FFFF,
        0,
    )
    assert (sregs.cr0 & 1, sregs.cr0 >> 31, regs.rflags >> 9 & 1, regs.rflags >> 17 & 1) == (1, 0, 0, 0)


def test_of_two_headers_the_newer_one_counts_unless_asked_otherwise() -> None:
    file = elf_kernel(HEADERS[2] + HEADERS[1], CODE)
    assert MultibootKernel(file).version == 2
    assert MultibootKernel(file, version=1).version == 1
    assert MultibootKernel(elf_kernel(HEADERS[1])).version == 1


@both_versions
def test_a_header_may_be_anywhere_in_the_beginning_where_it_is_aligned(version: int) -> None:
    limit, alignment = {1: (8192, 4), 2: (32768, 8)}[version]
    header = HEADERS[version]
    last = limit - len(header) & -alignment
    for place, found in ((0x400, True), (last, True), (last + alignment, False), (0x402, False), (0x404, version == 1)):
        file = bytearray(ElfFile([Segment(LOAD, bytes(0x9000))], bits=32).to_bytes())
        file[place : place + len(header)] = header
        if found:
            assert MultibootKernel(bytes(file)).header.offset == place
        else:
            with pytest.raises(ImageError, match=r"no Multiboot header|not all in the first"):
                MultibootKernel(bytes(file))


@both_versions
def test_a_header_with_a_wrong_checksum_is_none(version: int) -> None:
    wrong = Header1(wrong_by=1).to_bytes() if version == 1 else Header2(wrong_by=1).to_bytes()
    with pytest.raises(ImageError, match=r"has no Multiboot header .* and no Multiboot2 header .* checksum is right"):
        MultibootKernel(elf_kernel(wrong))
    assert MultibootKernel(elf_kernel(wrong + HEADERS[version])).header.offset > 0


def test_a_version_that_the_file_does_not_have_is_refused() -> None:
    with pytest.raises(ImageError, match="has no Multiboot2 header"):
        MultibootKernel(elf_kernel(HEADERS[1]), version=2)
    with pytest.raises(ImageError, match="has no Multiboot header"):
        MultibootKernel(elf_kernel(HEADERS[2]), version=1)
    with pytest.raises(UsageError, match="no version 3"):
        MultibootKernel(elf_kernel(HEADERS[2]), version=3)  # type: ignore[arg-type]


def test_requirements_that_nobody_knows_are_refused_by_their_numbers() -> None:
    place = 0x60  # behind the ELF header and one program header
    with pytest.raises(ImageError, match="flags is 0x8018: requirement 3, 4, 15 is not known") as caught:
        MultibootKernel(elf_kernel(Header1(flags=0x8018).to_bytes()))
    assert caught.value.offset == place + 4
    MultibootKernel(elf_kernel(Header1(flags=0xFFFE_0003).to_bytes()))  # optional ones, from bit 16 on


def test_a_header_of_another_machine_is_refused() -> None:
    with pytest.raises(ImageError, match="architecture is 4; i386 is 0") as caught:
        MultibootKernel(elf_kernel(Header2(architecture=4).to_bytes()))
    assert caught.value.offset == 0x64


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (Header2(length=15), "header_length is 0xf"),
        (Header2(length=0xFFFF_FFFF), "header_length is 0xffffffff"),
        (Header2(end=b""), "ends without its last tag"),
        (Header2([tag(6)], end=b""), "ends without its last tag"),
        (Header2([tag(6, size=7)]), "tag of type 6 has 7 bytes"),
        (Header2([tag(6, size=0)]), "tag of type 6 has 0 bytes"),
        (Header2([tag(6, size=0xFFFF_FFFF)]), "tag of type 6 has 4294967295 bytes"),
        (Header2([tag(2, 1, 2, 3)]), "tag of type 2 has 20 bytes"),
        (Header2([tag(3)]), "tag of type 3 has 8 bytes"),
        (Header2([tag(10, 0, 0, 1)]), "tag of type 10 has 20 bytes"),
        (Header2([tag(11)]), "tag of type 11 is required, but not known"),
        (Header2([tag(0xFFFF, 1)]), "tag of type 65535 is required"),
        (Header2([tag(4, 1)]), "console_flags is 0x1: the kernel requires a console, but takes no EGA text"),
    ],
)
def test_headers_that_cannot_be_obeyed_are_refused(header: Header2, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        MultibootKernel(elf_kernel(header.to_bytes()))
    assert caught.value.offset is not None


def test_optional_tags_that_nobody_knows_are_ignored() -> None:
    header = Header2([tag(11, 1, 2, optional=True), tag(4, 1, optional=True), tag(7), tag(8, 1), tag(9, 1)])
    load(MultibootKernel(elf_kernel(header.to_bytes())))


def test_required_information_that_cannot_be_given_is_refused_by_name() -> None:
    header = Header2([tag(1, 6, 7, 13, 99)]).to_bytes()
    with pytest.raises(ImageError, match=r"cannot give: 7 \(vbe\), 13 \(smbios\), 99 \(not known\)") as caught:
        MultibootKernel(elf_kernel(header))
    assert caught.value.offset == 0x70
    load(MultibootKernel(elf_kernel(Header2([tag(1, 6, 7, 13, 99, optional=True)]).to_bytes())))
    load(MultibootKernel(elf_kernel(Header2([tag(1, 1, 2, 3, 4, 5, 6, 8, 9, 14, 15, 21)]).to_bytes())))


# Where a kernel goes


@pytest.mark.parametrize("bits", [32, 64])
@both_versions
def test_segments_of_an_elf_file_go_to_their_physical_addresses(version: int, bits: int) -> None:
    upper = 0xC000_0000 if bits == 32 else 0xFFFF_FFFF_8000_0000
    data = HEADERS[version] + bytes(-len(HEADERS[version]) % 16)
    segment = Segment(upper + LOAD, data + CODE, paddr=LOAD, memsz=0x2000)
    entry, memory = load(MultibootKernel(ElfFile([segment], bits=bits, entry=upper + LOAD + len(data)).to_bytes()))
    assert entry.state.regs.rip == LOAD + len(data)
    assert memory.read(LOAD, 0x2000) == (data + CODE).ljust(0x2000, b"\0")


def test_address_fields_say_where_any_other_file_goes() -> None:
    header = Header1(addresses=(LOAD + 8, LOAD, 0, LOAD + 0x1000, LOAD + 40))
    file = flat_kernel(header.to_bytes(), CODE)
    entry, memory = load(MultibootKernel(file))
    assert memory.read(LOAD, 0x1001) == file.ljust(0x1000, b"\0") + b"\xcc"
    assert memory.read(entry.state.regs.rip, 3) == CODE
    file = flat_kernel(Header2([tag(2, LOAD + 8, LOAD, 0, LOAD + 0x1000), tag(3, LOAD)]).to_bytes(), CODE)
    entry, memory = load(MultibootKernel(file))
    assert memory.read(LOAD, 0x1001) == file.ljust(0x1000, b"\0") + b"\xcc"
    assert entry.state.regs.rip == LOAD


def test_loading_may_begin_and_end_within_the_file() -> None:
    header = Header1(addresses=(LOAD, LOAD, LOAD + 34, 0, LOAD + 32))
    entry, memory = load(MultibootKernel(flat_kernel(header.to_bytes(), CODE)))
    assert memory.read(LOAD - 1, 36) == b"\xcc" + header.to_bytes() + CODE[:2] + b"\xcc"
    assert entry.state.regs.rip == LOAD + 32


def test_in_multiboot2_a_file_may_be_loaded_from_its_start() -> None:
    file = flat_kernel(Header2([tag(2, LOAD + 8, 0xFFFF_FFFF, 0, 0), tag(3, LOAD)]).to_bytes(), CODE)
    _, memory = load(MultibootKernel(file))
    assert memory.read(LOAD, len(file)) == file
    too_low = flat_kernel(Header2([tag(2, 4, 0xFFFF_FFFF, 0, 0), tag(3, LOAD)]).to_bytes(), CODE)
    with pytest.raises(ImageError, match="header_addr is 0x4, too low"):
        MultibootKernel(too_low)


def test_address_fields_count_for_an_elf_file_too() -> None:
    elf = bytearray(ElfFile([Segment(LOAD, bytes(0x100))], bits=32).to_bytes())
    elf[0x60 : 0x60 + 32] = Header1(addresses=(2 * MIB + 0x60, 2 * MIB, 0, 0, 2 * MIB + 0x80)).to_bytes()
    entry, memory = load(MultibootKernel(bytes(elf)))
    assert entry.state.regs.rip == 2 * MIB + 0x80
    assert memory.read(2 * MIB, 4) == b"\x7fELF"


@pytest.mark.parametrize(
    ("addresses", "field", "message"),
    [
        ((LOAD, LOAD + 1, 0, 0, LOAD), 16, "load_addr is 0x100001: more than header_addr"),
        ((LOAD + 9, LOAD, 0, 0, LOAD), 12, "header_addr is 0x100009: the header is at offset 0x8"),
        ((LOAD, LOAD, LOAD, 0, LOAD), 20, "load_end_addr is 0x100000: not above load_addr"),
        ((LOAD, LOAD, LOAD + 0x1000, 0, LOAD), 20, "load_end_addr is 0x101000: the file ends"),
        ((LOAD, LOAD, 0, LOAD + 1, LOAD), 24, "bss_end_addr is 0x100001: less than the end of the data"),
        ((LOAD, LOAD, 0, 0, LOAD - 1), 28, "entry_addr is 0xfffff, outside of the image"),
        ((LOAD, LOAD, 0, LOAD + 0x100, LOAD + 0x100), 28, "entry_addr is 0x100100, outside of the image"),
        ((0xFFFF_FFF8, 0xFFFF_FFF8, 0, 0, 0xFFFF_FFF8), 16, "the image ends at 0x100000020, above 4 GiB"),
    ],
)  # fmt: skip
def test_address_fields_that_contradict_are_refused_at_the_field(
    addresses: tuple[int, int, int, int, int], field: int, message: str
) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        MultibootKernel(flat_kernel(Header1(addresses=addresses).to_bytes(), bytes(8)))
    assert caught.value.offset == 8 + field


def test_an_entry_address_tag_overrides_the_elf_header() -> None:
    header = Header2([tag(3, LOAD + 0x21)]).to_bytes()
    entry, _ = load(MultibootKernel(elf_kernel(header, bytes(0x100))))
    assert entry.state.regs.rip == LOAD + 0x21
    with pytest.raises(ImageError, match="entry 0x0 is in no segment"):
        MultibootKernel(elf_kernel(Header2([tag(3, 0)]).to_bytes()))


def test_without_addresses_a_file_must_be_an_elf_file() -> None:
    with pytest.raises(ImageError, match="is no ELF file, and its Multiboot header has no address fields") as caught:
        MultibootKernel(flat_kernel(HEADERS[1]))
    assert caught.value.offset == 8
    with pytest.raises(ImageError, match="there is no entry address tag"):
        MultibootKernel(flat_kernel(Header2([tag(2, LOAD, LOAD, 0, 0)]).to_bytes()))


def test_a_kernel_above_4_gib_or_outside_of_ram_is_refused() -> None:
    segment = Segment((1 << 32) - 0x100, HEADERS[1] + bytes(0x100))
    with pytest.raises(ImageError, match="loaded below 4 GiB"):
        MultibootKernel(ElfFile([segment], bits=64).to_bytes())
    with pytest.raises(ImageError, match=r"the image goes to 0x1000000.*not all in RAM"):
        load(MultibootKernel(flat_kernel(Header1(addresses=(16 * MIB, 16 * MIB, 0, 0, 16 * MIB)).to_bytes())))


def relocatable(*words: int, type: int = ET_DYN) -> bytes:
    header = Header2([tag(10, *words)]).to_bytes()
    return ElfFile([Segment(0x10_0000, header + CODE)], bits=32, type=type).to_bytes()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((0, 0xFFFF_FFFF, 0x1000, 0), LOAD),
        ((LOAD, LOAD + 0x100, 0x1000, 2), LOAD),
        ((0x20_0000, 0xFFFF_FFFF, 0x1000, 1), 0x20_0000),
        ((0x20_0001, 0xFFFF_FFFF, 0x1_0000, 1), 0x21_0000),
    ],
)
def test_a_relocatable_image_is_put_where_it_may_be_and_told_where(words: tuple[int, ...], expected: int) -> None:
    entry, memory = load(MultibootKernel(relocatable(*words)))
    assert struct.unpack("<I", tag_of(21, entry, memory)) == (expected,)
    assert memory.read(expected, 4) == b"\xd6\x50\x52\xe8"


def test_an_image_that_cannot_be_where_it_may_be_is_refused() -> None:
    for words, type in (
        ((0, 0xF_FFFF, 1, 0), 2),
        ((LOAD + 1, LOAD + 0x1010, 1, 0), ET_DYN),
        ((2 * MIB, 1, 4, 0), ET_DYN),
    ):
        with pytest.raises(ImageError, match="its header wants it between") as caught:
            MultibootKernel(relocatable(*words, type=type))
        assert caught.value.offset is not None
    with pytest.raises(ImageError, match="align is 0x3, not a power of two"):
        MultibootKernel(relocatable(2 * MIB, 3 * MIB, 3, 0, type=ET_DYN))


# What a kernel is told


def test_the_information_of_multiboot_1() -> None:
    modules = [MultibootModule(b"first" * 1000, "one --fast"), MultibootModule(b"", "empty"), MultibootModule(b"third")]
    kernel = MultibootKernel(elf_kernel(HEADERS[1], CODE), cmdline="quiet ü", modules=modules)
    entry, memory = load(kernel)
    info = information(entry, memory)
    assert info["flags"] == 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9
    assert (info["mem_lower"], info["mem_upper"]) == (639, 15 * 1024)
    assert memory.read_cstring(info["cmdline"]) == "quiet ü".encode()
    assert memory.read_cstring(info["boot_loader_name"]) == b"kvmpy"
    found = list(struct.iter_unpack("<4I", memory.read(info["mods_addr"], 16 * info["mods_count"])))
    assert [memory.read_cstring(string) for _, _, string, _ in found] == [b"one --fast", b"empty", b""]
    assert [memory.read(start, end - start) for start, end, _, _ in found] == [b"first" * 1000, b"", b"third"]
    assert all(start % 0x1000 == 0 and reserved == 0 for start, _, _, reserved in found)
    assert found[0][0] == LOAD + 0x2000, "modules follow the kernel with its .bss"
    entries = list(struct.iter_unpack("<IQQI", memory.read(info["mmap_addr"], info["mmap_length"])))
    assert entries == [
        (20, 0, 0x9_FC00, 1),
        (20, 0x9_FC00, 0x400, 2),
        (20, 0xF_0000, 0x1_0000, 2),
        (20, MIB, 15 * MIB, 1),
    ]


def test_the_information_of_multiboot_2() -> None:
    modules = [MultibootModule(b"first" * 1000, "one --fast"), MultibootModule(b"second")]
    kernel = MultibootKernel(elf_kernel(HEADERS[2], CODE), cmdline="quiet", modules=modules)
    entry, memory = load(kernel)
    found = list(tags(entry, memory))
    assert [kind for kind, _ in found] == [1, 2, 3, 3, 4, 6, 0]
    assert (found[0][1], found[1][1]) == (b"quiet\0", b"kvmpy\0")
    for (_, data), module in zip(found[2:4], modules, strict=True):
        start, end = struct.unpack_from("<II", data)
        assert memory.read(start, end - start) == module.source
        assert (data[8:], start % 0x1000) == (module.string.encode() + b"\0", 0)
    assert struct.unpack("<II", found[4][1]) == (639, 15 * 1024)
    entry_size, entry_version = struct.unpack_from("<II", found[5][1])
    assert (entry_size, entry_version) == (24, 0)
    entries = list(struct.iter_unpack("<QQII", found[5][1][8:]))
    assert entries[0] == (0, 0x9_FC00, 1, 0)
    assert entries[-1] == (MIB, 15 * MIB, 1, 0)


def test_upper_memory_ends_at_the_first_hole() -> None:
    for regions, expected in (
        (((0, 2 * MIB), (4 * MIB, 12 * MIB)), (639, 1024)),
        (((0, 0x8_0000), (MIB, MIB)), (512, 1024)),
        (((MIB, MIB),), (0, 1024)),
    ):
        entry, memory = load(MultibootKernel(elf_kernel(HEADERS[1])), ram(*regions))
        info = information(entry, memory)
        assert (info["mem_lower"], info["mem_upper"]) == expected


def test_modules_are_files_too(tmp_path: Path) -> None:
    file = tmp_path / "module.bin"
    file.write_bytes(b"contents")
    for given in (file, str(file)):
        entry, memory = load(MultibootKernel(elf_kernel(HEADERS[2]), modules=[given]))
        assert tag_of(3, entry, memory)[8:] == str(file).encode() + b"\0"
    with pytest.raises(UsageError, match="a module is a MultibootModule or a path, not b'contents'"):
        MultibootKernel(elf_kernel(HEADERS[2]), modules=[b"contents"])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="the string of a module ends with its first zero byte"):
        MultibootKernel(elf_kernel(HEADERS[2]), modules=[MultibootModule(b"", "a\0b")])
    with pytest.raises(UsageError, match="the command line ends"):
        MultibootKernel(elf_kernel(HEADERS[2]), cmdline="a\0b")


def test_a_module_larger_than_ram_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "module.bin"
    with file.open("wb") as sparse:
        sparse.truncate(1 << 40)
    with pytest.raises(ImageError, match=r"module\.bin: no 0x10000000000 bytes are free for this module"):
        load(MultibootKernel(elf_kernel(HEADERS[1]), modules=[file]))


@pytest.mark.parametrize(
    "header",
    [Header1(video=(1, 0, 0, 0)), Header2([tag(5, 80, 25, 0)]), Header2([tag(4, 3)]), Header2([tag(1, 8)])],
)
def test_a_kernel_that_wants_a_screen_is_told_of_the_text_mode(header: Header1 | Header2) -> None:
    kernel = MultibootKernel(elf_kernel(header.to_bytes()))
    entry, memory = load(kernel)
    screen = memory.read(entry.state.regs.rbx + 88, 22) if kernel.version == 1 else tag_of(8, entry, memory)[:22]
    assert struct.unpack("<QIIIBB", screen) == (0xB_8000, 160, 80, 25, 16, 2)
    if kernel.version == 1:
        assert information(entry, memory)["flags"] >> 11 & 3 == 2, "framebuffer, but no VBE"
    without = ram((0, 0xB_8000), (MIB, MIB))
    entry, _ = load(kernel, without)
    if kernel.version == 1:
        assert information(entry, without)["flags"] >> 12 == 0, "there is no memory for it"
    else:
        assert 8 not in [kind for kind, _ in tags(entry, without)]


class Rsdp:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def place(self, memory: GuestMemory, taken: Sequence[LoadedRange]) -> PlacedTables:
        memory.write(0xE_0000, self.data)
        used = LoadedRange(0xE_0000, len(self.data), "RSDP")
        return PlacedTables((used,), (E820Entry(0xE_0000, 0x1000, E820Type.NVS),), 0xE_0000)


OLD_RSDP = b"RSD PTR \x00kvmpy \x00" + bytes(4)
NEW_RSDP = b"RSD PTR \x00kvmpy \x02" + struct.pack("<IIQI", 0, 36, 0x1234, 0)


@pytest.mark.parametrize(("data", "kind"), [(OLD_RSDP, 14), (NEW_RSDP, 15)])
def test_a_copy_of_the_rsdp_is_handed_over(data: bytes, kind: int) -> None:
    kernel = MultibootKernel(elf_kernel(HEADERS[2]), tables=[Rsdp(data)])
    entry, memory = load(kernel)
    assert tag_of(kind, entry, memory) == data
    assert (0xE_0000, 0x1000, 4, 0) in struct.iter_unpack("<QQII", tag_of(6, entry, memory)[8:])


SYMBOLS = """
__attribute__((section(".multiboot"), used, aligned(8))) static const unsigned header[] = { %s };
int some_variable = 5;
void _start(void) { for (;;) some_variable++; }
"""


@pytest.mark.parametrize("bits", [32, 64])
@both_versions
def test_the_symbols_of_an_elf_kernel_are_in_memory(version: int, bits: int) -> None:
    words = ", ".join(hex(word) for (word,) in struct.iter_unpack("<I", HEADERS[version]))
    program = compile_c(SYMBOLS % words, address=LOAD, bits=bits)
    entry, memory = load(MultibootKernel(program.elf))
    if version == 1:
        info = information(entry, memory)
        assert info["flags"] >> 5 & 1
        count, size, names = info["num"], info["size"], info["shndx"]
        table = memory.read(info["addr"], count * size)
    else:
        data = tag_of(9, entry, memory)
        count, size, names = struct.unpack_from("<III", data)
        table = data[12:]
    layout = struct.Struct("<10I" if bits == 32 else "<IIQQQQIIQQ")
    assert size == layout.size
    sections = list(layout.iter_unpack(table))
    assert len(sections) == count
    strings = sections[names]
    found = {}
    for name, kind, _, address, _, length, link, *_ in sections:
        found[memory.read_cstring(strings[3] + name).decode()] = address
        if kind == 2:
            symbols = memory.read(address, length)
            symbol_names = sections[link][3]
    code = {
        memory.read_cstring(symbol_names + fields[0]): fields[1 if bits == 32 else 4]
        for fields in struct.iter_unpack("<IIIBBH" if bits == 32 else "<IBBHQQ", symbols)
    }
    assert code[b"some_variable"] == program.symbols["some_variable"]
    assert memory.read_u32(code[b"some_variable"]) == 5
    assert found[".text"] > 0


def test_only_what_the_entry_lists_is_written() -> None:
    for version in (1, 2):
        kernel = MultibootKernel(elf_kernel(HEADERS[version]), modules=[MultibootModule(b"module")], cmdline="quiet")
        entry, memory = load(kernel)
        contents = bytearray(memory.read(0, 16 * MIB))
        for used in entry.ranges:
            contents[used.address : used.end] = b"\xcc" * used.size
        assert contents == b"\xcc" * (16 * MIB)


def test_a_kernel_can_be_loaded_twice() -> None:
    kernel = MultibootKernel(elf_kernel(HEADERS[2]), modules=[MultibootModule(b"module")])
    assert load(kernel)[1].read(0, 16 * MIB) == load(kernel)[1].read(0, 16 * MIB)
