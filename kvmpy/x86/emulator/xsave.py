"""XSAVE, XSAVEOPT, XSAVEC, XSAVES, XRSTOR, XRSTORS (SDM vol. 1, 13.7 to 13.13).

Nothing is written where a component is not saved: what is reserved, and what is not asked for, stays as it is.
XSAVEOPT and its sisters never leave out a component because the program has not changed it since the last XRSTOR; they
may (13.9), but need not.
"""

from __future__ import annotations

from kvmpy.x86.emulator.extended_state import (
    AVX,
    HEADER_END,
    MXCSR,
    SSE,
    ST,
    X87,
    XCOMP_BV,
    XMM,
    XSTATE_BV,
    ExtendedState,
)
from kvmpy.x86.emulator.guest_exception import GuestException
from kvmpy.x86.emulator.processor import Operands
from kvmpy.x86.emulator.table import MEMORY, instruction
from kvmpy.x86.flags import Cr0, Cr4

_UD, _NM, _GP = 6, 7, 13
_RAX, _RDX = 0, 2
_TS, _OSXSAVE = int(Cr0.TS), int(Cr4.OSXSAVE)
_COMPACTED = 1 << 63
_IA32_XSS = 0xDA0
_MXCSR_DEFAULT = 0x1F80
_FIP, _FDP = 8, 16
_IN_EVERY_MODE = {2: 0x80, 6: 0x100, 7: 0}
"""Bytes of AVX, ZMM_Hi256, Hi16_ZMM outside 64-bit mode, which has only eight registers (SDM vol. 1, 13.5)."""

Pieces = list[tuple[int, bytes]]
"""What to write at which offset of the area, in ascending order."""


class _Request:
    """What every instruction here begins with: checks, the address, and RFBM."""

    __slots__ = ("address", "components", "enabled", "op", "state")

    def __init__(self, op: Operands, *, supervisor: bool, restores: bool = False) -> None:
        sregs = op.cpu.sregs
        if not sregs.cr4 & _OSXSAVE:
            raise GuestException.of(_UD)
        if sregs.cr0 & _TS:
            raise GuestException.of(_NM)
        if supervisor and op.cpl:
            raise GuestException.of(_GP, 0)
        self.address = op.address()
        if self.address % 64:
            raise GuestException.of(_GP, 0)
        self.op = op
        # IA32_XSS does not count: no supervisor component is in the area that KVM gives, and where KVM offers one,
        # the processor itself runs XSAVES.
        self.enabled = op.cpu.xcr0()
        self.components = self.enabled & (op.register(_RDX, 4) << 32 | op.register(_RAX, 4))
        self.state = op.cpu.extended_state(self.components if restores else 0)

    def extended(self, mask: int) -> list[tuple[int, int]]:
        """The extended components of `mask`: number, and how many bytes of it this mode has."""
        layout, short = self.state.layout, self.op.it.bits != 64
        return [
            (component, _IN_EVERY_MODE.get(component, size) if short else size)
            for component, (_, size, _) in layout.items()
            if mask >> component & 1
        ]

    @property
    def vector_registers(self) -> int:
        """How many XMM registers the mode has."""
        return 16 if self.op.it.bits == 64 else 8


