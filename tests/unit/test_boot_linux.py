"""What a Linux kernel finds in memory and in its registers, for every way to start it."""

import ctypes
import itertools
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from elf_files import ET_EXEC, ElfFile, Segment
from kvmpy.boot import Initramfs, LinuxKernel
from kvmpy.boot.e820 import E820Entry, E820Type
from kvmpy.boot.firmware_tables import PlacedTables
from kvmpy.boot.image import Entry, LoadedRange
from kvmpy.boot.linux import SetupData
from kvmpy.errors import ImageError, UsageError
from kvmpy.memory import GuestMemory, MemoryRegion
from kvmpy.x86 import entry_rules
from kvmpy.x86.descriptors import decode_segment
from kvmpy.x86.page_walk import translate
from linux_images import KERNEL, MIB, BzImageFile, pack, ram, vmlinux, xen_note

FOUR_GIB = 1 << 32
CODE = bytes(range(0x100))
NOTE = xen_note(KERNEL + 0x40)
VMLINUX = vmlinux(code=CODE, note=NOTE)
VMLINUX32 = vmlinux(bits=32, code=CODE, note=xen_note(KERNEL + 0x40, bits=32))
BZIMAGE = BzImageFile(payload=pack(VMLINUX))
BZIMAGE32 = BzImageFile(payload=pack(VMLINUX32), lies={"xloadflags": 0})


def load(kernel: LinuxKernel, memory: GuestMemory | None = None) -> tuple[Entry, GuestMemory]:
    memory = memory or ram()
    entry = kernel.load(memory)
    assert not entry_rules.violations(entry.state)
    for one, other in itertools.combinations(entry.ranges, 2):
        assert not one.overlaps(other.address, other.size), (one, other)
    return entry, memory


def number(memory: GuestMemory, address: int, size: int) -> int:
    return int.from_bytes(memory.read(address, size), "little")


def e820(memory: GuestMemory, boot_params: int) -> list[tuple[int, int, int]]:
    count = memory.read_u8(boot_params + 0x1E8)
    entries: list[tuple[int, int, int]] = list(struct.iter_unpack("<QQI", memory.read(boot_params + 0x2D0, 20 * count)))
    return entries


# Which way it starts


@pytest.mark.parametrize(
    ("file", "options", "protocol", "unpacked"),
    [
        (BZIMAGE.to_bytes(), {}, "64", True),
        (BZIMAGE.to_bytes(), {"unpack": False}, "64", False),
        (BZIMAGE.to_bytes(), {"entry": "64"}, "64", True),
        (BZIMAGE.to_bytes(), {"entry": "32"}, "32", False),
        (BZIMAGE.to_bytes(), {"entry": "32", "unpack": False}, "32", False),
        (BZIMAGE.to_bytes(), {"entry": "real"}, "real", False),
        (BZIMAGE.to_bytes(), {"entry": "pvh"}, "pvh", True),
        (BZIMAGE32.to_bytes(), {}, "32", True),
        (BZIMAGE32.to_bytes(), {"unpack": False}, "32", False),
        (BZIMAGE32.to_bytes(), {"entry": "32"}, "32", True),
        (BZIMAGE32.to_bytes(), {"entry": "pvh"}, "pvh", True),
        (BzImageFile(payload=pack(VMLINUX), lies={"version": 0x20B}).to_bytes(), {"entry": "32"}, "32", False),
        (BzImageFile(payload=pack(VMLINUX), lies={"version": 0x207}).to_bytes(), {}, "32", False),
        (BzImageFile().to_bytes(), {}, "64", False),
        (VMLINUX, {}, "64", True),
        (VMLINUX, {"entry": "pvh"}, "pvh", True),
        (VMLINUX32, {}, "32", True),
        (VMLINUX32, {"entry": "32"}, "32", True),
    ],
)  # fmt: skip
def test_the_entry_follows_from_the_kernel_and_the_wish(
    file: bytes, options: dict[str, object], protocol: str, unpacked: bool
) -> None:
    kernel = LinuxKernel(file, **options)  # type: ignore[arg-type]
    assert (kernel.protocol, kernel.elf is not None) == (protocol, unpacked)
    load(kernel)


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        (VMLINUX, {"entry": "real"}, "no real-mode code"),
        (VMLINUX, {"entry": "32"}, "ELF file of 64 bits, which has no 32-bit entry point"),
        (VMLINUX32, {"entry": "64"}, "ELF file of 32 bits, which has no 64-bit entry point"),
        (vmlinux(), {"entry": "pvh"}, "no ELF note XEN_ELFNOTE_PHYS32_ENTRY .*CONFIG_PVH"),
        (BZIMAGE32.to_bytes(), {"entry": "64"}, "32-bit kernel"),
        (BZIMAGE32.to_bytes(), {"entry": "64", "unpack": False}, "xloadflags is 0x0: .*XLF_KERNEL_64"),
        (BzImageFile().to_bytes(), {"entry": "pvh"}, "payload_offset is 0x0: .*no PVH entry"),
        (BzImageFile(lies={"version": 0x201}).to_bytes(), {}, 'version is 0x201: .*entry="real"'),
    ],
)
def test_an_entry_that_the_kernel_does_not_have_is_refused(
    file: bytes, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ImageError, match=message):
        LinuxKernel(file, **options)  # type: ignore[arg-type]


