"""Arithmetic on IEEE 754 singles and doubles as SSE does it: exact, then rounded once (SDM vol. 1, 4.8, 10.2.3, 11.5).

A number is its bits. An operation takes those of its operands, a `Format`, and MXCSR, and answers the bits of the
result and the exceptions that it raises, as the flags of MXCSR; the result is for the case that they are masked.
"""

from __future__ import annotations

from math import isqrt

from kvmpy.x86.emulator.x87_numbers import Format

__all__ = [
    "BEFORE_COMPUTING", "DENORMAL", "INVALID", "PRECISION", "add", "compare", "convert", "divide", "from_integer",
    "is_nan", "maximum", "minimum", "multiply", "multiply_add", "round_to_integral", "square_root", "subtract",
    "to_integer", "to_unsigned",
]  # fmt: skip

INVALID, DENORMAL, ZERO_DIVIDE, OVERFLOW, UNDERFLOW, PRECISION = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
BEFORE_COMPUTING = INVALID | DENORMAL | ZERO_DIVIDE
_DAZ, _FTZ = 1 << 6, 1 << 15
_MASK_OF = 7
"""From a flag to its mask bit."""
_NEAREST, _DOWN, _UP = 0, 1, 2

Result = tuple[int, int]
Number = tuple[bool, int, int]
"""A finite number: negative, magnitude, exponent; it is magnitude * 2^exponent."""


class _Parts:
    """What the bits say."""

    __slots__ = ("bits", "exponent", "fraction", "negative", "top")

    def __init__(self, bits: int, kind: Format, mxcsr: int) -> None:
        self.negative = bool(bits >> 8 * kind.size - 1)
        self.fraction = bits & (1 << kind.fraction) - 1
        self.exponent = bits >> kind.fraction & (1 << kind.exponent) - 1
        self.top = self.exponent == (1 << kind.exponent) - 1
        self.bits = bits
        if not self.exponent and mxcsr & _DAZ:
            self.fraction = 0
            self.bits = int(self.negative) << 8 * kind.size - 1

    @property
    def is_nan(self) -> bool:
        return self.top and self.fraction != 0

    @property
    def is_infinite(self) -> bool:
        return self.top and self.fraction == 0

    @property
    def is_zero(self) -> bool:
        return not self.exponent and not self.fraction

    @property
    def is_denormal(self) -> bool:
        return not self.exponent and self.fraction != 0

    def number(self, kind: Format) -> Number:
        """What a finite one is."""
        if not self.exponent:
            return self.negative, self.fraction, 1 - kind.bias - kind.fraction
        return self.negative, self.fraction | 1 << kind.fraction, self.exponent - kind.bias - kind.fraction


def _quiet_bit(kind: Format) -> int:
    return 1 << kind.fraction - 1


def _sign(negative: bool, kind: Format) -> int:
    return int(negative) << 8 * kind.size - 1


def _infinity(negative: bool, kind: Format) -> int:
    return _sign(negative, kind) | (1 << kind.exponent) - 1 << kind.fraction


def _indefinite(kind: Format) -> int:
    return _infinity(True, kind) | _quiet_bit(kind)


def is_nan(bits: int, kind: Format) -> bool:
    """Whether it is a NaN, quiet or signalling."""
    return bits & (1 << 8 * kind.size - 1) - 1 > _infinity(False, kind)


def _rounded(magnitude: int, shift: int, negative: bool, rounding: int) -> tuple[int, bool]:
    """`magnitude` / 2^shift as an integer, and whether that is inexact."""
    if shift <= 0:
        return magnitude << -shift, False
    whole, rest = magnitude >> shift, magnitude & (1 << shift) - 1
    if not rest:
        return whole, False
    if rounding == _NEAREST:
        half = 1 << shift - 1
        return whole + (rest > half or (rest == half and whole & 1)), True
    return whole + (rounding == (_DOWN if negative else _UP)), True


