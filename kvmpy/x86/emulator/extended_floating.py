"""Arithmetic on 80-bit numbers as x87 does it: exact, then rounded once (SDM vol. 1, 4.8, 8.1.5, 8.4, 8.5).

A number is an int as in `kvmpy.x86.emulator.x87_numbers`. An operation takes those of its operands and FCW, and answers
the result and flags for FSW: exceptions, and C1 when it was rounded up. The result of INVALID, DENORMAL or ZERO_DIVIDE
counts only when FCW masks it; that of the others always.
"""

from __future__ import annotations

from math import isqrt

from kvmpy.x86.emulator.x87_numbers import rounded
from kvmpy.x86.emulator.x87_stack import (
    C1,
    C2,
    DENORMAL,
    INDEFINITE,
    INVALID,
    OVERFLOW,
    PRECISION,
    UNDERFLOW,
    ZERO_DIVIDE,
)

__all__ = [
    "Operand", "add", "compare", "divide", "extract", "multiply", "remainder", "round_to_integral", "scale",
    "square_root", "subtract",
]  # fmt: skip

_BIAS, _MAX = 0x3FFF, 0x7FFF
_INTEGER_BIT, _QUIET, _SIGN = 1 << 63, 1 << 62, 1 << 79
_INFINITY = _MAX << 64 | _INTEGER_BIT
_LEAST, _MOST = 1 - _BIAS, _BIAS
"""Powers of two of the smallest and the largest normal number."""
_WRAP = 24576
"""What the exponent is changed by when overflow or underflow is not masked."""
_NEAREST, _DOWN, _UP, _TRUNCATE = 0, 1, 2, 3
_BITS = {0: 24, 1: 64, 2: 53, 3: 64}
"""FCW.PC; 1 is reserved."""

Result = tuple[int, int]
Number = tuple[bool, int, int]
"""A finite number: negative, magnitude, exponent; it is magnitude * 2^exponent."""


class Operand:
    """An 80-bit number, looked at."""

    __slots__ = ("bits", "exponent", "negative", "significand", "unsupported")

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.negative = bool(bits >> 79)
        self.exponent = bits >> 64 & _MAX
        self.significand = bits & (1 << 64) - 1
        self.unsupported = self.exponent != 0 and not self.significand & _INTEGER_BIT

    @property
    def is_nan(self) -> bool:
        return self.exponent == _MAX and self.significand > _INTEGER_BIT

    @property
    def is_signalling(self) -> bool:
        return self.is_nan and not self.significand & _QUIET

    @property
    def is_infinite(self) -> bool:
        return self.exponent == _MAX and self.significand == _INTEGER_BIT

    @property
    def is_zero(self) -> bool:
        return not self.exponent and not self.significand

    @property
    def is_denormal(self) -> bool:
        """Pseudo-denormals, with the integer bit set, too."""
        return not self.exponent and self.significand != 0

    @property
    def number(self) -> Number:
        """What a finite one is."""
        return self.negative, self.significand, max(self.exponent, 1) - _BIAS - 63


def _signed(negative: bool, bits: int) -> int:
    return bits | _SIGN if negative else bits


def _round(negative: bool, magnitude: int, exponent: int, control: int, bits: int = 0) -> Result:
    """A number that is not zero, to as many bits as FCW.PC says, or to `bits`."""
    rounding, bits = control >> 10 & 3, bits or _BITS[control >> 8 & 3]
    length = magnitude.bit_length()
    power, shift = exponent + length - 1, length - bits
    result, inexact, up = rounded(magnitude, shift, negative, rounding)
    if result >> bits:
        result, power = result >> 1, power + 1
    flags = (PRECISION if inexact else 0) | (C1 if up else 0)
    if power > _MOST:
        if control & OVERFLOW:
            away = rounding == _NEAREST or rounding == (_DOWN if negative else _UP)
            largest = _MAX - 1 << 64 | (1 << bits) - 1 << 64 - bits
            return _signed(negative, _INFINITY if away else largest), OVERFLOW | PRECISION | (C1 if away else 0)
        power, flags = power - _WRAP, flags | OVERFLOW
        if power > _MOST:  # FSCALE only
            return _signed(negative, _INFINITY), flags | PRECISION | C1
    elif power < _LEAST:
        if control & UNDERFLOW:
            # The lowest bits of the significand stay zero: FCW.PC counts from its integer bit, which is zero, too.
            result, inexact, up = rounded(magnitude, _LEAST + 1 - bits - exponent, negative, rounding)
            result <<= 64 - bits
            flags = (PRECISION | UNDERFLOW if inexact else 0) | (C1 if up else 0)
            return _signed(negative, (1 << 64 if result & _INTEGER_BIT else 0) | result), flags
        power, flags = power + _WRAP, flags | UNDERFLOW
        if power < _LEAST:
            return _signed(negative, 0), flags & ~C1 | PRECISION
    return _signed(negative, power + _BIAS << 64 | result << 64 - bits), flags


