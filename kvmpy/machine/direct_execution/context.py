"""Where the registers of a guest are whose ring 0 runs in ring 3: see `kvmpy.machine.direct_execution`.

General registers are in the run page, as always. RIP, RSP and RFLAGS are in the frame that an exception left on our
stack, IF and AC of RFLAGS in a cell of their own, and the system registers in a copy of struct kvm_sregs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from kvmpy.kvm.run_page import DIRTY_REGS, REGS, SREGS

if TYPE_CHECKING:
    from kvmpy.kvm import Vcpu
    from kvmpy.machine.direct_execution.memory import DirectMemory
    from kvmpy.machine.vcpu_runner import VcpuRunner

__all__ = ["DirectContext"]

PAGE = 0x1000

BASE = 0xFFFF_FFFF_7800_0000
"""Where our memory is in the guest's linear addresses while code runs directly: below the kernel's image, and within
reach of its relative jumps and those of modules."""
SIZE = 64 << 20

# In pages of the area: what is where (see also kvmpy.machine.direct_execution.memory).
GDT, IDT, STUBS, STACK, JOBS, RETURN, FLAGS_PAGE, TSS = 0, 1, 3, 4, 8, 9, 10, 16
FRAME = ((STACK + 1) * PAGE - 40) // 8
"""The cell in which an exception leaves RIP; CS, RFLAGS, RSP and SS follow. An error code is before it."""
FLAGS, PENDING = FLAGS_PAGE * 512, FLAGS_PAGE * 512 + 1
"""The cells with IF and AC, and with how many interrupts wait for IF."""
KERNEL_GS, CR2_CELL, SAVED, SELECTOR_CELLS = (FLAGS_PAGE * 512 + place for place in (2, 4, 5, 8))
"""Cells with KERNEL_GS_BASE, with CR2, with registers (RAX, RCX, RDX), and with the selectors, four bytes each."""

IF, AC, TF, RF, IOPL = 0x200, 0x4_0000, 0x100, 0x1_0000, 0x3000
KEPT = 0x20_4CD5
"""What POPF changes in ring 0 but IF and AC: status flags, DF, NT, ID."""

# Cells of the run page.
DIRTY = DIRTY_REGS // 8
_REGISTER = REGS // 8
RAX, RCX, RDX, RSP, RIP, RFLAGS = (_REGISTER + place for place in (0, 2, 3, 6, 16, 17))
REGISTERS = tuple(_REGISTER + place for place in (0, 2, 3, 1, 6, 7, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15))
"""By the number of a register in an instruction."""
SREGS_AT = SREGS

KERNEL_GS_BASE = 0xC000_0102  # an MSR

# Offsets in struct kvm_sregs.
CS, SS, SELECTORS = 0, 120, (48, 0, 120, 24, 72, 96)  # ES, CS, SS, DS, FS, GS
FS_BASE, GS_BASE, TR, GDTR, IDTR = 72, 96, 144, 192, 208
CR0, CR2, CR3, CR4, CR8, INTERRUPTS, SREGS_END = 224, 232, 240, 248, 256, 280, 312
NO_INTERRUPTS = bytes(SREGS_END - INTERRUPTS)
"""What KVM is given as interrupt_bitmap: it keeps an interrupt on its way by itself, and KVM_RUN leaves the bits of
those that were delivered in the area that it syncs."""


class DirectContext(Protocol):
    """The guest, as instructions see it that are done for it."""

    runner: VcpuRunner
    vcpu: Vcpu
    memory: DirectMemory
    cells: memoryview
    flags: int
    """IF and AC."""
    halted: bool
    """The guest waits for an interrupt."""
    arrived: bool
    """The instruction was an IRETQ."""
    going_out: bool
    """The next instruction leaves ring 0, or is otherwise KVM's, with all that follows."""

    def inner(self, rflags: int) -> int:
        """The guest's RFLAGS, from those with which it runs."""

    def selector(self, place: int) -> int:
        """The selector of a segment register."""

    def system(self, place: int) -> int:
        """A field of eight bytes of struct kvm_sregs."""

    def set_system(self, place: int, value: int) -> None:
        """Change one."""

    def changed_system(self) -> None:
        """Have KVM take the system registers in the run page."""

    def deliver(self, vector: int, error: int | None = None) -> bool:
        """An exception through the guest's IDT. False: it cannot be."""
