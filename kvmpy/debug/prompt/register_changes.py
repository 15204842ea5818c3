"""Which registers changed between two states of a processor, one line each: old -> new."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag
from typing import TYPE_CHECKING

from kvmpy.x86.flags import Cr0, Cr4, Efer, Rflags
from kvmpy.x86.registers import DescriptorTable, Segment

if TYPE_CHECKING:
    from kvmpy.x86.registers import CpuState

__all__ = ["RegisterChange", "register_changes"]

_FLAGS: dict[str, type[IntFlag]] = {"rflags": Rflags, "cr0": Cr0, "cr4": Cr4, "efer": Efer}
_UNTOLD = "rip"  # the place says it
_SEGMENT_FIELDS = ("selector", "base", "limit", "type", "dpl", "present", "s", "db", "l", "g", "avl", "unusable")


@dataclass(frozen=True, slots=True)
class RegisterChange:
    """One register: its name, and what it held `before` and holds `after`: an int, a segment or a table, or None."""

    name: str
    before: object
    after: object

    def __str__(self) -> str:
        return f"{self.name:<6}  {_difference(self.name, self.before, self.after)}"


def register_changes(before: CpuState, after: CpuState) -> tuple[RegisterChange, ...]:
    """What changed, RIP aside, in the order of the registers.

    RFLAGS.RF does not count: the processor sets it for whoever debugs (SDM vol. 3, 18.3.1.1).
    """
    found = []
    for here, there in ((before.regs, after.regs), (before.sregs, after.sregs)):
        for name, (old, new) in here.differences(there).items():
            if name == _UNTOLD:
                continue
            if name == "rflags" and isinstance(old, int) and isinstance(new, int):
                old, new = old & ~Rflags.RF, new & ~Rflags.RF
            if old != new:
                found.append(RegisterChange(name, old, new))
    return tuple(found)


def _difference(name: str, old: object, new: object) -> str:
    match old, new:
        case Segment(), Segment():
            return _fields(old, new, _SEGMENT_FIELDS)
        case DescriptorTable(), DescriptorTable():
            return _fields(old, new, ("base", "limit"))
        case int(), int():
            return f"{old:#x} -> {new:#x}{_bits(old, new, _FLAGS.get(name))}"
    return f"{_number(old)} -> {_number(new)}"


def _fields(old: object, new: object, names: tuple[str, ...]) -> str:
    pairs = {name: (getattr(old, name), getattr(new, name)) for name in names}
    changed = [f"{name} {here:#x} -> {there:#x}" for name, (here, there) in pairs.items() if here != there]
    return ", ".join(changed)


def _bits(old: int, new: int, flags: type[IntFlag] | None) -> str:
    """The flags that were set and cleared: " (+ZF -CF)"."""
    if flags is None:
        return ""
    words = [f"+{flag.name}" for flag in flags if flag & new & ~old]
    words += [f"-{flag.name}" for flag in flags if flag & old & ~new]
    return f" ({' '.join(words)})" if words else ""


def _number(value: object) -> str:
    return f"{value:#x}" if isinstance(value, int) else "none"
