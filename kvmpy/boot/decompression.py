"""Decompression of kernels: whole streams at hand, told apart by their first bytes.

gzip, bzip2, xz and lzma are Python's own; LZ4 and Zstandard need the packages of the extra `kvmpy[linux]`. Every stream
may be hostile: it fills no more memory than was promised, and what is wrong with it is an ImageError.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from kvmpy.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["compression_of", "decompress"]

_XZ_MEMORY = 1 << 29
"""Bytes that xz and lzma may use for their dictionaries; `xz -9` takes 64 MiB to decompress."""
_LZ4_BLOCK = 8 << 20
"""What each block of a legacy frame holds, but the last (LZ4 frame format description, "Legacy frame")."""
_LZ4_LARGEST = _LZ4_BLOCK + _LZ4_BLOCK // 255 + 16  # LZ4_compressBound()
_ZSTD_PIECE = 2048
"""Bytes given to Zstandard at once. It has no limit for what comes out: four bytes may be 128 KiB of one value."""


class _BrokenStreamError(Exception):
    """A stream that its decompressor refuses, and why."""


class _MissingPackageError(Exception):
    """The package that would decompress the stream."""


def compression_of(data: bytes) -> str | None:
    """The name of the format that `data` begins as, "none" for an ELF file, or None for what is not known."""
    return next((name for magic, name in _MAGICS if data.startswith(magic)), None)


def decompress(data: bytes, size: int, image: str, offset: int) -> bytes:
    """The `size` bytes that `data` holds compressed. `image` and `offset` are what errors name.

    Raises ImageError for an unknown format, one whose package is not installed, a stream that is broken or truncated,
    and one that does not give exactly `size` bytes. What follows the end of the stream is ignored.
    """
    name = compression_of(data)
    method = _METHODS.get(name or "")
    if method is None:
        what = f"compressed by {name}, which kvmpy cannot do" if name else f"of no known kind: {data[:6].hex(' ')}"
        raise ImageError(f"the payload is {what}; unpack=False has the kernel unpack itself", image, offset)
    try:
        plain = method(data, size)
    except _MissingPackageError as error:
        raise ImageError(
            f"the payload is compressed by {name}, for which Python needs the package {error}: install kvmpy[linux], "
            f"or `pip install {error}`; or let the kernel unpack itself, with unpack=False", image, offset,
        ) from None  # fmt: skip
    except _BrokenStreamError as error:
        raise ImageError(f"the payload, compressed by {name}, cannot be decompressed: {error}", image, offset) from None
    if len(plain) != size:
        relation = "more than" if len(plain) > size else f"{len(plain):#x} bytes and not"
        raise ImageError(f"the payload decompresses to {relation} the {size:#x} bytes that it says", image, offset)
    return plain


# Each takes the stream and the expected size; it may answer more bytes than that, but not many.


def _gzip(data: bytes, size: int) -> bytes:
    import zlib

    stream = zlib.decompressobj(wbits=31)
    try:
        plain = stream.decompress(data, size + 1)
    except zlib.error as error:
        raise _BrokenStreamError(error) from None
    return _whole(plain, stream.eof, size)


def _bzip2(data: bytes, size: int) -> bytes:
    import bz2

    stream = bz2.BZ2Decompressor()
    try:
        plain = stream.decompress(data, size + 1)
    except (OSError, ValueError) as error:
        raise _BrokenStreamError(error) from None
    return _whole(plain, stream.eof, size)


def _xz(data: bytes, size: int) -> bytes:
    import lzma

    stream = lzma.LZMADecompressor(lzma.FORMAT_AUTO, memlimit=_XZ_MEMORY)
    try:
        plain = stream.decompress(data, size + 1)
    except lzma.LZMAError as error:
        raise _BrokenStreamError(error) from None
    return _whole(plain, stream.eof, size)


def _lz4(data: bytes, size: int) -> bytes:
    try:
        import lz4.block
    except ImportError:
        raise _MissingPackageError("lz4") from None
    pieces = []
    left = size
    for block in _lz4_blocks(data):
        if left <= 0:
            break  # the rest is not compressed data, but the size that Linux appends
        try:
            piece = lz4.block.decompress(block, uncompressed_size=min(_LZ4_BLOCK, left))
        except (lz4.block.LZ4BlockError, ValueError) as error:
            raise _BrokenStreamError(error) from None
        pieces.append(piece)
        left -= len(piece)
        if len(piece) < _LZ4_BLOCK:
            break  # the last one
    return b"".join(pieces)


def _lz4_blocks(data: bytes) -> Iterator[memoryview]:
    view = memoryview(data)
    position = 4
    while position + 4 <= len(view):
        (length,) = struct.unpack_from("<I", view, position)
        position += 4
        if length > min(_LZ4_LARGEST, len(view) - position):
            raise _BrokenStreamError(f"a block of {length:#x} bytes at {position - 4:#x} does not fit")
        yield view[position : position + length]
        position += length


def _zstd(data: bytes, size: int) -> bytes:
    try:
        import zstandard
    except ImportError:
        raise _MissingPackageError("zstandard") from None
    stream = zstandard.ZstdDecompressor().decompressobj()
    pieces = []
    length = 0
    view = memoryview(data)
    try:
        for position in range(0, len(data), _ZSTD_PIECE):
            pieces.append(stream.decompress(view[position : position + _ZSTD_PIECE]))
            length += len(pieces[-1])
            if stream.eof or length > size:
                break
    except zstandard.ZstdError as error:
        raise _BrokenStreamError(error) from None
    return _whole(b"".join(pieces), stream.eof, size)


def _none(data: bytes, size: int) -> bytes:
    return data


def _whole(plain: bytes, ended: bool, size: int) -> bytes:
    if not ended and len(plain) <= size:
        raise _BrokenStreamError(f"it is truncated: it ends after {len(plain):#x} bytes")
    return plain


_MAGICS = (
    (b"\x1f\x8b", "gzip"), (b"\x1f\x9e", "gzip"), (b"BZ", "bzip2"), (b"\x5d\x00", "lzma"), (b"\xfd7", "xz"),
    (b"\x02\x21", "lz4"), (b"\x28\xb5", "zstd"), (b"\x89L", "LZO"), (b"\x7fELF", "none"),
)  # fmt: skip
"""The boot protocol document, payload_offset; LZO from linux/lib/decompress.c."""

_METHODS: Mapping[str, Callable[[bytes, int], bytes]] = {
    "gzip": _gzip, "bzip2": _bzip2, "lzma": _xz, "xz": _xz, "lz4": _lz4, "zstd": _zstd, "none": _none,
}  # fmt: skip
