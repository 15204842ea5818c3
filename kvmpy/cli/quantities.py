"""Numbers on the command line: sizes with a suffix, addresses, seconds."""

import argparse
import math

__all__ = ["address", "count", "seconds", "size"]

_SUFFIXES = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


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
    if not 0 < number < math.inf:  # nan is neither
        raise argparse.ArgumentTypeError(f"{text!r} is no time in seconds above 0")
    return number
