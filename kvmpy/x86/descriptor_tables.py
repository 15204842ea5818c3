"""GDT, TSS and IDT of a prepared guest, at fixed places of one scratch area of guest memory.

`kvmpy.x86.long_mode.prepare` and `kvmpy.x86.protected_mode.prepare` write the area; its layout, from its start:

====== ===========================================================================
0x0000 GDT, with the selectors of `kvmpy.x86.modes`
0x0100 TSS, then its I/O bitmap up to 0x2169
0x2169 stack for interrupts that arrive in ring 3, growing down from 0x3000
0x3000 IDT, 256 vectors (all not present when none is given)
0x4000 page tables, when there is paging
====== ===========================================================================
"""

from __future__ import annotations

from typing import NamedTuple

from kvmpy.errors import UsageError
from kvmpy.x86.descriptors import CODE32, CODE64, Gdt, tss_segment
from kvmpy.x86.gates import Idt
from kvmpy.x86.modes import task_register
from kvmpy.x86.paging import PhysicalMemory
from kvmpy.x86.registers import DescriptorTable, Segment
from kvmpy.x86.task_state import Tss32, Tss64

__all__ = ["GDT", "IDT", "INTERRUPT_STACK", "PAGE_TABLES", "TSS", "DescriptorRegisters", "write_descriptor_tables"]

GDT = 0x0000
TSS = 0x0100
INTERRUPT_STACK = 0x3000
IDT = 0x3000
PAGE_TABLES = 0x4000


class DescriptorRegisters(NamedTuple):
    """What GDTR, IDTR and TR hold for the tables that were written."""

    gdt: DescriptorTable
    idt: DescriptorTable
    tss: Segment


def write_descriptor_tables(
    memory: PhysicalMemory, base: int, tss: Tss32 | Tss64, idt: Idt | None = None
) -> DescriptorRegisters:
    """Write GDT, TSS and IDT into the area at `base`, mapped one to one. A `Tss64` makes them those of long mode.

    Without an `idt` all vectors are not present and IDTR is empty. Raises UsageError for a misaligned `base` or an IDT
    of the other form, GuestMemoryError when the area is not wholly inside memory.
    """
    long_mode = isinstance(tss, Tss64)
    if base < 0 or base % 0x1000:
        raise UsageError(f"the area for tables begins on a 4 KiB boundary, not at {base:#x}")
    if idt is not None and (idt.bits == 64) != long_mode:
        raise UsageError(f"an IDT of {idt.bits} bits does not fit {'long' if long_mode else 'protected'} mode")
    gdt = Gdt(long_mode=long_mode)
    gdt.append(CODE64 if long_mode else CODE32)  # 0x08
    gdt.append("data32")  # 0x10
    gdt.append("user_code32")  # 0x18
    gdt.append("user_data32")  # 0x20
    gdt.append("user_code64" if long_mode else None)  # 0x28
    # Busy, as LTR would have left it: the entry state has TR loaded already.
    gdt.append(tss_segment(base + TSS, tss.limit, busy=True))  # 0x30
    if not long_mode:
        gdt.append(None)  # 0x38, the second half of the descriptor in long mode
    gdt.append("code32")  # 0x40
    gdt.append("code16")  # 0x48
    gdt.append("data16")  # 0x50
    memory.write(base + GDT, gdt.to_bytes())
    memory.write(base + TSS, tss.to_bytes())
    memory.write(base + IDT, idt.to_bytes() if idt is not None else bytes(0x1000))
    return DescriptorRegisters(
        gdt.register(base + GDT),
        idt.register(base + IDT) if idt is not None else DescriptorTable(0, 0),
        task_register(base + TSS, tss.limit),
    )
