"""Vectors as elements of 1, 2, 4 or 8 bytes, the lowest first, and operations on them element by element."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

__all__ = ["elementwise", "join", "saturate", "split"]

Formats = dict[int, Literal["b", "B", "h", "H", "i", "I", "q", "Q"]]
_UNSIGNED: Formats = {1: "B", 2: "H", 4: "I", 8: "Q"}
_SIGNED: Formats = {1: "b", 2: "h", 4: "i", 8: "q"}


def split(value: int, width: int, size: int, *, signed: bool = False) -> list[int]:
    """The elements of `width` bytes of a vector of `size` bytes."""
    return memoryview(value.to_bytes(size, "little")).cast((_SIGNED if signed else _UNSIGNED)[width]).tolist()


def join(elements: Iterable[int], width: int) -> int:
    """The vector of these elements; of each the low `width` bytes count."""
    mask = (1 << 8 * width) - 1
    return int.from_bytes(b"".join([(element & mask).to_bytes(width, "little") for element in elements]), "little")


def saturate(value: int, width: int, *, signed: bool) -> int:
    """The nearest number that `width` bytes can hold."""
    least, most = (-1 << 8 * width - 1, (1 << 8 * width - 1) - 1) if signed else (0, (1 << 8 * width) - 1)
    return least if value < least else most if value > most else value


def elementwise(
    width: int, operation: Callable[[int, int], int], *, signed: bool = False
) -> Callable[[int, int, int, int], int]:
    """An operation on vectors, made of one on elements."""

    def whole(first: int, second: int, size: int, immediate: int) -> int:
        elements = map(operation, split(first, width, size, signed=signed), split(second, width, size, signed=signed))
        return join(elements, width)

    return whole
