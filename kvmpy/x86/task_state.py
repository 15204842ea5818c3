"""Task-state segments and the I/O permission bitmap (SDM vol. 3, 7.2.1 and 7.7; vol. 1, 18.5.2; APM vol. 2, 12.2)."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import ClassVar

from kvmpy._value import mutable
from kvmpy.errors import RegisterValueError, UsageError

__all__ = ["ALL_PORTS", "IoBitmap", "Tss32", "Tss64"]

ALL_PORTS = ((0, 0x1_0000),)
"""(first port, count) pairs that grant every port."""

_PORTS = 0x1_0000
TSS_SIZE = 0x68
"""Bytes of a 32- or 64-bit TSS before its I/O bitmap."""


class IoBitmap:
    """Which ports code may use whose CPL exceeds IOPL: one bit per port, 0 allows. All are denied at first."""

    __slots__ = ("_bits",)

    def __init__(self, ports: Iterable[tuple[int, int]] = ()) -> None:
        """`ports` are (first port, count) pairs to allow."""
        self._bits = bytearray(b"\xff" * (_PORTS // 8))
        for port, count in ports:
            self.allow(port, count)

    def allow(self, port: int, count: int = 1) -> None:
        """Grant `count` ports from `port` on. Raises UsageError for a range outside 0 to 0xFFFF."""
        mask = self._mask(port, count)
        self._set(self._value() & ~mask)

    def deny(self, port: int, count: int = 1) -> None:
        """Take back `count` ports from `port` on. Raises UsageError for a range outside 0 to 0xFFFF."""
        self._set(self._value() | self._mask(port, count))

    def allowed(self, port: int, count: int = 1) -> bool:
        """Whether an access of `count` bytes at `port` passes; all its ports must be granted."""
        return not self._value() & self._mask(port, count)

    def to_bytes(self) -> bytes:
        """0x2001 bytes: the bitmap and the byte of ones that must follow it, for the processor reads two."""
        return bytes(self._bits) + b"\xff"

    @classmethod
    def decode(cls, data: bytes) -> IoBitmap:
        """A bitmap read from memory; ports beyond its end are denied, as are those whose bit is in the last byte.

        The processor reads two bytes for every access, so a port needs the byte after its own inside the segment.
        """
        bitmap = cls()
        present = data[: max(len(data) - 1, 0)][: _PORTS // 8]
        bitmap._bits[: len(present)] = present
        return bitmap

    @staticmethod
    def _mask(port: int, count: int) -> int:
        if count < 1 or port < 0 or port + count > _PORTS:
            raise UsageError(f"{count} ports from {port:#x} on are not within 0 to 0xffff")
        return ((1 << count) - 1) << port

    def _value(self) -> int:
        return int.from_bytes(self._bits, "little")

    def _set(self, value: int) -> None:
        self._bits[:] = value.to_bytes(_PORTS // 8, "little")

    def __eq__(self, other: object) -> bool:
        return self._bits == other._bits if isinstance(other, IoBitmap) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<IoBitmap {_PORTS - self._value().bit_count()} ports allowed>"


_Layout = tuple[tuple[str, int, str], ...]

_TSS64_LAYOUT: _Layout = (
    *((f"rsp{ring}", 0x04 + 8 * ring, "Q") for ring in range(3)),
    *((f"ist{number}", 0x1C + 8 * number, "Q") for number in range(1, 8)),
)
# Every field takes four bytes, selectors the lower two; `trap` shares its four with the bitmap base (figure 7-2).
_TSS32_FIELDS = (
    "link", "esp0", "ss0", "esp1", "ss1", "esp2", "ss2", "cr3", "eip", "eflags", "eax", "ecx", "edx", "ebx", "esp",
    "ebp", "esi", "edi", "es", "cs", "ss", "ds", "fs", "gs", "ldt", "trap",
)  # fmt: skip
_TSS32_WORDS = {"link", "ss0", "ss1", "ss2", "es", "cs", "ss", "ds", "fs", "gs", "ldt", "trap"}
_TSS32_LAYOUT: _Layout = tuple(
    (name, 4 * place, "H" if name in _TSS32_WORDS else "I") for place, name in enumerate(_TSS32_FIELDS)
)


class _TaskState:
    """What both forms share: packing by a table of (field, offset, struct code)."""

    _layout: ClassVar[_Layout]
    io_bitmap: IoBitmap | None

    def to_bytes(self) -> bytes:
        """0x68 bytes, or 0x2069 with an I/O bitmap. Raises RegisterValueError for a field that does not fit."""
        data = bytearray(TSS_SIZE)
        for name, offset, code in self._layout:
            value = getattr(self, name)
            bits = 8 * struct.calcsize("<" + code)
            if not 0 <= value < 1 << bits:
                raise RegisterValueError(f"tss {name}", value, bits)
            struct.pack_into("<" + code, data, offset, value)
        # Without a bitmap its base is put past the limit: then every port is denied (SDM vol. 1, 18.5.2).
        struct.pack_into("<H", data, 0x66, TSS_SIZE)
        return bytes(data) + (self.io_bitmap.to_bytes() if self.io_bitmap is not None else b"")

    @property
    def limit(self) -> int:
        """The segment limit for its descriptor: the offset of the last byte."""
        return TSS_SIZE + _PORTS // 8 if self.io_bitmap is not None else TSS_SIZE - 1

    def allow(self, port: int, count: int = 1) -> None:
        """Grant `count` I/O ports from `port` on; the first call brings the bitmap. See `IoBitmap.allow`."""
        bitmap = self.io_bitmap if self.io_bitmap is not None else IoBitmap()
        bitmap.allow(port, count)
        self.io_bitmap = bitmap

    @classmethod
    def _fields(cls, data: bytes) -> dict[str, int]:
        if len(data) < TSS_SIZE:
            raise UsageError(f"a TSS has {TSS_SIZE:#x} bytes, not {len(data):#x}")
        return {name: struct.unpack_from("<" + code, data, offset)[0] for name, offset, code in cls._layout}

    @staticmethod
    def _bitmap(data: bytes) -> IoBitmap | None:
        base: int = struct.unpack_from("<H", data, 0x66)[0]
        return IoBitmap.decode(data[base:]) if base < len(data) else None


@mutable
class Tss64(_TaskState):
    """The TSS of long mode: stacks for rings 0 to 2, seven interrupt stacks, the I/O bitmap."""

    rsp0: int = 0
    rsp1: int = 0
    rsp2: int = 0
    ist1: int = 0
    ist2: int = 0
    ist3: int = 0
    ist4: int = 0
    ist5: int = 0
    ist6: int = 0
    ist7: int = 0
    io_bitmap: IoBitmap | None = None

    _layout = _TSS64_LAYOUT

    @classmethod
    def decode(cls, data: bytes) -> Tss64:
        """A TSS read from memory, `data` being all bytes up to its limit. Raises UsageError under 0x68 bytes."""
        return cls(**cls._fields(data), io_bitmap=cls._bitmap(data))


@mutable
class Tss32(_TaskState):
    """The 32-bit TSS: stacks for rings 0 to 2, the saved state of a task, the I/O bitmap."""

    link: int = 0
    esp0: int = 0
    ss0: int = 0
    esp1: int = 0
    ss1: int = 0
    esp2: int = 0
    ss2: int = 0
    cr3: int = 0
    eip: int = 0
    eflags: int = 2
    eax: int = 0
    ecx: int = 0
    edx: int = 0
    ebx: int = 0
    esp: int = 0
    ebp: int = 0
    esi: int = 0
    edi: int = 0
    es: int = 0
    cs: int = 0
    ss: int = 0
    ds: int = 0
    fs: int = 0
    gs: int = 0
    ldt: int = 0
    trap: int = 0
    io_bitmap: IoBitmap | None = None

    _layout = _TSS32_LAYOUT

    @classmethod
    def decode(cls, data: bytes) -> Tss32:
        """A TSS read from memory, `data` being all bytes up to its limit. Raises UsageError under 0x68 bytes."""
        return cls(**cls._fields(data), io_bitmap=cls._bitmap(data))