def test_wishes_that_make_no_sense_are_the_callers_fault() -> None:
    with pytest.raises(UsageError, match="no entry '128'; a kernel has auto, 64, 32, real, pvh"):
        LinuxKernel(VMLINUX, entry="128")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="leaves it packed"):
        LinuxKernel(BZIMAGE.to_bytes(), entry="pvh", unpack=False)
    with pytest.raises(UsageError, match="zero byte"):
        LinuxKernel(VMLINUX, cmdline="a\0b")


# 64-bit and 32-bit protocol


def test_the_unpacked_kernel_starts_at_its_physical_entry_in_64_bit_mode() -> None:
    entry, memory = load(LinuxKernel(BZIMAGE.to_bytes()))
    regs, sregs = entry.state.regs, entry.state.sregs
    assert memory.read(KERNEL, 0x100) == CODE
    assert memory.read(KERNEL + 0x1000, 8) == b"data\0\0\0\0"
    assert (regs.rip, sregs.cs.selector, sregs.cs.l) == (KERNEL, 0x10, 1)
    assert {segment.selector for segment in (sregs.ds, sregs.es, sregs.ss)} == {0x18}
    assert regs.rflags & 0x200 == 0, "interrupts are off"
    assert memory.read(regs.rsi + 0x202, 4) == b"HdrS"


def test_the_gdt_holds_the_segments_of_the_document() -> None:
    for options in ({}, {"entry": "32"}):
        entry, memory = load(LinuxKernel(BZIMAGE.to_bytes(), **options))  # type: ignore[arg-type]
        sregs = entry.state.sregs
        for segment in (sregs.cs, sregs.ds):
            descriptor = memory.read(sregs.gdt.base + segment.selector, 8)
            assert decode_segment(descriptor, segment.selector) == segment
            assert (segment.base, segment.limit) == (0, 0xFFFF_FFFF)
        assert sregs.gdt.limit == 0x1F


def test_memory_is_mapped_one_to_one_up_to_4_gib() -> None:
    entry, memory = load(LinuxKernel(BZIMAGE.to_bytes()))
    for address in (0, entry.state.regs.rsi, KERNEL, 0xFEE0_0000, FOUR_GIB - 1):
        found = translate(memory, entry.state.sregs, address)
        assert found is not None
        assert found == address or getattr(found, "physical", None) == address
    assert translate(memory, entry.state.sregs, FOUR_GIB) is None


def test_the_32_bit_entry_of_the_decompressor_has_what_the_document_demands() -> None:
    entry, memory = load(LinuxKernel(BZIMAGE.to_bytes(), entry="32"))
    regs, sregs = entry.state.regs, entry.state.sregs
    assert memory.read(KERNEL, 0x400) == BZIMAGE.protected
    assert (regs.rip, sregs.cs.selector, sregs.cs.db, sregs.ds.selector) == (KERNEL, 0x10, 1, 0x18)
    assert (regs.rbp, regs.rdi, regs.rbx, regs.rflags & 0x200, sregs.cr0 >> 31) == (0, 0, 0, 0, 0)
    assert memory.read_u32(regs.rsi + 0x214) == KERNEL, "code32_start"


