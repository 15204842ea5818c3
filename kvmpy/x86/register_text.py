"""Registers as text to read: flags by name, segments in one table, control registers decoded.

Both functions take anything with the attributes of `Registers` or `SystemRegisters`, a vCPU's live registers too.
"""

from __future__ import annotations

from enum import IntFlag
from typing import Protocol

from kvmpy.x86.flags import Cr0, Cr4, Efer, Rflags
from kvmpy.x86.registers import GENERAL_REGISTERS, SEGMENT_REGISTERS, DescriptorTable, Segment

__all__ = [
    "code_bits",
    "general_registers_text",
    "mode_text",
    "rflags_text",
    "segment_type_text",
    "system_registers_text",
]


class _General(Protocol):
    @property
    def rflags(self) -> int: ...


class _System(Protocol):
    @property
    def cs(self) -> Segment: ...
    @property
    def ss(self) -> Segment: ...
    @property
    def gdt(self) -> DescriptorTable: ...
    @property
    def idt(self) -> DescriptorTable: ...
    @property
    def cr0(self) -> int: ...
    @property
    def cr2(self) -> int: ...
    @property
    def cr3(self) -> int: ...
    @property
    def cr4(self) -> int: ...
    @property
    def cr8(self) -> int: ...
    @property
    def efer(self) -> int: ...
    @property
    def apic_base(self) -> int: ...
    @property
    def interrupt(self) -> int | None: ...


def general_registers_text(regs: _General) -> str:
    """Six lines: the sixteen registers four in a row, RIP, and RFLAGS by name."""
    shown = [f"{name:<3} {getattr(regs, name):016x}" for name in GENERAL_REGISTERS if name not in ("rip", "rflags")]
    lines = ["  ".join(shown[start : start + 4]) for start in range(0, len(shown), 4)]
    lines.append(f"rip {getattr(regs, 'rip'):016x}")  # noqa: B009  like its neighbours, and the protocol stays small
    lines.append(f"rflags {rflags_text(regs.rflags)}")
    return "\n".join(lines)


def rflags_text(value: int) -> str:
    """RFLAGS in hex, the names of its bits but the one that is always set, and IOPL: "0x246 PF ZF IF IOPL=0"."""
    hidden = int(Rflags.FIXED1 | Rflags.IOPL0 | Rflags.IOPL1)  # ~ of a flag would drop the bits without a name
    names = _names(value & ~hidden, Rflags)
    return " ".join([hex(value), *names, f"IOPL={value >> 12 & 3}"])


def system_registers_text(sregs: _System) -> str:
    """The mode, control registers with the names of their bits, and a table of segments and descriptor tables."""
    lines = [
        f"mode {mode_text(sregs)}",
        f"cr0  {_flags(sregs.cr0, Cr0)}",
        f"cr2  {sregs.cr2:#018x}",
        f"cr3  {sregs.cr3:#018x}",
        f"cr4  {_flags(sregs.cr4, Cr4)}",
        f"cr8  {sregs.cr8:#x}",
        f"efer {_flags(sregs.efer, Efer)}",
        f"apic_base {_apic_base(sregs.apic_base)}",
    ]
    if sregs.interrupt is not None:
        lines.append(f"interrupt {sregs.interrupt:#x} waits for injection")
    lines.append("     sel  base             limit    dpl type")
    for name in SEGMENT_REGISTERS:
        segment: Segment = getattr(sregs, name)
        place = f"{segment.selector:04x} {segment.base:016x} {segment.limit:08x}"
        lines.append(f"{name:<4} {place} {segment.dpl}   {_attributes(segment)}")
    for name, table in (("gdt", sregs.gdt), ("idt", sregs.idt)):
        lines.append(f"{name:<4}      {table.base:016x} {table.limit:08x}")
    return "\n".join(lines)


def mode_text(sregs: _System) -> str:
    """The operating mode and the privilege level, "64-bit mode, ring 0". Virtual-8086 mode is not told apart."""
    if not sregs.cr0 & Cr0.PE:
        return "real mode"
    if sregs.efer & Efer.LMA:
        mode = "64-bit mode" if sregs.cs.l else f"compatibility mode, {32 if sregs.cs.db else 16} bits"
    else:
        paging = ("PAE paging" if sregs.cr4 & Cr4.PAE else "paging") if sregs.cr0 & Cr0.PG else "no paging"
        mode = f"protected mode, {32 if sregs.cs.db else 16} bits, {paging}"
    return f"{mode}, ring {sregs.ss.dpl}"


def code_bits(sregs: _System) -> int:
    """How wide the code is that runs: 64 in 64-bit mode, else 32 or 16, as CS.D says (SDM vol. 3, 3.4.5).

    CS.D counts in every other mode: a guest that has just cleared CR0.PE runs 32-bit code until it loads CS.
    """
    if sregs.efer & Efer.LMA and sregs.cs.l:
        return 64
    return 32 if sregs.cs.db else 16


def segment_type_text(segment: Segment) -> str:
    """What the type field says (SDM vol. 3, tables 3-1 and 3-2): "code, readable, accessed", "busy TSS"."""
    if not segment.s:
        return _SYSTEM_TYPES.get(segment.type, f"reserved type {segment.type}")
    if segment.type & 8:
        words = ["code"]
        words += ["conforming"] if segment.type & 4 else []
        words += ["readable"] if segment.type & 2 else []
    else:
        words = ["data"]
        words += ["expand-down"] if segment.type & 4 else []
        words += ["writable"] if segment.type & 2 else []
    words += ["accessed"] if segment.type & 1 else []
    return ", ".join(words)


_SYSTEM_TYPES = {
    1: "16-bit TSS",
    2: "LDT",
    3: "busy 16-bit TSS",
    4: "16-bit call gate",
    5: "task gate",
    6: "16-bit interrupt gate",
    7: "16-bit trap gate",
    9: "TSS",
    11: "busy TSS",
    12: "call gate",
    14: "interrupt gate",
    15: "trap gate",
}


def _attributes(segment: Segment) -> str:
    words = [segment_type_text(segment)]
    if segment.s:
        words.append("64 bits" if segment.l else "32 bits" if segment.db else "16 bits")
    words += [name for name in ("g", "avl") if getattr(segment, name)]
    words += [] if segment.present else ["not present"]
    words += ["unusable"] if segment.unusable else []
    return ", ".join(words)


def _apic_base(value: int) -> str:
    """IA32_APIC_BASE (SDM vol. 3, 10.4.4)."""
    words = [f"at {value & 0x000F_FFFF_FFFF_F000:#x}", "enabled" if value & 1 << 11 else "disabled"]
    words += ["x2APIC"] if value & 1 << 10 else []
    words += ["bootstrap processor"] if value & 1 << 8 else []
    return f"{value:#x} {', '.join(words)}"


def _flags(value: int, flags: type[IntFlag]) -> str:
    return " ".join([f"{value:#018x}", *_names(value, flags)])


def _names(value: int, flags: type[IntFlag]) -> list[str]:
    """The manual's names of the set bits, lowest first, and "bit<n>" for those without one."""
    known = {flag.value: flag.name or "" for flag in flags}
    bits = [1 << number for number in range(value.bit_length()) if value >> number & 1]
    return [known.get(bit, f"bit{bit.bit_length() - 1}") for bit in bits]
