"""The words on a stack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmpy.debug.symbols import SymbolTable

__all__ = ["StackListing"]


@dataclass(frozen=True, slots=True)
class StackListing:
    """Words of `width` bytes from the stack pointer `address`, a linear address, upwards; None is one not in memory.

    A word that may be an address in the guest's program shows its symbol: perhaps a return address.
    """

    address: int
    width: int
    words: tuple[int | None, ...]
    symbols: SymbolTable

    def __str__(self) -> str:
        lines = []
        for number, word in enumerate(self.words):
            distance = number * self.width
            place = f"{self.address + distance:#x}  +{distance:#04x}"
            if word is None:
                lines.append(f"{place}  {'?' * 2 * self.width}")
                continue
            found = self.symbols.at(word)
            symbol = f"  <{found}>" if found is not None else ""
            lines.append(f"{place}  {word:0{2 * self.width}x}{symbol}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from kvmpy.x86.html_text import preformatted

        return preformatted(str(self))