def _not_a_number(*operands: Operand) -> Result | None:
    """The result when an operand is no number (SDM vol. 1, table 4-7): of two NaNs the larger significand."""
    if any(each.unsupported for each in operands):
        return INDEFINITE, INVALID
    nans = [each for each in operands if each.is_nan]
    if not nans:
        return None
    flags = INVALID if any(each.is_signalling for each in nans) else 0
    if len(nans) == 2 and nans[0].is_signalling != nans[1].is_signalling:
        return (nans[1] if nans[0].is_signalling else nans[0]).bits, flags
    chosen = max(nans, key=lambda each: (each.significand, not each.negative))
    return chosen.bits | _QUIET, flags


def _denormals(*operands: Operand) -> int:
    return DENORMAL if any(each.is_denormal for each in operands) else 0


def add(first: int, second: int, control: int) -> Result:
    """first + second."""
    one, other = Operand(first), Operand(second)
    special = _not_a_number(one, other)
    if special is not None:
        return special
    if one.is_infinite or other.is_infinite:
        if one.is_infinite and other.is_infinite and one.negative != other.negative:
            return INDEFINITE, INVALID
        return (one if one.is_infinite else other).bits, _denormals(one, other)
    denormal = _denormals(one, other)
    (negative, magnitude, exponent), (other_negative, other_magnitude, other_exponent) = one.number, other.number
    zero = _signed(control >> 10 & 3 == _DOWN, 0)
    if not magnitude and not other_magnitude:
        return (one.bits if negative == other_negative else zero), denormal
    least = min(exponent, other_exponent)
    total = (-magnitude if negative else magnitude) << exponent - least
    total += (-other_magnitude if other_negative else other_magnitude) << other_exponent - least
    if not total:
        return zero, denormal
    result, flags = _round(total < 0, abs(total), least, control)
    return result, flags | denormal


def subtract(first: int, second: int, control: int) -> Result:
    """first - second."""
    return add(first, second if Operand(second).is_nan else second ^ _SIGN, control)


def multiply(first: int, second: int, control: int) -> Result:
    """first * second."""
    one, other = Operand(first), Operand(second)
    special = _not_a_number(one, other)
    if special is not None:
        return special
    negative, denormal = one.negative != other.negative, _denormals(one, other)
    if one.is_infinite or other.is_infinite:
        if one.is_zero or other.is_zero:
            return INDEFINITE, INVALID
        return _signed(negative, _INFINITY), denormal
    if one.is_zero or other.is_zero:
        return _signed(negative, 0), denormal
    (_, magnitude, exponent), (_, other_magnitude, other_exponent) = one.number, other.number
    result, flags = _round(negative, magnitude * other_magnitude, exponent + other_exponent, control)
    return result, flags | denormal


def divide(first: int, second: int, control: int) -> Result:
    """first / second."""
    one, other = Operand(first), Operand(second)
    special = _not_a_number(one, other)
    if special is not None:
        return special
    negative, denormal = one.negative != other.negative, _denormals(one, other)
    if (one.is_infinite and other.is_infinite) or (one.is_zero and other.is_zero):
        return INDEFINITE, INVALID
    if one.is_infinite:
        return _signed(negative, _INFINITY), denormal
    if other.is_zero:
        return _signed(negative, _INFINITY), ZERO_DIVIDE
    if one.is_zero or other.is_infinite:
        return _signed(negative, 0), denormal
    (_, magnitude, exponent), (_, other_magnitude, other_exponent) = one.number, other.number
    extra = max(0, 67 - magnitude.bit_length() + other_magnitude.bit_length())
    quotient, rest = divmod(magnitude << extra, other_magnitude)
    result, flags = _round(negative, quotient << 1 | (rest != 0), exponent - extra - other_exponent - 1, control)
    return result, flags | denormal


