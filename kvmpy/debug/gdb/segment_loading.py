"""What a segment register caches when a debugger puts a selector into it (SDM vol. 3, 3.4 and 21.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from kvmpy.debug.gdb.target import TargetError
from kvmpy.x86.descriptors import decode_segment
from kvmpy.x86.flags import Cr0, Efer, Rflags
from kvmpy.x86.registers import DescriptorTable, Segment

__all__ = ["load_segment"]

_LDT = 4
"""Selector bit TI: the local table."""


class _System(Protocol):
    @property
    def cr0(self) -> int: ...
    @property
    def efer(self) -> int: ...
    @property
    def gdt(self) -> DescriptorTable: ...
    @property
    def ldt(self) -> Segment: ...


def load_segment(
    old: Segment, selector: int, sregs: _System, rflags: int, read: Callable[[int, int], bytes]
) -> Segment:
    """The segment register `old` after `selector` was put into it; `read(linear, length)` gives guest memory.

    In real and virtual-8086 mode the base is 16 times the selector. Elsewhere it comes from the descriptor tables, and
    no privilege is checked. Raises TargetError when there is no descriptor that is present.
    """
    if not 0 <= selector < 1 << 16:
        raise TargetError(f"a selector has 16 bits; {selector:#x} does not fit")
    if not sregs.cr0 & Cr0.PE or rflags & Rflags.VM:
        return old.replace(selector=selector, base=selector << 4)
    if selector < _LDT:  # the null selector
        return Segment(selector, 0, 0, type=0, present=0, s=old.s, unusable=1)
    long_mode = bool(sregs.efer & Efer.LMA)
    table, limit = (sregs.ldt.base, sregs.ldt.limit) if selector & _LDT else (sregs.gdt.base, sregs.gdt.limit)
    size = 16 if long_mode and not old.s else 8
    place = selector & ~7
    if place + size - 1 > limit:
        raise TargetError(f"selector {selector:#x} is beyond the limit {limit:#x} of its descriptor table")
    segment = decode_segment(read(table + place, size), selector, long_mode=size == 16)
    if not segment.present or segment.s != old.s:
        raise TargetError(f"the descriptor of selector {selector:#x} is not one that this register takes: {segment!r}")
    if not segment.s and segment.type in (1, 9):  # LTR marks a TSS busy
        segment = segment.replace(type=segment.type | 2)
    return segment
