"""Position-independent images linked by the real tools run where they are put; tables that lie are refused."""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from elf_files import DYNAMIC, ET_DYN, ET_EXEC, ElfFile, Segment, dynamic_section
from kvmpy.boot import ElfImage
from kvmpy.errors import ImageError
from kvmpy.memory import GuestMemory, MemoryRegion

MIB = 0x10_0000

DT_NEEDED, DT_PLTRELSZ, DT_RELA, DT_RELASZ, DT_RELAENT, DT_REL, DT_RELSZ, DT_RELENT = 1, 2, 7, 8, 9, 17, 18, 19
DT_PLTREL, DT_JMPREL, DT_RELRSZ, DT_RELR, DT_RELRENT = 20, 23, 35, 36, 37
NONE, RELATIVE, GLOB_DAT = 0, 8, 6


def ram(size: int = 4 * MIB) -> GuestMemory:
    memory = GuestMemory()
    memory.add(MemoryRegion.anonymous(0, size))
    memory.fill(0, size, 0xCC)
    return memory


# Real linkers

SOURCE = """
int value = 5;
int *pointer = &value;
static int zeroed[100];
int *pointers[200] = { [0] = zeroed, [1] = &zeroed[1], [70] = &zeroed[70], [199] = &value };
int **chain = &pointer;
void _start(void)
{
    zeroed[0] = **chain;
    for (;;)
        __asm__ volatile("hlt");
}
"""


def linked(folder: Path, bits: int, *options: str) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("needs `gcc` (Debian package gcc)")
    source, program = folder / "program.c", folder / "program.elf"
    source.write_text(SOURCE)
    command = ["gcc", f"-m{bits}", "-O1", "-ffreestanding", "-nostdlib", "-fno-stack-protector", *options]
    done = subprocess.run(
        [*command, "-o", str(program), str(source)], capture_output=True, text=True, timeout=60, check=False
    )
    if "pack-relative-relocs" in " ".join(options) and done.stderr:
        pytest.skip("this ld cannot pack relative relocations (binutils 2.38 can)")
    assert done.returncode == 0, done.stderr
    return program


@pytest.mark.parametrize("base", [None, 0x1_0000, 0x24_5000])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "relr"])
@pytest.mark.parametrize("bits", [32, 64])
def test_every_pointer_of_a_static_pie_points_into_the_moved_image(
    tmp_path: Path, bits: int, packed: bool, base: int | None
) -> None:
    options = ["-static-pie", "-fpie", *(["-Wl,-z,pack-relative-relocs"] if packed else [])]
    image = ElfImage(linked(tmp_path, bits, *options), base=base)
    memory = ram()
    entry = image.load(memory)
    symbols = image.symbols()
    read, width = (memory.read_u64, 8) if bits == 64 else (memory.read_u32, 4)
    assert image.position_independent
    assert image.segments[0].address == (MIB if base is None else base)
    assert memory.read_u32(symbols["value"]) == 5
    assert read(symbols["pointer"]) == symbols["value"]
    assert read(symbols["chain"]) == symbols["pointer"]
    expected = {0: symbols["zeroed"], 1: symbols["zeroed"] + 4, 70: symbols["zeroed"] + 280, 199: symbols["value"]}
    for index in range(200):
        assert read(symbols["pointers"] + index * width) == expected.get(index, 0)
    assert memory.read(symbols["zeroed"], 400) == bytes(400)
    assert entry.state.regs.rip == symbols["_start"]


def test_loading_twice_relocates_once(tmp_path: Path) -> None:
    image = ElfImage(linked(tmp_path, 32, "-static-pie", "-fpie"))
    memory = ram()
    image.load(memory)
    first = memory.read(0, 4 * MIB)
    image.load(memory)
    assert memory.read(0, 4 * MIB) == first


def test_a_program_that_needs_shared_libraries_is_refused(tmp_path: Path) -> None:
    library = linked(tmp_path, 64, "-shared", "-fpic", "-Wl,-soname,libneeded.so")
    library = library.rename(tmp_path / "libneeded.so")
    program = linked(tmp_path, 64, "-pie", "-fpie", "-Wl,--no-as-needed", str(library))
    with pytest.raises(ImageError, match=r"program\.elf.*shared libraries"):
        ElfImage(program)


