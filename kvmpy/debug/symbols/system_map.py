"""Linux's System.map and /proc/kallsyms, and what `nm` prints: an address, a letter and a name on each line.

The letters are those of nm(1): t for code, d, b, r and their like for data, a for absolute numbers, w and v for weak
symbols; global symbols have them in upper case. kallsyms appends the module, in brackets.
"""

from __future__ import annotations

import os
import stat

from kvmpy.debug.symbols.symbol import SymbolKind
from kvmpy.debug.symbols.symbol_columns import GLOBAL, LOCAL, WEAK, SymbolColumns
from kvmpy.errors import ImageError

__all__ = ["read_system_map"]

_KINDS: dict[str, SymbolKind] = {
    **dict.fromkeys("tTiI", "function"),
    **dict.fromkeys("bBcCdDgGrRsSuvV", "object"),
    **dict.fromkeys("aA", "absolute"),
}
_BINDINGS = {**dict.fromkeys("wWvVu", WEAK), **dict.fromkeys("ABCDGIRST", GLOBAL)}
_SIZE_LIMIT = 1 << 27
_SYMBOL_LIMIT = 1 << 20
_TOP = 1 << 64


def read_system_map(source: bytes | str | os.PathLike[str], bias: int = 0) -> SymbolColumns:
    """The symbols of a file, or of its text: bytes, or a str with a line feed. Raises ImageError, OSError."""
    if isinstance(source, bytes):
        return _parse(source.decode("utf-8", "replace"), "symbols", bias)
    if isinstance(source, str) and "\n" in source:
        return _parse(source, "symbols", bias)
    name = os.fspath(source)
    return _parse(_read_file(name).decode("utf-8", "replace"), name, bias)


def _read_file(name: str) -> bytes:
    # Not by its st_size, which is 0 for /proc/kallsyms; and asked before, for opening a FIFO would block.
    if not stat.S_ISREG(os.stat(name).st_mode):
        raise ImageError("is not a regular file", name)
    with open(name, "rb") as file:
        data = file.read(_SIZE_LIMIT + 1)
    if len(data) > _SIZE_LIMIT:
        raise ImageError(f"is larger than {_SIZE_LIMIT:#x} bytes", name)
    return data


def _parse(text: str, name: str, bias: int) -> SymbolColumns:
    columns = SymbolColumns()
    names, addresses, kinds, bindings = columns.names, columns.addresses, columns.kinds, columns.bindings
    for number, line in enumerate(text.split("\n"), 1):
        fields = line.split()
        if len(fields) < 3:
            if not fields or (len(fields) == 2 and fields[0] in "Uwv"):
                continue  # nm's undefined symbols have no address
            raise _refusal(name, number, line)
        digits, letter, symbol = fields[:3]
        try:
            address = int(digits, 16)
        except ValueError:
            raise _refusal(name, number, line) from None
        kind = _KINDS.get(letter, "label")
        if not 0 <= address < _TOP or len(letter) != 1:
            raise _refusal(name, number, line)
        if len(fields) > 3:
            columns.modules[len(names)] = fields[3].strip("[]")
        names.append(symbol)
        addresses.append(address if kind == "absolute" or not bias else address + bias & _TOP - 1)
        kinds.append(kind)
        bindings.append(_BINDINGS.get(letter, LOCAL))
        if len(names) > _SYMBOL_LIMIT:
            raise ImageError(f"has more than {_SYMBOL_LIMIT} symbols", name)
    if len(names) > 1 and not any(addresses):
        raise ImageError(
            "all addresses are 0: the kernel hides them from who reads /proc/kallsyms without rights; copy it as root",
            name,
        )
    columns.sizes = [0] * len(names)
    columns.reaches = [0] * len(names)
    return columns


def _refusal(name: str, number: int, line: str) -> ImageError:
    return ImageError(f"line {number} is not an address, a letter and a name: {line[:80]!r}", name)
