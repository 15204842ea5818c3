"""Selectors that cannot be loaded: into segment registers, by far jumps, calls and returns, by LTR and LLDT.

SDM vol. 3, 5.5 to 5.8; vol. 2, MOV, JMP, CALL, RET, IRET, LTR, LLDT.
"""

from __future__ import annotations

from collections.abc import Callable

from kvmpy.debug.crash_report.first_event.candidate import Candidate, Cause
from kvmpy.debug.crash_report.first_event.decoder import Decoded
from kvmpy.debug.crash_report.first_event.execution import SEGMENTS, Execution, read_linear
from kvmpy.debug.crash_report.first_event.memory_faults import is_canonical, page_fault_at
from kvmpy.x86.descriptors import decode_segment
from kvmpy.x86.flags import Rflags
from kvmpy.x86.page_walk import Access
from kvmpy.x86.register_text import segment_type_text
from kvmpy.x86.registers import Segment

__all__ = ["far_transfer_fault", "segment_load_fault", "system_selector_fault"]

_TSS_AVAILABLE, _TSS_BUSY, _LDT = (1, 9), (3, 11), 2
_GATES = (4, 5, 12)
_TS, _GP = 10, 13


def _descriptor(execution: Execution, selector: int, what: str) -> Segment | Candidate:
    """The descriptor that a selector picks, or the fault of looking it up."""
    sregs, index = execution.sregs, selector & 0xFFF8
    name, table = ("LDT", sregs.ldt) if selector & 4 else ("GDT", sregs.gdt)
    values = {"selector": selector, "base": table.base, "limit": table.limit}
    code = selector & 0xFFFC
    if selector & 4 and (sregs.ldt.unusable or not sregs.ldt.present):
        text = f"{what} is in the LDT (bit 2 is set), and there is none"
        return Candidate.protection(Cause.NO_LDT, text, error_code=code).noting(**values)
    if index + 7 > table.limit:
        text = f"{what} is beyond the limit {table.limit:#x} of the {name}"
        return Candidate.protection(Cause.SELECTOR_BEYOND_LIMIT, text, error_code=code).noting(**values)
    place = table.base + index
    data = read_linear(execution.memory, execution.state, place, 8)
    if len(data) < 8:
        what = f"{name} entry of {what} at {place:#x}"
        fault = page_fault_at(execution, place + len(data), 1, Access.READ, what)
        text = f"{what}: there is no memory"
        return fault or Candidate.protection(Cause.DESCRIPTOR_EMPTY, text, error_code=code, certain=False).noting(
            **values
        )
    if not any(data):
        text = f"the {name} entry of {what}, at {place:#x}, is empty (all zero)"
        return Candidate.protection(Cause.DESCRIPTOR_EMPTY, text, error_code=code).noting(**values)
    return decode_segment(data, selector)


def _wrong_type(selector: int, what: str, descriptor: Segment, wanted: str) -> Candidate:
    kind = segment_type_text(descriptor)
    text = f"{what} is no {wanted}, but: {kind}"
    return Candidate.protection(Cause.DESCRIPTOR_TYPE, text, error_code=selector & 0xFFFC).noting(selector=selector)


def _privilege(selector: int, text: str) -> Candidate:
    return Candidate.protection(Cause.DESCRIPTOR_PRIVILEGE, text, error_code=selector & 0xFFFC).noting(
        selector=selector, rpl=selector & 3
    )


# Segment registers


def segment_load_fault(execution: Execution) -> Candidate | None:
    """MOV and POP to a segment register, and LDS, LES, LFS, LGS, LSS."""
    decoded = execution.decoded
    if decoded is None or not execution.protected:
        return None
    loaded = _loaded_segment(execution, decoded)
    if loaded is None:
        return None
    name, selector = loaded
    if name == "ss":
        return stack_segment_fault(execution, selector, execution.cpl)
    return data_segment_fault(execution, name, selector)


