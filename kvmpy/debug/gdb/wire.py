"""Numbers and bytes as packets write them: hex, and thread ids (gdb manual, E.1 and E.2)."""

from __future__ import annotations

import re
from binascii import unhexlify

__all__ = ["Malformed", "address_and_length", "data", "number", "register_bytes", "thread_id"]

_HEX = re.compile(rb"[0-9a-fA-F]{1,16}")
_WIDEST = 1 << 64

ALL_THREADS = -1
ANY_THREAD = 0


class Malformed(Exception):
    """A packet is not what its first letters promise."""


def number(text: bytes) -> int:
    """An unsigned hex number of at most 64 bits."""
    if not _HEX.fullmatch(text):
        raise Malformed(f"not a hex number: {text[:20]!r}")
    return int(text, 16)


def address_and_length(text: bytes) -> tuple[int, int]:
    """`address,length`. The end may be that of the address space, and not behind it."""
    first, comma, second = text.partition(b",")
    if not comma:
        raise Malformed(f"not an address and a length: {text[:20]!r}")
    address, length = number(first), number(second)
    if address + length > _WIDEST:
        raise Malformed("the range leaves the address space")
    return address, length


def data(text: bytes) -> bytes:
    """Bytes written as two hex digits each."""
    try:
        return unhexlify(text)
    except ValueError:
        raise Malformed("not hex digits in pairs") from None


def thread_id(text: bytes) -> int:
    """A thread id: from 1 on, 0 for any thread, -1 for all of them."""
    return ALL_THREADS if text == b"-1" else number(text)


def register_bytes(value: int | None, size: int) -> bytes:
    """A register as packets have it: its bytes in the target's order, or x's when it is not available."""
    if value is None:
        return b"xx" * size
    return (value & (1 << 8 * size) - 1).to_bytes(size, "little").hex().encode()
