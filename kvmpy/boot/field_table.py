"""Numbers in a structure, found by the names and offsets that its specification lists in a table."""

from __future__ import annotations

from collections.abc import Mapping

from kvmpy.errors import UsageError

__all__ = ["FieldTable", "Fields"]

FieldTable = Mapping[str, tuple[int, int]]
"""Name -> (offset, size in bytes), as in the specification."""


class Fields:
    """The fields of `data` by name: little-endian, unsigned. `base` is the offset of its first byte in the table.

    A name that the table lacks is a KeyError, a value that does not fit a UsageError.
    """

    def __init__(self, table: FieldTable, data: bytearray, base: int = 0) -> None:
        self.table = table
        self.data = data
        self.base = base

    def __getitem__(self, name: str) -> int:
        offset, size = self.table[name]
        return int.from_bytes(self.data[offset - self.base : offset - self.base + size], "little")

    def __setitem__(self, name: str, value: int) -> None:
        offset, size = self.table[name]
        if not 0 <= value < 1 << 8 * size:
            raise UsageError(f"{name} has {size} bytes; {value:#x} does not fit")
        self.data[offset - self.base : offset - self.base + size] = value.to_bytes(size, "little")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {', '.join(f'{name}={self[name]:#x}' for name in self.table)}>"