def _compacted_offsets(state: ExtendedState, mask: int) -> dict[int, int]:
    """Where each extended component of `mask` is in a compacted area (SDM vol. 1, 13.4.3)."""
    offsets, at = {}, HEADER_END
    for component, (_, size, aligned) in sorted(state.layout.items()):
        if mask >> component & 1:
            if aligned:
                at = -(-at // 64) * 64
            offsets[component] = at
            at += size
    return offsets


def _narrow_pointers(legacy: bytearray) -> bytearray:
    """FIP and FDP with 32 bits, and selectors, which processors have long given up: without REX.W (13.5.1)."""
    for at in (_FIP, _FDP):
        legacy[at + 4 : at + 8] = bytes(4)
    return legacy


def _legacy_pieces(request: _Request, components: int, mxcsr: bool) -> Pieces:
    """x87 and SSE state of those `components`, for the legacy region."""
    state = request.state
    if components & X87:
        state.need(X87)
    if components & SSE:
        state.need(SSE)
    legacy = bytearray(state.area[: XMM + 16 * request.vector_registers])
    legacy[MXCSR:ST] = state.current_mxcsr.to_bytes(4, "little") + state.mxcsr_mask
    if not request.op.it.w:
        _narrow_pointers(legacy)
    if components & X87 and components & SSE and mxcsr:
        return [(0, bytes(legacy))]
    ends = (0, MXCSR, components & X87), (MXCSR, ST, mxcsr), (ST, XMM, components & X87), (XMM, None, components & SSE)
    return [(start, bytes(legacy[start:end])) for start, end, wanted in ends if wanted]


def _save_standard(op: Operands, *, only_in_use: bool) -> None:
    request = _Request(op, supervisor=False)
    state, asked = request.state, request.components
    used = state.in_use
    memory = op.cpu.memory
    memory.check_writable(request.address, HEADER_END)
    before = int.from_bytes(memory.read(request.address + XSTATE_BV, 8), "little")
    wanted = asked & used if only_in_use else asked
    pieces = _legacy_pieces(request, wanted, bool(asked & (SSE | AVX)))
    pieces.append((XSTATE_BV, (before & ~asked | asked & used).to_bytes(8, "little")))
    for component, size in request.extended(wanted):
        if size:
            pieces.append((state.layout[component][0], state.extended(component, size)))
    op.cpu.memory.write_pieces(request.address, pieces)


def _save_compacted(op: Operands, *, supervisor: bool) -> None:
    request = _Request(op, supervisor=supervisor)
    state, asked = request.state, request.components
    used = state.in_use
    if state.current_mxcsr != _MXCSR_DEFAULT:
        used |= SSE  # SDM vol. 1, 13.10 and 13.11
    wanted = asked & used
    pieces = _legacy_pieces(request, wanted, bool(wanted & SSE))
    pieces.append((XSTATE_BV, wanted.to_bytes(8, "little") + (asked | _COMPACTED).to_bytes(8, "little")))
    offsets = _compacted_offsets(state, asked)
    for component, size in request.extended(wanted):
        if size:
            pieces.append((offsets[component], state.extended(component, size)))
    op.cpu.memory.write_pieces(request.address, pieces)


@instruction("xsave", 1, 0xAE, digit=4, operand=MEMORY)
def _xsave(op: Operands) -> None:
    _save_standard(op, only_in_use=False)


@instruction("xsaveopt", 1, 0xAE, digit=6, operand=MEMORY)
def _xsaveopt(op: Operands) -> None:
    _save_standard(op, only_in_use=True)


@instruction("xsavec", 1, 0xC7, digit=4, operand=MEMORY)
def _xsavec(op: Operands) -> None:
    _save_compacted(op, supervisor=False)


@instruction("xsaves", 1, 0xC7, digit=5, operand=MEMORY)
def _xsaves(op: Operands) -> None:
    _save_compacted(op, supervisor=True)


def _restore(op: Operands, *, supervisor: bool) -> None:
    request = _Request(op, supervisor=supervisor, restores=True)
    state, asked, memory, address = request.state, request.components, op.cpu.memory, request.address
    legacy = bytearray(memory.read(address, HEADER_END))
    present, layout = (int.from_bytes(legacy[at : at + 8], "little") for at in (XSTATE_BV, XCOMP_BV))
    compacted = bool(layout & _COMPACTED)
    layout &= ~_COMPACTED
    if compacted:
        bad = layout & ~request.enabled or present & ~layout or any(legacy[XSTATE_BV + 16 :])
    else:
        bad = supervisor or present & ~request.enabled or any(legacy[XCOMP_BV : XSTATE_BV + 24])
    if bad:
        raise GuestException.of(_GP, 0)
    # MXCSR is SSE's in the compacted format; in the standard one it is there whatever XSTATE_BV says (13.8.1, 13.8.2).
    loads_mxcsr = bool(asked & present & SSE) if compacted else bool(asked & (SSE | AVX))
    found = int.from_bytes(legacy[MXCSR : MXCSR + 4], "little")
    if loads_mxcsr and found & ~state.mxcsr_bits:
        raise GuestException.of(_GP, 0)
    offsets = _compacted_offsets(state, layout) if compacted else {}
    loaded = {
        component: memory.read(address + offsets.get(component, state.layout[component][0]), size)
        for component, size in request.extended(asked & present)
    }
    # Nothing faults from here on.
    if asked & X87 and not op.it.w:
        _narrow_pointers(legacy)
    mxcsr = found if loads_mxcsr else _MXCSR_DEFAULT if compacted and asked & SSE else None
    state.restore(asked, present, legacy, request.vector_registers, loaded, mxcsr)


@instruction("xrstor", 1, 0xAE, digit=5, operand=MEMORY)
def _xrstor(op: Operands) -> None:
    _restore(op, supervisor=False)


@instruction("xrstors", 1, 0xC7, digit=3, operand=MEMORY)
def _xrstors(op: Operands) -> None:
    _restore(op, supervisor=True)
