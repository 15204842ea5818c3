"""The last exits of a vCPU, one a line."""

from __future__ import annotations

from typing import Any

from kvmpy.machine.recent_exits import DeviceAccess

__all__ = ["ExitListing"]


class ExitListing(tuple[Any, ...]):
    """`DeviceAccess` and exits, the oldest first: a tuple that prints as lines."""

    __slots__ = ()

    def __str__(self) -> str:
        if not self:
            return "no exit so far"
        return "\n".join(str(event) if isinstance(event, DeviceAccess) else repr(event) for event in self)

    def _repr_html_(self) -> str:
        from kvmpy.x86.html_text import preformatted

        return preformatted(str(self))
