"""Hostile multiboot kernels: loaded or refused by ImageError, and nothing leaves RAM."""

import struct

from hypothesis import given
from hypothesis import strategies as st

from elf_files import ET_DYN, ET_EXEC, ElfFile, Segment
from hostile_images import attempt, numbers
from kvmpy.boot import MultibootKernel, MultibootModule
from multiboot_files import LOAD, Header1, Header2, elf_kernel, flat_kernel, tag

words = numbers.map(lambda value: value & 0xFFFF_FFFF)
near = st.one_of(st.integers(LOAD - 0x100, LOAD + 0x1000), words)
options = st.fixed_dictionaries(
    {},
    optional={
        "cmdline": st.sampled_from(["quiet", "x" * 0x3_0000]),
        "modules": st.lists(
            st.sampled_from([MultibootModule(b"module"), MultibootModule(b""), MultibootModule(bytes(0x10_0000))]),
            max_size=3,
        ),
        "version": st.sampled_from([1, 2]),
    },
)
ADDRESSES = (LOAD + 8, LOAD, 0, LOAD + 0x1000, LOAD + 8 + 32)
SOUND = [
    elf_kernel(Header1().to_bytes()),
    elf_kernel(Header2().to_bytes()),
    flat_kernel(Header1(addresses=ADDRESSES).to_bytes()),
    flat_kernel(Header2([tag(2, LOAD + 8, LOAD, 0, LOAD + 0x1000), tag(3, LOAD + 8)]).to_bytes()),
]


def test_the_sound_kernels_are_loaded() -> None:
    for file in SOUND:
        assert attempt(MultibootKernel, file)


@given(data=st.binary(max_size=0x200), start=st.sampled_from([b"", b"\x7fELF", Header1(flags=1 << 16).to_bytes()[:12]]))
def test_random_bytes(data: bytes, start: bytes) -> None:
    length = 16 + len(data) & -8
    second = struct.pack("<4I", 0xE852_50D6, 0, length, -(0xE852_50D6 + length) & 0xFFFF_FFFF)
    attempt(MultibootKernel, start + data if start else flat_kernel(second, data))


@given(
    file=st.sampled_from(SOUND),
    changes=st.lists(st.tuples(st.integers(0, 0x9F), st.integers(0, 255)), min_size=1, max_size=6),
    length=st.one_of(st.just(0x1000), st.integers(0, 0x200)),
    options=options,
)
def test_changed_bytes_and_truncation(
    file: bytes, changes: list[tuple[int, int]], length: int, options: dict[str, object]
) -> None:
    changed = bytearray(file)
    for offset, value in changes:
        if offset < len(changed):
            changed[offset] = value
    attempt(MultibootKernel, bytes(changed[:length]), **options)


@given(
    flags=st.one_of(words, words.map(lambda flags: flags & 0xFFFF_0007)), place=st.integers(0, 0x40), elf=st.booleans(),
    addresses=st.one_of(st.none(), st.tuples(near, near, near, near, near), st.just(ADDRESSES)),
    video=st.one_of(st.none(), st.tuples(words, words, words, words)), options=options,
)  # fmt: skip
def test_any_header_of_multiboot_1(
    flags: int,
    place: int,
    elf: bool,
    addresses: tuple[int, int, int, int, int] | None,
    video: tuple[int, int, int, int] | None,
    options: dict[str, object],
) -> None:
    header = Header1(flags=flags, addresses=addresses, video=video).to_bytes()
    file = elf_kernel(header) if elf else bytes(4 * place) + header + b"\xf4" * 0x10
    attempt(MultibootKernel, file, **options)


WORDS = {1: 3, 2: 4, 3: 1, 4: 1, 5: 3, 6: 0, 7: 0, 8: 1, 9: 1, 10: 4}
"""How much each tag of the specification holds."""

sound_tags = st.sampled_from(sorted(WORDS)).flatmap(
    lambda kind: st.builds(
        lambda contents, optional: tag(kind, *contents, optional=optional),
        st.lists(st.one_of(near, st.integers(0, 21)), min_size=WORDS[kind], max_size=WORDS[kind]),
        st.booleans(),
    )
)
wild_tags = st.builds(
    lambda kind, contents, optional, size: tag(kind, *contents, optional=optional, size=size),
    st.one_of(st.integers(0, 12), st.integers(0, 0xFFFF)),
    st.lists(st.one_of(near, st.integers(0, 24)), max_size=6),
    st.booleans(),
    st.one_of(st.none(), st.integers(0, 0x40), words),
)


@given(
    tags=st.one_of(st.lists(sound_tags, max_size=3), st.lists(wild_tags, max_size=5)), options=options,
    length=st.one_of(st.none(), st.none(), words), elf=st.booleans(), end=st.sampled_from([tag(0), tag(0), b""]),
)  # fmt: skip
def test_any_tags_of_multiboot_2(
    tags: list[bytes], length: int | None, options: dict[str, object], elf: bool, end: bytes
) -> None:
    header = Header2(tags, length=length, end=end).to_bytes()
    attempt(MultibootKernel, elf_kernel(header) if elf else flat_kernel(header), **options)


@given(lies=st.dictionaries(st.integers(0, 4), near, max_size=3), options=options)
def test_any_addresses_of_multiboot_2(lies: dict[int, int], options: dict[str, object]) -> None:
    addresses = [lies.get(index, sound) for index, sound in enumerate(ADDRESSES)]
    header = Header2([tag(2, *addresses[:4]), tag(3, addresses[4])]).to_bytes()
    attempt(MultibootKernel, flat_kernel(header, bytes(64)), **options)


@given(
    minimum=words, maximum=words, align=st.one_of(words, st.integers(0, 31).map(lambda bit: 1 << bit)),
    type=st.sampled_from([ET_EXEC, ET_DYN]), paddr=near, p_align=st.sampled_from([0, 1, 0x1000, 1 << 31]),
)  # fmt: skip
def test_any_relocatable_image(minimum: int, maximum: int, align: int, type: int, paddr: int, p_align: int) -> None:
    header = Header2([tag(10, minimum, maximum, align, 1)]).to_bytes()
    segment = Segment(paddr, header + b"\xf4" * 0x10, align=p_align)
    attempt(MultibootKernel, ElfFile([segment], bits=32, type=type).to_bytes())


@given(
    bits=st.sampled_from([32, 64]),
    sections=st.lists(st.lists(numbers, min_size=10, max_size=10), max_size=5),
    count=st.one_of(st.none(), st.integers(0, 0xFFFF)),
    names=st.integers(0, 8),
)  # fmt: skip
def test_lying_section_headers(bits: int, sections: list[list[int]], count: int | None, names: int) -> None:
    layout = struct.Struct("<10I" if bits == 32 else "<IIQQQQIIQQ")
    narrow = range(10) if bits == 32 else (0, 1, 6, 7)
    fields = [
        [value & 0xFFFF_FFFF if index in narrow else value for index, value in enumerate(section)]
        for section in sections
    ]
    header = Header1().to_bytes()
    lies = {"e_shentsize": layout.size, "e_shnum": len(sections) if count is None else count, "e_shstrndx": names}
    file = ElfFile([Segment(LOAD, header + bytes(4) + b"\xf4")], bits=bits, entry=LOAD + 16, lies=lies)
    body = file.to_bytes()
    file.lies["e_shoff"] = len(body)
    attempt(MultibootKernel, file.to_bytes() + b"".join(layout.pack(*each) for each in fields))
