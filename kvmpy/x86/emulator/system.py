"""STAC, CLAC, XGETBV, RDTSCP, RDPID, RDPKRU, MONITOR, VERR, LAR, INVPCID, their sisters, hints (SDM vol. 2)."""

from __future__ import annotations

from kvmpy.x86.descriptors import decode_segment
from kvmpy.x86.emulator.extended_state import ExtendedState
from kvmpy.x86.emulator.guest_exception import GuestException
from kvmpy.x86.emulator.processor import Operands
from kvmpy.x86.emulator.table import MEMORY, REGISTER, instruction
from kvmpy.x86.flags import Cr0, Cr4, Rflags
from kvmpy.x86.instruction import MemoryOperand
from kvmpy.x86.registers import Segment

_UD, _GP = 6, 13
_RAX, _RCX, _RDX = 0, 1, 2
_ZF, _AC = int(Rflags.ZF), int(Rflags.AC)
_IA32_TSC_AUX = 0xC000_0103
_LOW = 0xFFFF_FFFF
_PKRU = 9
"""The number of the component of the XSAVE area."""


def _only_in_ring_0(op: Operands) -> None:
    if op.cpl:
        raise GuestException.of(_UD)


@instruction("clac", 1, 0x01, prefix=None, digit=1, rm=2)
def _clac(op: Operands) -> None:
    _only_in_ring_0(op)
    op.set_flags(0, _AC)


@instruction("stac", 1, 0x01, prefix=None, digit=1, rm=3)
def _stac(op: Operands) -> None:
    _only_in_ring_0(op)
    op.set_flags(_AC, _AC)


@instruction("xgetbv", 1, 0x01, digit=2, rm=0)
def _xgetbv(op: Operands) -> None:
    if not op.cpu.sregs.cr4 & Cr4.OSXSAVE:
        raise GuestException.of(_UD)
    which = op.register(_RCX, 4)
    if which > 1:
        raise GuestException.of(_GP, 0)
    # XGETBV with ECX 1 says which components are in use: those of XSTATE_BV that XCR0 enables.
    value = op.cpu.xcr0()
    if which:
        value &= op.cpu.extended_state().in_use
    op.set_register(_RAX, value & _LOW, 4)
    op.set_register(_RDX, value >> 32, 4)


@instruction("rdtscp", 1, 0x01, prefix=None, digit=7, rm=1)
def _rdtscp(op: Operands) -> None:
    if op.cpl and op.cpu.sregs.cr4 & Cr4.TSD:
        raise GuestException.of(_GP, 0)
    ticks = op.cpu.timestamp()
    op.set_register(_RAX, ticks & _LOW, 4)
    op.set_register(_RDX, ticks >> 32, 4)
    op.set_register(_RCX, (op.cpu.read_msr(_IA32_TSC_AUX) or 0) & _LOW, 4)


@instruction("rdpid", 1, 0xC7, prefix=0xF3, digit=7, operand=REGISTER)
def _rdpid(op: Operands) -> None:
    value = (op.cpu.read_msr(_IA32_TSC_AUX) or 0) & _LOW
    op.set_register(op.it.rm, value, 8 if op.it.bits == 64 else 4)


@instruction("invpcid", 2, 0x82, prefix=0x66, operand=MEMORY, bits=(32, 64))
def _invpcid(op: Operands) -> None:
    if op.cpl:
        raise GuestException.of(_GP, 0)
    kind = op.register(op.it.reg, 8 if op.it.bits == 64 else 4)
    descriptor = op.load(16)
    if kind > 3 or descriptor & (1 << 64) - 1 >> 12:
        raise GuestException.of(_GP, 0)
    op.cpu.flush_translations()


@instruction("clwb", 1, 0xAE, prefix=0x66, digit=6, operand=MEMORY)
def _clwb(op: Operands) -> None:
    op.load(1)  # it faults like a read


# Protection keys


def _protection_keys(op: Operands) -> ExtendedState:
    state = op.cpu.extended_state() if op.cpu.sregs.cr4 & Cr4.PKE else None
    if state is None or _PKRU not in state.layout:
        raise GuestException.of(_UD)
    if op.register(_RCX, 4):
        raise GuestException.of(_GP, 0)
    return state


@instruction("rdpkru", 1, 0x01, prefix=0, digit=5, rm=6)
def _rdpkru(op: Operands) -> None:
    state = _protection_keys(op)
    op.set_register(_RAX, int.from_bytes(state.extended(_PKRU, 4), "little"), 4)
    op.set_register(_RDX, 0, 4)


@instruction("wrpkru", 1, 0x01, prefix=0, digit=5, rm=7)
def _wrpkru(op: Operands) -> None:
    state = _protection_keys(op)
    if op.register(_RDX, 4):
        raise GuestException.of(_GP, 0)
    value = op.register(_RAX, 4)
    state.need(1 << _PKRU)
    state.put(state.layout[_PKRU][0], value, 4)


