"""Delivery in real mode through the interrupt vector table (SDM vol. 3, 20.1.4; vol. 2, INT n, REAL-ADDRESS-MODE)."""

from __future__ import annotations

from kvmpy.x86.event_delivery.attempt import GP, Attempt
from kvmpy.x86.event_delivery.outcome import Delivered
from kvmpy.x86.flags import Rflags

__all__ = ["deliver_real"]

CLEARED = int(Rflags.IF | Rflags.TF | Rflags.AC)


def deliver_real(attempt: Attempt) -> Delivered:
    """Push FLAGS, CS and IP (16 bits each; never an error code) and go to the table's segment:offset."""
    event, state = attempt.event, attempt.state
    idt, cs, ss = state.sregs.idt, state.sregs.cs, state.sregs.ss
    place = attempt.linear(idt.base + event.vector * 4)
    attempt.gate = f"IVT entry {event.vector:#04x} at {place:#x}"
    last = event.vector * 4 + 3
    if last > idt.limit:
        attempt.fail(GP, 0, f"the entry ends at offset {last:#x}, beyond the IDT limit {idt.limit:#x}")
    entry = attempt.read_number(place, 4, f"IVT entry {event.vector:#04x}")
    offset, selector = entry & 0xFFFF, entry >> 16
    items = [
        ("flags", state.regs.rflags & 0xFFFF),
        ("cs", cs.selector),
        ("ip", attempt.return_address & 0xFFFF),
    ]
    pointer = attempt.push(ss, state.regs.rsp, items, 2, user=False, selector=0)
    if offset > cs.limit:
        attempt.fail(GP, 0, f"the handler's offset {offset:#x} is beyond the limit {cs.limit:#x} of CS")
    new = state.copy()
    new.regs.rsp = pointer
    new.regs.rip = offset
    new.regs.rflags &= ~CLEARED
    # Base and selector change; limit and rights stay, which is what makes "unreal" segments last.
    new.sregs.cs = cs.replace(selector=selector, base=selector << 4)
    address = attempt.linear(ss.base + (pointer & (0xFFFF_FFFF if ss.db else 0xFFFF)))
    return Delivered(event, attempt.gate, new, tuple(reversed(items)), address)
