"""x87, SSE and AVX registers in the XSAVE area (SDM vol. 1, chapter 13), standard format."""

from __future__ import annotations

import struct
from collections.abc import Mapping

__all__ = ["AVX", "SSE", "X87", "ExtendedState", "Layout"]

FCW, FSW, FTW, FOP, FIP, FDP = 0, 2, 4, 6, 8, 16
MXCSR, MXCSR_MASK, ST, XMM = 24, 28, 32, 160
XSTATE_BV, XCOMP_BV, HEADER_END = 512, 520, 576
_XMM_END = 416
X87, SSE, AVX = 1, 2, 4
_AVX, _OPMASK, _ZMM_HI256, _HI16_ZMM = 2, 5, 6, 7
"""Numbers of components: the upper halves of YMM0 to YMM15, K0 to K7, the upper halves of ZMM0 to ZMM15, ZMM16 on."""

_X87 = struct.Struct("<HHBBHQQ")
_X87_INITIAL = _X87.pack(0x37F, 0, 0, 0, 0, 0, 0)
_REGISTER_BITS = int.from_bytes((b"\xff" * 10 + bytes(6)) * 8, "little")
"""Of the eight x87 registers, 16 bytes each, those that there are."""
_MXCSR_INITIAL = 0x1F80
_EXCEPTIONS, _ES, _BUSY = 0x3F, 0x80, 0x8000
_HALF = (1 << 128) - 1

Layout = Mapping[int, tuple[int, int, bool]]
"""Component -> (offset in the standard format, size, whether it is aligned to 64 bytes in the compacted format)."""

AVX_ONLY: Layout = {2: (0x240, 0x100, False)}
"""Where every processor has AVX; the offsets of what came later differ between makers (CPUID leaf 0xD)."""


