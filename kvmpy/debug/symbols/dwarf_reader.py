"""The numbers and strings of DWARF (version 5, chapter 7), read one after the other and checked."""

from __future__ import annotations

from kvmpy.errors import ImageError

__all__ = ["DwarfReader", "StringTable"]

_LEB128_LIMIT = 16
_STRING_LIMIT = 4096
"""Paths are not longer: PATH_MAX."""


class DwarfReader:
    """Reads `data` from `at` up to `end`; raises ImageError that says where, when something goes past the end.

    `section` and `image` are what the error calls the data and the file.
    """

    __slots__ = ("_data", "_image", "_section", "at", "end")

    def __init__(self, data: bytes, at: int, end: int, section: str, image: str) -> None:
        self._data = data
        self._section = section
        self._image = image
        self.at = at
        self.end = min(end, len(data))

    def refusal(self, message: str) -> ImageError:
        """The error that says `message` about the place where the reader is."""
        return ImageError(f"{self._section} at {self.at:#x}: {message}", self._image)

    @property
    def left(self) -> int:
        """The number of bytes up to the end."""
        return self.end - self.at

    def skip(self, count: int) -> None:
        """Pass over `count` bytes."""
        if not 0 <= count <= self.left:
            raise self.refusal(f"{count:#x} bytes are expected, {self.left:#x} are left")
        self.at += count

    def data(self, start: int, end: int) -> bytes:
        """The bytes between two places that the reader has passed."""
        return self._data[start:end]

    def number(self, size: int) -> int:
        """An unsigned number of `size` bytes."""
        at = self.at
        self.skip(size)
        return int.from_bytes(self._data[at : self.at], "little")

    def signed(self, size: int) -> int:
        """A signed number of `size` bytes."""
        value = self.number(size)
        return value - (1 << 8 * size) if value >> 8 * size - 1 else value

    def uleb128(self) -> int:
        """An unsigned LEB128 number, at most 16 bytes long."""
        value = shift = 0
        for at in range(self.at, min(self.at + _LEB128_LIMIT, self.end)):
            byte = self._data[at]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                self.at = at + 1
                return value
            shift += 7
        raise self.refusal("a LEB128 number does not end")

    def sleb128(self) -> int:
        """A signed LEB128 number, at most 16 bytes long."""
        start = self.at
        value = self.uleb128()
        bits = 7 * (self.at - start)
        return value - (1 << bits) if value >> bits - 1 else value

    def string(self) -> str:
        """A string that ends with NUL, of at most 4,096 bytes."""
        end = self._data.find(b"\0", self.at, min(self.end, self.at + _STRING_LIMIT + 1))
        if end < 0:
            raise self.refusal("a string does not end")
        text = self._data[self.at : end].decode("utf-8", "replace")
        self.at = end + 1
        return text


class StringTable:
    """The strings of .debug_str or .debug_line_str, by their offsets."""

    def __init__(self, data: bytes, section: str, image: str) -> None:
        self._data = data
        self._section = section
        self._image = image
        self._read: dict[int, str] = {}
        # A string may be the tail of another one, but a table of a million tails of a long one would fill the memory.
        self._budget = 4 * len(data)

    def at(self, offset: int) -> str:
        """The string at `offset`. Raises ImageError."""
        text = self._read.get(offset)
        if text is None:
            reader = DwarfReader(self._data, offset, len(self._data), self._section, self._image)
            text = self._read[offset] = reader.string()
            self._budget -= len(text)
            if self._budget < 0:
                raise reader.refusal("the strings overlap too much to be names")
        return text
