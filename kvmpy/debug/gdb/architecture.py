"""What gdb takes the processor for: i386:x86-64, i386 or i8086, and which one fits the mode that the guest is in."""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from kvmpy.errors import UsageError
from kvmpy.x86.flags import Cr0, Efer, Rflags
from kvmpy.x86.registers import Segment

__all__ = ["Architecture", "architecture_named", "fitting_architecture"]


class _Mode(Protocol):
    @property
    def cs(self) -> Segment: ...
    @property
    def cr0(self) -> int: ...
    @property
    def efer(self) -> int: ...


class Architecture(Enum):
    """Names as in gdb's `set architecture`. They say how wide registers are and how gdb disassembles."""

    X86_64 = "i386:x86-64"
    I386 = "i386"
    I8086 = "i8086"

    @property
    def bits(self) -> int:
        """Width of the general registers that gdb shows; i8086 has the 32-bit ones that real mode can use, too."""
        return 64 if self is Architecture.X86_64 else 32


def fitting_architecture(sregs: _Mode, rflags: int = 0) -> Architecture:
    """The architecture of the mode in which the processor is.

    Long mode is i386:x86-64, compatibility mode included: its kernel has 64 bits. Code segments of 16 bits, real mode
    and virtual-8086 mode are i8086.
    """
    if sregs.efer & Efer.LMA:
        return Architecture.X86_64
    if not sregs.cr0 & Cr0.PE or rflags & Rflags.VM or not sregs.cs.db:
        return Architecture.I8086
    return Architecture.I386


def architecture_named(name: str) -> Architecture:
    """The architecture with gdb's name, or with one that people use for it. Raises UsageError for others."""
    short = {"x86-64": "i386:x86-64", "x86_64": "i386:x86-64", "amd64": "i386:x86-64", "64": "i386:x86-64"}
    short |= {"32": "i386", "16": "i8086"}
    try:
        return Architecture(short.get(name, name))
    except ValueError:
        known = ", ".join(architecture.value for architecture in Architecture)
        raise UsageError(f"gdb has no x86 architecture {name!r}; there are {known}") from None
