"""Breakpoints and watchpoints as their user holds them, and what a debugger says when one stops the guest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from kvmpy.kvm import Vcpu
    from kvmpy.machine import Outcome

__all__ = ["Breakpoint", "Condition", "Handler", "Point", "Stop", "StopKind", "Watchpoint"]

P = TypeVar("P", bound="Point")

Handler = Callable[["Vcpu", Any], "Outcome | None"]
"""Called with the vCPU, which stands, and the point that it reached. None: go on; an `Outcome`: end the run so."""

Condition = Callable[["Vcpu"], bool]
"""Whether a point counts, asked each time that the guest reaches it."""


class Point:
    """What a breakpoint and a watchpoint share. `hits` counts how often it was reached with its condition true."""

    def __init__(
        self,
        address: int,
        name: str,
        handler: Handler | None,
        condition: Condition | None,
        remove: Callable[[Any], None],
    ) -> None:
        self.address = address
        self.name = name or hex(address)
        self.handler = handler
        self.condition = condition
        self.hits = 0
        self.active = True
        self._remove = remove

    def remove(self) -> None:
        """Take it out; the guest runs past from now on. Calling it again does nothing."""
        if self.active:
            self._remove(self)

    def __enter__(self: P) -> P:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class Breakpoint(Point):
    """Stops the guest before it executes the instruction at virtual `address`.

    `hardware`: it is in a debug register of the processor (SDM vol. 3, 18.2), of which there are four; otherwise the
    instruction in guest memory is replaced. `temporary`: it goes when it is reached.
    """

    def __init__(
        self, address: int, name: str, handler: Handler | None, condition: Condition | None,
        remove: Callable[[Any], None], *, hardware: bool, temporary: bool,
    ) -> None:  # fmt: skip
        super().__init__(address, name, handler, condition, remove)
        self.hardware = hardware
        self.temporary = temporary
        self.physical = 0
        """Where, guest-physical, one in memory is."""

    def __repr__(self) -> str:
        kind = "hardware" if self.hardware else "software"
        return f"<Breakpoint {self.name}, {kind}, {self.hits} hits{'' if self.active else ', removed'}>"


class Watchpoint(Point):
    """Stops the guest after it accesses any of `length` bytes at virtual `address`.

    `access` is "write" or "access" (reads and writes). `hardware`: by a debug register; otherwise the page is taken
    from the guest, and each of its accesses to the page is an exit. `written` is the value last written, or None.
    """

    def __init__(
        self, address: int, length: int, access: str, name: str, handler: Handler | None,
        condition: Condition | None, remove: Callable[[Any], None], *, hardware: bool,
    ) -> None:  # fmt: skip
        super().__init__(address, name, handler, condition, remove)
        self.length = length
        self.access = access
        self.hardware = hardware
        self.physical: tuple[tuple[int, int], ...] = ()
        """(guest-physical address, length) of its pieces, one for each page; empty for one in a debug register."""

    def __repr__(self) -> str:
        kind = "hardware" if self.hardware else "by page"
        state = "" if self.active else ", removed"
        return f"<Watchpoint {self.name}, {self.length} bytes, {self.access}, {kind}, {self.hits} hits{state}>"


class StopKind(StrEnum):
    """Why a guest stands before its debugger."""

    BREAKPOINT = "breakpoint"
    WATCHPOINT = "watchpoint"
    STEP = "step"
    INTERRUPTED = "interrupted"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Stop:
    """One stop: of which vCPU, at which linear address, and what caused it.

    `point` is the breakpoint or watchpoint. `outcome` is how the run ended, or is about to end: a guest that ended
    badly stands at the place, and ends when it is resumed.
    """

    kind: StopKind
    vcpu: int = 0
    address: int = 0
    point: Point | None = None
    outcome: Outcome | None = None

    def __str__(self) -> str:
        if self.kind is StopKind.ENDED:
            return f"the run ended: {self.outcome}"
        where = f" {self.point.name}" if self.point is not None else ""
        return f"{self.kind}{where}: vCPU {self.vcpu} at {self.address:#x}"