# Hand-made tables: the image is linked for 0, with its table at 0x100 and its data at 0x800


def made(
    dynamic: list[tuple[int, int]], table: bytes, *, bits: int = 64, data: bytes = b"", type: int = ET_DYN
) -> bytes:
    contents = (bytes(0x100) + table).ljust(0x800, b"\0") + data.ljust(0x200, b"\0")
    body = Segment(0, contents, memsz=0x1000)
    return ElfFile(
        [body, Segment(0, dynamic_section(dynamic, bits), type=DYNAMIC)], bits=bits, type=type, entry=1
    ).to_bytes()


def rela(*entries: tuple[int, int, int]) -> bytes:
    return b"".join(struct.pack("<3Q", *entry) for entry in entries)


def rela_dynamic(size: int, address: int = 0x100) -> list[tuple[int, int]]:
    return [(DT_RELA, address), (DT_RELASZ, size), (DT_RELAENT, 24)]


def test_a_rela_entry_takes_its_own_addend() -> None:
    table = rela((0x800, RELATIVE, 0x123), (0x808, NONE, 0), (0xFF8, RELATIVE, (1 << 64) - 0x10_0001))
    memory = ram()
    ElfImage(made(rela_dynamic(72), table, data=b"\x11" * 16)).load(memory)
    assert memory.read_u64(MIB + 0x800) == MIB + 0x123
    assert memory.read_u64(MIB + 0x808) == 0x1111_1111_1111_1111
    assert memory.read_u64(MIB + 0xFF8) == (1 << 64) - 1, "modulo 2^64, and in .bss"


def test_the_first_of_two_equal_tags_counts() -> None:
    memory = ram()
    dynamic = [*rela_dynamic(24), (DT_RELASZ, 48), (0x6FFF_FFF9, 1)]
    ElfImage(made(dynamic, rela((0x800, RELATIVE, 1), (0x808, RELATIVE, 2)))).load(memory)
    assert memory.read_u64(MIB + 0x800) == MIB + 1
    assert memory.read_u64(MIB + 0x808) == 0


def test_a_rel_entry_finds_its_addend_in_place() -> None:
    dynamic = [(DT_REL, 0x100), (DT_RELSZ, 16), (DT_RELENT, 8)]
    table = struct.pack("<4I", 0x800, RELATIVE, 0x804, RELATIVE)
    memory = ram()
    ElfImage(made(dynamic, table, bits=32, data=struct.pack("<II", 0x44, 0xFFFF_FFFF))).load(memory)
    assert memory.read_u32(MIB + 0x800) == MIB + 0x44
    assert memory.read_u32(MIB + 0x804) == MIB - 1


@pytest.mark.parametrize(("kind", "table"), [(DT_RELA, rela((0x800, 8, 7))), (DT_REL, struct.pack("<2Q", 0x800, 8))])
def test_the_plt_table_is_relocated_too(kind: int, table: bytes) -> None:
    dynamic = [(DT_JMPREL, 0x100), (DT_PLTRELSZ, len(table)), (DT_PLTREL, kind)]
    memory = ram()
    ElfImage(made(dynamic, table, data=struct.pack("<Q", 7))).load(memory)
    assert memory.read_u64(MIB + 0x800) == MIB + 7


