"""The steps that protected and long mode share: finding the gate and the code segment it names."""

from __future__ import annotations

from kvmpy.x86.descriptors import decode_segment
from kvmpy.x86.event_delivery.attempt import GP, NP, Attempt
from kvmpy.x86.gates import Gate
from kvmpy.x86.registers import Segment

__all__ = ["handler_segment", "interrupt_gate", "read_descriptor"]


def interrupt_gate(attempt: Attempt) -> Gate:
    """The interrupt or trap gate of the event's vector, fully checked (SDM vol. 3, 6.12.1 and 6.14.1)."""
    size = 16 if attempt.long_mode else 8
    event, idt = attempt.event, attempt.state.sregs.idt
    place = attempt.linear(idt.base + event.vector * size)
    name = f"IDT gate {event.vector:#04x}"
    attempt.gate = f"{name} at {place:#x}"
    last = event.vector * size + size - 1
    if last > idt.limit:
        attempt.fail_gate(GP, f"the gate ends at offset {last:#x}, beyond the IDT limit {idt.limit:#x}")
    data = attempt.read(place, size, name)
    gate = Gate.decode(data, long_mode=attempt.long_mode)
    if gate is None or gate.kind == "call":
        access = data[5]
        attempt.fail_gate(GP, f"type {access & 0x1F:#x} is no interrupt or trap gate (access byte {access:#04x})")
    if event.software and gate.dpl < attempt.cpl:
        attempt.fail_gate(GP, f"the gate's DPL is {gate.dpl}, {event} came from CPL {attempt.cpl}")
    if not gate.present:
        attempt.fail_gate(NP, "not present")
    if gate.kind == "task":
        attempt.fail_unsupported(f"a task gate to the TSS {gate.selector:#x}: task switches are not modelled")
    return gate


def read_descriptor(attempt: Attempt, selector: int, fault: int, what: str) -> Segment:
    """The descriptor that a selector picks from GDT or LDT; exception `fault` when the selector is beyond the table."""
    if selector & 4:
        ldt = attempt.state.sregs.ldt
        table, base, limit = "LDT", ldt.base, ldt.limit
        if ldt.unusable or not ldt.present:
            attempt.fail_selector(fault, selector, f"{what} {selector:#06x} is in the LDT, and there is none")
    else:
        gdt = attempt.state.sregs.gdt
        table, base, limit = "GDT", gdt.base, gdt.limit
    if selector | 7 > limit:
        attempt.fail_selector(fault, selector, f"{what} {selector:#06x} is beyond the {table} limit {limit:#x}")
    data = attempt.read(base + (selector & 0xFFF8), 8, f"{table} entry of {what} {selector:#06x}")
    return decode_segment(data, selector)


def handler_segment(attempt: Attempt, gate: Gate) -> Segment:
    """The code segment of the handler, not yet checked for presence; its hidden type has the accessed bit."""
    selector = gate.selector
    if selector & 0xFFFC == 0:
        attempt.fail(GP, attempt.ext, "the gate's code selector is null")
    code = read_descriptor(attempt, selector, GP, "code segment")
    if not (code.s and code.type & 8):
        attempt.fail_selector(GP, selector, f"{selector:#06x} is not a code segment (type {code.type:#x}, S={code.s})")
    if code.dpl > attempt.cpl:
        attempt.fail_selector(
            GP, selector, f"code segment {selector:#06x} has DPL {code.dpl}, less privileged than CPL {attempt.cpl}"
        )
    return code.replace(type=code.type | 1)
