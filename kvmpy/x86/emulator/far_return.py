"""IRET in protected mode, RET to another segment: also to an outer ring (SDM vol. 2; vol. 3, 5.8.6 and 6.12.1).

A KVM that runs ring 0 in software knows IRET in real mode and in 64-bit code, and RET within a ring.
"""

from __future__ import annotations

from kvmpy.x86.descriptors import decode_segment
from kvmpy.x86.emulator.guest_exception import GuestException
from kvmpy.x86.emulator.processor import Operands
from kvmpy.x86.emulator.stack import Stack, pointer_mask, set_stack_pointer
from kvmpy.x86.emulator.table import UnknownInstruction, instruction
from kvmpy.x86.event_delivery.protected_mode import NULL
from kvmpy.x86.flags import Cr0, Efer, Rflags
from kvmpy.x86.registers import Segment

_NP, _SS, _GP = 11, 12, 13
_PE, _LMA = int(Cr0.PE), int(Efer.LMA)
_NT, _VM, _IF, _IOPL = int(Rflags.NT), int(Rflags.VM), int(Rflags.IF), 0x3000
_ALWAYS = 0x4DD5
"""CF, PF, AF, ZF, SF, TF, DF, OF, NT."""
_WITH_32_BITS = int(Rflags.RF | Rflags.AC | Rflags.ID)
_VIRTUAL = int(Rflags.VIF | Rflags.VIP)
_ACCESSED, _CODE, _CONFORMING, _WRITABLE = 1, 8, 4, 2


class _Descriptor:
    """A segment that a selector names, and where its descriptor is."""

    def __init__(self, op: Operands, selector: int) -> None:
        sregs = op.cpu.sregs
        table, limit = (sregs.ldt, sregs.ldt.limit) if selector & 4 else (sregs.gdt, sregs.gdt.limit)
        if selector & 4 and sregs.ldt.unusable:
            limit = -1
        if (selector & 0xFFF8) + 7 > limit:
            raise GuestException.of(_GP, selector & 0xFFFC)
        self._op = op
        self._address = table.base + (selector & 0xFFF8)
        self.segment = decode_segment(op.cpu.memory.read(self._address, 8, implicit=True), selector)

    def loaded(self) -> Segment:
        """The segment as it is after loading: accessed, in the table too."""
        segment = self.segment
        if segment.type & _ACCESSED:
            return segment
        memory, place = self._op.cpu.memory, self._address + 5
        memory.write(place, bytes((memory.read(place, 1, implicit=True)[0] | _ACCESSED,)), implicit=True)
        return segment.replace(type=segment.type | _ACCESSED)


def _code(op: Operands, selector: int) -> _Descriptor:
    """The code segment to return to, judged: its RPL is the ring that it will be."""
    rpl, error = selector & 3, selector & 0xFFFC
    if not error:
        raise GuestException.of(_GP, 0)
    found = _Descriptor(op, selector)
    segment = found.segment
    long_mode = bool(op.cpu.sregs.efer & _LMA)
    conforming = segment.type & _CONFORMING
    if (
        not (segment.s and segment.type & _CODE)
        or rpl < op.cpl
        or (segment.dpl > rpl if conforming else segment.dpl != rpl)
        or (long_mode and segment.l and segment.db)
    ):
        raise GuestException.of(_GP, error)
    if not segment.present:
        raise GuestException.of(_NP, error)
    return found


def _check_target(op: Operands, segment: Segment, target: int) -> None:
    """The address to return to: within the limit, or canonical."""
    wide = segment.l and op.cpu.sregs.efer & _LMA
    if target >> 47 not in (0, 0x1FFFF) if wide else target > segment.limit:
        raise GuestException.of(_GP, 0)


