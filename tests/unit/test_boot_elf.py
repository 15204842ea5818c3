"""ELF images: fixed and position-independent ones, where they go, where they start, and which are refused."""

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from elf_files import ET_DYN, ElfFile, Segment
from gnu_toolchain import compile_c
from kvmpy.boot import ElfImage
from kvmpy.boot.image import Entry
from kvmpy.errors import ImageError
from kvmpy.memory import GuestMemory, MemoryRegion
from kvmpy.x86 import entry_rules
from kvmpy.x86.page_walk import translate

MIB = 0x10_0000
HIGH_HALF = 0xFFFF_FFFF_8000_0000


def ram(*regions: tuple[int, int]) -> GuestMemory:
    """Memory full of 0xCC, so that what a loader wrote, or zeroed, can be told."""
    memory = GuestMemory()
    for address, size in regions or ((0, 4 * MIB),):
        memory.add(MemoryRegion.anonymous(address, size))
        memory.fill(address, size, 0xCC)
    return memory


def load(file: ElfFile, memory: GuestMemory | None = None) -> Entry:
    return ElfImage(file.to_bytes()).load(memory or ram())


PROGRAM = """
int initialized = 0x12345678;
int *pointer = &initialized;
int zeroed[3000];
__attribute__((section(".text.entry"))) void _start(void)
{
    zeroed[0] = *pointer;
    for (;;)
        __asm__ volatile("hlt");
}
"""


@pytest.mark.parametrize(("bits", "machine"), [(32, "i386"), (64, "x86-64")])
def test_a_linked_program_is_loaded_where_it_was_linked(bits: int, machine: str) -> None:
    program = compile_c(PROGRAM, address=0x20_0000, bits=bits)
    image = ElfImage(program.elf)
    memory = ram()
    entry = image.load(memory)
    symbols = image.symbols()
    assert (image.bits, image.machine, image.position_independent) == (bits, machine, False)
    assert memory.read(0x20_0000, len(program.image)) == program.image
    assert memory.read_u32(symbols["initialized"]) == 0x1234_5678
    assert memory.read(symbols["zeroed"], 12000) == bytes(12000)
    assert entry.state.regs.rip == symbols["_start"] == program.entry
    assert not entry_rules.violations(entry.state)


def test_the_class_of_the_file_decides_the_mode() -> None:
    thirty_two = load(ElfFile([Segment(MIB)], bits=32)).state
    sixty_four = load(ElfFile([Segment(MIB)], bits=64)).state
    assert (thirty_two.sregs.cs.db, thirty_two.sregs.cs.l, thirty_two.sregs.efer & 0x400) == (1, 0, 0)
    assert (sixty_four.sregs.cs.db, sixty_four.sregs.cs.l, sixty_four.sregs.efer & 0x400) == (0, 1, 0x400)


def test_the_mode_can_be_chosen() -> None:
    file = ElfFile([Segment(0x8000)], bits=64).to_bytes()
    assert ElfImage(file, mode="protected").load(ram()).state.sregs.cs.db == 1
    assert ElfImage(file, mode="real").load(ram()).state.sregs.cr0 & 1 == 0


def test_only_what_the_image_says_is_written() -> None:
    memory = ram()
    entry = load(ElfFile([Segment(0x20_0010, b"code", memsz=0x100), Segment(0x20_1000, b"data")]), memory)
    expected = bytearray(b"\xcc" * (4 * MIB))
    expected[0x20_0010:0x20_0110] = b"code" + bytes(0xFC)
    expected[0x20_1000:0x20_1004] = b"data"
    tables = next(used for used in entry.ranges if used.name == "tables")
    expected[tables.address : tables.end] = memory.read(tables.address, tables.size)
    assert memory.read(0, 4 * MIB) == expected


def test_segments_go_to_their_physical_addresses() -> None:
    memory = ram()
    load(ElfFile([Segment(0x40_0000_0000, b"\xf4code", paddr=MIB)]), memory)
    assert memory.read(MIB, 5) == b"\xf4code"


def test_segments_go_to_their_virtual_addresses_when_asked() -> None:
    file = ElfFile([Segment(MIB, b"\xf4code", paddr=0x7777_0000_0000)]).to_bytes()
    memory = ram()
    entry = ElfImage(file, physical=False).load(memory)
    assert memory.read(MIB, 5) == b"\xf4code"
    assert entry.state.regs.rip == MIB