def _round(negative: bool, magnitude: int, exponent: int, kind: Format, mxcsr: int) -> Result:
    """A number that is not zero as `kind`: overflow, underflow, precision."""
    rounding = mxcsr >> 13 & 3
    sign = _sign(negative, kind)
    length = magnitude.bit_length()
    power = exponent + length - 1
    result, inexact = _rounded(magnitude, length - kind.fraction - 1, negative, rounding)
    if result >> kind.fraction + 1:
        result, power = result >> 1, power + 1
    flags = PRECISION if inexact else 0
    if power > kind.bias:
        if not mxcsr & OVERFLOW << _MASK_OF:
            return 0, OVERFLOW | flags
        away = rounding == _NEAREST or rounding == (_DOWN if negative else _UP)
        infinity = _infinity(negative, kind)
        return infinity if away else infinity - 1, OVERFLOW | PRECISION
    least = 1 - kind.bias
    if power >= least:
        return sign | (power + kind.bias << kind.fraction) + (result & (1 << kind.fraction) - 1), flags
    if not mxcsr & UNDERFLOW << _MASK_OF:
        return 0, UNDERFLOW | flags  # an exact one, too
    if mxcsr & _FTZ:
        return sign, UNDERFLOW | PRECISION
    result, inexact = _rounded(magnitude, least - kind.fraction - exponent, negative, rounding)
    return sign | result, UNDERFLOW | PRECISION if inexact else 0


def _nan_of(operands: tuple[_Parts, ...], kind: Format) -> Result | None:
    """The result when an operand is a NaN: the first such, quiet (SDM vol. 1, table 4-7)."""
    nans = [each for each in operands if each.is_nan]
    if not nans:
        return None
    quiet = _quiet_bit(kind)
    return nans[0].bits | quiet, 0 if all(each.fraction & quiet for each in nans) else INVALID


def _denormals(*operands: _Parts) -> int:
    return DENORMAL if any(each.is_denormal for each in operands) else 0


def _sum(one: Number, other: Number, kind: Format, mxcsr: int) -> Result:
    (negative, magnitude, exponent), (other_negative, other_magnitude, other_exponent) = one, other
    if not magnitude and not other_magnitude:
        if negative != other_negative:
            negative = mxcsr >> 13 & 3 == _DOWN
        return _sign(negative, kind), 0
    least = min(exponent, other_exponent)
    signed = -(magnitude << exponent - least) if negative else magnitude << exponent - least
    shifted = other_magnitude << other_exponent - least
    signed += -shifted if other_negative else shifted
    if not signed:
        return _sign(mxcsr >> 13 & 3 == _DOWN, kind), 0
    return _round(signed < 0, abs(signed), least, kind, mxcsr)


def add(first: int, second: int, kind: Format, mxcsr: int) -> Result:
    """first + second."""
    one, other = _Parts(first, kind, mxcsr), _Parts(second, kind, mxcsr)
    if one.top or other.top:
        nan = _nan_of((one, other), kind)
        if nan is not None:
            return nan
        if one.is_infinite and other.is_infinite and one.negative != other.negative:
            return _indefinite(kind), INVALID
        return (one if one.is_infinite else other).bits, _denormals(one, other)
    result, flags = _sum(one.number(kind), other.number(kind), kind, mxcsr)
    return result, flags | _denormals(one, other)


def subtract(first: int, second: int, kind: Format, mxcsr: int) -> Result:
    """first - second."""
    if not is_nan(second, kind):
        second ^= _sign(True, kind)
    return add(first, second, kind, mxcsr)


def multiply(first: int, second: int, kind: Format, mxcsr: int) -> Result:
    """first * second."""
    one, other = _Parts(first, kind, mxcsr), _Parts(second, kind, mxcsr)
    negative = one.negative != other.negative
    if one.top or other.top:
        nan = _nan_of((one, other), kind)
        if nan is not None:
            return nan
        if one.is_zero or other.is_zero:
            return _indefinite(kind), INVALID
        return _infinity(negative, kind), _denormals(one, other)
    denormal = _denormals(one, other)
    if one.is_zero or other.is_zero:
        return _sign(negative, kind), denormal
    (_, magnitude, exponent), (_, other_magnitude, other_exponent) = one.number(kind), other.number(kind)
    result, flags = _round(negative, magnitude * other_magnitude, exponent + other_exponent, kind, mxcsr)
    return result, flags | denormal


