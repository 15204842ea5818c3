"""Filling the kernel's structures: ctypes cuts off what does not fit a field without a word (1 << 64 becomes 0)."""

import ctypes

from kvmpy.errors import RegisterValueError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    S = TypeVar("S", bound=ctypes.Structure)

__all__ = ["capability_number", "filled", "fits"]


def fits(what: str, value: int, bits: int) -> int:
    """`value`, if it is an unsigned number of so many bits; RegisterValueError otherwise."""
    if not isinstance(value, int) or not 0 <= value < 1 << bits:
        raise RegisterValueError(what, value, bits)
    return value


def capability_number(capability: int) -> int:
    """The number of a capability. Raises UsageError for its name, or anything else that is none."""
    if not isinstance(capability, int):
        raise UsageError(f"a capability is a kvmpy.abi.capabilities.Cap, such as Cap.IRQCHIP, not {capability!r}")
    return int(capability)


def filled(kind: "type[S]", **fields: int) -> "S":
    """A structure with these fields set. Raises RegisterValueError naming the field that a value does not fit."""
    structure = kind()
    for name, value in fields.items():
        try:
            setattr(structure, name, value)
        except TypeError as error:
            raise UsageError(f"{kind.__name__}.{name}: {error}") from None
        if getattr(structure, name) != value:
            raise RegisterValueError(f"{kind.__name__}.{name}", value, 8 * getattr(kind, name).size)
    return structure
