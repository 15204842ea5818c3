"""From addresses to names and source lines, and back.

`SymbolTable` has the symbols of an ELF file, of a System.map, or of a dictionary; `LineTable` the source lines of an
ELF file with DWARF. Both read files that nobody vouches for: what is truncated or lying is an ImageError.
"""

from __future__ import annotations

from kvmpy.debug.symbols.line_table import LineRange, LineTable, SourceLine
from kvmpy.debug.symbols.symbol import Symbol, SymbolAddress, UnknownSymbolError
from kvmpy.debug.symbols.symbol_table import SymbolTable

__all__ = ["LineRange", "LineTable", "SourceLine", "Symbol", "SymbolAddress", "SymbolTable", "UnknownSymbolError"]
