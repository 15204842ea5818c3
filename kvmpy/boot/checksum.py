"""The checksum that tables of a firmware carry: a byte that makes the sum of all bytes zero."""

from __future__ import annotations

__all__ = ["with_checksum"]


def with_checksum(data: bytes | bytearray, place: int, end: int | None = None) -> bytes:
    """`data` with the byte at `place` set so that all bytes, or those before `end`, sum up to zero modulo 256."""
    made = bytearray(data)
    made[place] = 0
    made[place] = -sum(made[:end]) & 0xFF
    return bytes(made)
