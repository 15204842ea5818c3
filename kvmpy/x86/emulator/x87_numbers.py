"""80-bit floating-point numbers from and to the formats that x87 loads and stores (SDM vol. 1, 4.2.2, 4.8, 8.2, 8.5).

An 80-bit number is an int: bit 79 sign, 78 to 64 exponent, 63 to 0 significand with its explicit integer bit.
"""

from __future__ import annotations

from kvmpy.x86.emulator.x87_stack import C1, DENORMAL, INDEFINITE, INVALID, OVERFLOW, PRECISION, UNDERFLOW

__all__ = ["DOUBLE", "SINGLE", "Format", "from_binary", "from_integer", "rounded", "tag", "to_binary", "to_integer"]

_BIAS, _MAX = 0x3FFF, 0x7FFF
_INTEGER_BIT, _QUIET = 1 << 63, 1 << 62
_NEAREST, _DOWN, _UP = 0, 1, 2  # FCW.RC; 3 is towards zero


class Format:
    """An IEEE 754 format: `size` in bytes, bits of exponent and of fraction."""

    __slots__ = ("bias", "exponent", "fraction", "size")

    def __init__(self, size: int, exponent: int, fraction: int) -> None:
        self.size = size
        self.exponent = exponent
        self.fraction = fraction
        self.bias = (1 << exponent - 1) - 1


SINGLE, DOUBLE = Format(4, 8, 23), Format(8, 11, 52)


def from_integer(value: int) -> int:
    """An integer of up to 64 bits, exactly."""
    if not value:
        return 0
    sign, magnitude = (1 << 79 if value < 0 else 0), abs(value)
    shift = 64 - magnitude.bit_length()
    return sign | _BIAS + 63 - shift << 64 | magnitude << shift


def from_binary(bits: int, kind: Format) -> tuple[int, int]:
    """A single or double as 80 bits, and the exceptions that loading it raises."""
    fraction = bits & (1 << kind.fraction) - 1
    exponent = bits >> kind.fraction & (1 << kind.exponent) - 1
    sign = bits >> 8 * kind.size - 1 << 79
    significand = fraction << 63 - kind.fraction
    if exponent == (1 << kind.exponent) - 1:
        value = sign | _MAX << 64 | _INTEGER_BIT | significand
        if fraction and not significand & _QUIET:
            return value | _QUIET, INVALID
        return value, 0
    if exponent:
        return sign | exponent - kind.bias + _BIAS << 64 | _INTEGER_BIT | significand, 0
    if not fraction:
        return sign, 0
    shift = 64 - significand.bit_length()
    return sign | 1 - kind.bias + _BIAS - shift << 64 | significand << shift, DENORMAL


def _is_unsupported(exponent: int, significand: int) -> bool:
    """Unnormals, pseudo-infinities, pseudo-NaNs (SDM vol. 1, table 8-3)."""
    return exponent != 0 and not significand & _INTEGER_BIT


def tag(value: int) -> int:
    """The two bits of the full tag word for a register that is not empty: valid 0, zero 1, special 2."""
    exponent, significand = value >> 64 & _MAX, value & (1 << 64) - 1
    if not exponent and not significand:
        return 1
    return 0 if exponent not in (0, _MAX) and significand & _INTEGER_BIT else 2


def rounded(magnitude: int, shift: int, negative: bool, rounding: int) -> tuple[int, bool, bool]:
    """`magnitude` / 2^shift as an integer by FCW.RC: the integer, whether that is inexact, whether it is larger."""
    if shift <= 0:
        return magnitude << -shift, False, False
    whole, rest = magnitude >> shift, magnitude & (1 << shift) - 1
    if not rest:
        return whole, False, False
    half = 1 << shift - 1
    if rounding == _NEAREST:
        up = rest > half or (rest == half and whole & 1 == 1)
    else:
        up = rounding == (_DOWN if negative else _UP)
    return whole + up, True, up


def to_binary(value: int, kind: Format, control: int) -> tuple[int, int]:
    """An 80-bit number as a single or double by FCW, and the flags for FSW: exceptions, and C1 when rounded up.

    The number counts only when FCW masks the exceptions; precision leaves it valid in any case.
    """
    negative, exponent, significand = bool(value >> 79), value >> 64 & _MAX, value & (1 << 64) - 1
    sign = int(negative) << 8 * kind.size - 1
    infinity = sign | (1 << kind.exponent) - 1 << kind.fraction
    quiet = 1 << kind.fraction - 1
    if _is_unsupported(exponent, significand):
        return 1 << 8 * kind.size - 1 | infinity | quiet, INVALID
    if exponent == _MAX:
        fraction = significand & _INTEGER_BIT - 1
        if not fraction:
            return infinity, 0
        return infinity | quiet | fraction >> 63 - kind.fraction, 0 if significand & _QUIET else INVALID
    if not significand:
        return sign, 0
    power = max(exponent, 1) - _BIAS  # of the integer bit
    lead = significand.bit_length() - 64
    significand, power = significand << -lead, power + lead
    rounding = control >> 10 & 3
    result, inexact, up = rounded(significand, 63 - kind.fraction, negative, rounding)
    flags = (PRECISION if inexact else 0) | (C1 if up else 0)
    if result >> kind.fraction + 1:
        result, rounded_power = result >> 1, power + 1
    else:
        rounded_power = power
    if rounded_power > kind.bias:
        if not control & OVERFLOW:  # nothing is stored
            return 0, OVERFLOW
        largest = infinity - 1
        away = rounding == _NEAREST or rounding == (_DOWN if negative else _UP)
        return (infinity if away else largest), OVERFLOW | PRECISION | (C1 if away else 0)
    least = 1 - kind.bias
    if rounded_power >= least:
        return sign | (rounded_power + kind.bias << kind.fraction) + (result & (1 << kind.fraction) - 1), flags
    # Tiny: denormal, or zero.
    if not control & UNDERFLOW:
        return 0, UNDERFLOW  # exact results underflow only when that is not masked
    result, inexact, up = rounded(significand, 63 - kind.fraction + least - power, negative, rounding)
    return sign | result, (PRECISION | UNDERFLOW if inexact else 0) | (C1 if up else 0)


def to_integer(value: int, size: int, rounding: int) -> tuple[int, int]:
    """An 80-bit number as a signed integer of `size` bytes, in two's complement, and the flags for FSW."""
    negative, exponent, significand = bool(value >> 79), value >> 64 & _MAX, value & (1 << 64) - 1
    bits = 8 * size
    indefinite = 1 << bits - 1
    if exponent == _MAX or _is_unsupported(exponent, significand) or exponent > _BIAS + 64:
        return indefinite, INVALID
    whole, inexact, up = rounded(significand, _BIAS + 63 - max(exponent, 1), negative, rounding)
    if whole > indefinite - (not negative):
        return indefinite, INVALID
    return (-whole if negative else whole) & (1 << bits) - 1, (PRECISION if inexact else 0) | (C1 if up else 0)


assert INDEFINITE >> 64 == 0xFFFF
