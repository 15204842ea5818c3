"""DynamoRIO's drcov files, version 2: a table of modules, and for each block its module, offset and size.

Text up to the line "BB Table: n bbs", then n times `struct { uint32_t start; uint16_t size; uint16_t mod_id; }`, as
drcov writes them (DynamoRIO, clients/drcov) and Lighthouse, Cartographer and others read them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from kvmpy.debug.coverage.basic_blocks import BasicBlock

if TYPE_CHECKING:
    from kvmpy.debug.coverage.covered_code import Module

__all__ = ["drcov_file"]

_BLOCK = struct.Struct("<IHH")
_LARGEST = 0xFFFF
"""Bytes of a block; larger ones become several."""
_OFFSETS = 1 << 32
_REST = "[guest memory]"
"""The name of what is outside of all modules, 4 GiB at a time."""


def drcov_file(blocks: Iterable[BasicBlock], modules: Sequence[Module]) -> bytes:
    """The file."""
    starts = [(module.start, module.end, module.name) for module in modules]
    rest: dict[int, int] = {}
    table = []
    for block in blocks:
        number = next((at for at, (start, end, _) in enumerate(starts) if start <= block.start < end), None)
        if number is None:
            base = block.start - block.start % _OFFSETS
            number = rest.setdefault(base, len(modules) + len(rest))
        else:
            base = starts[number][0]
        offset, size = block.start - base, block.size
        while size > 0:
            table.append(_BLOCK.pack(offset, min(size, _LARGEST), number))
            offset, size = offset + _LARGEST, size - _LARGEST
    starts += [(base, base + _OFFSETS, _REST) for base in rest]
    header = ["DRCOV VERSION: 2", "DRCOV FLAVOR: drcov", f"Module Table: version 2, count {len(starts)}"]
    header.append("Columns: id, base, end, entry, path")
    header += [f"{number:3}, {start:#018x}, {end:#018x}, {0:#018x}, {name}" for number, (start, end, name) in
               enumerate(starts)]  # fmt: skip
    header.append(f"BB Table: {len(table)} bbs")
    return "".join(f"{line}\n" for line in header).encode("utf-8", "surrogateescape") + b"".join(table)
