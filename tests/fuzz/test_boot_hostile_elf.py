"""Hostile images: whatever the file says, loading works or raises ImageError, and stays inside RAM.

The RAM has ROM right behind it and holes around it, and all of it holds a pattern. After every attempt the ROM must be
as it was; after a successful one nothing but the ranges that the image reports may have changed.
"""

import struct
from collections.abc import Callable

from hypothesis import given, note
from hypothesis import strategies as st

from elf_files import DYNAMIC, ET_DYN, ET_EXEC, ElfFile, Segment, dynamic_section
from kvmpy.boot import ElfImage, FirmwareImage, FlatImage
from kvmpy.boot.image import Image
from kvmpy.errors import ImageError
from kvmpy.memory import GuestMemory, MemoryRegion
from kvmpy.x86 import entry_rules
from kvmpy.x86.page_walk import translate

PATTERN = 0xCC
LOW, HIGH = (0x0, 0x2_0000), (0x10_0000, 0x4_0000)
ROM = (0x14_0000, 0x1000)
FAR = (0x1_0000_0000, 0x1_0000)


def guest() -> GuestMemory:
    memory = GuestMemory()
    for address, size in (LOW, HIGH, FAR):
        memory.add(MemoryRegion.anonymous(address, size))
    memory.add(MemoryRegion.anonymous(*ROM, read_only=True))
    for region in memory.regions:
        memory.fill(region.address, region.size, PATTERN)
    return memory


def attempt(make: Callable[..., Image], *arguments: object, **options: object) -> None:
    """Make the image and load it; judge what is left behind."""
    memory = guest()
    try:
        image = make(*arguments, **options)
        entry = image.load(memory)
    except ImageError as error:
        note(f"refused: {error}")
        entry = None
    assert memory.read(*ROM) == bytes([PATTERN]) * ROM[1], "the ROM was written"
    if entry is None:
        return
    note(f"loaded: {entry}")
    assert not entry_rules.violations(entry.state)
    for region in memory.regions:
        contents = bytearray(region.buffer)
        for used in entry.ranges:
            start, end = max(used.address - region.address, 0), used.end - region.address
            if end > start:
                contents[start:end] = bytes([PATTERN]) * len(contents[start:end])
        assert contents == bytes([PATTERN]) * region.size, "memory outside of the reported ranges was written"
    first = entry.state.sregs.cs.base + entry.state.regs.rip
    assert translate(memory, entry.state.sregs, first) is not None, "the first instruction is not mapped"


# A healthy position-independent file with everything in it: two segments, a RELA and a RELR table.
def healthy(bits: int, type: int = ET_DYN) -> bytes:
    word = "Q" if bits == 64 else "I"
    width = bits // 8
    table = struct.pack(f"<3{word}", 0x800, 8, 0x10) + struct.pack(f"<3{word}", 0x808, 8, 0x20)
    packed = struct.pack(f"<2{word}", 0x900, 0b1011)
    contents = (bytes(0x100) + table).ljust(0x200, b"\0") + packed
    dynamic = [(7, 0x100), (8, len(table)), (9, 3 * width), (36, 0x200), (35, len(packed)), (37, width)]
    code = Segment(0x0, contents.ljust(0xA00, b"\xf4"), memsz=0xC00)
    data = Segment(0x1000, b"data", memsz=0x100)
    return ElfFile(
        [code, data, Segment(0, dynamic_section(dynamic, bits), type=DYNAMIC)], bits=bits, type=type, entry=0x400
    ).to_bytes()


HEALTHY = [healthy(bits, type) for bits in (32, 64) for type in (ET_DYN, ET_EXEC)]

# Numbers near which loaders break: ends of the RAM and of address widths, signs, the file's own sizes.
EDGES = sorted(
    {
        max(edge + offset, 0)
        for edge in (0, 0x1000, 0x2_0000, 0x10_0000, 0x14_0000, 1 << 31, 1 << 32, 1 << 47, 1 << 63, (1 << 64) - 1)
        for offset in (-0x1000, -8, -1, 0, 1, 8, 0x1000)
        if edge + offset < 1 << 64
    }
)
numbers = st.one_of(
    st.sampled_from(EDGES), st.integers(0, (1 << 64) - 1), st.integers(0, 0x20_0000), st.integers(0, 64)
)
pages = st.integers(0, 0x150).map(lambda page: page << 12)
in_ram = st.one_of(st.integers(0x10_0000, 0x14_0000), st.integers(0, 0x2_0000), st.integers(FAR[0], FAR[0] + FAR[1]))
MODES = st.sampled_from(["real", "protected16", "protected", "long"])
STACKS = st.sampled_from([0x8000, 0x2_0000, 0x14_0000])
options = st.fixed_dictionaries({}, optional={"physical": st.booleans(), "mode": MODES, "stack": STACKS})
choosy = st.fixed_dictionaries(
    {},
    optional={
        "physical": st.booleans(), "mode": MODES, "stack": STACKS,
        "entry": st.one_of(st.integers(0x10_0000, 0x10_1100), numbers), "tables": st.one_of(pages, numbers),
        "base": st.one_of(pages, numbers),
    },
)  # fmt: skip