def _loaded_segment(execution: Execution, decoded: Decoded) -> tuple[str, int] | None:
    opcode = decoded.opcode
    if opcode == 0x8E and decoded.group < 6:
        value = execution.operand(decoded, 16)
        return None if value is None else (SEGMENTS[decoded.group], value)
    popped = {0x07: "es", 0x17: "ss", 0x1F: "ds", 0x0FA1: "fs", 0x0FA9: "gs"}.get(opcode)
    if popped is not None:
        items = execution.stack_items(1, 2)
        return None if items is None else (popped, items[0])
    far = {0xC4: "es", 0xC5: "ds", 0x0FB2: "ss", 0x0FB4: "fs", 0x0FB5: "gs"}.get(opcode)
    if far is not None and decoded.memory is not None:
        segment, offset = execution.effective_address(decoded)
        data = execution.read(segment, offset + decoded.operand_bits // 8, 2)
        return None if data is None else (far, int.from_bytes(data, "little"))
    return None


def data_segment_fault(execution: Execution, name: str, selector: int) -> Candidate | None:
    """DS, ES, FS or GS: null is allowed, else readable, privileged enough, present."""
    if selector & 0xFFFC == 0:
        return None
    what = f"the selector {selector:#06x} for {name.upper()}"
    descriptor = _descriptor(execution, selector, what)
    if isinstance(descriptor, Candidate):
        return descriptor
    code = bool(descriptor.type & 8)
    if not descriptor.s or (code and not descriptor.type & 2):
        return _wrong_type(selector, what, descriptor, "data segment or readable code")
    conforming = code and descriptor.type & 4
    if not conforming and max(selector & 3, execution.cpl) > descriptor.dpl:
        return _privilege(
            selector,
            f"{what} has RPL {selector & 3}, and CPL is {execution.cpl}; "
            f"the descriptor's DPL {descriptor.dpl} asks for at most that",
        )
    if not descriptor.present:
        text = f"{what} picks a segment that is not present (P=0)"
        return Candidate.not_present(text, error_code=selector & 0xFFFC).noting(selector=selector)
    return None


def stack_segment_fault(execution: Execution, selector: int, cpl: int, what: str = "") -> Candidate | None:
    """SS: not null (but in 64-bit mode of rings 0 to 2), writable data, RPL and DPL equal to the CPL, present."""
    what = f"the selector {selector:#06x} for SS{what}"
    if selector & 0xFFFC == 0:
        if execution.bits == 64 and cpl < 3 and selector & 3 == cpl:
            return None
        return Candidate.protection(Cause.SELECTOR_NULL, f"{what} is null").noting(selector=selector)
    descriptor = _descriptor(execution, selector, what)
    if isinstance(descriptor, Candidate):
        return descriptor
    if not descriptor.s or descriptor.type & 8 or not descriptor.type & 2:
        return _wrong_type(selector, what, descriptor, "writable data segment")
    if selector & 3 != cpl or descriptor.dpl != cpl:
        return _privilege(selector, f"{what} has RPL {selector & 3} and DPL {descriptor.dpl}; both must be CPL {cpl}")
    if not descriptor.present:
        text = f"{what} picks a segment that is not present (P=0)"
        return Candidate.stack(Cause.DESCRIPTOR_NOT_PRESENT, text, error_code=selector & 0xFFFC).noting(
            selector=selector
        )
    return None


# Code segments


def far_transfer_fault(execution: Execution) -> Candidate | None:
    """Far JMP, CALL and RET, and IRET. Call gates and task switches are not followed."""
    decoded = execution.decoded
    if decoded is None:
        return None
    if decoded.opcode == 0xCF:
        return _iret_fault(execution, decoded)
    if decoded.opcode in (0xCA, 0xCB):
        return _far_return_fault(execution, decoded)
    target = _far_target(execution, decoded)
    if target is None or not execution.protected:
        return None
    selector, offset = target
    what = (
        f"the selector {selector:#06x} of the far {'call' if decoded.opcode == 0x9A or decoded.group == 3 else 'jump'}"
    )
    descriptor = _code_descriptor(execution, selector, what)
    if descriptor is None or isinstance(descriptor, Candidate):
        return descriptor
    conforming, cpl = bool(descriptor.type & 4), execution.cpl
    if descriptor.dpl > cpl if conforming else (selector & 3 > cpl or descriptor.dpl != cpl):
        return _privilege(selector, f"{what} has RPL {selector & 3} and DPL {descriptor.dpl}, and CPL is {cpl}")
    return _entered_fault(execution, selector, descriptor, offset, what)


def _far_target(execution: Execution, decoded: Decoded) -> tuple[int, int] | None:
    """(selector, offset) of a far jump or call."""
    if decoded.opcode in (0x9A, 0xEA):
        return decoded.selector, decoded.immediate
    if decoded.opcode != 0xFF or decoded.group not in (3, 5) or decoded.memory is None:
        return None
    size = decoded.operand_bits // 8
    data = execution.read(*execution.effective_address(decoded), size + 2)
    if data is None:
        return None
    return int.from_bytes(data[size:], "little"), int.from_bytes(data[:size], "little")


def _code_descriptor(execution: Execution, selector: int, what: str) -> Segment | Candidate | None:
    """A code segment; None for gates and TSSs, which lead elsewhere."""
    if selector & 0xFFFC == 0:
        return Candidate.protection(Cause.SELECTOR_NULL, f"{what} is null").noting(selector=selector)
    descriptor = _descriptor(execution, selector, what)
    if isinstance(descriptor, Candidate):
        return descriptor
    if not descriptor.s and descriptor.type in (*_GATES, *_TSS_AVAILABLE):
        return None
    if not (descriptor.s and descriptor.type & 8):
        return _wrong_type(selector, what, descriptor, "code segment")
    return descriptor


def _entered_fault(
    execution: Execution, selector: int, descriptor: Segment, offset: int, what: str
) -> Candidate | None:
    """What is left to check once a code segment's privilege is right."""
    code = selector & 0xFFFC
    if not descriptor.present:
        text = f"{what} picks a segment that is not present (P=0)"
        return Candidate.not_present(text, error_code=code).noting(selector=selector)
    if execution.long_mode and descriptor.l and descriptor.db:
        text = f"{what} picks a descriptor with both L and D set, which long mode reserves"
        return Candidate.protection(Cause.DESCRIPTOR_L_AND_D, text, error_code=code).noting(selector=selector)
    if execution.long_mode and descriptor.l:
        if not is_canonical(execution, offset):
            text = f"the target {offset:#x} is not canonical"
            return Candidate.protection(Cause.TARGET_NOT_CANONICAL, text).noting(address=offset)
    elif offset > descriptor.limit:
        text = f"the target offset {offset:#x} is beyond the limit {descriptor.limit:#x} of {selector:#06x}"
        return Candidate.protection(Cause.TARGET_BEYOND_LIMIT, text).noting(offset=offset, limit=descriptor.limit)
    return None


def _far_return_fault(execution: Execution, decoded: Decoded) -> Candidate | None:
    items = execution.stack_items(2, decoded.operand_bits // 8)
    if items is None or not execution.protected:
        return None
    return _return_fault(execution, items[0], items[1] & 0xFFFF, "RETF")


def _iret_fault(execution: Execution, decoded: Decoded) -> Candidate | None:
    """The frame on the stack: offset, CS, flags, and in 64-bit mode always RSP and SS."""
    if not execution.protected:
        return None
    if execution.regs.rflags & Rflags.NT:
        if execution.long_mode:
            text = "RFLAGS.NT is set, and long mode has no task switches to return from"
            return Candidate.protection(Cause.NESTED_TASK, text)
        text = "RFLAGS.NT is set: IRET switches to the task that the TSS's link names"
        return Candidate.exception(_TS, Cause.NESTED_TASK, text, certain=False)
    wide = execution.bits == 64
    items = execution.stack_items(5 if wide else 3, decoded.operand_bits // 8)
    if items is None:
        return None
    selector = items[1] & 0xFFFF
    fault = _return_fault(execution, items[0], selector, "IRET")
    if fault is None and wide:
        ring = selector & 3
        fault = stack_segment_fault(execution, items[4] & 0xFFFF, ring, ", which IRET took from the stack,")
    return fault


def _return_fault(execution: Execution, offset: int, selector: int, name: str) -> Candidate | None:
    what = f"the selector {selector:#06x} for CS, which {name} took from the stack,"
    descriptor = _code_descriptor(execution, selector, what)
    if descriptor is None:
        return Candidate.protection(Cause.DESCRIPTOR_TYPE, f"{what} is no code segment", error_code=selector & 0xFFFC)
    if isinstance(descriptor, Candidate):
        return descriptor
    rpl, cpl = selector & 3, execution.cpl
    if rpl < cpl:
        return _privilege(selector, f"{what} has RPL {rpl}: a return never goes inward from CPL {cpl}")
    if descriptor.dpl > rpl if descriptor.type & 4 else descriptor.dpl != rpl:
        return _privilege(selector, f"{what} has RPL {rpl}, but its descriptor DPL {descriptor.dpl}")
    return _entered_fault(execution, selector, descriptor, offset, what)


# LTR and LLDT


def system_selector_fault(execution: Execution) -> Candidate | None:
    """LTR wants an available TSS, LLDT an LDT."""
    decoded = execution.decoded
    if decoded is None or decoded.opcode != 0x0F00 or decoded.group not in (2, 3) or not execution.protected:
        return None
    selector = execution.operand(decoded, 16)
    if selector is None:
        return None
    return _check_ltr(execution, selector) if decoded.group == 3 else _check_lldt(execution, selector)


def _check_ltr(execution: Execution, selector: int) -> Candidate | None:
    what = f"LTR's selector {selector:#06x}"
    if selector & 0xFFFC == 0:
        return Candidate.protection(Cause.SELECTOR_NULL, f"{what} is null").noting(selector=selector)
    descriptor = _descriptor(execution, selector, what)
    if isinstance(descriptor, Candidate):
        return descriptor
    if not descriptor.s and descriptor.type in _TSS_BUSY:
        text = f"{what} picks a TSS that is busy already: LTR was executed before"
        return Candidate.protection(Cause.TSS_BUSY, text, error_code=selector & 0xFFFC).noting(selector=selector)
    available = _TSS_AVAILABLE[1:] if execution.long_mode else _TSS_AVAILABLE
    return _system(selector, what, descriptor, lambda kind: kind in available, "available TSS")


def _check_lldt(execution: Execution, selector: int) -> Candidate | None:
    if selector & 0xFFFC == 0:
        return None
    what = f"LLDT's selector {selector:#06x}"
    descriptor = _descriptor(execution, selector, what)
    if isinstance(descriptor, Candidate):
        return descriptor
    return _system(selector, what, descriptor, lambda kind: kind == _LDT, "LDT")


def _system(
    selector: int, what: str, descriptor: Segment, fits: Callable[[int], bool], wanted: str
) -> Candidate | None:
    if descriptor.s or not fits(descriptor.type):
        return _wrong_type(selector, what, descriptor, wanted)
    if not descriptor.present:
        text = f"{what} picks a descriptor that is not present (P=0)"
        return Candidate.not_present(text, error_code=selector & 0xFFFC).noting(selector=selector)
    return None