# Waiting for a write to memory: MWAIT may go on at any time, and does so at once


@instruction("monitor", 1, 0x01, prefix=0, digit=1, rm=0)
def _monitor(op: Operands) -> None:
    _only_in_ring_0(op)
    if op.register(_RCX, 4):
        raise GuestException.of(_GP, 0)
    op.cpu.memory.read(op.linear(0, MemoryOperand(_RAX, None, 1, 0, op.it.segment or "ds", False)), 1)


@instruction("mwait", 1, 0x01, prefix=0, digit=1, rm=1)
def _mwait(op: Operands) -> None:
    _only_in_ring_0(op)
    if op.register(_RCX, 4) & ~1:  # bit 0: interrupts end it even when they are off
        raise GuestException.of(_GP, 0)


# VERR, VERW, LAR, LSL ask what a selector would give. Not in real mode (SDM vol. 2: #UD).


def _descriptor(op: Operands, selector: int) -> Segment | None:
    """What the selector names, or None for null and what is outside the table."""
    if not selector & 0xFFFC:
        return None
    sregs = op.cpu.sregs
    if selector & 4:
        base, limit = sregs.ldt.base, sregs.ldt.limit if not sregs.ldt.unusable else -1
    else:
        base, limit = sregs.gdt.base, sregs.gdt.limit
    offset = selector & 0xFFF8
    if offset + 7 > limit:
        return None
    return decode_segment(op.cpu.memory.read(base + offset, 8, implicit=True), selector)


def _selector(op: Operands) -> int:
    if not op.cpu.sregs.cr0 & Cr0.PE:
        raise GuestException.of(_UD)
    return op.source(2)


def _is_conforming(segment: Segment) -> bool:
    return segment.s == 1 and segment.type & 0xC == 0xC


def _within_reach(op: Operands, segment: Segment, selector: int) -> bool:
    return _is_conforming(segment) or segment.dpl >= max(op.cpl, selector & 3)


@instruction("verr", 1, 0x00, prefix=None, digit=4)
def _verr(op: Operands) -> None:
    selector = _selector(op)
    segment = _descriptor(op, selector)
    readable = segment is not None and segment.s == 1 and (not segment.type & 8 or bool(segment.type & 2))
    good = readable and segment is not None and _within_reach(op, segment, selector)
    op.set_flags(_ZF if good else 0, _ZF)


@instruction("verw", 1, 0x00, prefix=None, digit=5)
def _verw(op: Operands) -> None:
    selector = _selector(op)
    segment = _descriptor(op, selector)
    writable = segment is not None and segment.s == 1 and segment.type & 0xA == 2
    good = writable and segment is not None and segment.dpl >= max(op.cpl, selector & 3)
    op.set_flags(_ZF if good else 0, _ZF)


_LAR_SYSTEM = {1, 2, 3, 4, 5, 9, 11, 12}
_LSL_SYSTEM = {1, 2, 3, 9, 11}
_LONG_MODE_SYSTEM = {2, 9, 11, 12}


def _asked(op: Operands, system_types: set[int]) -> tuple[Segment, int] | None:
    selector = _selector(op)
    segment = _descriptor(op, selector)
    if segment is None or not _within_reach(op, segment, selector):
        return None
    if not segment.s:
        known = system_types & _LONG_MODE_SYSTEM if op.cpu.sregs.efer & 0x400 else system_types
        if segment.type not in known:
            return None
    return segment, selector


@instruction("lar", 1, 0x02, prefix=None)
def _lar(op: Operands) -> None:
    asked = _asked(op, _LAR_SYSTEM)
    if asked is not None:
        _, selector = asked
        table = op.cpu.sregs.ldt if selector & 4 else op.cpu.sregs.gdt
        raw = op.cpu.memory.read(table.base + (selector & 0xFFF8) + 4, 4, implicit=True)
        op.set_register(op.it.reg, int.from_bytes(raw, "little") & 0x00FF_FF00, op.it.operand_size)
    op.set_flags(_ZF if asked is not None else 0, _ZF)


@instruction("lsl", 1, 0x03, prefix=None)
def _lsl(op: Operands) -> None:
    asked = _asked(op, _LSL_SYSTEM)
    if asked is not None:
        op.set_register(op.it.reg, asked[0].limit, op.it.operand_size)
    op.set_flags(_ZF if asked is not None else 0, _ZF)


# Hints that need nothing done.


@instruction("nop (hint)", 1, 0x19, prefix=None)
@instruction("nop (hint)", 1, 0x1A, prefix=None)
@instruction("nop (hint)", 1, 0x1B, prefix=None)
@instruction("nop (hint)", 1, 0x1C, prefix=None)
@instruction("nop (hint)", 1, 0x1D, prefix=None)
def _hint(op: Operands) -> None:
    """Reserved NOPs, among them CLDEMOTE and the MPX instructions where there is no MPX."""
