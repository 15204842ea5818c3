"""The structs of the KVM interface as ctypes classes, under the kernel's names.

Classes are found by attribute (`from kvmpy.abi.structs import kvm_irqfd`) or by name (`struct("kvm_irqfd")`). A ctypes
class takes about 50 microseconds to build, so each theme is a module of its own that is loaded when one of its structs
is first asked for.

Padding has explicit fields, named as in the kernel, or `_pad...` where C inserts it silently. A struct that ends in a
flexible array is declared without it, which is what the ioctl numbers encode; `sized(kvm_cpuid2, 100)` is the class
with room for 100 entries.
"""

from ctypes import c_uint64

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ctypes import Structure, _CData
    from typing import TypeVar

    from kvmpy.abi.structs.registers import *  # noqa: F403

    _S = TypeVar("_S", bound=Structure)

__all__ = ["MODULES", "names", "sized", "struct"]

MODULES = {
    "registers": (
        "kvm_regs",
        "kvm_segment",
        "kvm_dtable",
        "kvm_sregs",
        "kvm_vcpu_events",
        "kvm_sync_regs",
        "kvm_userspace_memory_region",
    ),
}
"""Which module of this package holds which structs."""

_PLAIN_TYPES = {"__u64": c_uint64, "unsigned long": c_uint64}
_WHERE = {name: module for module, members in MODULES.items() for name in members}
_SIZED: "dict[tuple[type, int], type]" = {}


def names() -> tuple[str, ...]:
    """All struct names, grouped by theme."""
    return tuple(_WHERE)


def struct(name: str) -> "type[_CData]":
    """The ctypes class of the C type `name`, a KVM struct or "__u64". Raises KeyError for a name that is none."""
    plain = _PLAIN_TYPES.get(name)
    if plain is not None:
        return plain
    module = __import__(f"{__name__}.{_WHERE[name]}", fromlist=[name])
    found: type[_CData] = getattr(module, name)
    globals()[name] = found  # the next attribute access does not come here
    return found


def __getattr__(name: str) -> "type[_CData]":
    try:
        return struct(name)
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})


def sized(base: "type[_S]", entries: int) -> "type[_S]":
    """`base` with its flexible array, `entries` long; the same class for the same arguments.

    `base._flexible_` names the array and its element type. Raises TypeError when `base` has no flexible array and
    ValueError when `entries` is negative.
    """
    key = (base, entries)
    found = _SIZED.get(key)
    if found is None:
        flexible = getattr(base, "_flexible_", None)
        if flexible is None:
            raise TypeError(f"{base.__name__} has no flexible array")
        if entries < 0:
            raise ValueError(f"an array cannot have {entries} entries")
        array, element = flexible
        found = type(f"{base.__name__}[{entries}]", (base,), {"_fields_": [(array, element * entries)]})
        _SIZED[key] = found
    return found