def test_the_64_bit_entry_of_the_decompressor_is_0x200_bytes_in() -> None:
    entry, memory = load(LinuxKernel(BZIMAGE.to_bytes(), unpack=False))
    assert (entry.state.regs.rip, entry.state.sregs.cs.l) == (KERNEL + 0x200, 1)
    assert memory.read(KERNEL, len(BZIMAGE.protected) + len(BZIMAGE.payload))[0x400:] == BZIMAGE.payload


def test_a_kernel_that_is_moved_is_told_where_it_is() -> None:
    entry, memory = load(LinuxKernel(BZIMAGE.to_bytes(), unpack=False), ram((0, 12 * MIB)))
    assert entry.state.regs.rip == 2 * MIB + 0x200
    assert memory.read_u32(entry.state.regs.rsi + 0x214) == 2 * MIB
    tight = BzImageFile(lies={"min_alignment": 12}).to_bytes()
    entry, memory = load(LinuxKernel(tight), ram((0, MIB), (0x11_0000, 0x41_0000)))
    assert memory.read_u32(entry.state.regs.rsi + 0x230) == 0x2_0000, "kernel_alignment"


# boot_params


def test_boot_params_hold_the_header_of_the_file_and_nothing_around_it() -> None:
    file = BZIMAGE.to_bytes()
    entry, memory = load(LinuxKernel(file))
    address = entry.state.regs.rsi
    page = memory.read(address, 0x1000)
    written = {  # type_of_loader, code32_start.. and the rest that a loader fills in
        *range(0x210, 0x211), *range(0x218, 0x220), *range(0x228, 0x22C), *range(0x250, 0x258),
    }  # fmt: skip
    assert all(page[at] == file[at] for at in range(0x1F1, 0x26C) if at not in written)
    outside = bytearray(page)
    outside[0x1F1:0x26C] = bytes(0x26C - 0x1F1)
    outside[0x1E8] = 0
    outside[0x2D0 : 0x2D0 + 128 * 20] = bytes(128 * 20)
    assert outside == bytes(0x1000), "screen_info and everything else is zero, the sentinel too"
    assert page[0x210] == 0xFF, "type_of_loader: undefined"
    assert page[0x211] & 0x80 == 0, "there is no setup heap"


def test_a_vmlinux_gets_a_header_all_the_same() -> None:
    entry, memory = load(LinuxKernel(VMLINUX, cmdline="quiet"))
    address = entry.state.regs.rsi
    assert memory.read_u16(address + 0x1FE) == 0xAA55
    assert memory.read(address + 0x202, 4) == b"HdrS"
    assert memory.read_u16(address + 0x206) == 0x20F
    assert memory.read_u8(address + 0x210) == 0xFF
    assert memory.read_cstring(memory.read_u32(address + 0x228)) == b"quiet"


def test_the_command_line_is_there_as_it_was_given() -> None:
    for given, expected in (("", b""), ("console=ttyS0 ü", "console=ttyS0 ü".encode()), (b"raw=\xff", b"raw=\xff")):
        entry, memory = load(LinuxKernel(BZIMAGE.to_bytes(), cmdline=given))
        place = memory.read_u32(entry.state.regs.rsi + 0x228)
        assert memory.read_cstring(place, 0x1000) == expected


def test_a_command_line_may_be_as_long_as_the_kernel_takes_and_no_longer() -> None:
    load(LinuxKernel(BZIMAGE.to_bytes(), cmdline="x" * 2047))
    with pytest.raises(ImageError, match=r"of 2048 bytes is too long for this kernel, which takes 2047") as caught:
        LinuxKernel(BZIMAGE.to_bytes(), cmdline="x" * 2048)
    assert caught.value.offset == 0x238
    before_2_06 = BzImageFile(lies={"version": 0x205}).to_bytes()
    load(LinuxKernel(before_2_06, cmdline="x" * 255))
    with pytest.raises(ImageError, match="takes 255"):
        LinuxKernel(before_2_06, cmdline="x" * 256)


def test_the_memory_map_is_that_of_a_pc() -> None:
    entry, memory = load(LinuxKernel(BZIMAGE.to_bytes()), ram((0, 32 * MIB), (FOUR_GIB, MIB)))
    assert e820(memory, entry.state.regs.rsi) == [
        (0, 0x9_FC00, 1),
        (0x9_FC00, 0x400, 2),
        (0xF_0000, 0x1_0000, 2),
        (MIB, 31 * MIB, 1),
        (FOUR_GIB, MIB, 1),
    ]


