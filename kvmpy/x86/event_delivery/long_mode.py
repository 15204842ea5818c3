"""Delivery in long mode (SDM vol. 3, 6.14; vol. 2, INT n, with IA-32e mode active; APM vol. 2, 8.9)."""

from __future__ import annotations

from kvmpy.x86.event_delivery.attempt import GP, NP, SS, Attempt
from kvmpy.x86.event_delivery.gate_lookup import handler_segment, interrupt_gate
from kvmpy.x86.event_delivery.outcome import Delivered
from kvmpy.x86.flags import Cr4, Rflags
from kvmpy.x86.gates import Gate
from kvmpy.x86.registers import Segment

__all__ = ["deliver_long"]

TS = 10
CLEARED = int(Rflags.TF | Rflags.NT | Rflags.RF | Rflags.VM)


def deliver_long(attempt: Attempt) -> Delivered:
    """Through a 16-byte gate. The frame always has SS and RSP, is aligned to 16 bytes, and is 8 bytes an item."""
    gate = interrupt_gate(attempt)
    code = handler_segment(attempt, gate)
    if not code.l or code.db:
        attempt.fail_selector(
            GP, gate.selector, f"code segment {gate.selector:#06x} is not 64-bit code (L={code.l}, D={code.db})"
        )
    if not code.present:
        attempt.fail_selector(NP, gate.selector, f"code segment {gate.selector:#06x} is not present")
    state = attempt.state
    inner = not code.type & 4 and code.dpl < attempt.cpl
    new_cpl = code.dpl if inner else attempt.cpl
    top = _stack_top(attempt, gate, inner, new_cpl) & ~0xF
    items = [
        ("ss", state.sregs.ss.selector),
        ("rsp", state.regs.rsp),
        ("rflags", attempt.pushed_flags),
        ("cs", state.sregs.cs.selector),
        ("rip", attempt.return_address),
    ]
    if attempt.event.pushed_error_code is not None:
        items.append(("error code", attempt.event.pushed_error_code))
    pointer = top
    for name, value in items:
        pointer = (pointer - 8) & 0xFFFF_FFFF_FFFF_FFFF
        if not _canonical(attempt, pointer):
            attempt.fail(SS, attempt.ext, f"the stack address {pointer:#x} for {name} is not canonical")
        attempt.plan_write(pointer, value, 8, user=new_cpl == 3)
    if not _canonical(attempt, gate.offset):
        attempt.fail(GP, attempt.ext, f"the handler's address {gate.offset:#x} is not canonical")

    new = state.copy()
    new.regs.rsp = pointer
    new.regs.rip = gate.offset
    new.regs.rflags &= ~CLEARED
    if gate.kind == "interrupt":
        new.regs.rflags &= ~int(Rflags.IF)
    new.sregs.cs = code.replace(selector=(gate.selector & 0xFFFC) | new_cpl)
    if inner:
        # A null selector whose RPL is the new CPL; DPL is what VT-x and KVM take for the CPL.
        new.sregs.ss = Segment(new_cpl, 0, 0xFFFF_FFFF, type=3, dpl=new_cpl, db=1, g=1, unusable=1)
    return Delivered(attempt.event, attempt.gate, new, tuple(reversed(items)), pointer)


def _canonical(attempt: Attempt, address: int) -> bool:
    width = 57 if attempt.state.sregs.cr4 & Cr4.LA57 else 48
    return address >> width - 1 in (0, (1 << 65 - width) - 1)


def _stack_top(attempt: Attempt, gate: Gate, inner: bool, ring: int) -> int:
    """RSP of the interrupt stack (IST) that the gate names, of the new ring, or the present one."""
    if gate.ist:
        name, offset = f"ist{gate.ist}", 0x1C + gate.ist * 8
    elif inner:
        name, offset = f"rsp{ring}", 4 + ring * 8
    else:
        return attempt.state.regs.rsp
    tr = attempt.state.sregs.tr
    last = offset + 7
    if last > tr.limit:
        attempt.fail_selector(
            TS, tr.selector, f"{name} in the TSS ends at offset {last:#x}, beyond the TSS limit {tr.limit:#x}"
        )
    top = attempt.read_number(tr.base + offset, 8, f"{name} in the TSS")
    if not _canonical(attempt, top):
        attempt.fail(SS, attempt.ext, f"{name} in the TSS, {top:#x}, is not canonical")
    return top
