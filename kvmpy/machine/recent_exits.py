"""The last exits of a vCPU, for whoever asks afterwards what the guest did."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from kvmpy._exit import Exit

__all__ = ["KEPT", "DeviceAccess", "recent_exits"]

KEPT = 64
"""How many exits of each vCPU are kept."""


class DeviceAccess:
    """One access of a guest to a port or to memory of a device: `kind` is "port" or "mmio", `direction` "read" or
    "write", `size` is in bytes, `value` what was written, or what the device answered."""

    __slots__ = __match_args__ = ("kind", "direction", "address", "size", "value")

    def __init__(self, kind: str, direction: str, address: int, size: int, value: int) -> None:
        self.kind = kind
        self.direction = direction
        self.address = address
        self.size = size
        self.value = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DeviceAccess):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

    def __hash__(self) -> int:
        return hash((self.kind, self.direction, self.address, self.size, self.value))

    def __str__(self) -> str:
        arrow = "<-" if self.direction == "write" else "->"
        return f"{self.kind} {self.direction} {self.address:#x} {arrow} {self.value:#0{2 + 2 * self.size}x}"

    def __repr__(self) -> str:
        return f"<{self}>"


def recent_exits(notes: "Iterable[tuple[Any, Any]]") -> "tuple[DeviceAccess | Exit, ...]":
    """What a run loop noted, as values: (kind, direction, address, size) and a value, or None and an exit."""
    return tuple(
        it if what is None else DeviceAccess(what[0], what[1], what[2], what[3], it) for what, it in tuple(notes)
    )