def test_segments_without_memory_and_of_other_types_are_skipped() -> None:
    note = Segment(1 << 60, b"note", type=4)
    nothing = Segment(1 << 61, b"")
    image = ElfImage(ElfFile([note, nothing, Segment(MIB)], entry=MIB).to_bytes())
    assert [segment.address for segment in image.segments] == [MIB]
    image.load(ram())


def test_a_segment_may_end_with_the_last_byte_of_ram() -> None:
    memory = ram()
    load(ElfFile([Segment(MIB), Segment(3 * MIB, b"x" * MIB)]), memory)
    assert memory.read(3 * MIB, MIB) == b"x" * MIB


@pytest.mark.parametrize(
    "segment",
    [
        Segment(4 * MIB),
        Segment(4 * MIB - 1, b"ab"),
        Segment(MIB, memsz=3 * MIB + 1),
        Segment((1 << 64) - 16, b"x" * 16),
        Segment(MIB, memsz=1 << 62),
    ],
)
def test_a_segment_outside_of_ram_is_refused_before_anything_is_written(segment: Segment) -> None:
    memory = ram()
    with pytest.raises(ImageError, match=r"at offset 0x78: program header 1 goes to .* not all in RAM"):
        ElfImage(ElfFile([Segment(0x1000), segment], entry=0x1000).to_bytes()).load(memory)
    assert memory.read(0, 4 * MIB) == b"\xcc" * 4 * MIB


def test_a_file_is_named_in_the_error(tmp_path: Path) -> None:
    file = tmp_path / "kernel.elf"
    file.write_bytes(ElfFile([Segment(MIB)], lies={"e_machine": 183}).to_bytes())
    with pytest.raises(ImageError, match=r"kernel\.elf at offset 0x12: e_machine is 183, AArch64; ") as caught:
        ElfImage(file)
    assert (caught.value.image, caught.value.offset) == (str(file), 0x12)


