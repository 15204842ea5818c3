"""Memory as hex digits and characters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["HexDump"]

_ROW = 16


@dataclass(frozen=True, slots=True)
class HexDump:
    """Bytes from `address` on; None is one that is not there (its page is not mapped, or it is outside of memory).

    Prints as rows of sixteen, which begin at multiples of sixteen, in hex and in ASCII.
    """

    address: int
    cells: Sequence[int | None]

    @property
    def data(self) -> bytes:
        """The bytes, 0 for those that are not there."""
        return bytes(cell or 0 for cell in self.cells)

    def __str__(self) -> str:
        end = self.address + len(self.cells)
        digits = max(len(f"{max(end - 1, 0):x}"), 4)
        rows = range(self.address & -_ROW, end, _ROW)
        return "\n".join(f"{row:#0{digits + 2}x}  {self._row(row)}" for row in rows)

    def _row(self, row: int) -> str:
        numbers, characters = [], []
        for address in range(row, row + _ROW):
            at = address - self.address
            if not 0 <= at < len(self.cells):
                number, character = "  ", " "
            elif (cell := self.cells[at]) is None:
                number, character = "??", "?"
            else:
                number, character = f"{cell:02x}", chr(cell) if 0x20 <= cell < 0x7F else "."
            numbers.append(number)
            characters.append(character)
        half = _ROW // 2
        return f"{' '.join(numbers[:half])}  {' '.join(numbers[half:])}  {''.join(characters).rstrip()}"

    def _repr_html_(self) -> str:
        from kvmpy.x86.html_text import preformatted

        return preformatted(str(self))
