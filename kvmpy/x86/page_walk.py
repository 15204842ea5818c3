"""Walking page tables as the processor does: where an address leads, why it does not, what an access would give.

SDM vol. 3, 4.3 to 4.7. Protection keys and the shadow-stack rules are not judged. An entry is read as it stands in
memory; a real processor may still use what its TLB or its PAE pointer registers hold.
"""

from __future__ import annotations

from enum import Enum

from kvmpy._value import frozen
from kvmpy.errors import GuestMemoryError, RegisterValueError, UsageError
from kvmpy.x86.flags import Cr0, Cr4, Efer, Rflags
from kvmpy.x86.paging import Level, PageFault, PageFlag, PagingMode, PagingRegisters, PhysicalMemory, paging_mode

__all__ = ["Access", "EntryRead", "Failure", "FailureKind", "Walk", "page_fault", "translate", "walk"]

_P, _RW, _US, _PS, _G, _XD = 1, 2, 4, 0x80, 0x100, 1 << 63
_FRAME = 0x000F_FFFF_FFFF_F000


class FailureKind(Enum):
    """Why an address has no translation."""

    NOT_CANONICAL = "not canonical"
    NOT_PRESENT = "not present"
    RESERVED = "reserved bits set"
    OUTSIDE_MEMORY = "table outside memory"


@frozen
class Failure:
    """Why and at which level (its name, "PDE" for instance; empty when no table was read). `reserved`: the bits."""

    kind: FailureKind
    level: str = ""
    reserved: int = 0

    def __str__(self) -> str:
        where = f"{self.level} " if self.level else "address "
        return f"{where}{self.kind.value}" + (f" ({self.reserved:#x})" if self.reserved else "")


@frozen
class EntryRead:
    """One entry that the walk read: the level's name, the entry's physical address and its value."""

    level: str
    address: int
    value: int