def _outer_stack(op: Operands, selector: int, code: Segment) -> _Descriptor | None:
    """The stack segment of the outer ring, judged. None: null, which 64-bit code may have outside ring 3."""
    rpl, error = code.selector & 3, selector & 0xFFFC
    if not error:
        if code.l and op.cpu.sregs.efer & _LMA and rpl != 3:
            return None
        raise GuestException.of(_GP, 0)
    found = _Descriptor(op, selector)
    segment = found.segment
    writable_data = segment.s and segment.type & (_CODE | _WRITABLE) == _WRITABLE
    if selector & 3 != rpl or not writable_data or segment.dpl != rpl:
        raise GuestException.of(_GP, error)
    if not segment.present:
        raise GuestException.of(_SS, error)
    return found


def _leave(op: Operands, stack: Stack, selector: int, target: int, *, taken: int, released: int = 0) -> None:
    """Go to `selector`:`target`. So far `taken` operands are off the stack; `released` bytes more go from it.

    For an outer ring its stack pointer and SS follow on the stack, and `released` bytes go from that stack, too.
    """
    sregs = op.cpu.sregs
    code = _code(op, selector)
    ring = selector & 3
    taken_bytes = taken * stack.size + released
    if ring == op.cpl:
        _check_target(op, code.segment, target)
        sregs.cs = code.loaded()
        stack.drop(taken_bytes)
        op.target = target
        return
    pointer = stack.read(stack.top + taken_bytes)
    stack_selector = stack.read(stack.top + taken_bytes + stack.size) & 0xFFFF
    outer = _outer_stack(op, stack_selector, code.segment)
    _check_target(op, code.segment, target)  # last (SDM vol. 2, IRET)
    sregs.cs = code.loaded()
    sregs.ss = NULL.replace(selector=stack_selector, s=1, type=3, dpl=ring) if outer is None else outer.loaded()
    wide = bool(sregs.cs.l and sregs.efer & _LMA)
    set_stack_pointer(op, pointer + released, pointer_mask(sregs.ss, wide))
    for name in ("es", "fs", "gs", "ds"):
        segment: Segment = getattr(sregs, name)
        shared = segment.type & (_CODE | _CONFORMING) == _CODE | _CONFORMING
        if segment.selector & 0xFFFC and not segment.unusable and segment.dpl < ring and not shared:
            setattr(sregs, name, NULL)
    op.target = target


@instruction("iret", 0, 0xCF, prefix=None, modrm=False, bits=(16, 32), leaves=True)
def _iret(op: Operands) -> None:
    before, cpl, size = op.flags, op.cpl, op.it.operand_size
    if not op.cpu.sregs.cr0 & _PE or before & (_VM | _NT):  # KVM does the first; virtual-8086 mode, a return to a task
        raise UnknownInstruction(b"\xcf")
    stack = Stack(op, op.it.operand_size)
    target, selector, flags = stack[0], stack[1] & 0xFFFF, stack[2]
    if size == 4 and flags & _VM and not cpl:
        raise UnknownInstruction(b"\xcf")
    _leave(op, stack, selector, target, taken=3)
    changed = _ALWAYS
    if size == 4:
        changed |= _WITH_32_BITS
    if cpl <= before >> 12 & 3:
        changed |= _IF
    if not cpl:
        changed |= _IOPL | (_VIRTUAL if size == 4 else 0)
    op.set_flags(flags, changed)
    # It also ends the blocking of NMIs. A KVM that needs this row keeps none: `nmi.masked` is 0 in the handler there.


def _far_return(op: Operands, released: int) -> None:
    if not op.cpu.sregs.cr0 & _PE or op.flags & _VM:
        raise UnknownInstruction(b"\xcb")
    stack = Stack(op, op.it.operand_size)
    _leave(op, stack, stack[1] & 0xFFFF, stack[0], taken=2, released=released)


@instruction("ret far", 0, 0xCB, prefix=None, modrm=False, leaves=True)
def _retf(op: Operands) -> None:
    _far_return(op, 0)


@instruction("ret far n", 0, 0xCA, prefix=None, modrm=False, immediate=2, leaves=True)
def _retf_n(op: Operands) -> None:
    _far_return(op, op.it.immediate)
