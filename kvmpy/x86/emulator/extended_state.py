"""x87, SSE and AVX registers in the XSAVE area (SDM vol. 1, chapter 13), standard format."""

from __future__ import annotations

import struct

__all__ = ["ExtendedState"]

FCW, FSW, FTW, FOP, FIP, FDP, MXCSR, MXCSR_MASK = 0, 2, 4, 6, 8, 16, 24, 28
ST, XMM = 32, 160
XSTATE_BV, XCOMP_BV = 512, 520
LEGACY_SIZE, HEADER_END = 512, 576
YMM = 576
X87, SSE, AVX = 1, 2, 4


class ExtendedState:
    """The area of KVM_GET_XSAVE as registers. `changed` says that it has to go back."""

    __slots__ = ("area", "changed")

    def __init__(self, area: bytes) -> None:
        self.area = bytearray(area)
        self.changed = False

    # Components that are in their initial state are not in the area; to read or change one, it is put there.

    def need(self, component: int) -> None:
        """Have a component (X87, SSE, AVX) in the area with the values that the processor has for it."""
        present = self.u64(XSTATE_BV)
        if present & component:
            return
        if component == X87:
            self.area[:24] = struct.pack("<HHBBHQQ", 0x37F, 0, 0, 0, 0, 0, 0)
            self.area[ST:XMM] = bytes(XMM - ST)
        elif component == SSE:
            self.area[XMM:416] = bytes(256)
            if not present & AVX:
                self.put(MXCSR, 0x1F80, 4)
        elif component == AVX:
            self.area[YMM : YMM + 256] = bytes(256)
            if not present & SSE:
                self.put(MXCSR, 0x1F80, 4)
        self.area[XSTATE_BV : XSTATE_BV + 8] = (present | component).to_bytes(8, "little")

    @property
    def in_use(self) -> int:
        """XSTATE_BV: the components that are not in their initial state."""
        return self.u64(XSTATE_BV)

    # Fields

    def get(self, offset: int, size: int) -> int:
        """The number of `size` bytes at an offset of the area."""
        return int.from_bytes(self.area[offset : offset + size], "little")

    def put(self, offset: int, value: int, size: int) -> None:
        """Write it."""
        self.area[offset : offset + size] = value.to_bytes(size, "little")
        self.changed = True

    def u64(self, offset: int) -> int:
        """The 64-bit number at an offset."""
        return int.from_bytes(self.area[offset : offset + 8], "little")

    # Registers

    def xmm(self, number: int) -> int:
        """XMM0 to XMM15 as a number of 128 bits."""
        self.need(SSE)
        return self.get(XMM + 16 * number, 16)

    def set_xmm(self, number: int, value: int) -> None:
        """Write an XMM register; the upper half of its YMM register stays (legacy SSE encodings)."""
        self.need(SSE)
        self.put(XMM + 16 * number, value, 16)

    def ymm(self, number: int) -> int:
        """YMM0 to YMM15 as a number of 256 bits."""
        self.need(AVX)
        return self.xmm(number) | self.get(YMM + 16 * number, 16) << 128

    def set_ymm(self, number: int, value: int) -> None:
        """Write a YMM register."""
        self.need(AVX)
        self.set_xmm(number, value & (1 << 128) - 1)
        self.put(YMM + 16 * number, value >> 128, 16)

    @property
    def mxcsr(self) -> int:
        """MXCSR."""
        self.need(SSE)
        return self.get(MXCSR, 4)

    @mxcsr.setter
    def mxcsr(self, value: int) -> None:
        self.need(SSE)
        self.put(MXCSR, value, 4)