def test_a_memory_map_that_is_too_long_goes_on_in_setup_data() -> None:
    memory = ram((0, 32 * MIB))
    for index in range(140):
        memory.add(MemoryRegion.anonymous(0x1000_0000 + 0x2000 * index, 0x1000))
    entry, _ = load(LinuxKernel(BZIMAGE.to_bytes()), memory)
    address = entry.state.regs.rsi
    listed = e820(memory, address)
    node = number(memory, address + 0x250, 8)
    following, kind, length = struct.unpack("<QII", memory.read(node, 16))
    more = list(struct.iter_unpack("<QQI", memory.read(node + 16, length)))
    assert (len(listed), following, kind) == (128, 0, 1)
    assert [*listed, *more][-1] == (0x1000_0000 + 0x2000 * 139, 0x1000, 1)
    assert len(listed) + len(more) == 4 + 140


def test_setup_data_is_a_list_in_memory() -> None:
    nodes = [SetupData(9, b"seed"), SetupData(2, b"tree!")]
    entry, memory = load(LinuxKernel(BZIMAGE.to_bytes(), setup_data=nodes))
    address, found = number(memory, entry.state.regs.rsi + 0x250, 8), []
    while address:
        address, kind, length, data = (
            *struct.unpack("<QII", memory.read(address, 16)),
            memory.read(address + 16, 5),
        )
        found.append((kind, data[:length]))
    assert found == [(9, b"seed"), (2, b"tree!")]


def test_setup_data_that_the_kernel_would_not_see_is_refused() -> None:
    kernel = LinuxKernel(BzImageFile(lies={"version": 0x208}).to_bytes(), setup_data=[SetupData(9, b"seed")])
    with pytest.raises(ImageError, match=r"setup_data needs 2\.09"):
        kernel.load(ram())


# initrd


def initrd_of(entry: Entry, memory: GuestMemory) -> tuple[int, int]:
    address = entry.state.regs.rsi
    low, size = number(memory, address + 0x218, 4), number(memory, address + 0x21C, 4)
    return low | number(memory, address + 0xC0, 4) << 32, size | number(memory, address + 0xC4, 4) << 32


def test_an_initrd_goes_to_the_top_of_ram(tmp_path: Path) -> None:
    file = tmp_path / "initrd.img"
    file.write_bytes(b"initrd" * 1000)
    for source in (file, str(file), b"initrd" * 1000):
        entry, memory = load(LinuxKernel(BZIMAGE.to_bytes(), initrd=source))
        assert initrd_of(entry, memory) == (32 * MIB - 0x2000, 6000)
        assert memory.read(32 * MIB - 0x2000, 6001) == b"initrd" * 1000 + b"\xcc"


def test_an_archive_is_made_into_an_initrd() -> None:
    archive = Initramfs({"init": b"#!"})
    entry, memory = load(LinuxKernel(BZIMAGE.to_bytes(), initrd=archive))
    address, size = initrd_of(entry, memory)
    assert memory.read(address, size) == archive.to_bytes()


def test_without_an_initrd_its_fields_are_zero() -> None:
    for nothing in (None, b""):
        entry, memory = load(LinuxKernel(BZIMAGE.to_bytes(), initrd=nothing))
        assert initrd_of(entry, memory) == (0, 0)


def test_initrd_addr_max_is_the_last_byte_that_it_may_take() -> None:
    for highest, expected in ((0x1FF_FFFF, 0x1FF_F000), (0x1FF_FFFE, 0x1FF_E000), (0x200_0000, 0x1FF_F000)):
        file = BzImageFile(payload=pack(VMLINUX), lies={"initrd_addr_max": highest}).to_bytes()
        entry, memory = load(LinuxKernel(file, initrd=bytes(0x1000)))
        assert initrd_of(entry, memory) == (expected, 0x1000)


def test_an_initrd_keeps_out_of_what_the_kernel_uses_first() -> None:
    for options in ({}, {"unpack": False}, {"entry": "32"}):
        kernel = LinuxKernel(BZIMAGE.to_bytes(), initrd=bytes(11 * MIB), **options)
        entry, memory = load(kernel, ram((0, KERNEL + 0x40_0000 + 10 * MIB)))
        assert initrd_of(entry, memory) == (KERNEL - 11 * MIB, 11 * MIB), "above init_size there is not room enough"


