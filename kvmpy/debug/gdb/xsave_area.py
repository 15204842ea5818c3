"""x87, SSE and AVX registers in an XSAVE area (SDM vol. 1, 10.5.1 and 13.4), as gdb counts them."""

from __future__ import annotations

__all__ = ["XsaveArea"]

_XSTATE_BV = 512
_X87, _SSE, _AVX = 1, 2, 4
"""Bits of XSTATE_BV: components that the area has a state of."""

# name -> (component, offset, bytes)
_PLACES: dict[str, tuple[int, int, int]] = {
    "fctrl": (_X87, 0, 2), "fstat": (_X87, 2, 2), "fop": (_X87, 6, 2),
    "fioff": (_X87, 8, 4), "fiseg": (_X87, 12, 2), "fooff": (_X87, 16, 4), "foseg": (_X87, 20, 2),
    "mxcsr": (_SSE, 24, 4),
    **{f"st{number}": (_X87, 32 + 16 * number, 10) for number in range(8)},
    **{f"xmm{number}": (_SSE, 160 + 16 * number, 16) for number in range(16)},
    # In the standard format this component begins here on every processor that has it (SDM vol. 1, 13.4.3).
    **{f"ymm{number}h": (_AVX, 576 + 16 * number, 16) for number in range(16)},
}  # fmt: skip
_TAGS = 4  # one bit a register, set when it is not empty
_EMPTY, _VALID, _ZERO, _SPECIAL = 3, 0, 1, 2


class XsaveArea:
    """A copy of a vCPU's XSAVE area whose registers can be read and written by gdb's names."""

    NAMES = frozenset((*_PLACES, "ftag"))

    def __init__(self, area: bytes) -> None:
        self._area = bytearray(area)

    def __bytes__(self) -> bytes:
        return bytes(self._area)

    @property
    def has_avx(self) -> bool:
        """Whether there is a state of the upper halves of YMM registers."""
        return bool(self._area[_XSTATE_BV] & _AVX)

    def read(self, name: str) -> int:
        """A register, as an unsigned number."""
        if name == "ftag":
            return self._tag_word()
        _, offset, size = _PLACES[name]
        return int.from_bytes(self._area[offset : offset + size], "little")

    def write(self, name: str, value: int) -> None:
        """Set a register; bits that do not fit are dropped, as gdb shows the control words wider than they are."""
        if name == "ftag":
            component = _X87
            self._area[_TAGS] = sum((value >> 2 * number & 3 != _EMPTY) << number for number in range(8))
        else:
            component, offset, size = _PLACES[name]
            content = value & (1 << 8 * size) - 1
            self._area[offset : offset + size] = content.to_bytes(size, "little")
        # Without its bit the component counts as initial, and what is in the area is not looked at.
        self._area[_XSTATE_BV] |= component

    def _tag_word(self) -> int:
        """The x87 tag word, two bits a register, which FXSAVE abridges to one (SDM vol. 1, 10.5.1.1)."""
        top = self.read("fstat") >> 11 & 7
        word = 0
        for number in range(8):  # physical registers; the area holds them from the top of the stack on
            tag = self._tag((number - top) % 8) if self._area[_TAGS] >> number & 1 else _EMPTY
            word |= tag << 2 * number
        return word

    def _tag(self, place: int) -> int:
        value = self.read(f"st{place}")
        exponent, significand = value >> 64 & 0x7FFF, value & (1 << 64) - 1
        if exponent == 0x7FFF:
            return _SPECIAL
        if exponent == 0:
            return _SPECIAL if significand else _ZERO
        return _VALID if significand >> 63 else _SPECIAL
