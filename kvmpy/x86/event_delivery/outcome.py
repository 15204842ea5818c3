"""What became of a delivery."""

from __future__ import annotations

from enum import Enum

from kvmpy._value import frozen
from kvmpy.x86.event_delivery.event import Event
from kvmpy.x86.registers import CpuState

__all__ = ["Delivered", "DeliveryFailure", "Outcome", "OutcomeKind"]


@frozen
class Delivered:
    """The handler is entered.

    `gate` names the table entry that was used ("IDT gate 0x0e at 0x10e0"). `state` is the processor at the handler's
    first instruction. `frame` are the values pushed, lowest address first, at linear `frame_address`.
    """

    event: Event
    gate: str
    state: CpuState
    frame: tuple[tuple[str, int], ...]
    frame_address: int

    def __str__(self) -> str:
        cs, rip = self.state.sregs.cs.selector, self.state.regs.rip
        return f"{self.event} through {self.gate}: handler at {cs:#06x}:{rip:#x}, frame at {self.frame_address:#x}"


@frozen
class DeliveryFailure:
    """The handler cannot be entered.

    `reason` says why, and `raises` is the exception that the processor raises instead, as yet without regard to double
    faults. `raises` is None where this package cannot tell (task gates; tables outside memory).
    """

    event: Event
    gate: str
    reason: str
    raises: Event | None

    def __str__(self) -> str:
        result = f"raises {self.raises}" if self.raises is not None else "not followed further"
        return f"{self.event} through {self.gate}: {self.reason}; {result}"


class OutcomeKind(Enum):
    """How a chain of deliveries ends."""

    DELIVERED = "delivered"
    SHUTDOWN = "triple fault"
    UNDETERMINED = "undetermined"


@frozen
class Outcome:
    """The whole chain: every attempt in order, with a remark after each failure on what it made of the next event.

    `state` is the processor at the handler's first instruction, or None.
    """

    kind: OutcomeKind
    steps: tuple[Delivered | DeliveryFailure, ...]
    remarks: tuple[str, ...] = ()

    @property
    def state(self) -> CpuState | None:
        last = self.steps[-1]
        return last.state if isinstance(last, Delivered) else None

    def __str__(self) -> str:
        lines: list[str] = []
        for index, step in enumerate(self.steps):
            lines.append(str(step))
            if index < len(self.remarks):
                lines.append(f"  {self.remarks[index]}")
        return "\n".join(lines)