def square_root(operand: int, control: int) -> Result:
    """The square root."""
    one = Operand(operand)
    special = _not_a_number(one)
    if special is not None:
        return special
    if one.is_zero:
        return operand, 0
    if one.negative:
        return INDEFINITE, INVALID
    if one.is_infinite:
        return operand, 0
    _, magnitude, exponent = one.number
    extra = 134 - magnitude.bit_length()
    extra += (exponent - extra) & 1
    magnitude, exponent = magnitude << extra, exponent - extra
    root = isqrt(magnitude)
    result, flags = _round(False, root << 1 | (root * root != magnitude), exponent // 2 - 1, control)
    return result, flags | _denormals(one)


def compare(first: int, second: int, *, signals: bool) -> tuple[int | None, int]:
    """-1, 0 or 1, None for unordered, and exceptions; `signals`: a quiet NaN is invalid, too."""
    one, other = Operand(first), Operand(second)
    special = _not_a_number(one, other)
    if special is not None:
        return None, INVALID if signals else special[1]
    (negative, magnitude, exponent), (other_negative, other_magnitude, other_exponent) = one.number, other.number
    least = min(exponent, other_exponent)
    here = (-magnitude if negative else magnitude) << exponent - least
    there = (-other_magnitude if other_negative else other_magnitude) << other_exponent - least
    return (here > there) - (here < there), _denormals(one, other)


def round_to_integral(operand: int, control: int) -> Result:
    """FRNDINT: by FCW.RC."""
    one = Operand(operand)
    special = _not_a_number(one)
    if special is not None:
        return special
    negative, magnitude, exponent = one.number
    if one.is_infinite or one.is_zero or exponent >= 0:
        return operand, _denormals(one)
    whole, inexact, up = rounded(magnitude, -exponent, negative, control >> 10 & 3)
    flags = _denormals(one) | (PRECISION if inexact else 0) | (C1 if up else 0)
    if not whole:
        return _signed(negative, 0), flags
    return _round(negative, whole, 0, control, 64)[0], flags


def scale(first: int, second: int, control: int) -> Result:
    """FSCALE: first * 2^second, the second one truncated."""
    one, other = Operand(first), Operand(second)
    special = _not_a_number(one, other)
    if special is not None:
        return special
    denormal = _denormals(one, other)
    if other.is_infinite:
        if (one.is_infinite and other.negative) or (one.is_zero and not other.negative):
            return INDEFINITE, INVALID
        return _signed(one.negative, 0 if other.negative else _INFINITY), denormal
    if one.is_infinite or one.is_zero:
        return first, denormal
    negative, magnitude, exponent = other.number
    by = min(rounded(magnitude, -exponent, negative, _TRUNCATE)[0], 0x1_0000)
    if not by:
        return _whole(one, control, denormal)
    (sign, magnitude, exponent), by = one.number, -by if negative else by
    result, flags = _round(sign, magnitude, exponent + by, control, 64)
    return result, flags | denormal


def _whole(one: Operand, control: int, denormal: int) -> Result:
    sign, magnitude, exponent = one.number
    result, flags = _round(sign, magnitude, exponent, control, 64)
    return result, flags | denormal


def extract(operand: int) -> tuple[int, int, int]:
    """FXTRACT: the exponent as a number, the significand with its sign, exceptions."""
    one = Operand(operand)
    special = _not_a_number(one)
    if special is not None:
        return special[0], special[0], special[1]
    if one.is_infinite:
        return _INFINITY, operand, 0
    if one.is_zero:
        return _SIGN | _INFINITY, operand, ZERO_DIVIDE
    sign, magnitude, exponent = one.number
    power = exponent + magnitude.bit_length() - 1
    length = abs(power).bit_length()
    number = _signed(power < 0, _BIAS + length - 1 << 64 | abs(power) << 64 - length) if power else 0
    return number, _signed(sign, _BIAS << 64 | magnitude << 64 - magnitude.bit_length()), _denormals(one)


def remainder(first: int, second: int, control: int, *, nearest: bool) -> tuple[int, int, int | None]:
    """FPREM and FPREM1 (`nearest`): the remainder, flags with C2 when it is partial, the quotient if there is one."""
    one, other = Operand(first), Operand(second)
    special = _not_a_number(one, other)
    if special is not None:
        return *special, None
    if one.is_infinite or other.is_zero:
        return INDEFINITE, INVALID, None
    denormal = _denormals(one, other)
    if one.is_zero or other.is_infinite:
        return (*_whole(one, control, denormal), 0) if one.is_denormal else (first, denormal, 0)
    (negative, magnitude, exponent), (_, divisor, other_exponent) = one.number, other.number
    difference = exponent + magnitude.bit_length() - other_exponent - divisor.bit_length()
    if difference >= 64:
        # A partial remainder: the difference of exponents becomes smaller by 32 to 63 (SDM vol. 2, FPREM).
        by = difference - (32 + difference % 32)
        divisor_there = divisor << max(other_exponent + by - exponent, 0)
        rest = (magnitude << max(exponent - other_exponent - by, 0)) % divisor_there
        least = min(exponent, other_exponent + by)
        if not rest:
            return _signed(negative, 0), denormal | C2, 0
        result, flags = _round(negative, rest, least, control, 64)
        return result, flags | denormal | C2, 0
    least = min(exponent, other_exponent)
    dividend, divisor = magnitude << exponent - least, divisor << other_exponent - least
    quotient, rest = divmod(dividend, divisor)
    if nearest and (2 * rest > divisor or (2 * rest == divisor and quotient & 1)):
        quotient, rest, negative = quotient + 1, divisor - rest, not negative
    if not rest:
        return _signed(one.negative, 0), denormal, quotient
    result, flags = _round(negative, rest, least, control, 64)
    return result, flags | denormal, quotient
