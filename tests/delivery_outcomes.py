"""What an event delivery gave, for tests that know whether it must succeed or fail."""

from __future__ import annotations

from entry_rule_breaks import Bytes
from kvmpy.x86.event_delivery import Delivered, DeliveryFailure, Event, EventKind, deliver
from kvmpy.x86.paging import PhysicalMemory
from kvmpy.x86.registers import CpuState

__all__ = ["delivered", "failed", "raised"]


def delivered(memory: PhysicalMemory, state: CpuState, event: Event) -> Delivered:
    result = deliver(memory, state, event)
    assert isinstance(result, Delivered), str(result)
    return result


def failed(memory: Bytes, state: CpuState, event: Event) -> DeliveryFailure:
    """The failure, after checking that it wrote nothing."""
    before = bytes(memory.data)
    result = deliver(memory, state, event)
    assert isinstance(result, DeliveryFailure), str(result)
    assert memory.data == before
    return result


def raised(memory: Bytes, state: CpuState, event: Event) -> tuple[int, int | None]:
    failure = failed(memory, state, event)
    assert failure.raises is not None
    assert failure.raises.kind is EventKind.EXCEPTION
    return failure.raises.vector, failure.raises.error_code