@pytest.mark.parametrize(("bits", "word"), [(32, "I"), (64, "Q")])
def test_a_relr_bitmap_covers_the_words_after_its_address(bits: int, word: str) -> None:
    width = bits // 8
    # The address, then words 1 and 3 of those behind it, then the first word of the next bitmap's stretch.
    table = struct.pack(f"<3{word}", 0x800, 0b1011, 0b11)
    words = {0: 1, 1: 1, 3: 1, bits: 1}  # word 0 by its address; bit 1 of the first bitmap is word 1
    dynamic = [(DT_RELR, 0x100), (DT_RELRSZ, 3 * width), (DT_RELRENT, width)]
    memory = ram()
    ElfImage(made(dynamic, table, bits=bits)).load(memory)
    read = memory.read_u64 if bits == 64 else memory.read_u32
    for index in range(0x200 // width):
        assert read(MIB + 0x800 + index * width) == (MIB if index in words else 0), index


def test_an_image_at_fixed_addresses_is_not_relocated() -> None:
    memory = ram()
    file = made(rela_dynamic(24), rela((0x800, RELATIVE, 5)), type=ET_EXEC)
    ElfImage(file).load(memory)
    assert memory.read_u64(0x800) == 0


def test_relocations_are_done_at_the_link_address_too() -> None:
    memory = ram()
    ElfImage(made(rela_dynamic(24), rela((0x800, RELATIVE, 5))), base=0).load(memory)
    assert memory.read_u64(0x800) == 5


@pytest.mark.parametrize(
    ("dynamic", "table", "message"),
    [
        ([(DT_NEEDED, 1)], b"", "shared libraries"),
        (rela_dynamic(24, address=0xA00), b"", "RELA table, 0x18 bytes at 0xa00, is in no segment of the file"),
        (rela_dynamic(24, address=0xFFFF_FFFF_FFFF_FFFF), b"", "in no segment of the file"),
        (rela_dynamic(24 << 50), b"", "in no segment of the file"),
        (rela_dynamic(23), b"", "RELA table has 0x17 bytes in entries of 24"),
        ([(DT_RELA, 0x100), (DT_RELASZ, 24), (DT_RELAENT, 0)], b"", "in entries of 0"),
        ([(DT_RELR, 0x100), (DT_RELRSZ, 12)], b"", "RELR table has 0xc bytes"),
        ([(DT_JMPREL, 0x100), (DT_PLTRELSZ, 25), (DT_PLTREL, DT_RELA)], b"", "DT_JMPREL table has 0x19 bytes"),
    ],
)
def test_a_lying_dynamic_section_is_refused(dynamic: list[tuple[int, int]], table: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        ElfImage(made(dynamic, table))


def test_a_table_without_bytes_is_no_table() -> None:
    memory = ram()
    ElfImage(made([(DT_RELA, 0xFFFF_FFFF_FFFF)], b"")).load(memory)
    assert memory.read(MIB, 0x1000) == bytes(0x1000)


@pytest.mark.parametrize(
    ("dynamic", "table", "message"),
    [
        (rela_dynamic(24), rela((0x800, GLOB_DAT, 0)), "relocation 0 of the RELA table is of type 6; only RELATIVE"),
        (rela_dynamic(24), rela((0x800, 37, 0)), "type 37"),
        (rela_dynamic(24), rela((0xFF9, RELATIVE, 0)), "relocates 0xff9; the 8 bytes there are in no segment"),
        (rela_dynamic(24), rela(((1 << 64) - 8, RELATIVE, 0)), "in no segment"),
        (rela_dynamic(24), rela(((1 << 64) - 1, RELATIVE, 0)), "in no segment"),
        ([(DT_RELR, 0x100), (DT_RELRSZ, 8)], struct.pack("<Q", 1), "starts with a bitmap"),
        ([(DT_RELR, 0x100), (DT_RELRSZ, 16)], struct.pack("<2Q", 0x800, 0x800), "0x800 comes after higher ones"),
        ([(DT_RELR, 0x100), (DT_RELRSZ, 8)], struct.pack("<Q", 0x1000), "in no segment"),
        ([(DT_RELR, 0x100), (DT_RELRSZ, 16)], struct.pack("<2Q", 0xFF0, 7), "relocates 0x1000"),
    ],
)
def test_a_relocation_that_cannot_be_done_is_refused(
    dynamic: list[tuple[int, int]], table: bytes, message: str
) -> None:
    image = ElfImage(made(dynamic, table))
    memory = ram()
    with pytest.raises(ImageError, match=message) as caught:
        image.load(memory)
    assert caught.value.offset is not None
    assert memory.read(0, MIB) == b"\xcc" * MIB
    assert memory.read(MIB + 0x1000, 3 * MIB - 0x1000) == b"\xcc" * (3 * MIB - 0x1000)
