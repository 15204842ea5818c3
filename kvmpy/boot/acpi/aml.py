"""ACPI Machine Language (ACPI 6.5, chapter 20), as far as a table of devices needs it.

Every function answers the bytes of one object, by the name that ACPI's source language (ASL) has for it, in small
letters; so a tree of calls reads as the ASL does. Values may be given as numbers, strings and bytes:

    device("COM1", name("_HID", eisa_id("PNP0501")), name("_UID", 1))
"""

from __future__ import annotations

from kvmpy.errors import UsageError

__all__ = ["Value", "buffer", "device", "eisa_id", "integer", "method", "name", "name_string", "package", "scope"]

Value = int | str | bytes
"""A number, a string, or the bytes of an object made here."""

_ZERO, _ONE = 0x00, 0x01
_NAME_OP, _SCOPE_OP, _BUFFER_OP, _PACKAGE_OP, _METHOD_OP = 0x08, 0x10, 0x11, 0x12, 0x14
_STRING_PREFIX, _DUAL_NAME_PREFIX, _MULTI_NAME_PREFIX = 0x0D, 0x2E, 0x2F
_DEVICE_OP = b"\x5b\x82"
_INTEGER_PREFIXES = ((1, 0x0A), (2, 0x0B), (4, 0x0C), (8, 0x0E))


def name_string(path: str) -> bytes:
    r"""A path of names (20.2.2), such as "COM1", "\\_SB" or "\\_SB.PCI0"."""
    names = path.lstrip("\\^")
    prefix = path[: len(path) - len(names)]
    segments = names.split(".") if names else []
    for segment in segments:
        if not (1 <= len(segment) <= 4 and segment.isascii() and segment.isidentifier() and segment.upper() == segment):
            raise UsageError(
                f"{segment!r} in {path!r} is no name of ACPI: up to four of A-Z, 0-9 and _, no digit first"
            )
    padded = b"".join(segment.ljust(4, "_").encode() for segment in segments)
    match len(segments):
        case 0:
            kind = b"" if prefix else bytes([_ZERO])
        case 1:
            kind = b""
        case 2:
            kind = bytes([_DUAL_NAME_PREFIX])
        case count:
            kind = bytes([_MULTI_NAME_PREFIX, count])
    return prefix.encode() + kind + padded


def package_length(content: int) -> bytes:
    """The length of an object's rest, with the length of this field itself (20.2.4)."""
    if content + 1 < 1 << 6:
        return bytes([content + 1])
    for following in (1, 2, 3):
        total = content + 1 + following
        if total < 1 << 4 + 8 * following:
            return bytes([following << 6 | total & 0xF]) + (total >> 4).to_bytes(following, "little")
    raise UsageError(f"an object of {content:#x} bytes is too large for AML")


def integer(value: int) -> bytes:
    """The shortest constant (20.2.3) that is `value`, of up to 64 bits."""
    if value in (_ZERO, _ONE):
        return bytes([value])
    for size, prefix in _INTEGER_PREFIXES:
        if 0 <= value < 1 << 8 * size:
            return bytes([prefix]) + value.to_bytes(size, "little")
    raise UsageError(f"{value:#x} does not fit an integer of ACPI, which has 64 bits and no sign")


def _encode(value: Value) -> bytes:
    if isinstance(value, int):
        return integer(value)
    if isinstance(value, str):
        return bytes([_STRING_PREFIX]) + value.encode("ascii") + b"\0"
    return value


def _object(opcode: bytes, content: bytes) -> bytes:
    return opcode + package_length(len(content)) + content


def name(path: str, value: Value) -> bytes:
    """Name (path, value)"""
    return bytes([_NAME_OP]) + name_string(path) + _encode(value)


def scope(path: str, *content: bytes) -> bytes:
    """Scope (path) {content}"""
    return _object(bytes([_SCOPE_OP]), name_string(path) + b"".join(content))


def device(path: str, *content: bytes) -> bytes:
    """Device (path) {content}"""
    return _object(_DEVICE_OP, name_string(path) + b"".join(content))


def method(path: str, arguments: int, *content: bytes) -> bytes:
    """Method (path, arguments) {content}"""
    return _object(bytes([_METHOD_OP]), name_string(path) + bytes([arguments]) + b"".join(content))


def package(*elements: Value) -> bytes:
    """Package () {elements}"""
    return _object(bytes([_PACKAGE_OP]), bytes([len(elements)]) + b"".join(map(_encode, elements)))


def buffer(data: bytes) -> bytes:
    """Buffer () {data}"""
    return _object(bytes([_BUFFER_OP]), integer(len(data)) + data)


def eisa_id(text: str) -> int:
    """EisaId (text): a compressed identifier such as "PNP0501" (19.6.36)."""
    letters = 0
    for letter in text[:3]:
        letters = letters << 5 | ord(letter) - 0x40 & 0x1F
    return int.from_bytes((letters << 16 | int(text[3:], 16)).to_bytes(4, "big"), "little")