def divide(first: int, second: int, kind: Format, mxcsr: int) -> Result:
    """first / second."""
    one, other = _Parts(first, kind, mxcsr), _Parts(second, kind, mxcsr)
    negative = one.negative != other.negative
    nan = _nan_of((one, other), kind)
    if nan is not None:
        return nan
    if (one.is_infinite and other.is_infinite) or (one.is_zero and other.is_zero):
        return _indefinite(kind), INVALID
    denormal = _denormals(one, other)
    if one.is_infinite:
        return _infinity(negative, kind), denormal
    if other.is_zero:
        return _infinity(negative, kind), ZERO_DIVIDE
    if one.is_zero or other.is_infinite:
        return _sign(negative, kind), denormal
    (_, magnitude, exponent), (_, other_magnitude, other_exponent) = one.number(kind), other.number(kind)
    extra = max(0, kind.fraction + 3 - magnitude.bit_length() + other_magnitude.bit_length())
    quotient, rest = divmod(magnitude << extra, other_magnitude)
    result, flags = _round(
        negative, quotient << 1 | (rest != 0), exponent - extra - other_exponent - 1, kind, mxcsr
    )  # fmt: skip
    return result, flags | denormal


def square_root(_: int, operand: int, kind: Format, mxcsr: int) -> Result:
    """The square root of the second."""
    one = _Parts(operand, kind, mxcsr)
    nan = _nan_of((one,), kind)
    if nan is not None:
        return nan
    if one.is_zero:
        return one.bits, 0
    if one.negative:
        return _indefinite(kind), INVALID
    if one.is_infinite:
        return one.bits, 0
    _, magnitude, exponent = one.number(kind)
    extra = max(0, 2 * kind.fraction + 6 - magnitude.bit_length())
    extra += (exponent - extra) & 1
    magnitude, exponent = magnitude << extra, exponent - extra
    root = isqrt(magnitude)
    result, flags = _round(False, root << 1 | (root * root != magnitude), exponent // 2 - 1, kind, mxcsr)
    return result, flags | _denormals(one)


def multiply_add(first: int, second: int, third: int, kind: Format, mxcsr: int) -> Result:
    """first * second + third, rounded once."""
    one, other, added = (_Parts(each, kind, mxcsr) for each in (first, second, third))
    negative = one.negative != other.negative
    if one.top or other.top or added.top:
        nan = _nan_of((one, other, added), kind)
        if nan is not None:
            return nan
        if one.top or other.top:
            if one.is_zero or other.is_zero or (added.is_infinite and added.negative != negative):
                return _indefinite(kind), INVALID
            return _infinity(negative, kind), _denormals(one, other, added)
        return added.bits, _denormals(one, other, added)
    (_, magnitude, exponent), (_, other_magnitude, other_exponent) = one.number(kind), other.number(kind)
    product = negative, magnitude * other_magnitude, exponent + other_exponent
    result, flags = _sum(product, added.number(kind), kind, mxcsr)
    return result, flags | _denormals(one, other, added)


def _place(parts: _Parts, kind: Format) -> int:
    """An integer that is in the order of the numbers: the bits without the sign are."""
    magnitude = parts.bits & (1 << 8 * kind.size - 1) - 1
    return -magnitude if parts.negative else magnitude


def compare(first: int, second: int, kind: Format, mxcsr: int, *, signals: bool) -> tuple[int | None, int]:
    """-1, 0 or 1, None for unordered, and the exceptions; `signals`: a quiet NaN is invalid, too."""
    one, other = _Parts(first, kind, mxcsr), _Parts(second, kind, mxcsr)
    nan = _nan_of((one, other), kind)
    if nan is not None:
        return None, INVALID if signals else nan[1]
    here, there = _place(one, kind), _place(other, kind)
    return (here > there) - (here < there), _denormals(one, other)


def _chosen(first: int, second: int, kind: Format, mxcsr: int, wanted: int) -> Result:
    order, flags = compare(first, second, kind, mxcsr, signals=True)
    return _Parts(first if order == wanted else second, kind, mxcsr).bits, flags


def minimum(first: int, second: int, kind: Format, mxcsr: int) -> Result:
    """The smaller one; the second when they are equal, or one is a NaN."""
    return _chosen(first, second, kind, mxcsr, -1)


def maximum(first: int, second: int, kind: Format, mxcsr: int) -> Result:
    """The larger one; the second when they are equal, or one is a NaN."""
    return _chosen(first, second, kind, mxcsr, 1)


# Conversions


def convert(bits: int, kind: Format, target: Format, mxcsr: int) -> Result:
    """A number of one format as another."""
    one = _Parts(bits, kind, mxcsr)
    if one.is_nan:
        widened = target.fraction - kind.fraction
        fraction = (one.fraction | _quiet_bit(kind)) << widened if widened > 0 else one.fraction >> -widened
        quiet = _quiet_bit(target)
        result = _infinity(one.negative, target) | fraction | quiet
        return result, 0 if one.fraction & _quiet_bit(kind) else INVALID
    if one.is_infinite:
        return _infinity(one.negative, target), 0
    if one.is_zero:
        return _sign(one.negative, target), 0
    result, flags = _round(*one.number(kind), target, mxcsr)
    return result, flags | _denormals(one)


def from_integer(value: int, kind: Format, mxcsr: int) -> Result:
    """A signed integer as a number."""
    return _round(value < 0, abs(value), 0, kind, mxcsr) if value else (0, 0)


def to_integer(bits: int, kind: Format, size: int, mxcsr: int, *, truncates: bool) -> Result:
    """A number as a signed integer of `size` bytes, in two's complement; what does not fit is the least one."""
    one = _Parts(bits, kind, mxcsr)
    least = 1 << 8 * size - 1
    if one.top:
        return least, INVALID
    negative, magnitude, exponent = one.number(kind)
    if exponent > 64:
        return least, INVALID
    whole, inexact = _rounded(magnitude, -exponent, negative, 3 if truncates else mxcsr >> 13 & 3)
    if whole > least - (not negative):
        return least, INVALID
    return (-whole if negative else whole) & 2 * least - 1, PRECISION if inexact else 0


def to_unsigned(bits: int, kind: Format, size: int, mxcsr: int, *, truncates: bool) -> Result:
    """A number as an unsigned integer of `size` bytes; what does not fit is the largest one."""
    one = _Parts(bits, kind, mxcsr)
    largest = (1 << 8 * size) - 1
    if one.top:
        return largest, INVALID
    negative, magnitude, exponent = one.number(kind)
    if exponent > 64:
        return largest, INVALID
    whole, inexact = _rounded(magnitude, -exponent, negative, 3 if truncates else mxcsr >> 13 & 3)
    if whole > largest or (negative and whole):
        return largest, INVALID
    return whole, PRECISION if inexact else 0


def round_to_integral(bits: int, kind: Format, mxcsr: int, control: int, scale: int = 0) -> Result:
    """A number rounded to a multiple of 2^-scale; `control` are the lowest bits of the immediate of ROUNDPS."""
    one = _Parts(bits, kind, mxcsr)
    nan = _nan_of((one,), kind)
    if nan is not None:
        return nan
    negative, magnitude, exponent = one.number(kind)
    if one.top or exponent + scale >= 0 or one.is_zero:
        return one.bits, 0
    rounding = mxcsr >> 13 & 3 if control & 4 else control & 3
    whole, inexact = _rounded(magnitude, -exponent - scale, negative, rounding)
    flags = PRECISION if inexact and not control & 8 else 0
    if not whole:
        return _sign(negative, kind), flags
    return _round(negative, whole, -scale, kind, mxcsr)[0], flags