def test_the_healthy_file_is_loaded() -> None:
    for file in HEALTHY:
        ElfImage(file).load(guest())


@given(data=st.binary(max_size=0x200))
def test_random_bytes(data: bytes) -> None:
    attempt(ElfImage, data)
    attempt(ElfImage, b"\x7fELF" + data)
    attempt(ElfImage, HEALTHY[0][:0x18] + data)


@given(file=st.sampled_from(HEALTHY), length=st.integers(0, max(map(len, HEALTHY))), options=options)
def test_truncation(file: bytes, length: int, options: dict[str, object]) -> None:
    attempt(ElfImage, file[:length], **options)


@given(
    file=st.sampled_from(HEALTHY),
    changes=st.lists(st.tuples(st.integers(0, 0x1FF), st.integers(0, 255)), min_size=1, max_size=8),
    options=options,
)
def test_changed_bytes_of_the_headers(file: bytes, changes: list[tuple[int, int]], options: dict[str, object]) -> None:
    changed = bytearray(file)
    for offset, value in changes:
        changed[offset] = value
    attempt(ElfImage, bytes(changed), **options)


@given(
    bits=st.sampled_from([32, 64]),
    header=st.dictionaries(
        st.sampled_from(["e_phoff", "e_phnum", "e_phentsize", "e_ehsize", "e_entry", "e_machine", "e_version"]),
        numbers,
        max_size=2,
    ),
    fields=st.lists(
        st.tuples(
            st.integers(0, 2),
            st.sampled_from(["p_type", "p_offset", "p_vaddr", "p_paddr", "p_filesz", "p_memsz", "p_align"]),
            numbers,
        ),
        max_size=4,
    ),
    options=options,
)  # fmt: skip
def test_lying_fields(
    bits: int, header: dict[str, int], fields: list[tuple[int, str, int]], options: dict[str, object]
) -> None:
    half_words = {"e_phnum", "e_phentsize", "e_ehsize", "e_machine"}
    mask = (1 << bits) - 1
    segments = [Segment(0x10_0000, b"\xf4" * 0x40), Segment(0x10_2000, b"data", memsz=0x100), Segment(0x11_0000)]
    for index, name, value in fields:
        segments[index].lies[name] = value & (0xFFFF_FFFF if name == "p_type" else mask)
    lies = {name: value & (0xFFFF if name in half_words else 0xFFFF_FFFF) for name, value in header.items()}
    attempt(ElfImage, ElfFile(segments, bits=bits, lies=lies).to_bytes(), **options)