class ExtendedState:
    """The area of KVM_GET_XSAVE as registers, changed in place. `changed` says that it has to go back.

    A component whose bit in XSTATE_BV is clear is in its initial state, whatever the area holds; to read or to change
    one, it is put there first.
    """

    __slots__ = ("area", "changed", "in_use", "layout")

    def __init__(self, area: bytearray | memoryview, layout: Layout = AVX_ONLY) -> None:
        self.area = area
        self.layout = layout
        self.changed = False
        self.in_use = int.from_bytes(area[XSTATE_BV : XSTATE_BV + 8], "little")
        """XSTATE_BV: the components that are not in their initial state."""

    def _set_in_use(self, value: int) -> None:
        self.in_use = value
        self.area[XSTATE_BV : XSTATE_BV + 8] = value.to_bytes(8, "little")
        self.changed = True

    def need(self, mask: int) -> None:
        """Have a component (X87, SSE, AVX) in the area with the values that the processor has for it."""
        present = self.in_use
        if present & mask:
            return
        if mask == X87:
            self.area[:MXCSR] = _X87_INITIAL
            self.area[ST:XMM] = bytes(XMM - ST)
        else:
            mxcsr = self.current_mxcsr
            if mask == SSE:
                self.area[XMM:_XMM_END] = bytes(_XMM_END - XMM)
            else:
                offset, size, _ = self.layout[mask.bit_length() - 1]
                self.area[offset : offset + size] = bytes(size)
            self.area[MXCSR : MXCSR + 4] = mxcsr.to_bytes(4, "little")
        self._set_in_use(present | mask)

    # MXCSR belongs to SSE and to AVX: it is in the area when either is. But a host that keeps registers in the
    # compacted format takes it for SSE's alone, so whatever is not the initial value makes SSE in use.

    @property
    def current_mxcsr(self) -> int:
        """MXCSR."""
        if not self.in_use & (SSE | AVX):
            return _MXCSR_INITIAL
        return self.get(MXCSR, 4)

    @current_mxcsr.setter
    def current_mxcsr(self, value: int) -> None:
        if value != _MXCSR_INITIAL or self.in_use & (SSE | AVX):
            self.need(SSE)
            self.put(MXCSR, value, 4)

    @property
    def mxcsr_mask(self) -> bytes:
        """MXCSR_MASK as the processor saves it."""
        mask = bytes(self.area[MXCSR_MASK : MXCSR_MASK + 4])
        return mask if mask != b"\0\0\0\0" else b"\xff\xff\x00\x00"

    @property
    def mxcsr_bits(self) -> int:
        """The bits of MXCSR that may be set."""
        return int.from_bytes(self.mxcsr_mask, "little")

    # Fields

    def get(self, offset: int, size: int) -> int:
        """The number of `size` bytes at an offset of the area."""
        return int.from_bytes(self.area[offset : offset + size], "little")

    def put(self, offset: int, value: int, size: int) -> None:
        """Write it."""
        self.area[offset : offset + size] = value.to_bytes(size, "little")
        self.changed = True

    # Whole components, for XSAVE and XRSTOR

    def extended(self, component: int, size: int) -> bytes:
        """An extended component, zeros when it is in its initial state."""
        if not self.in_use >> component & 1:
            return bytes(size)
        offset = self.layout[component][0]
        return bytes(self.area[offset : offset + size])

    def restore(
        self,
        asked: int,
        present: int,
        legacy: bytes | bytearray,
        count: int,
        loaded: Mapping[int, bytes],
        mxcsr: int | None,
    ) -> None:
        """Load the components `asked` for, as XRSTOR does; those that are not `present` become initial.

        x87 state and `count` XMM registers come from a legacy region, `loaded` are extended components or their first
        bytes. `mxcsr` None: it stays as it is.
        """
        area, used = self.area, self.in_use
        mxcsr = self.current_mxcsr if mxcsr is None else mxcsr
        if asked & present & X87:
            self._load_x87(legacy)
        if asked & SSE or not used & SSE:
            end = XMM + 16 * count
            if not used & SSE:
                area[XMM:_XMM_END] = bytes(_XMM_END - XMM)
            area[XMM:end] = legacy[XMM:end] if asked & present & SSE else bytes(end - XMM)
        for component, data in loaded.items():
            offset, size, _ = self.layout[component]
            if len(data) < size and not used >> component & 1:
                area[offset : offset + size] = bytes(size)
            area[offset : offset + len(data)] = data
        partly = used & SSE if count < 16 else 0  # XMM8 to XMM15 are still what they were
        used = used & ~asked | asked & present | partly
        if mxcsr != _MXCSR_INITIAL:
            used |= SSE
        area[MXCSR : MXCSR + 4] = mxcsr.to_bytes(4, "little")
        self._set_in_use(used)

    def _load_x87(self, legacy: bytes | bytearray) -> None:
        """x87 state of a legacy region, as the processor takes it."""
        control, status, tags, _, opcode, instruction_at, operand_at = _X87.unpack_from(legacy)
        self.area[:MXCSR] = _X87.pack(
            control & 0x1F3F | 0x40, status, tags, 0, opcode & 0x7FF, instruction_at, operand_at
        )
        registers = int.from_bytes(legacy[ST:XMM], "little") & _REGISTER_BITS
        self.area[ST:XMM] = registers.to_bytes(XMM - ST, "little")
        self.set_status(status)

    # x87 status

    def set_status(self, status: int) -> None:
        """Write FSW; ES and B say whether an exception is pending that FCW does not mask (SDM vol. 1, 8.1.3.3)."""
        status &= ~(_ES | _BUSY)
        if status & ~self.get(FCW, 2) & _EXCEPTIONS:
            status |= _ES | _BUSY
        self.put(FSW, status, 2)

    # Vector registers

    def xmm(self, number: int) -> int:
        """XMM0 to XMM15 as a number of 128 bits."""
        self.need(SSE)
        at = XMM + 16 * number
        return int.from_bytes(self.area[at : at + 16], "little")

    def set_xmm(self, number: int, value: int) -> None:
        """Write an XMM register; what is above it in its YMM register stays (legacy SSE encodings)."""
        self.need(SSE)
        at = XMM + 16 * number
        self.area[at : at + 16] = value.to_bytes(16, "little")
        self.changed = True

    def ymm(self, number: int) -> int:
        """YMM0 to YMM15 as a number of 256 bits."""
        low = self.xmm(number)
        if not self.in_use & AVX:
            return low
        return low | self.get(self.layout[_AVX][0] + 16 * number, 16) << 128

    def set_vector(self, number: int, value: int) -> None:
        """Write a whole vector register, as VEX encodings do: what is above 256 bits becomes zero, too."""
        self.set_xmm(number, value & _HALF)
        high = value >> 128
        if high or self.in_use & AVX:
            self.need(AVX)
            self.put(self.layout[_AVX][0] + 16 * number, high, 16)
        self._clear_above_256(number)

    def zmm(self, number: int) -> int:
        """ZMM0 to ZMM31 as a number of 512 bits."""
        if number < 16:
            return self.ymm(number) | self._extra(_ZMM_HI256, 32 * number, 32) << 256
        return self._extra(_HI16_ZMM, 64 * (number - 16), 64)

    def set_zmm(self, number: int, value: int) -> None:
        """Write one."""
        if number >= 16:
            self._set_extra(_HI16_ZMM, 64 * (number - 16), value, 64)
            return
        self.set_vector(number, value & (1 << 256) - 1)
        if value >> 256:
            self._set_extra(_ZMM_HI256, 32 * number, value >> 256, 32)

    def opmask(self, number: int) -> int:
        """K0 to K7."""
        return self._extra(_OPMASK, 8 * number, 8)

    def set_opmask(self, number: int, value: int) -> None:
        """Write one."""
        self._set_extra(_OPMASK, 8 * number, value, 8)

    def _extra(self, component: int, offset: int, size: int) -> int:
        return self.get(self.layout[component][0] + offset, size) if self.in_use >> component & 1 else 0

    def _set_extra(self, component: int, offset: int, value: int, size: int) -> None:
        self.need(1 << component)
        self.put(self.layout[component][0] + offset, value, size)

    def _clear_above_256(self, number: int) -> None:
        if self.in_use >> _ZMM_HI256 & 1:
            self.put(self.layout[_ZMM_HI256][0] + 32 * number, 0, 32)

    def clear_vectors(self, count: int, *, upper_only: bool) -> None:
        """VZEROUPPER, or VZEROALL, of the first `count` registers."""
        for number in range(count):
            self.set_vector(number, self.xmm(number) if upper_only else 0)
