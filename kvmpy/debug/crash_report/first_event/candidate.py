"""An event that may have begun the end: what the processor would raise, and why."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from kvmpy._value import field, frozen, replace
from kvmpy.x86.event_delivery import Event

__all__ = ["Candidate", "Cause"]

_UD, _NM, _TS, _NP, _SS, _GP = 6, 7, 10, 11, 12, 13


class Cause(StrEnum):
    """What about an instruction raises an exception. The findings are looked up by it."""

    # Memory
    SEGMENT_LIMIT = "segment limit"
    SEGMENT_NULL = "null segment"
    SEGMENT_NOT_WRITABLE = "segment not writable"
    SEGMENT_NOT_READABLE = "segment not readable"
    NOT_CANONICAL = "address not canonical"
    NOT_PRESENT = "page not present"
    RESERVED_BITS = "reserved bits in a page-table entry"
    TABLE_OUTSIDE_MEMORY = "page table outside memory"
    READ_ONLY = "page not writable"
    NO_EXECUTE = "page not executable"
    SUPERVISOR_PAGE = "supervisor page"
    SMEP = "SMEP"
    SMAP = "SMAP"
    MISALIGNED = "operand not aligned"
    # Selectors
    SELECTOR_NULL = "null selector"
    SELECTOR_BEYOND_LIMIT = "selector beyond the table"
    NO_LDT = "no LDT"
    DESCRIPTOR_EMPTY = "empty descriptor"
    DESCRIPTOR_TYPE = "descriptor of the wrong type"
    DESCRIPTOR_PRIVILEGE = "privilege of a descriptor"
    DESCRIPTOR_NOT_PRESENT = "descriptor not present"
    DESCRIPTOR_L_AND_D = "code descriptor with L and D"
    TSS_BUSY = "TSS busy"
    # Instructions
    UNDEFINED = "undefined instruction"
    NOT_IN_THIS_MODE = "instruction not in this mode"
    SSE_OFF = "SSE not enabled"
    FPU_OFF = "FPU switched off"
    FEATURE_OFF = "feature not enabled"
    PRIVILEGED = "privileged instruction"
    PORT_DENIED = "port denied"
    DIVIDE = "divide error"
    TARGET_BEYOND_LIMIT = "branch beyond the code segment"
    TARGET_NOT_CANONICAL = "branch to an address that is not canonical"
    NESTED_TASK = "IRET with NT"
    # Control registers and MSRs
    CONTROL_REGISTER = "value of a control register"
    PAE_OFF = "CR4.PAE not set"
    LME_OFF = "EFER.LME not set"
    NO_32_BIT_PAGING = "32-bit paging"
    MSR = "MSR"
    # Events that come as they are
    SOFTWARE_INTERRUPT = "software interrupt"
    BREAKPOINT = "breakpoint"
    INTERRUPT = "external interrupt"
    RECORDED = "recorded by KVM"


@frozen
class Candidate:
    """One event, the cause in short, and a sentence with the values that decide.

    `certain` means that the state proves it; otherwise it depends on what is not known (the processor's features, what
    an interrupt controller did). `values` are numbers for those who want more than the text.
    """

    event: Event
    cause: Cause
    text: str
    certain: bool = True
    values: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def exception(cls, vector: int, cause: Cause, text: str, *, error_code: int = 0, certain: bool = True) -> Candidate:
        """A fault of the instruction; the error code counts for vectors that have one."""
        code = error_code if vector in (_TS, _NP, _SS, _GP) else None
        return cls(Event.exception(vector, code), cause, text, certain)

    @classmethod
    def undefined(cls, cause: Cause, text: str, *, certain: bool = True) -> Candidate:
        """#UD."""
        return cls.exception(_UD, cause, text, certain=certain)

    @classmethod
    def device_not_available(cls, text: str) -> Candidate:
        """#NM."""
        return cls.exception(_NM, Cause.FPU_OFF, text)

    @classmethod
    def protection(cls, cause: Cause, text: str, *, error_code: int = 0, certain: bool = True) -> Candidate:
        """#GP."""
        return cls.exception(_GP, cause, text, error_code=error_code, certain=certain)

    @classmethod
    def stack(cls, cause: Cause, text: str, *, error_code: int = 0) -> Candidate:
        """#SS."""
        return cls.exception(_SS, cause, text, error_code=error_code)

    @classmethod
    def not_present(cls, text: str, *, error_code: int) -> Candidate:
        """#NP."""
        return cls.exception(_NP, Cause.DESCRIPTOR_NOT_PRESENT, text, error_code=error_code)

    @classmethod
    def page_fault(cls, cause: Cause, text: str, address: int, error_code: int) -> Candidate:
        """#PF at a linear address."""
        return cls(Event.page_fault(address, error_code), cause, text).noting(address=address)

    def noting(self, **values: int) -> Candidate:
        """The same with these values added."""
        return replace(self, values={**self.values, **values})
