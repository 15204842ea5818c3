"""Paging modes and page-table entries (SDM vol. 3, chapter 4; APM vol. 2, chapter 5).

`kvmpy.x86.page_tables` builds tables in guest memory, `kvmpy.x86.page_walk` walks them.
"""

from __future__ import annotations

from enum import Enum, IntFlag
from typing import NamedTuple, Protocol

from kvmpy.x86.flags import Cr0, Cr4, Efer

__all__ = ["Level", "PageFault", "PageFlag", "PagingMode", "PagingRegisters", "PhysicalMemory", "paging_mode"]


class PhysicalMemory(Protocol):
    """Guest-physical memory, as `kvmpy.memory.GuestMemory` offers it.

    All raise `kvmpy.errors.GuestMemoryError` when the range is not wholly inside; `guest_write`, which is `write` on
    behalf of the guest, for ROM as well.
    """

    def read(self, address: int, length: int) -> bytes: ...
    def write(self, address: int, data: bytes) -> object: ...
    def guest_write(self, address: int, data: bytes) -> object: ...


class PagingRegisters(Protocol):
    """What paging depends on. `SystemRegisters` has it, and so has a vCPU's live register object."""

    @property
    def cr0(self) -> int: ...
    @property
    def cr3(self) -> int: ...
    @property
    def cr4(self) -> int: ...
    @property
    def efer(self) -> int: ...


class PageFlag(IntFlag):
    """Bits of a paging-structure entry. PAT is bit 7 in an entry for a 4 KiB page, where PS has no meaning."""

    P = 1 << 0
    RW = 1 << 1
    US = 1 << 2
    PWT = 1 << 3
    PCD = 1 << 4
    A = 1 << 5
    D = 1 << 6
    PS = 1 << 7
    G = 1 << 8
    PAT_LARGE = 1 << 12
    XD = 1 << 63


class PageFault(IntFlag):
    """The error code of #PF (SDM vol. 3, 4.7 and 6.15)."""

    P = 1 << 0
    """The page was present: a permission was violated."""
    W = 1 << 1
    U = 1 << 2
    RSVD = 1 << 3
    ID = 1 << 4
    """An instruction fetch; reported only when EFER.NXE (with PAE) or CR4.SMEP is set."""
    PK = 1 << 5
    SS = 1 << 6


class Level(NamedTuple):
    """One level of tables: `name` of its entries, lowest address bit `shift` and number `bits` of the index."""

    name: str
    shift: int
    bits: int


_PML5E, _PML4E = Level("PML5E", 48, 9), Level("PML4E", 39, 9)
_PDPTE, _PDE, _PTE = Level("PDPTE", 30, 9), Level("PDE", 21, 9), Level("PTE", 12, 9)


class PagingMode(Enum):
    """How linear addresses become physical (SDM vol. 3, 4.1.1)."""

    NONE = "no paging"
    BITS32 = "32-bit paging"
    PAE = "PAE paging"
    LEVEL4 = "4-level paging"
    LEVEL5 = "5-level paging"

    @property
    def levels(self) -> tuple[Level, ...]:
        """The tables from the top down; empty without paging."""
        return _LEVELS[self]

    @property
    def entry_size(self) -> int:
        """Bytes of one entry."""
        return 4 if self is PagingMode.BITS32 else 8

    @property
    def address_bits(self) -> int:
        """Width of a linear address that is translated; above it, bits must repeat the top one in 4 and 5 levels."""
        return {PagingMode.LEVEL4: 48, PagingMode.LEVEL5: 57}.get(self, 32)

    @property
    def page_sizes(self) -> tuple[int, ...]:
        """Page sizes in bytes, small to large, that the mode can express; the processor may lack the largest."""
        return _PAGE_SIZES[self]

    def is_canonical(self, address: int) -> bool:
        """Whether a linear address can be translated at all."""
        if self.address_bits == 32:
            return address >> 32 == 0
        return address >> (self.address_bits - 1) in (0, (1 << (65 - self.address_bits)) - 1)


_LEVELS = {
    PagingMode.NONE: (),
    PagingMode.BITS32: (Level("PDE", 22, 10), Level("PTE", 12, 10)),
    PagingMode.PAE: (Level("PDPTE", 30, 2), _PDE, _PTE),
    PagingMode.LEVEL4: (_PML4E, _PDPTE, _PDE, _PTE),
    PagingMode.LEVEL5: (_PML5E, _PML4E, _PDPTE, _PDE, _PTE),
}
_PAGE_SIZES = {
    PagingMode.NONE: (),
    PagingMode.BITS32: (0x1000, 0x40_0000),
    PagingMode.PAE: (0x1000, 0x20_0000),
    PagingMode.LEVEL4: (0x1000, 0x20_0000, 0x4000_0000),
    PagingMode.LEVEL5: (0x1000, 0x20_0000, 0x4000_0000),
}


def paging_mode(sregs: PagingRegisters) -> PagingMode:
    """The paging mode that CR0.PG, CR4.PAE, EFER.LMA and CR4.LA57 select."""
    if not sregs.cr0 & Cr0.PG:
        return PagingMode.NONE
    if not sregs.cr4 & Cr4.PAE:
        return PagingMode.BITS32
    # LME counts too: a state about to be set may leave LMA, which the processor derives, to KVM.
    if not sregs.efer & (Efer.LMA | Efer.LME):
        return PagingMode.PAE
    return PagingMode.LEVEL5 if sregs.cr4 & Cr4.LA57 else PagingMode.LEVEL4
