"""What an instruction raises in the guest instead of completing."""

from __future__ import annotations

from kvmpy.x86.event_delivery.event import Event

__all__ = ["GuestException", "SoftwareInterrupt"]


class GuestException(Exception):
    """The instruction raises an exception in the guest: `event`. The saved RIP is the instruction's own."""

    def __init__(self, event: Event) -> None:
        super().__init__(str(event))
        self.event = event

    @classmethod
    def of(cls, vector: int, error_code: int | None = None) -> GuestException:
        """By vector: #UD is 6."""
        return cls(Event.exception(vector, error_code))


class SoftwareInterrupt(Exception):
    """The instruction is INT3, INTO or INT n: `event` is to be delivered; the saved RIP is the next instruction's."""

    def __init__(self, event: Event) -> None:
        super().__init__(str(event))
        self.event = event
