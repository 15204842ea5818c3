"""XSAVE, XSAVEOPT, XSAVEC, XSAVES, XRSTOR, XRSTORS (SDM vol. 1, 13.7 to 13.13)."""

from __future__ import annotations

from kvmpy.x86.emulator.extended_state import (
    AVX,
    HEADER_END,
    MXCSR,
    SSE,
    ST,
    X87,
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
_COMPACTED = 1 << 63
_IA32_XSS = 0xDA0
_FIRST_EXTENDED = 2
_LAST = 63
_MXCSR_DEFAULT = 0x1F80


def _requested(op: Operands, *, supervisor: bool) -> int:
    """RFBM: what EDX:EAX ask for of what XCR0 (and IA32_XSS) enable. Raises what every instruction here raises."""
    sregs = op.cpu.sregs
    if not sregs.cr4 & Cr4.OSXSAVE:
        raise GuestException.of(_UD)
    if sregs.cr0 & Cr0.TS:
        raise GuestException.of(_NM)
    if supervisor and op.cpl:
        raise GuestException.of(_GP, 0)
    if op.address() % 64:
        raise GuestException.of(_GP, 0)
    enabled = op.cpu.xcr0()
    if supervisor:
        enabled |= op.cpu.read_msr(_IA32_XSS) or 0
    return enabled & (op.register(_RDX, 4) << 32 | op.register(_RAX, 4))


def _extended_components(mask: int) -> list[int]:
    return [component for component in range(_FIRST_EXTENDED, _LAST) if mask >> component & 1]


def _compacted_offsets(state: ExtendedState, mask: int) -> dict[int, int]:
    """Where each extended component of `mask` is in a compacted area (SDM vol. 1, 13.4.3)."""
    offsets, at = {}, HEADER_END
    for component in _extended_components(mask):
        _, size, aligned = state.layout[component]
        if aligned:
            at = -(-at // 64) * 64
        offsets[component] = at
        at += size
    return offsets


def _in_use(state: ExtendedState) -> int:
    """XINUSE; SSE counts when MXCSR is not as after reset (SDM vol. 1, 13.6)."""
    used = state.in_use
    if not used & SSE and state.current_mxcsr != _MXCSR_DEFAULT:
        used |= SSE
    return used


def _save_legacy(op: Operands, state: ExtendedState, components: int, mxcsr: bool) -> None:
    """x87 and SSE state of those `components`, in the legacy region."""
    memory, address = op.cpu.memory, op.address()
    if components & X87:
        memory.write(address, bytes(state.component(X87)[:MXCSR]))
        memory.write(address + ST, bytes(state.component(X87)[ST:XMM]))
    if mxcsr:
        memory.write(address + MXCSR, state.current_mxcsr.to_bytes(4, "little") + state.mxcsr_mask)
    if components & SSE:
        memory.write(address + XMM, bytes(state.component(SSE)[XMM : XMM + 16 * (16 if op.it.bits == 64 else 8)]))


def _save_standard(op: Operands, *, only_in_use: bool) -> None:
    requested = _requested(op, supervisor=False)
    state = op.cpu.extended_state()
    memory, address = op.cpu.memory, op.address()
    used = _in_use(state)
    before = int.from_bytes(memory.read(address + XSTATE_BV, 8), "little")
    memory.check_writable(address, HEADER_END)
    wanted = requested & used if only_in_use else requested
    _save_legacy(op, state, wanted, bool(requested & (SSE | AVX)))
    for component in _extended_components(wanted):
        offset, size, _ = state.layout[component]
        memory.write(address + offset, state.extended(component, size))
    memory.write(address + XSTATE_BV, (before & ~requested | requested & used).to_bytes(8, "little"))


def _save_compacted(op: Operands, *, supervisor: bool) -> None:
    requested = _requested(op, supervisor=supervisor)
    state = op.cpu.extended_state()
    memory, address = op.cpu.memory, op.address()
    wanted = requested & _in_use(state)
    memory.check_writable(address, HEADER_END)
    _save_legacy(op, state, wanted, bool(wanted & SSE))
    offsets = _compacted_offsets(state, requested)
    for component in _extended_components(wanted):
        memory.write(address + offsets[component], state.extended(component, state.layout[component][1]))
    header = wanted.to_bytes(8, "little") + (requested | _COMPACTED).to_bytes(8, "little")
    memory.write(address + XSTATE_BV, header)


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
    requested = _requested(op, supervisor=supervisor)
    memory, address = op.cpu.memory, op.address()
    header = memory.read(address + XSTATE_BV, 64)
    present = int.from_bytes(header[:8], "little")
    layout = int.from_bytes(header[8:16], "little")
    compacted = bool(layout & _COMPACTED)
    enabled = op.cpu.xcr0() | ((op.cpu.read_msr(_IA32_XSS) or 0) if supervisor else 0)
    if compacted:
        bad = layout & ~_COMPACTED & ~enabled or present & ~layout or any(header[16:])
    else:
        bad = supervisor or present & ~enabled or any(header[8:24])
    if bad:
        raise GuestException.of(_GP, 0)
    state = op.cpu.extended_state()
    legacy = memory.read(address, XSTATE_BV)
    loads_mxcsr = bool(requested & present & SSE) if compacted else bool(requested & (SSE | AVX))
    mxcsr = int.from_bytes(legacy[MXCSR : MXCSR + 4], "little")
    if loads_mxcsr and mxcsr & ~state.mxcsr_bits:
        raise GuestException.of(_GP, 0)
    offsets = _compacted_offsets(state, layout & ~_COMPACTED) if compacted else {}
    loaded = {
        component: memory.read(address + offsets.get(component, state.layout[component][0]), state.layout[component][1])
        for component in _extended_components(requested & present)
    }
    # Nothing faults from here on.
    if requested & X87:
        state.restore_x87(legacy if present & X87 else None)
    if requested & SSE:
        state.restore_xmm(legacy if present & SSE else None, 16 if op.it.bits == 64 else 8)
    if loads_mxcsr:
        state.current_mxcsr = mxcsr
    elif compacted and requested & SSE:
        state.current_mxcsr = _MXCSR_DEFAULT
    for component in _extended_components(requested):
        state.set_extended(component, loaded.get(component))


@instruction("xrstor", 1, 0xAE, digit=5, operand=MEMORY)
def _xrstor(op: Operands) -> None:
    _restore(op, supervisor=False)


@instruction("xrstors", 1, 0xC7, digit=3, operand=MEMORY)
def _xrstors(op: Operands) -> None:
    _restore(op, supervisor=True)