def test_an_initrd_may_be_above_4_gib_when_the_kernel_says_so() -> None:
    memory = ram((0, 20 * MIB), (FOUR_GIB, 32 * MIB))
    kernel = LinuxKernel(BZIMAGE.to_bytes(), initrd=bytes(20 * MIB))
    entry, _ = load(kernel, memory)
    assert initrd_of(entry, memory) == (FOUR_GIB + 12 * MIB, 20 * MIB)
    below = BzImageFile(payload=pack(VMLINUX), lies={"xloadflags": 1}).to_bytes()
    with pytest.raises(ImageError, match="initrd of 0x1400000 bytes: no 0x1400000 bytes are free"):
        LinuxKernel(below, initrd=bytes(20 * MIB)).load(memory)


def test_an_initrd_larger_than_ram_is_refused_with_the_numbers(tmp_path: Path) -> None:
    file = tmp_path / "initrd.img"
    with file.open("wb") as sparse:
        sparse.truncate(1 << 40)
    kernel = LinuxKernel(BZIMAGE.to_bytes(), initrd=file)
    with pytest.raises(
        ImageError,
        match=r"initrd\.img: no 0x10000000000 bytes are free for the initrd at or below 0x7fffffff .*RAM 0x0",
    ):
        kernel.load(ram())


# tables of a firmware


class SomeTables:
    """Tables of 16 bytes at a fixed address, with an RSDP."""

    def __init__(self, address: int) -> None:
        self.address = address
        self.taken: Sequence[LoadedRange] = ()

    def place(self, memory: GuestMemory, taken: Sequence[LoadedRange]) -> PlacedTables:
        self.taken = taken
        memory.write(self.address, b"RSD PTR tables!!")
        used = LoadedRange(self.address, 16, "ACPI tables")
        return PlacedTables((used,), (E820Entry(self.address, 0x1000, E820Type.ACPI),), self.address)


@pytest.mark.parametrize("where", [0xE_0000, 31 * MIB])
def test_tables_are_told_in_the_memory_map_and_in_acpi_rsdp_addr(where: int) -> None:
    tables = SomeTables(where)
    entry, memory = load(LinuxKernel(BZIMAGE.to_bytes(), initrd=bytes(2 * MIB), tables=[tables]))
    address = entry.state.regs.rsi
    assert number(memory, address + 0x70, 8) == where
    assert (where, 0x1000, 3) in e820(memory, address)
    assert memory.read(where, 16) == b"RSD PTR tables!!", "nothing was put over them"
    assert any(used.name == "program header 0" for used in tables.taken)


def test_the_address_of_an_rsdp_can_be_given() -> None:
    entry, memory = load(LinuxKernel(BZIMAGE.to_bytes(), acpi_rsdp_addr=0xE_1230))
    assert number(memory, entry.state.regs.rsi + 0x70, 8) == 0xE_1230


# PVH