@frozen
class Walk:
    """What a walk found. `physical` is None when it failed; then `failure` says why.

    `writable`, `user` and `executable` are the RW, US and XD bits of all entries combined, before CR0.WP, SMEP and the
    like (`page_fault` applies those). `page_size` is in bytes, 0 without paging or when the walk failed.
    """

    virtual: int
    mode: PagingMode
    entries: tuple[EntryRead, ...]
    physical: int | None
    failure: Failure | None = None
    page_size: int = 0
    writable: bool = True
    user: bool = True
    executable: bool = True
    global_page: bool = False

    def __str__(self) -> str:
        lines = [f"{self.virtual:#x} by {self.mode.value}:"]
        for entry in self.entries:
            names = " ".join(flag.name or "" for flag in PageFlag if entry.value & flag and flag < 1 << 9)
            execute = " XD" if entry.value & _XD else ""
            lines.append(f"  {entry.level:<5} at {entry.address:#x}: {entry.value:#018x} {names}{execute}")
        if self.physical is None:
            lines.append(f"  {self.failure}")
        else:
            ring = "user" if self.user else "supervisor"
            rights = f"r{'w' if self.writable else '-'}{'x' if self.executable else '-'}"
            size = f", page of {self.page_size:#x} bytes, {ring} {rights}" if self.page_size else ""
            lines.append(f"  physical {self.physical:#x}{size}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from kvmpy.x86.html_text import preformatted

        return preformatted(str(self), [str(self.failure)] if self.failure is not None else ())


def walk(
    memory: PhysicalMemory,
    sregs: PagingRegisters,
    virtual: int,
    *,
    physical_bits: int = 52,
    gigabyte_pages: bool = True,
) -> Walk:
    """Follow `virtual`, a linear address, through the tables that `sregs` selects. Never raises for what is in memory.

    Linear addresses are cut to 32 bits in the modes that have no more. `physical_bits` is the processor's MAXPHYADDR
    (CPUID 0x80000008, EAX[7:0]), above which address bits are reserved; without `gigabyte_pages` (CPUID 0x80000001,
    EDX bit 26) PS is reserved in a PDPTE. Raises RegisterValueError for an address over 64 bits.
    """
    if not 0 <= virtual < 1 << 64:
        raise RegisterValueError("a linear address", virtual, 64)
    mode = paging_mode(sregs)
    if mode.address_bits == 32:
        virtual &= 0xFFFF_FFFF
    if mode is PagingMode.NONE:
        return Walk(virtual, mode, (), virtual)
    if not mode.is_canonical(virtual):
        return Walk(virtual, mode, (), None, Failure(FailureKind.NOT_CANONICAL))

    size = mode.entry_size
    table = sregs.cr3 & {PagingMode.BITS32: 0xFFFF_F000, PagingMode.PAE: 0xFFFF_FFE0}.get(mode, _FRAME)
    entries: list[EntryRead] = []
    rights, no_execute = _RW | _US, False
    for depth, level in enumerate(mode.levels):
        place = table + (virtual >> level.shift & ((1 << level.bits) - 1)) * size
        try:
            value = int.from_bytes(memory.read(place, size), "little")
        except GuestMemoryError:
            return Walk(virtual, mode, tuple(entries), None, Failure(FailureKind.OUTSIDE_MEMORY, level.name))
        entries.append(EntryRead(level.name, place, value))
        if not value & _P:
            return Walk(virtual, mode, tuple(entries), None, Failure(FailureKind.NOT_PRESENT, level.name))
        leaf = _is_leaf(mode, depth, value, sregs, gigabyte_pages)
        reserved = value & _reserved(mode, level, leaf, value, sregs, physical_bits, gigabyte_pages)
        if reserved:
            failure = Failure(FailureKind.RESERVED, level.name, reserved)
            return Walk(virtual, mode, tuple(entries), None, failure)
        if not (mode is PagingMode.PAE and depth == 0):  # a PAE PDPTE carries no permissions
            rights &= value
            no_execute |= bool(value & _XD)
        if leaf:
            break
        table = value & _FRAME
    within = (1 << level.shift) - 1
    frame = value & _FRAME & ~within
    if mode is PagingMode.BITS32 and level.shift == 22:  # PSE-36: address bits 39:32 are in bits 20:13
        frame |= (value >> 13 & 0xFF) << 32
    return Walk(
        virtual,
        mode,
        tuple(entries),
        frame | virtual & within,
        page_size=within + 1,
        writable=bool(rights & _RW),
        user=bool(rights & _US),
        executable=not no_execute,
        global_page=bool(value & _G and sregs.cr4 & Cr4.PGE),
    )


def translate(memory: PhysicalMemory, sregs: PagingRegisters, virtual: int) -> int | None:
    """The physical address of a linear one, or None. Judges no permissions; see `walk` for the reason."""
    return walk(memory, sregs, virtual).physical


class Access(Enum):
    """What the processor wants of an address."""

    READ = "read"
    WRITE = "write"
    FETCH = "fetch"


def page_fault(
    walked: Walk,
    sregs: PagingRegisters,
    access: Access = Access.READ,
    *,
    user: bool = False,
    rflags: int = 0,
    implicit: bool = False,
) -> PageFault | None:
    """The error code of the #PF that an access would raise, or None when it is allowed (SDM vol. 3, 4.6.1 and 4.7).

    `user` is an access from CPL 3, others are supervisor accesses. `rflags` counts for AC, which lifts SMAP; `implicit`
    marks the processor's own accesses to GDT, IDT or TSS, which are supervisor accesses at any CPL and for which AC
    does not count. A table outside memory counts as not present. Raises UsageError for an address that is not
    canonical: that is a #GP or #SS, never a page fault.
    """
    kind = walked.failure.kind if walked.failure is not None else None
    if kind is FailureKind.NOT_CANONICAL:
        raise UsageError(f"{walked.virtual:#x} is not canonical: an access gives #GP or #SS, not #PF")
    user = user and not implicit
    if kind is None and (walked.mode is PagingMode.NONE or _allowed(walked, sregs, access, user, rflags, implicit)):
        return None
    code = PageFault(0)
    if kind in (None, FailureKind.RESERVED):
        code |= PageFault.P
    if kind is FailureKind.RESERVED:
        code |= PageFault.RSVD
    if access is Access.WRITE:
        code |= PageFault.W
    if user:
        code |= PageFault.U
    execute_disable = sregs.cr4 & Cr4.PAE and sregs.efer & Efer.NXE
    if access is Access.FETCH and (execute_disable or sregs.cr4 & Cr4.SMEP):
        code |= PageFault.ID
    return code


def _allowed(
    walked: Walk, sregs: PagingRegisters, access: Access, user: bool, rflags: int, implicit: bool
) -> bool:  # fmt: skip
    if user:
        permitted = walked.user and (walked.writable or access is not Access.WRITE)
        return permitted and (walked.executable or access is not Access.FETCH)
    if access is Access.FETCH:
        return walked.executable and not (walked.user and sregs.cr4 & Cr4.SMEP)
    if walked.user and sregs.cr4 & Cr4.SMAP and (implicit or not rflags & Rflags.AC):
        return False
    return access is Access.READ or walked.writable or not sregs.cr0 & Cr0.WP


def _is_leaf(mode: PagingMode, depth: int, value: int, sregs: PagingRegisters, gigabyte_pages: bool) -> bool:
    """Whether an entry maps a page. Bit 7 of a PTE is PAT; PS works only where the mode has a page of that size."""
    levels = mode.levels
    if depth == len(levels) - 1:
        return True
    if mode is PagingMode.BITS32:
        return bool(value & _PS and sregs.cr4 & Cr4.PSE)
    if levels[depth].shift == 30 and (not gigabyte_pages or mode is PagingMode.PAE):
        return False
    return bool(value & _PS and 1 << levels[depth].shift in mode.page_sizes)


def _reserved(
    mode: PagingMode,
    level: Level,
    leaf: bool,
    value: int,
    sregs: PagingRegisters,
    physical_bits: int,
    gigabyte_pages: bool,
) -> int:
    """The bits of an entry that must be zero (SDM vol. 3, tables 4-4 to 4-20)."""
    if mode is PagingMode.BITS32:
        if not leaf or level.shift == 12:
            return 0
        # 4 MiB pages: bits 20:13 hold address bits 39:32 as far as the processor has them, bit 21 is reserved.
        have = min(max(physical_bits, 32), 40) - 32
        return 0x3F_E000 & ~(((1 << have) - 1) << 13)
    beyond = 0x000F_FFFF_FFFF_FFFF & -(1 << physical_bits)
    if mode is PagingMode.PAE:
        beyond |= 0x7FF0_0000_0000_0000
        if level.shift == 30:
            return beyond | _XD | 0x1E6
    if not sregs.efer & Efer.NXE:
        beyond |= _XD
    if leaf and level.shift > 12:
        return beyond | ((1 << level.shift) - 1 & ~0x1FFF)  # bits between PAT (12) and the frame
    if not leaf and level.shift >= 30:
        # PS in a PML4E or PML5E, and in a PDPTE of a processor without 1 GiB pages.
        return beyond | (_PS if level.shift > 30 or not gigabyte_pages else 0)
    return beyond
