"""Hostile Linux kernels: whatever the file says, it is loaded or refused by ImageError, and nothing leaves RAM."""

import struct

from hypothesis import given
from hypothesis import strategies as st

from hostile_images import HIGH, attempt, numbers
from kvmpy.boot import LinuxKernel
from kvmpy.boot.linux import SetupData
from linux_images import FIELDS, BzImageFile, pack, vmlinux, xen_note

AT = 0x18_0000
VMLINUX = vmlinux(at=AT, note=xen_note(AT))
SOUND = {"pref_address": 0x14_0000, "init_size": 0x8_0000, "kernel_alignment": 0x1000, "min_alignment": 12}
PAYLOADS = {"gzip": pack(VMLINUX), "none": VMLINUX}

options = st.fixed_dictionaries(
    {},
    optional={
        "entry": st.sampled_from(["auto", "64", "32", "real", "pvh"]),
        "unpack": st.just(True),
        "initrd": st.sampled_from([b"", b"initrd", bytes(0x2_0000), bytes(0x20_0000)]),
        "cmdline": st.sampled_from(["quiet", "x" * 2047, "x" * 3000]),
        "setup_data": st.just([SetupData(9, b"seed")]),
    },
)
packed = st.fixed_dictionaries({"unpack": st.just(False), "entry": st.sampled_from(["auto", "64", "32", "real"])})
either = st.one_of(options, packed)


def sized(name: str) -> st.SearchStrategy[tuple[str, int]]:
    mask = (1 << 8 * struct.calcsize(FIELDS[name][1])) - 1
    return numbers.map(lambda value: (name, value & mask))


lies = st.lists(st.sampled_from(sorted(FIELDS)).flatmap(sized), max_size=4).map(dict)


def test_the_sound_images_are_loaded_by_every_entry() -> None:
    for payload in PAYLOADS.values():
        file = BzImageFile(payload=payload, lies=SOUND).to_bytes()
        for entry in ("auto", "64", "32", "pvh"):
            assert attempt(LinuxKernel, file, entry=entry)
        assert attempt(LinuxKernel, file, unpack=False)
    assert attempt(LinuxKernel, VMLINUX)


@given(payload=st.sampled_from(sorted(PAYLOADS)), lies=lies, options=either)
def test_lying_fields_of_the_setup_header(payload: str, lies: dict[str, int], options: dict[str, object]) -> None:
    file = BzImageFile(payload=PAYLOADS[payload], lies=SOUND | lies).to_bytes()
    attempt(LinuxKernel, file, **options)


@given(name=st.sampled_from(sorted(FIELDS)).flatmap(sized), options=either)
def test_one_lying_field(name: tuple[str, int], options: dict[str, object]) -> None:
    file = BzImageFile(payload=PAYLOADS["gzip"], lies=SOUND | dict([name])).to_bytes()
    attempt(LinuxKernel, file, **options)


@given(
    changes=st.lists(st.tuples(st.integers(0x1F1, 0x26B), st.integers(0, 255)), min_size=1, max_size=8), options=either
)
def test_changed_bytes_of_the_setup_header(changes: list[tuple[int, int]], options: dict[str, object]) -> None:
    file = bytearray(BzImageFile(payload=PAYLOADS["gzip"], lies=SOUND).to_bytes())
    for offset, value in changes:
        file[offset] = value
    attempt(LinuxKernel, bytes(file), **options)


@given(length=st.integers(0, 0x1200), payload=st.sampled_from(sorted(PAYLOADS)), options=either)
def test_truncation(length: int, payload: str, options: dict[str, object]) -> None:
    file = VMLINUX if length % 8 == 0 else BzImageFile(payload=PAYLOADS[payload], lies=SOUND).to_bytes()
    attempt(LinuxKernel, file[:length], **options)


@given(data=st.binary(max_size=0x400))
def test_random_bytes(data: bytes) -> None:
    attempt(LinuxKernel, data)
    attempt(LinuxKernel, BzImageFile(lies=SOUND).to_bytes()[:0x1F1] + data)
    attempt(LinuxKernel, BzImageFile(payload=data, lies=SOUND).to_bytes())


@given(
    changes=st.lists(st.tuples(st.integers(0, len(PAYLOADS["gzip"]) - 1), st.integers(0, 255)), min_size=1, max_size=4)
)
def test_changed_bytes_of_the_payload(changes: list[tuple[int, int]]) -> None:
    payload = bytearray(PAYLOADS["gzip"])
    for offset, value in changes:
        payload[offset] = value
    attempt(LinuxKernel, BzImageFile(payload=bytes(payload), lies=SOUND).to_bytes())


@given(
    changes=st.lists(st.tuples(st.integers(0, 0x130), st.integers(0, 255)), min_size=1, max_size=3),
    options=options,
    bare=st.booleans(),
)
def test_changed_bytes_of_the_kernel_in_it(
    changes: list[tuple[int, int]], options: dict[str, object], bare: bool
) -> None:
    kernel = bytearray(VMLINUX)
    for offset, value in changes:
        kernel[offset] = value
    packed = BzImageFile(payload=pack(bytes(kernel)), lies=SOUND).to_bytes()
    attempt(LinuxKernel, bytes(kernel) if bare else packed, **options)


words = st.one_of(numbers, st.sampled_from([4, 8, 18])).map(lambda value: value & 0xFFFF_FFFF)
lying_notes = st.builds(lambda *sizes: struct.pack("<III8s", *sizes), words, words, words, st.binary(max_size=8))
sound_notes = st.builds(
    lambda entry, kind, bits: xen_note(entry & (1 << bits) - 1, kind=kind, bits=bits),
    st.one_of(st.just(AT), numbers),
    st.one_of(st.just(18), st.integers(0, 20)),
    st.sampled_from([32, 64]),
)


@given(
    notes=st.lists(st.one_of(sound_notes, sound_notes, lying_notes), max_size=4).map(b"".join),
    tail=st.binary(max_size=16),
    align=st.sampled_from([0, 4, 4, 8, 1 << 63]),
)
def test_lying_notes(notes: bytes, tail: bytes, align: int) -> None:
    attempt(LinuxKernel, vmlinux(at=AT, note=notes + tail + b"\0", notes_align=align), entry="pvh")


@given(
    address=st.one_of(st.integers(HIGH[0], sum(HIGH)), numbers), maximum=numbers, size=st.integers(0, 0x12_0000),
    unpack=st.booleans(),
)  # fmt: skip
def test_an_initrd_of_any_size_and_limit(address: int, maximum: int, size: int, unpack: bool) -> None:
    lies = SOUND | {"initrd_addr_max": maximum & 0xFFFF_FFFF, "pref_address": address}
    file = BzImageFile(payload=PAYLOADS["gzip"], lies=lies).to_bytes()
    attempt(LinuxKernel, file, initrd=bytes(size), unpack=unpack)