class StartInfo(ctypes.LittleEndianStructure):
    """struct hvm_start_info of Xen's public headers, version 1."""

    _fields_ = [
        ("magic", ctypes.c_uint32), ("version", ctypes.c_uint32), ("flags", ctypes.c_uint32),
        ("nr_modules", ctypes.c_uint32), ("modlist_paddr", ctypes.c_uint64), ("cmdline_paddr", ctypes.c_uint64),
        ("rsdp_paddr", ctypes.c_uint64), ("memmap_paddr", ctypes.c_uint64), ("memmap_entries", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    ]  # fmt: skip


def test_pvh_starts_where_the_note_says_with_start_info_in_ebx() -> None:
    for file in (BZIMAGE.to_bytes(), VMLINUX, VMLINUX32):
        kernel = LinuxKernel(file, entry="pvh", cmdline="quiet", initrd=b"initrd", tables=[SomeTables(0xE_0000)])
        entry, memory = load(kernel)
        regs, sregs = entry.state.regs, entry.state.sregs
        assert (regs.rip, sregs.cs.db, sregs.cr0 >> 31, sregs.cr0 & 1) == (KERNEL + 0x40, 1, 0, 1)
        info = memory.read_struct(regs.rbx, StartInfo)
        assert (info.magic, info.version, info.flags, info.reserved) == (0x336E_C578, 1, 0, 0)
        assert memory.read_cstring(info.cmdline_paddr) == b"quiet"
        assert (info.nr_modules, info.rsdp_paddr) == (1, 0xE_0000)
        module = struct.unpack("<QQQQ", memory.read(info.modlist_paddr, 32))
        assert module == (32 * MIB - 0x1000, 6, 0, 0)
        assert memory.read(module[0], 6) == b"initrd"
        entries = list(struct.iter_unpack("<QQII", memory.read(info.memmap_paddr, 24 * info.memmap_entries)))
        assert entries[0] == (0, 0x9_FC00, 1, 0)
        assert entries[-1] == (MIB, 31 * MIB, 1, 0)


def test_pvh_without_an_initrd_has_no_modules() -> None:
    entry, memory = load(LinuxKernel(VMLINUX, entry="pvh"))
    info = memory.read_struct(entry.state.regs.rbx, StartInfo)
    assert (info.nr_modules, info.modlist_paddr) == (0, 0)


def test_the_note_is_found_behind_others_and_with_either_alignment() -> None:
    others = xen_note(1, kind=6, name=b"Xen\0") + xen_note(2, kind=18, name=b"GNU\0")
    kernel = LinuxKernel(vmlinux(note=others + NOTE), entry="pvh")
    assert load(kernel)[0].state.regs.rip == KERNEL + 0x40
    # With 8-byte alignment the description begins at 16, and the next note where that ends.
    name, description = struct.pack("<III4s", 4, 8, 3, b"GNU\0"), struct.pack("<Q", 5)
    wanted = struct.pack("<III4s", 4, 8, 18, b"Xen\0") + struct.pack("<Q", KERNEL + 0x40)
    kernel = LinuxKernel(vmlinux(note=name + description + wanted, notes_align=8), entry="pvh")
    assert load(kernel)[0].state.regs.rip == KERNEL + 0x40


@pytest.mark.parametrize(
    ("note", "message"),
    [
        (xen_note(KERNEL + 0x100), "in no segment below 4 GiB"),
        (xen_note(FOUR_GIB + KERNEL), "in no segment below 4 GiB"),
        (struct.pack("<III4sI", 4, 2, 18, b"Xen\0", 0), "has 2 bytes, not 4 or 8"),
        (struct.pack("<III4s", 4, 0x1000, 18, b"Xen\0"), "a note ends behind its segment"),
        (struct.pack("<III4s", 0xFFFF_FFFF, 8, 18, b"Xen\0"), "a note ends behind its segment"),
        (b"\0" * 11, "has no ELF note"),
    ],
)
def test_a_bad_note_is_refused(note: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        LinuxKernel(vmlinux(note=note), entry="pvh")


# Real mode


def test_the_setup_code_is_entered_in_real_mode_as_the_document_says() -> None:
    file = BZIMAGE.to_bytes()
    kernel = LinuxKernel(file, entry="real", cmdline="quiet", initrd=b"initrd", setup_data=[SetupData(9, b"seed")])
    entry, memory = load(kernel)
    regs, sregs = entry.state.regs, entry.state.sregs
    base = sregs.ds.base
    assert (sregs.cs.selector, regs.rip) == ((base >> 4) + 0x20, 0)
    assert {s.selector for s in (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs)} == {base >> 4}
    assert (regs.rsp, regs.rflags & 0x200, sregs.cr0 & 1) == (0xE000, 0, 0)
    header = memory.read(base, 0x290)
    assert header[:0x1F1] == file[:0x1F1]
    assert memory.read(base + 0x26C, 0xA00 - 0x26C) == file[0x26C:0xA00]
    assert (header[0x210], header[0x211]) == (0xFF, 0x81), "type_of_loader; LOADED_HIGH, CAN_USE_HEAP"
    assert number(memory, base + 0x224, 2) == 0xE000 - 0x200, "heap_end_ptr"
    assert number(memory, base + 0x228, 4) == base + 0xE000, "cmd_line_ptr"
    assert memory.read_cstring(base + 0xE000) == b"quiet"
    assert number(memory, base + 0x218, 8) == 32 * MIB - 0x1000 | 6 << 32, "ramdisk_image and ramdisk_size"
    assert number(memory, base + 0x214, 4) == KERNEL, "code32_start"
    assert memory.read(number(memory, base + 0x250, 8) + 8, 12) == struct.pack("<II4s", 9, 4, b"seed")
    assert memory.read(KERNEL, 0x400) == BZIMAGE.protected


@pytest.mark.parametrize("lies", [{"version": 0x201}, {"version": 0x203, "loadflags": 0}])
def test_an_old_kernel_has_its_setup_code_at_0x90000(lies: dict[str, int]) -> None:
    file = BzImageFile(lies={"relocatable_kernel": 0, **lies}).to_bytes()
    entry, memory = load(LinuxKernel(file, entry="real", cmdline="quiet"))
    assert (entry.state.sregs.cs.selector, entry.state.regs.rsp) == (0x9020, 0x9800)
    assert number(memory, 0x9_0224, 2) == 0x9800 - 0x200
    assert memory.read_cstring(0x9_9800) == b"quiet"
    if lies["version"] < 0x202:
        assert memory.read(0x9_0020, 4) == struct.pack("<HH", 0xA33F, 0x9800), "cmd_line_magic, cmd_line_offset"
        assert number(memory, 0x9_0212, 2) == 0x9800 + 6, "setup_move_size"
    else:
        assert memory.read(0x1_0000, 0x400) == b"\xf4" * 0x400, "a zImage"


def test_in_real_mode_the_command_line_has_the_room_of_its_segment() -> None:
    file = BzImageFile(lies={"cmdline_size": 0xFFFF}).to_bytes()
    load(LinuxKernel(file, entry="real", cmdline="x" * 0x1FFF))
    with pytest.raises(ImageError, match="has room for 8191"):
        LinuxKernel(file, entry="real", cmdline="x" * 0x2000).load(ram())


# RAM that does not fit


@pytest.mark.parametrize("options", [{}, {"unpack": False}, {"entry": "32"}, {"entry": "real"}, {"entry": "pvh"}])
@pytest.mark.parametrize("regions", [[(0, 2 * MIB)], [(0, 0x8000)], [(0, 0x9000), (KERNEL, 0x40_0000)]])
def test_too_little_ram_is_refused_in_words(options: dict[str, object], regions: list[tuple[int, int]]) -> None:
    kernel = LinuxKernel(BZIMAGE.to_bytes(), **options)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="RAM 0x0"):
        kernel.load(ram(*regions))


def test_a_guest_without_low_memory_has_its_parameters_above_1_mib() -> None:
    entry, memory = load(LinuxKernel(BZIMAGE.to_bytes()), ram((MIB, 31 * MIB)))
    assert entry.low == MIB
    assert e820(memory, entry.state.regs.rsi) == [(MIB, 31 * MIB, 1)]
    with pytest.raises(ImageError, match="the real-mode code with heap and command line goes to 0x80000"):
        LinuxKernel(BZIMAGE.to_bytes(), entry="real").load(memory)


def test_a_kernel_linked_above_4_gib_is_refused() -> None:
    file = ElfFile([Segment(FOUR_GIB - 0x1000, b"\xf4" * 0x1001)], type=ET_EXEC).to_bytes()
    with pytest.raises(ImageError, match=r"program header 0: p_paddr is 0xfffff000; .*loaded below 4 GiB"):
        LinuxKernel(file)


def test_a_kernel_can_be_loaded_twice_and_does_not_change_by_it() -> None:
    kernel = LinuxKernel(BZIMAGE.to_bytes(), cmdline="quiet", initrd=b"initrd")
    memories = [ram(), ram()]
    entries = [kernel.load(memory) for memory in memories]
    assert entries[0].ranges == entries[1].ranges
    assert memories[0].read(0, 32 * MIB) == memories[1].read(0, 32 * MIB)


def test_only_what_the_entry_lists_is_written() -> None:
    for options in ({}, {"unpack": False}, {"entry": "32"}, {"entry": "real"}, {"entry": "pvh"}):
        kernel = LinuxKernel(BZIMAGE.to_bytes(), initrd=b"initrd", **options)
        entry, memory = load(kernel)
        contents = bytearray(memory.read(0, 32 * MIB))
        for used in entry.ranges:
            contents[used.address : used.end] = b"\xcc" * used.size
        assert contents == b"\xcc" * (32 * MIB)
