"""Delivery in protected and virtual-8086 mode (SDM vol. 3, 6.12 and 20.3; vol. 2, INT n, PROTECTED-MODE)."""

from __future__ import annotations

from kvmpy.x86.event_delivery.attempt import GP, NP, SS, Attempt
from kvmpy.x86.event_delivery.event import EventKind
from kvmpy.x86.event_delivery.gate_lookup import handler_segment, interrupt_gate, read_descriptor
from kvmpy.x86.event_delivery.outcome import Delivered
from kvmpy.x86.flags import Cr4, Rflags
from kvmpy.x86.gates import Gate
from kvmpy.x86.registers import Segment

__all__ = ["deliver_protected"]

TS = 10
CLEARED = int(Rflags.TF | Rflags.NT | Rflags.RF | Rflags.VM)
TSS16_TYPES = (1, 3)
NULL = Segment(0, 0, 0, type=0, s=0, present=0, unusable=1)
IOPL_SHIFT = 12


def deliver_protected(attempt: Attempt) -> Delivered:
    """Through an 8-byte gate, with the stack of the TSS when the handler is more privileged."""
    _check_virtual_8086(attempt)
    gate = interrupt_gate(attempt)
    code = handler_segment(attempt, gate)
    if not code.present:
        attempt.fail_selector(NP, gate.selector, f"code segment {gate.selector:#06x} is not present")
    conforming = bool(code.type & 4)
    state, cpl = attempt.state, attempt.cpl
    if attempt.virtual_8086 and (conforming or code.dpl):
        attempt.fail_selector(
            GP, gate.selector, f"from virtual-8086 mode the handler must be non-conforming ring 0, not DPL {code.dpl}"
        )
    size = 2 if gate.bits == 16 else 4
    items: list[tuple[str, int]] = []
    if not conforming and code.dpl < cpl:
        new_cpl = code.dpl
        stack, pointer = _inner_stack(attempt, new_cpl)
        if attempt.virtual_8086:
            items += [(name, getattr(state.sregs, name).selector) for name in ("gs", "fs", "ds", "es")]
        items += [("ss", state.sregs.ss.selector), ("esp", state.regs.rsp)]
        selector = stack.selector
    else:
        new_cpl, stack, pointer, selector = cpl, state.sregs.ss, state.regs.rsp & 0xFFFF_FFFF, 0
    items += [("eflags", attempt.pushed_flags), ("cs", state.sregs.cs.selector), ("eip", attempt.return_address)]
    if attempt.event.pushed_error_code is not None:
        items.append(("error code", attempt.event.pushed_error_code))
    pointer = attempt.push(stack, pointer, items, size, user=new_cpl == 3, selector=selector)
    if gate.offset > code.limit:
        attempt.fail(
            GP, attempt.ext, f"the handler's offset {gate.offset:#x} is beyond the limit {code.limit:#x} of its segment"
        )
    return _entered(attempt, gate, code, new_cpl, stack, pointer, items, size)


def _check_virtual_8086(attempt: Attempt) -> None:
    """INT n in virtual-8086 mode depends on IOPL and CR4.VME (SDM vol. 3, table 20-2)."""
    if not attempt.virtual_8086 or attempt.event.kind is not EventKind.SOFTWARE_INTERRUPT:
        return
    if attempt.state.sregs.cr4 & Cr4.VME:
        attempt.fail_unsupported("INT n in virtual-8086 mode with CR4.VME: the redirection bitmap is not modelled")
    iopl = attempt.state.regs.rflags >> IOPL_SHIFT & 3
    if iopl < 3:
        attempt.fail(GP, 0, f"INT n in virtual-8086 mode needs IOPL 3, which is {iopl}")


def _inner_stack(attempt: Attempt, ring: int) -> tuple[Segment, int]:
    """SS and ESP for `ring` from the TSS, with all the checks on SS."""
    tr = attempt.state.sregs.tr
    if tr.type in TSS16_TYPES:
        offset, width = ring * 4 + 2, 2
    else:
        offset, width = ring * 8 + 4, 4
    last = offset + width + 1
    if last > tr.limit:
        attempt.fail_selector(
            TS, tr.selector, f"ss{ring} in the TSS ends at offset {last:#x}, beyond the TSS limit {tr.limit:#x}"
        )
    pointer = attempt.read_number(tr.base + offset, width, f"esp{ring} in the TSS")
    selector = attempt.read_number(tr.base + offset + width, 2, f"ss{ring} in the TSS")
    what = f"ss{ring} {selector:#06x} in the TSS"
    if selector & 0xFFFC == 0:
        attempt.fail(TS, attempt.ext, f"ss{ring} in the TSS is null")
    if selector & 3 != ring:
        attempt.fail_selector(TS, selector, f"{what} has RPL {selector & 3}")
    stack = read_descriptor(attempt, selector, TS, f"ss{ring}")
    if stack.dpl != ring:
        attempt.fail_selector(TS, selector, f"{what} has DPL {stack.dpl}")
    if not stack.s or stack.type & 8 or not stack.type & 2:
        attempt.fail_selector(TS, selector, f"{what} is not writable data (type {stack.type:#x}, S={stack.s})")
    if not stack.present:
        attempt.fail_selector(SS, selector, f"{what} is not present")
    return stack.replace(type=stack.type | 1), pointer


def _entered(
    attempt: Attempt,
    gate: Gate,
    code: Segment,
    new_cpl: int,
    stack: Segment,
    pointer: int,
    items: list[tuple[str, int]],
    size: int,
) -> Delivered:
    new = attempt.state.copy()
    new.regs.rsp = pointer
    new.regs.rip = gate.offset
    new.regs.rflags &= ~CLEARED
    if gate.kind == "interrupt":
        new.regs.rflags &= ~int(Rflags.IF)
    new.sregs.cs = code.replace(selector=(gate.selector & 0xFFFC) | new_cpl)
    new.sregs.ss = stack
    if attempt.virtual_8086:
        new.sregs.ds = new.sregs.es = new.sregs.fs = new.sregs.gs = NULL
    mask = (1 << 8 * size) - 1
    frame = tuple((name, value & mask) for name, value in reversed(items))
    address = attempt.linear(stack.base + (pointer & (0xFFFF_FFFF if stack.db else 0xFFFF)))
    return Delivered(attempt.event, attempt.gate, new, frame, address)
