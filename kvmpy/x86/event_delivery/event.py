"""What is delivered: exceptions, software interrupts, external interrupts, NMI (SDM vol. 3, 6.3 to 6.5)."""

from __future__ import annotations

from enum import Enum

from kvmpy._value import frozen
from kvmpy.errors import UsageError

__all__ = ["DOUBLE_FAULT", "Event", "EventKind", "Severity", "exception_name"]

EXCEPTION_NAMES = {
    0: "#DE", 1: "#DB", 2: "NMI", 3: "#BP", 4: "#OF", 5: "#BR", 6: "#UD", 7: "#NM", 8: "#DF", 10: "#TS", 11: "#NP",
    12: "#SS", 13: "#GP", 14: "#PF", 16: "#MF", 17: "#AC", 18: "#MC", 19: "#XM", 20: "#VE", 21: "#CP", 28: "#HV",
    29: "#VC", 30: "#SX",
}  # fmt: skip
"""SDM vol. 3, table 6-1; 28 to 30 are AMD's (APM vol. 2, table 8-1)."""

WITH_ERROR_CODE = frozenset({8, 10, 11, 12, 13, 14, 17, 21, 29, 30})
FAULTS = frozenset({0, 5, 6, 7, 10, 11, 12, 13, 14, 16, 17, 19, 20, 21, 29, 30})
"""Exceptions whose saved RIP is the faulting instruction; their RFLAGS image has RF set (SDM vol. 3, 17.3.1.1)."""

DEBUG, NMI, BREAKPOINT, OVERFLOW, DOUBLE_FAULT, PAGE_FAULT = 1, 2, 3, 4, 8, 14


def exception_name(vector: int) -> str:
    """The manual's mnemonic, "#GP" for 13; "exception 0x1f" for a reserved vector."""
    return EXCEPTION_NAMES.get(vector, f"exception {vector:#04x}")


class EventKind(Enum):
    """Where an event comes from. Only the two software kinds are subject to the gate's DPL."""

    EXCEPTION = "exception"
    SOFTWARE_INTERRUPT = "software interrupt"
    """INT n."""
    SOFTWARE_EXCEPTION = "software exception"
    """INT3 and INTO."""
    EXTERNAL_INTERRUPT = "external interrupt"
    NMI = "NMI"


class Severity(Enum):
    """The classes of SDM vol. 3, table 6-4, which decide what a second exception during delivery becomes."""

    BENIGN = "benign"
    CONTRIBUTORY = "contributory"
    PAGE_FAULT = "page fault"
    DOUBLE_FAULT = "double fault"


CONTRIBUTORY = frozenset({0, 10, 11, 12, 13, 21})
PAGE_FAULTS = frozenset({14, 20})


@frozen
class Event:
    """One event to deliver; best made by the class methods.

    `error_code` counts for exceptions that have one. `address` is what CR2 takes for #PF. `instruction_length` is added
    to RIP for the software kinds, whose return address is the next instruction. Raises UsageError for a vector that the
    kind does not have.
    """

    vector: int
    kind: EventKind
    error_code: int | None = None
    address: int | None = None
    instruction_length: int = 0

    def __post_init__(self) -> None:
        top = 31 if self.kind is EventKind.EXCEPTION else 255
        if not 0 <= self.vector <= top:
            raise UsageError(f"the vector of an {self.kind.value} is 0 to {top:#x}, not {self.vector:#x}")

    @classmethod
    def exception(cls, vector: int, error_code: int | None = None, *, address: int | None = None) -> Event:
        """A hardware exception, 0 to 31. An error code is 0 unless given; UsageError for a vector that has none."""
        if vector in WITH_ERROR_CODE:
            error_code = error_code or 0
        elif error_code is not None:
            raise UsageError(f"{exception_name(vector)} has no error code")
        return cls(vector, EventKind.EXCEPTION, error_code, address)

    @classmethod
    def page_fault(cls, address: int, error_code: int) -> Event:
        """#PF at linear `address` (SDM vol. 3, 4.7 for the error code)."""
        return cls.exception(PAGE_FAULT, error_code, address=address)

    @classmethod
    def software_interrupt(cls, vector: int, *, instruction_length: int = 2) -> Event:
        """INT n."""
        return cls(vector, EventKind.SOFTWARE_INTERRUPT, instruction_length=instruction_length)

    @classmethod
    def int3(cls) -> Event:
        """INT3 (0xCC); not `cd 03`, which is a software interrupt."""
        return cls(BREAKPOINT, EventKind.SOFTWARE_EXCEPTION, instruction_length=1)

    @classmethod
    def into(cls) -> Event:
        """INTO with OF set."""
        return cls(OVERFLOW, EventKind.SOFTWARE_EXCEPTION, instruction_length=1)

    @classmethod
    def external_interrupt(cls, vector: int) -> Event:
        """What an interrupt controller sends."""
        return cls(vector, EventKind.EXTERNAL_INTERRUPT)

    @classmethod
    def nmi(cls) -> Event:
        return cls(NMI, EventKind.NMI)

    @property
    def software(self) -> bool:
        """Caused by INT n, INT3 or INTO: the gate's DPL counts, and EXT is 0 in error codes of its delivery."""
        return self.kind in (EventKind.SOFTWARE_INTERRUPT, EventKind.SOFTWARE_EXCEPTION)

    @property
    def pushed_error_code(self) -> int | None:
        """What goes on the stack outside real mode, None when nothing does."""
        if self.kind is not EventKind.EXCEPTION or self.vector not in WITH_ERROR_CODE:
            return None
        return self.error_code or 0

    @property
    def sets_resume_flag(self) -> bool:
        """Whether the RFLAGS image on the stack has RF set."""
        return self.kind is EventKind.EXCEPTION and self.vector in FAULTS

    @property
    def severity(self) -> Severity:
        if self.kind is not EventKind.EXCEPTION:
            return Severity.BENIGN
        if self.vector == DOUBLE_FAULT:
            return Severity.DOUBLE_FAULT
        if self.vector in PAGE_FAULTS:
            return Severity.PAGE_FAULT
        return Severity.CONTRIBUTORY if self.vector in CONTRIBUTORY else Severity.BENIGN

    def __str__(self) -> str:
        if self.kind is EventKind.SOFTWARE_INTERRUPT:
            return f"int {self.vector:#04x}"
        if self.kind is EventKind.SOFTWARE_EXCEPTION:
            return f"{exception_name(self.vector)} ({'int3' if self.vector == BREAKPOINT else 'into'})"
        if self.kind is EventKind.EXTERNAL_INTERRUPT:
            return f"interrupt {self.vector:#04x}"
        text = exception_name(self.vector)
        details = []
        if self.error_code is not None:
            details.append(f"error code {self.error_code:#x}")
        if self.address is not None:
            details.append(f"address {self.address:#x}")
        return f"{text} ({', '.join(details)})" if details else text
