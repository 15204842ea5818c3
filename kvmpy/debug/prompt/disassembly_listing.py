"""Instructions one below the other, with addresses, bytes and symbols."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmpy.debug.disassembly import annotate

if TYPE_CHECKING:
    from kvmpy.debug.disassembly import Instruction
    from kvmpy.debug.symbols import SymbolTable

__all__ = ["DisassemblyListing"]

_BYTES_WIDTH = 8


@dataclass(frozen=True, slots=True)
class DisassemblyListing:
    """Instructions with the symbols around and in them. The one at `pc`, a linear address, is marked by an arrow.

    `advice` is what would make it better, when something is missing.
    """

    instructions: tuple[Instruction, ...]
    symbols: SymbolTable
    pc: int
    advice: str = ""

    def __str__(self) -> str:
        lines: list[str] = []
        for instruction in self.instructions:
            found = self.symbols.at(instruction.address)
            if found is not None and not (found.offset and lines):
                lines.append(f"<{found}>:")
            arrow = "=>" if instruction.address == self.pc else "  "
            code = instruction.bytes.hex(" ")
            text = annotate(instruction, self.symbols)
            lines.append(f"{arrow} {instruction.address:#x}  {code:<{3 * _BYTES_WIDTH - 1}}  {text}")
        if self.advice:
            lines.append(f"({self.advice})")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from kvmpy.x86.html_text import preformatted

        return preformatted(str(self), [line for line in str(self).splitlines() if line.startswith("=>")])
