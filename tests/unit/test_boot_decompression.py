"""Unpacking kernels: every format, streams that lie, packages that are missing."""

import bz2
import gzip
import lzma
import random
import struct
import sys
from collections.abc import Callable

import pytest

from kvmpy.boot.decompression import compression_of, decompress
from kvmpy.errors import ImageError

PLAIN = b"\x7fELF" + random.Random(4).randbytes(0x8000) + bytes(0x2_0000)
LARGE = bytes(0x90_0000) + PLAIN  # more than one block of LZ4


def _lz4(plain: bytes) -> bytes:
    block = pytest.importorskip("lz4.block")
    blocks = [block.compress(plain[at : at + 0x80_0000], store_size=False) for at in range(0, len(plain), 0x80_0000)]
    return b"\x02\x21\x4c\x18" + b"".join(struct.pack("<I", len(piece)) + piece for piece in blocks)


def _zstd(plain: bytes) -> bytes:
    compressed: bytes = pytest.importorskip("zstandard").ZstdCompressor().compress(plain)
    return compressed


FORMATS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "lzma": lambda plain: lzma.compress(plain, lzma.FORMAT_ALONE),
    "xz": lambda plain: lzma.compress(plain, lzma.FORMAT_XZ, lzma.CHECK_CRC32),
    "lz4": _lz4,
    "zstd": _zstd,
}
by_name = pytest.mark.parametrize("name", FORMATS)


def stream(name: str, plain: bytes = PLAIN) -> bytes:
    """What Linux has in its image: gzip says its size at the end, behind the others it is added."""
    packed = FORMATS[name](plain)
    return packed if name == "gzip" else packed + struct.pack("<I", len(plain))


@by_name
@pytest.mark.parametrize("plain", [PLAIN, LARGE], ids=["small", "large"])
def test_every_format_is_known_and_undone(name: str, plain: bytes) -> None:
    assert compression_of(stream(name, plain)) == name
    assert decompress(stream(name, plain), len(plain), "vmlinuz", 0) == plain


def test_an_elf_file_is_taken_as_it_is() -> None:
    assert decompress(PLAIN, len(PLAIN), "vmlinuz", 0) == PLAIN


@by_name
def test_a_truncated_stream_is_refused(name: str) -> None:
    packed = FORMATS[name](PLAIN)
    for length in (6, 20, len(packed) // 2, len(packed) - 9):
        with pytest.raises(ImageError, match="vmlinuz at offset 0x4d2: the payload"):
            decompress(packed[:length], len(PLAIN), "vmlinuz", 1234)


@by_name
def test_a_stream_that_gives_more_or_less_than_it_says_is_refused(name: str) -> None:
    with pytest.raises(ImageError, match=r"decompresses to .* bytes and not the|cannot be decompressed"):
        decompress(stream(name), len(PLAIN) + 1, "vmlinuz", 0)
    with pytest.raises(ImageError, match=r"decompresses to more than the|cannot be decompressed"):
        decompress(stream(name), len(PLAIN) - 1, "vmlinuz", 0)


@by_name
def test_a_stream_with_changed_bytes_never_gives_anything_else_than_an_image_error(name: str) -> None:
    packed = bytearray(stream(name))
    for at in range(2, min(len(packed), 0x120)):
        changed = packed.copy()
        changed[at] ^= 0xFF
        try:
            assert len(decompress(bytes(changed), len(PLAIN), "vmlinuz", 0)) == len(PLAIN)
        except ImageError:
            continue


@pytest.mark.parametrize(("name", "package"), [("lz4", "lz4"), ("zstd", "zstandard")])
def test_a_missing_package_is_named(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = stream(name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ImageError, match=rf"compressed by {name}, .*kvmpy\[linux\].*`pip install {package}`.*unpack=False"
    ):
        decompress(packed, len(PLAIN), "vmlinuz", 0)


def test_an_unknown_format_is_shown_with_the_way_out() -> None:
    with pytest.raises(ImageError, match="of no known kind: 01 02 03 04 05 06; unpack=False"):
        decompress(bytes(range(1, 20)), 100, "vmlinuz", 0)
    with pytest.raises(ImageError, match="compressed by LZO, which kvmpy cannot do; unpack=False"):
        decompress(b"\x89LZO\0\r\n\x1a\n", 100, "vmlinuz", 0)


def test_a_dictionary_larger_than_any_kernel_needs_is_refused() -> None:
    # An LZMA stream that asks for 4 GiB of memory.
    hostile = b"\x5d\x00\x00\x00\xff" + b"\xff" * 8 + bytes(32)
    with pytest.raises(ImageError, match="cannot be decompressed"):
        decompress(hostile, 100, "vmlinuz", 0)


def test_lz4_blocks_of_no_size_are_not_gone_through_one_by_one() -> None:
    pytest.importorskip("lz4")
    empty = struct.pack("<I", 1) + b"\0"
    with pytest.raises(ImageError):
        decompress(b"\x02\x21\x4c\x18" + empty * 1_000_000, 0x100_0000, "vmlinuz", 0)