@st.composite
def segments(draw: st.DrawFn, bits: int) -> list[Segment]:
    """Mostly in RAM and mostly disjoint; linked for where they are, for the higher half, or anywhere."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        physical = draw(st.one_of(in_ram, pages, pages, numbers)) & (1 << bits) - 1
        above = physical + (0xFFFF_FFFF_8000_0000 if bits == 64 else 0xC000_0000)
        virtual = draw(st.one_of(st.just(physical), st.just(above), st.just(above + 0x5000), numbers)) & (1 << bits) - 1
        size = draw(st.one_of(st.integers(0, 0x3000), st.integers(0, 0x4_0000)))
        align = draw(st.sampled_from([0, 1, 0x1000, 0x1000, 0x20_0000]))
        found.append(Segment(virtual, b"\xf4" * min(size, 0x20), paddr=physical, memsz=size, align=align))
    return found


@given(data=st.data(), bits=st.sampled_from([32, 64]), type=st.sampled_from([ET_EXEC, ET_DYN]))
def test_segments_anywhere(data: st.DataObject, bits: int, type: int) -> None:
    file = ElfFile(data.draw(segments(bits)), bits=bits, type=type)
    attempt(ElfImage, file.to_bytes(), **data.draw(options if type == ET_EXEC else st.one_of(options, choosy)))


@given(file=st.sampled_from(HEALTHY), options=choosy)
def test_wishes_that_cannot_be_met(file: bytes, options: dict[str, object]) -> None:
    attempt(ElfImage, file, **options)


@given(
    bits=st.sampled_from([32, 64]),
    dynamic=st.lists(
        st.tuples(st.sampled_from([1, 2, 7, 8, 9, 17, 18, 19, 20, 23, 35, 36, 37]), numbers), max_size=8
    ),
    words=st.lists(st.one_of(st.just(8), st.integers(0, 0x1200), numbers), max_size=24),
    options=options,
)  # fmt: skip
def test_lying_relocations(
    bits: int, dynamic: list[tuple[int, int]], words: list[int], options: dict[str, object]
) -> None:
    mask = (1 << bits) - 1
    word = "Q" if bits == 64 else "I"
    width = bits // 8
    table = struct.pack(f"<{len(words)}{word}", *(value & mask for value in words))
    # Sound tables first, so that most examples reach the relocations themselves; a later equal tag does not count.
    sizes = {"RELA": (7, 8, 9, 3 * width), "REL": (17, 18, 19, 2 * width), "RELR": (36, 35, 37, width)}
    kind = ("RELA", "REL", "RELR")[len(words) % 3]
    tag, size_tag, entry_tag, entry_size = sizes[kind]
    sound = [(tag, 0x100), (size_tag, len(table) // entry_size * entry_size), (entry_tag, entry_size)]
    entries = [(tag, value & mask) for tag, value in (*sound, *dynamic)]
    code = Segment(0, (bytes(0x100) + table).ljust(0x800, b"\0"), memsz=0x1000)
    section = Segment(0, dynamic_section(entries, bits), type=DYNAMIC)
    attempt(ElfImage, ElfFile([code, section], bits=bits, type=ET_DYN, entry=1).to_bytes(), **options)


def with_symbols() -> tuple[bytes, int]:
    """An ELF64 file with a symbol table, and where its names, symbols and section headers begin."""
    body = healthy(64)
    names, symbols = b"\0code\0data\0".ljust(16, b"\0"), bytes(24)
    symbols += struct.pack("<IBBHQQ", 1, 0x12, 0, 1, 0x400, 8) + struct.pack("<IBBHQQ", 6, 0x01, 0, 1, 0x1000, 4)
    at_names, at_symbols = len(body), len(body) + len(names)
    sections = bytes(64)
    sections += struct.pack("<IIQQQQIIQQ", 1, 2, 0, 0, at_symbols, len(symbols), 2, 1, 8, 24)
    sections += struct.pack("<IIQQQQIIQQ", 1, 3, 0, 0, at_names, len(names), 0, 0, 1, 0)
    data = bytearray(body + names + symbols + sections)
    struct.pack_into("<Q", data, 0x28, at_symbols + len(symbols))
    struct.pack_into("<HHH", data, 0x3A, 64, 3, 2)
    return bytes(data), at_names


SYMBOLS, SYMBOLS_AT = with_symbols()


def test_the_healthy_symbols_are_read() -> None:
    assert ElfImage(SYMBOLS, base=0).symbols() == {"code": 0x400, "data": 0x1000}


@given(
    changes=st.lists(
        st.tuples(
            st.one_of(st.integers(0x28, 0x3F), st.integers(SYMBOLS_AT, len(SYMBOLS) - 1)),
            st.one_of(st.integers(0, 255), st.sampled_from([0, 1, 2, 0x7F, 0x80, 0xFF])),
        ),
        min_size=1, max_size=6,
    )
)  # fmt: skip
def test_lying_symbol_tables(changes: list[tuple[int, int]]) -> None:
    """Loading ignores sections; symbols() reads them and may only say ImageError."""
    changed = bytearray(SYMBOLS)
    for offset, value in changes:
        changed[offset] = value
    try:
        image = ElfImage(bytes(changed))
        image.load(guest())
        symbols = image.symbols()
    except ImageError as error:
        note(f"refused: {error}")
    else:
        note(f"loaded: {symbols}")
        assert all(0 <= value < 1 << 64 for value in symbols.values())


@given(
    size=st.one_of(st.integers(0, 0x40), st.integers(0x1_0000, 0x5_0000)),
    address=st.one_of(in_ram, numbers),
    offset=st.one_of(st.just(0), st.integers(-1, 0x40)),
    options=st.fixed_dictionaries(
        {}, optional={"mode": MODES, "stack": STACKS, "tables": st.one_of(pages, numbers)}
    ),
)  # fmt: skip
def test_flat_images_anywhere(size: int, address: int, offset: int, options: dict[str, object]) -> None:
    attempt(FlatImage, b"\xf4" * size, address, entry=address + offset, **options)


@given(size=st.one_of(st.integers(0, 0x4_0000), st.integers(0, 0x50).map(lambda pages: pages << 12)))
def test_firmware_of_any_size(size: int) -> None:
    memory = GuestMemory()
    memory.add(MemoryRegion.anonymous(0, 0x10_1000))
    memory.fill(0, 0x10_1000, PATTERN)
    try:
        image = FirmwareImage(bytes(size))
    except ImageError:
        assert size % 0x1000 or not 0x1_0000 <= size <= 0x100_0000
        return
    entry = image.load(memory)
    low = 0x10_0000 - min(size, 0x2_0000)
    assert entry.low == low
    assert memory.read(0, low) == bytes([PATTERN]) * low
    assert memory.read(low, 0x10_0000 - low) == bytes(0x10_0000 - low)
    assert memory.read(0x10_0000, 0x1000) == bytes([PATTERN]) * 0x1000