@pytest.mark.parametrize(
    ("file", "offset", "message"),
    [
        (ElfFile([Segment(MIB)], ident={0: 0}), 0, "not an ELF file"),
        (ElfFile([Segment(MIB)], ident={4: 0}), 4, "EI_CLASS is 0"),
        (ElfFile([Segment(MIB)], ident={4: 3}), 4, "EI_CLASS is 3"),
        (ElfFile([Segment(MIB)], ident={5: 2}), 5, "EI_DATA is 2"),
        (ElfFile([Segment(MIB)], ident={6: 0}), 6, "EI_VERSION is 0"),
        (ElfFile([Segment(MIB)], lies={"e_machine": 3}), 0x12, "e_machine is 3, i386; class ELF64 goes with x86-64"),
        (ElfFile([Segment(MIB)], bits=32, lies={"e_machine": 62}), 0x12, "e_machine is 62, x86-64; class ELF32"),
        (ElfFile([Segment(MIB)], lies={"e_machine": 0}), 0x12, "e_machine is 0, an unknown machine"),
        (ElfFile([Segment(MIB)], lies={"e_type": 1}), 0x10, "relocatable object, which must be linked"),
        (ElfFile([Segment(MIB)], lies={"e_type": 4}), 0x10, "core dump"),
        (ElfFile([Segment(MIB)], lies={"e_type": 0xFE00}), 0x10, "e_type is 65024, unknown"),
        (ElfFile([Segment(MIB)], lies={"e_version": 2}), 0x14, "e_version is 2"),
        (ElfFile([Segment(MIB)], lies={"e_ehsize": 63}), 0x34, "e_ehsize is 63"),
        (ElfFile([Segment(MIB)], bits=32, lies={"e_ehsize": 51}), 0x28, "e_ehsize is 51"),
        (ElfFile([Segment(MIB)], lies={"e_phentsize": 0}), 0x36, "e_phentsize is 0"),
        (ElfFile([Segment(MIB)], bits=32, lies={"e_phentsize": 56}), 0x2A, "e_phentsize is 56"),
        (ElfFile([]), 0x38, "e_phnum is 0"),
        (ElfFile([Segment(MIB)], lies={"e_phnum": 0xFFFF}), 0x38, "PN_XNUM"),
        (ElfFile([Segment(MIB)], lies={"e_phnum": 0xFFFE}), 0x20, "end behind the file"),
        (ElfFile([Segment(MIB)], lies={"e_phoff": (1 << 64) - 1}), 0x20, "end behind the file"),
        (ElfFile([Segment(MIB)], entry=0), 0x18, "e_entry is 0: the file has no entry point"),
        (ElfFile([Segment(MIB)], entry=MIB + 1), 0x18, "e_entry is 0x100001, in no segment"),
        (ElfFile([Segment(MIB, lies={"p_offset": 1 << 40})]), 0x48, "program header 0: p_offset is 0x10000000000: "),
        (ElfFile([Segment(MIB, memsz=99, lies={"p_filesz": 17})]), 0x60, "p_filesz is 0x11: .* end behind the file"),
        (ElfFile([Segment(MIB, b"abc", memsz=2)]), 0x60, "p_filesz is 0x3, more than p_memsz 0x2"),
        (ElfFile([Segment((1 << 64) - 4, memsz=5)]), 0x50, "p_vaddr is .*wraps around at 2.64"),
        (ElfFile([Segment(MIB, paddr=(1 << 64) - 4, memsz=5)]), 0x58, "p_paddr is .*wraps around at 2.64"),
        (ElfFile([Segment((1 << 32) - 4, memsz=5)], bits=32), 0x3C, "p_vaddr is .*wraps around at 2.32"),
        (ElfFile([Segment(MIB, align=3)]), 0x70, "p_align is 0x3, not a power of two"),
        (
            ElfFile([Segment(MIB, b"abcd"), Segment(MIB + 3)]),
            0x90,
            r"program header 1: p_paddr is 0x100003, but program header 0 already takes 0x100000\.\.0x100003",
        ),
        (ElfFile([Segment(MIB, b"")]), None, "no PT_LOAD segment"),
        (ElfFile([Segment(MIB, type=4)]), None, "no PT_LOAD segment"),
    ],
)
def test_a_lie_is_refused_by_field_and_offset(file: ElfFile, offset: int | None, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        ElfImage(file.to_bytes())
    assert caught.value.offset == offset


@pytest.mark.parametrize("bits", [32, 64])
def test_a_file_truncated_at_any_byte_is_refused(bits: int) -> None:
    whole = ElfFile([Segment(MIB, b"0123456789abcdef"), Segment(2 * MIB, b"0123456789abcdef")], bits=bits).to_bytes()
    ElfImage(whole)
    for length in range(len(whole)):
        with pytest.raises(ImageError):
            ElfImage(whole[:length])


def test_an_entry_of_ones_own_is_started() -> None:
    file = ElfFile([Segment(MIB, b"\x90\xf4")], entry=0).to_bytes()
    assert ElfImage(file, entry=MIB + 1).load(ram()).state.regs.rip == MIB + 1
    with pytest.raises(ImageError, match="entry 0x2 is in no segment"):
        ElfImage(file, entry=2)


# Virtual addresses


@pytest.mark.parametrize("offset", [0, 0x1000, 0x12_3000])
def test_a_higher_half_kernel_runs_at_its_virtual_addresses(offset: int) -> None:
    memory = ram((0, 16 * MIB))
    text = Segment(HIGH_HALF + MIB + offset, b"\x90\xf4", paddr=MIB)
    data = Segment(HIGH_HALF + 0x40_0000 + offset, b"data", paddr=0x40_0000, memsz=0x30_0000)
    entry = load(ElfFile([text, data], entry=text.vaddr + 1), memory)
    sregs = entry.state.sregs
    assert entry.state.regs.rip == text.vaddr + 1
    assert translate(memory, sregs, text.vaddr + 1) == MIB + 1
    assert memory.read(MIB, 2) == b"\x90\xf4"
    assert translate(memory, sregs, data.vaddr + 0x2F_FFFF) == 0x6F_FFFF
    assert translate(memory, sregs, data.vaddr + 0x30_0000) is None
    for same in (0, MIB, 0xFEE0_0000, 0xFFFF_FFFF, entry.state.regs.rsp - 8, sregs.gdt.base):
        assert translate(memory, sregs, same) == same
    assert not entry_rules.violations(entry.state)


def test_a_large_higher_half_kernel_is_mapped_by_large_pages() -> None:
    memory = ram((0, 64 * MIB))
    file = ElfFile([Segment(HIGH_HALF + 2 * MIB, paddr=2 * MIB, memsz=48 * MIB)])
    entry = load(file, memory)
    tables = next(used for used in entry.ranges if used.name == "tables")
    assert tables.size < 0x1_0000
    assert translate(memory, entry.state.sregs, HIGH_HALF + 50 * MIB - 1) == 50 * MIB - 1


def test_a_higher_half_entry_is_started_physically_without_paging() -> None:
    segment = Segment(0xC010_0000, b"\x90\xf4", paddr=MIB)
    assert load(ElfFile([segment], bits=32, entry=0xC010_0001)).state.regs.rip == MIB + 1
    sixty_four = ElfFile([Segment(HIGH_HALF, b"\x90\xf4", paddr=MIB)], entry=HIGH_HALF + 1).to_bytes()
    assert ElfImage(sixty_four, mode="protected").load(ram()).state.regs.rip == MIB + 1


def test_a_physical_entry_gets_no_mapping_of_segments() -> None:
    """Linux's vmlinux: e_entry is physical, and its per-CPU segment is linked for virtual address 0."""
    memory = ram()
    text, per_cpu = Segment(HIGH_HALF + MIB, b"\xf4", paddr=MIB), Segment(0, b"percpu", paddr=2 * MIB)
    entry = load(ElfFile([text, per_cpu], entry=MIB), memory)
    assert entry.state.regs.rip == MIB
    assert translate(memory, entry.state.sregs, 0) == 0
    assert translate(memory, entry.state.sregs, HIGH_HALF + MIB) is None


def test_an_entry_in_an_identity_segment_starts_there_before_the_kernel_maps_itself() -> None:
    memory = ram()
    boot, kernel = Segment(MIB, b"\xf4"), Segment(HIGH_HALF + 2 * MIB, b"kernel", paddr=2 * MIB)
    entry = load(ElfFile([boot, kernel], entry=MIB), memory)
    assert entry.state.regs.rip == MIB
    assert memory.read(2 * MIB, 6) == b"kernel"
    assert translate(memory, entry.state.sregs, HIGH_HALF + 2 * MIB) is None


def test_a_segment_wins_over_the_identity_map_and_the_tables_stay_clear_of_it() -> None:
    memory = ram()
    segment = Segment(0x3F_0000, b"\xf4code", paddr=MIB, memsz=0x1_0000)  # virtual: the top of RAM
    entry = load(ElfFile([segment]), memory)
    sregs = entry.state.sregs
    assert translate(memory, sregs, 0x3F_0000) == MIB
    assert translate(memory, sregs, 0x3E_FFFF) == 0x3E_FFFF
    assert translate(memory, sregs, 0x40_0000) == 0x40_0000
    for used in (sregs.gdt.base, sregs.tr.base, sregs.cr3, entry.state.regs.rsp - 8):
        assert translate(memory, sregs, used) == used


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([Segment(1 << 47, paddr=MIB)], "p_vaddr is 0x800000000000, not a canonical"),
        ([Segment((1 << 47) - 1, b"ab", paddr=MIB)], "not a canonical 48-bit address"),
        ([Segment(HIGH_HALF + 1, paddr=MIB)], "p_vaddr is 0xffffffff80000001, which is not 0x100000 modulo 4 KiB"),
        (
            [Segment(HIGH_HALF, paddr=MIB), Segment(HIGH_HALF + 0x10, paddr=2 * MIB + 0x10)],
            "p_vaddr is 0xffffffff80000010, which is in a page that another segment has",
        ),
    ],
)
def test_what_pages_cannot_map_is_refused(segments: list[Segment], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load(ElfFile(segments))


def test_segments_that_share_a_page_are_mapped() -> None:
    memory = ram()
    first, second = Segment(HIGH_HALF, b"\xf4", paddr=MIB), Segment(HIGH_HALF + 0x10, b"second", paddr=MIB + 0x10)
    entry = load(ElfFile([first, second]), memory)
    assert translate(memory, entry.state.sregs, HIGH_HALF + 0x10) == MIB + 0x10


def test_a_large_page_never_covers_a_page_shared_with_another_segment() -> None:
    memory = ram((0, 16 * MIB))
    first = Segment(HIGH_HALF, b"\xf4", paddr=4 * MIB, memsz=2 * MIB + 0x800)
    second = Segment(HIGH_HALF + 2 * MIB + 0x800, b"second", paddr=6 * MIB + 0x800, memsz=4 * MIB)
    entry = load(ElfFile([first, second]), memory)
    for offset in (0, 2 * MIB, 2 * MIB + 0x800, 4 * MIB, 6 * MIB + 0x7FF):
        assert translate(memory, entry.state.sregs, HIGH_HALF + offset) == 4 * MIB + offset


def test_ring_3_may_use_the_virtual_addresses() -> None:
    from kvmpy.x86.page_walk import walk

    memory = ram()
    file = ElfFile([Segment(HIGH_HALF, paddr=MIB)]).to_bytes()
    entry = ElfImage(file, ring=3).load(memory)
    assert entry.state.sregs.cs.dpl == 3
    assert walk(memory, entry.state.sregs, HIGH_HALF).user


def test_long_mode_reaches_segments_above_4_gib() -> None:
    memory = ram((0, MIB), (0x1_0000_0000, 4 * MIB))
    entry = load(ElfFile([Segment(0x1_0020_0000, b"\xf4", memsz=2 * MIB)]), memory)
    assert translate(memory, entry.state.sregs, 0x1_0020_0000) == 0x1_0020_0000
    assert memory.read_u8(0x1_0020_0000) == 0xF4


# Moving


def pie(*addresses: int, bits: int = 64, align: int = 0x1000, entry: int = 0x1000) -> bytes:
    segments = [Segment(address, b"\xf4" * 0x20, align=align) for address in addresses]
    return ElfFile(segments, bits=bits, type=ET_DYN, entry=entry).to_bytes()


@pytest.mark.parametrize(
    ("align", "base"), [(0x1000, MIB), (0x20_0000, 2 * MIB), (0, MIB), (1, MIB), (0x40_0000, 4 * MIB)]
)
def test_an_image_linked_for_0_goes_to_1_mib_or_its_alignment(align: int, base: int) -> None:
    image = ElfImage(pie(0, 0x1000, align=align))
    assert image.position_independent
    assert [segment.address for segment in image.segments] == [base, base + 0x1000]
    assert image.load(ram((0, 8 * MIB))).state.regs.rip == base + 0x1000


def test_an_image_linked_for_another_address_stays() -> None:
    image = ElfImage(pie(0x20_0000, entry=0x20_0000))
    assert (image.bias, image.entry) == (0, 0x20_0000)


@pytest.mark.parametrize("linked", [0, 0x40, 0x20_0000])
def test_an_image_goes_to_the_base_that_is_asked_for(linked: int) -> None:
    memory = ram()
    base = 0x30_0000 + linked % 0x1000
    entry = ElfImage(pie(linked, entry=linked + 1), base=base).load(memory)
    assert memory.read(base, 0x20) == b"\xf4" * 0x20
    assert entry.state.regs.rip == base + 1


def test_an_image_can_be_moved_down() -> None:
    image = ElfImage(pie(0x20_0000, entry=0x20_0004), base=0x1_0000)
    assert (image.bias, image.entry) == (0x1_0000 - 0x20_0000, 0x1_0004)


def test_a_base_that_breaks_the_alignment_is_refused() -> None:
    with pytest.raises(ImageError, match="base 0x300800 does not keep the alignment"):
        ElfImage(pie(0, 0x1000), base=0x30_0800)


@pytest.mark.parametrize(("bits", "base"), [(32, 0xFFFF_F000), (64, (1 << 64) - 0x1000), (64, -0x1000), (64, 1 << 64)])
def test_a_base_that_wraps_around_is_refused(bits: int, base: int) -> None:
    with pytest.raises(ImageError, match="wraps around"):
        ElfImage(pie(0, 0x1000, bits=bits), base=base)


def test_an_image_at_fixed_addresses_cannot_be_moved() -> None:
    with pytest.raises(ImageError, match="ET_EXEC"):
        ElfImage(ElfFile([Segment(MIB)]).to_bytes(), base=2 * MIB)


# Symbols


def test_symbols_of_a_stripped_file_are_none() -> None:
    assert ElfImage(ElfFile([Segment(MIB)]).to_bytes()).symbols() == {}


def test_symbols_are_functions_and_objects_but_no_files_and_sections() -> None:
    names = set(ElfImage(compile_c(PROGRAM, address=0x20_0000).elf).symbols())
    assert {"_start", "initialized", "pointer", "zeroed"} <= names
    assert not {"", "<stdin>", ".text"} & names


SECTION = struct.Struct("<IIQQQQIIQQ")


def with_symbols(
    symbols: list[tuple[bytes, int, int, int]], *, change: Callable[[bytearray, int], None] = lambda data, at: None
) -> bytes:
    """A PIE for address 0 with (name, st_info, st_shndx, st_value) in .symtab."""
    names, table = b"\0", bytes(24)
    for name, info, place, value in symbols:
        table += struct.pack("<IBBHQQ", len(names), info, 0, place, value, 0)
        names += name + b"\0"
    body = pie(0, 0x1000)
    at_names = len(body)
    at_table = at_names + len(names)
    at_sections = at_table + len(table)
    sections = SECTION.pack(*[0] * 10)
    sections += SECTION.pack(1, 2, 0, 0, at_table, len(table), 2, 1, 8, 24)
    sections += SECTION.pack(1, 3, 0, 0, at_names, len(names), 0, 0, 1, 0)
    data = bytearray(body + names + table + sections)
    struct.pack_into("<Q", data, 0x28, at_sections)
    struct.pack_into("<HHH", data, 0x3A, 64, 3, 2)
    change(data, at_sections)
    return bytes(data)


def test_symbols_move_with_the_image_unless_they_are_absolute() -> None:
    symbols = [(b"code", 0x12, 1, 0x1000), (b"constant", 0x10, 0xFFF1, 0x1234)]
    image = ElfImage(with_symbols(symbols), base=0x30_0000)
    assert image.symbols() == {"code": 0x30_1000, "constant": 0x1234}


def test_a_global_symbol_wins_over_local_ones_and_the_first_over_the_next() -> None:
    symbols = [
        (b"a", 0x02, 1, 1), (b"a", 0x12, 1, 2), (b"a", 0x02, 1, 3),
        (b"b", 0x02, 1, 4), (b"b", 0x02, 1, 5),
        (b"undefined", 0x10, 0, 0), (b"file.c", 0x04, 0xFFF1, 0),
    ]  # fmt: skip
    assert ElfImage(with_symbols(symbols), base=0).symbols() == {"a": 2, "b": 4}


@pytest.mark.parametrize(
    "change",
    [
        lambda data, at: struct.pack_into("<H", data, 0x3A, 0),  # e_shentsize
        lambda data, at: struct.pack_into("<H", data, 0x3C, 0),  # e_shnum
        lambda data, at: struct.pack_into("<H", data, 0x3C, 4),
        lambda data, at: struct.pack_into("<Q", data, 0x28, 1 << 63),  # e_shoff
        lambda data, at: struct.pack_into("<Q", data, at + 64 + 0x38, 0),  # sh_entsize of .symtab
        lambda data, at: struct.pack_into("<Q", data, at + 64 + 0x20, 1 << 60),  # sh_size of .symtab
        lambda data, at: struct.pack_into("<Q", data, at + 64 + 0x18, 1 << 63),  # sh_offset of .symtab
        lambda data, at: struct.pack_into("<I", data, at + 64 + 0x28, 77),  # sh_link of .symtab
    ],
)
def test_a_lying_symbol_table_is_an_image_error(change: Callable[[bytearray, int], None]) -> None:
    image = ElfImage(with_symbols([(b"code", 0x12, 1, 0x1000)], change=change))
    image.load(ram())
    with pytest.raises(ImageError):
        image.symbols()


@pytest.mark.parametrize("entry_size", [0, 1, 40, 65])
def test_a_section_table_of_another_entry_size_is_not_read(entry_size: int) -> None:
    """With a size of 0 pyelftools would read one header as often as the file says."""
    file = with_symbols([], change=lambda data, at: struct.pack_into("<H", data, 0x3A, entry_size))
    with pytest.raises(ImageError, match=rf"section header table \(3 entries of {entry_size} bytes\)"):
        ElfImage(file).symbols()


def test_an_elf_image_says_what_it_is() -> None:
    image = ElfImage(ElfFile([Segment(MIB)]).to_bytes())
    assert "x86-64 entry=0x100000" in repr(image)
    assert image.memory_needs() == ()
