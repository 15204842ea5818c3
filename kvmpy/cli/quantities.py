"""Numbers on the command line: sizes with a suffix, addresses, seconds."""

import argparse

__all__ = ["address", "count", "duration", "place", "seconds", "size"]

_SUFFIXES = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_INFINITY = float("inf")
_TIMES = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}


def size(text: str) -> int:
    """Bytes: a number with K, M, G or T (powers of 1024; KiB, kb ... mean the same), decimal or 0x."""
    digits = text.strip()
    suffix = ""
    if not digits.lower().startswith("0x"):
        digits = digits.rstrip("BbIi")
        if digits[-1:].upper() in "KMGT":
            digits, suffix = digits[:-1], digits[-1:].upper()
    try:
        number = int(digits, 0)
    except ValueError:
        number = -1
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it as 16M, 512K, 2G or 0x100000")
    return number << _SUFFIXES[suffix]


def address(text: str) -> int:
    """A guest address: hexadecimal with 0x, else decimal."""
    try:
        number = int(text, 0)
    except ValueError:
        number = -1
    if not 0 <= number < 1 << 64:
        raise argparse.ArgumentTypeError(f"{text!r} is no address; write it as 0x7c00")
    return number


def count(text: str) -> int:
    """A number of things, at least one."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return number


def seconds(text: str) -> float:
    """A time in seconds, more than 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < _INFINITY:  # nan is neither
        raise argparse.ArgumentTypeError(f"{text!r} is no time in seconds above 0")
    return number


def duration(text: str) -> float:
    """A short time, in seconds: a number with ns, us, ms or s."""
    unit = next((unit for unit in _TIMES if text.endswith(unit)), "s")
    try:
        time = float(text.removesuffix(unit)) * _TIMES[unit]
    except ValueError:
        time = -1.0
    if not 0 <= time < _INFINITY:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write it as 50us, 2ms or 0.1s")
    return time


def place(text: str) -> range:
    """An address, or all from one to another: 0x3f8-0x3ff."""
    first, _, last = text.partition("-")
    begin = address(first)
    end = address(last) if last else begin
    if end < begin:
        raise argparse.ArgumentTypeError(f"{text!r} ends before it begins")
    return range(begin, end + 1)
