"""Segment descriptors and the global descriptor table (SDM vol. 3, 3.4.5, 3.5 and 7.2.2; APM vol. 2, 4.7 and 4.8).

A descriptor in memory becomes a `Segment`, the hidden part that a segment register would hold, and back. Code, data
and protected-mode system descriptors are 8 bytes; long mode stretches TSS and LDT descriptors to 16. The gates of an
IDT are in `kvmpy.x86.gates`, task-state segments in `kvmpy.x86.task_state`.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvmpy.errors import RegisterValueError, UsageError
from kvmpy.x86.gates import Gate
from kvmpy.x86.registers import DescriptorTable, Segment

__all__ = [
    "CODE16",
    "CODE32",
    "CODE64",
    "DATA16",
    "DATA32",
    "FLAT_SEGMENTS",
    "USER_CODE32",
    "USER_CODE64",
    "USER_DATA32",
    "Gdt",
    "decode_segment",
    "encode_segment",
    "ldt_segment",
    "tss_segment",
]

_FLAT = 0xFFFF_FFFF

# Types have the accessed bit set already: a processor that loads them then needs no write to the table.
CODE16 = Segment(0, 0, 0xFFFF, type=11)
CODE32 = Segment(0, 0, _FLAT, type=11, db=1, g=1)
CODE64 = Segment(0, 0, _FLAT, type=11, l=1, g=1)
DATA16 = Segment(0, 0, 0xFFFF, type=3)
DATA32 = Segment(0, 0, _FLAT, type=3, db=1, g=1)
USER_CODE32 = CODE32.replace(dpl=3)
USER_CODE64 = CODE64.replace(dpl=3)
USER_DATA32 = DATA32.replace(dpl=3)

FLAT_SEGMENTS = {
    "code16": CODE16,
    "code32": CODE32,
    "code64": CODE64,
    "data16": DATA16,
    "data32": DATA32,
    "user_code32": USER_CODE32,
    "user_code64": USER_CODE64,
    "user_data32": USER_DATA32,
}
"""The names that `Gdt.append` takes. Long mode ignores base and limit, so data32 serves there too."""

_GATE_TYPES = (4, 5, 6, 7, 12, 14, 15)


def tss_segment(base: int, limit: int = 0x67, *, busy: bool = False, dpl: int = 0) -> Segment:
    """A 32- or 64-bit TSS whose last byte is at `limit`. LTR takes one that is not busy and marks it so."""
    return Segment(0, base, limit, type=11 if busy else 9, s=0, dpl=dpl, g=1 if limit >> 20 else 0)


def ldt_segment(base: int, limit: int) -> Segment:
    """A local descriptor table of `limit` + 1 bytes."""
    return Segment(0, base, limit, type=2, s=0, g=1 if limit >> 20 else 0)


def encode_segment(segment: Segment, *, long_mode: bool = False) -> bytes:
    """The descriptor of a segment: 8 bytes, or 16 for a system segment in long mode.

    The selector and the `unusable` mark are no part of a descriptor and are left out. Raises RegisterValueError for a
    field that does not fit (a base over 32 bits, too), UsageError for a limit that its granularity cannot express.
    """
    wide = long_mode and not segment.s
    _check("segment base", segment.base, 64 if wide else 32)
    _check("segment limit", segment.limit, 32)
    limit = segment.limit
    if segment.g:
        if limit & 0xFFF != 0xFFF:
            raise UsageError(f"a limit in 4 KiB pages ends in 0xfff; {limit:#x} does not")
        limit >>= 12
    elif limit >> 20:
        raise UsageError(f"the limit {limit:#x} needs 4 KiB granularity (g=1)")
    _check("segment type", segment.type, 4)
    _check("segment dpl", segment.dpl, 2)
    for name in ("s", "present", "avl", "l", "db", "g"):
        _check(f"segment {name}", getattr(segment, name), 1)
    access = segment.type | segment.s << 4 | segment.dpl << 5 | segment.present << 7
    flags = segment.avl | segment.l << 1 | segment.db << 2 | segment.g << 3
    base = segment.base
    value = (
        limit & 0xFFFF
        | (base & 0xFF_FFFF) << 16
        | access << 40
        | (limit >> 16) << 48
        | flags << 52
        | (base >> 24 & 0xFF) << 56
    )
    if wide:
        value |= (base >> 32) << 64
        return value.to_bytes(16, "little")
    return value.to_bytes(8, "little")


def decode_segment(data: bytes, selector: int = 0, *, long_mode: bool = False) -> Segment:
    """What a segment register would cache from a descriptor, with `selector` filled in.

    Takes the first 8 bytes of `data`, or 16 for a system descriptor in long mode. The content is not judged: it may
    not be present, or be a gate, which has other fields (`Gate.decode`). Raises UsageError when `data` is too short.
    """
    if len(data) < 8:
        raise UsageError(f"a descriptor has 8 bytes, not {len(data)}")
    value = int.from_bytes(data[:8], "little")
    access = value >> 40 & 0xFF
    flags = value >> 52 & 0xF
    base = value >> 16 & 0xFF_FFFF | (value >> 56) << 24
    limit = value & 0xFFFF | (value >> 48 & 0xF) << 16
    if flags & 8:
        limit = limit << 12 | 0xFFF
    system = not access & 0x10
    if long_mode and system and access & 0xF:  # type 0 is the null descriptor, 8 bytes like code and data
        if len(data) < 16:
            raise UsageError(f"a system descriptor in long mode has 16 bytes, not {len(data)}")
        base |= int.from_bytes(data[8:12], "little") << 32
    return Segment(
        selector,
        base,
        limit,
        type=access & 0xF,
        s=access >> 4 & 1,
        dpl=access >> 5 & 3,
        present=access >> 7,
        avl=flags & 1,
        l=flags >> 1 & 1,
        db=flags >> 2 & 1,
        g=flags >> 3,
    )


class Gdt:
    """A global descriptor table under construction. It begins with the null descriptor.

    `long_mode` makes system descriptors and call gates 16 bytes wide, which take two places.
    """

    def __init__(self, *, long_mode: bool = False) -> None:
        self.long_mode = long_mode
        self._data = bytearray(8)

    def append(self, descriptor: Segment | Gate | str | None) -> int:
        """Add a descriptor and return its selector; RPL is the DPL for code and data, 0 otherwise.

        Takes a `Segment`, a name of `FLAT_SEGMENTS`, a call or task gate, or None for an empty place. Raises
        UsageError for an unknown name or a full table (64 KiB), and as `encode_segment` does.
        """
        privilege = 0
        if descriptor is None:
            encoded = bytes(8)
        elif isinstance(descriptor, Gate):
            if descriptor.kind not in ("call", "task"):
                raise UsageError(f"an {descriptor.kind} gate belongs into an IDT, not into a GDT")
            encoded = descriptor.to_bytes()
            if len(encoded) != (16 if self.long_mode else 8):
                raise UsageError("a gate in a long-mode table is 64 bits wide, in another table 16 or 32")
        else:
            segment = self._named(descriptor) if isinstance(descriptor, str) else descriptor
            encoded = encode_segment(segment, long_mode=self.long_mode)
            privilege = segment.dpl if segment.s else 0
        selector = len(self._data)
        if selector + len(encoded) > 0x1_0000:
            raise UsageError("a descriptor table has at most 64 KiB")
        self._data += encoded
        return selector | privilege

    @staticmethod
    def _named(name: str) -> Segment:
        try:
            return FLAT_SEGMENTS[name]
        except KeyError:
            raise UsageError(f"no flat segment is named {name!r}; there are {', '.join(FLAT_SEGMENTS)}") from None

    def segment(self, selector: int) -> Segment:
        """What a register loaded with `selector` caches. A TSS comes back busy, as from LTR.

        Raises UsageError for a selector beyond the table or one that picks the LDT (bit 2).
        """
        place = selector & ~7
        if selector & 4 or not 0 <= place < len(self._data):
            raise UsageError(f"the selector {selector:#x} is not in this table of {len(self._data):#x} bytes")
        segment = decode_segment(bytes(self._data[place : place + 16]), selector, long_mode=self.long_mode)
        if not segment.s and segment.type in (1, 9):
            segment = segment.replace(type=segment.type | 2)
        return segment

    def __iter__(self) -> Iterator[tuple[int, Segment | Gate | None]]:
        """(selector without RPL, descriptor) in table order; None for an empty place."""
        place = 0
        while place + 8 <= len(self._data):
            data = bytes(self._data[place : place + 16])
            access = data[5]
            wide = self.long_mode and not access & 0x10 and access & 0xF and len(data) == 16
            if not any(data[:8]):
                yield place, None
            elif not access & 0x10 and access & 0xF in _GATE_TYPES:
                yield place, Gate.decode(data, long_mode=bool(wide))
            else:
                yield place, decode_segment(data, place, long_mode=bool(wide))
            place += 16 if wide else 8

    def to_bytes(self) -> bytes:
        """The table as it stands in memory."""
        return bytes(self._data)

    @classmethod
    def decode(cls, data: bytes, *, long_mode: bool = False) -> Gdt:
        """A table read from memory; a partial last descriptor is dropped. Raises UsageError over 64 KiB."""
        if len(data) > 0x1_0000:
            raise UsageError("a descriptor table has at most 64 KiB")
        table = cls(long_mode=long_mode)
        whole = len(data) & ~7
        table._data = bytearray(data[:whole]) if whole else bytearray(8)
        return table

    def register(self, base: int) -> DescriptorTable:
        """What GDTR holds when the table stands at linear address `base`."""
        return DescriptorTable(base, len(self._data) - 1)

    def __len__(self) -> int:
        """Size in bytes."""
        return len(self._data)

    def __repr__(self) -> str:
        return f"<Gdt {len(self._data) // 8} places{' long mode' if self.long_mode else ''}>"


def _check(what: str, value: int, bits: int) -> None:
    if not 0 <= value < 1 << bits:
        raise RegisterValueError(what, value, bits)
