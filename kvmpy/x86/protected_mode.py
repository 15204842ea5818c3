"""A prepared protected-mode guest: descriptor tables, page tables if wanted, and the state to enter with.

The area that `prepare` fills is laid out as `kvmpy.x86.descriptor_tables` says. For a state without tables see
`kvmpy.x86.modes`.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvmpy.errors import UsageError
from kvmpy.x86 import modes
from kvmpy.x86.descriptor_tables import INTERRUPT_STACK, PAGE_TABLES, write_descriptor_tables
from kvmpy.x86.gates import Idt
from kvmpy.x86.page_tables import PageTables
from kvmpy.x86.paging import PagingMode, PhysicalMemory
from kvmpy.x86.registers import CpuState
from kvmpy.x86.task_state import ALL_PORTS, IoBitmap, Tss32

__all__ = ["prepare", "tables_size"]

_FOUR_GIB = 1 << 32


def prepare(
    memory: PhysicalMemory,
    *,
    entry: int,
    tables: int,
    stack: int | None = None,
    ring: int = 0,
    bits: int = 32,
    paging: PagingMode = PagingMode.NONE,
    identity_map: int = _FOUR_GIB,
    ports: Iterable[tuple[int, int]] = ALL_PORTS,
    interrupt_stack: int | None = None,
    idt: Idt | None = None,
) -> CpuState:
    """Write GDT, TSS, IDT and, with `paging`, page tables into guest memory; return the state that enters at `entry`.

    `tables` is the physical address of the scratch area, 4 KiB aligned and below 4 GiB; it takes
    `tables_size(paging, identity_map)` bytes. `paging` is NONE, BITS32 or PAE; the first `identity_map` bytes
    (rounded up to the page size) are then mapped one to one with pages of 4 or 2 MiB, writable, and open to ring 3
    when `ring` is 3. Some hosts run no 32-bit paging at all.

    `ports` are (first, count) pairs that ring 3 may use, all by default. `interrupt_stack` is ESP0, the stack that
    interrupts of ring 3 switch to; by default 0xe97 bytes in the area. Without an `idt` every exception ends in a
    triple fault. `entry`, `stack`, `ring` and `bits` are those of `modes.protected_mode`; 16 bits only in ring 0
    without paging.

    Raises UsageError for arguments that cannot be, GuestMemoryError when the area is not wholly inside memory.
    """
    page_size = tables_size(paging, identity_map) - PAGE_TABLES
    cr3 = tables + PAGE_TABLES
    if bits != 32 and (ring or paging is not PagingMode.NONE):
        raise UsageError(f"an entry in ring 3 or with paging is 32 bits wide, not {bits}")
    if paging is PagingMode.BITS32:
        state = modes.paging32(entry, cr3, stack=stack, ring=ring)
    elif paging is PagingMode.PAE:
        state = modes.pae(entry, cr3, stack=stack, ring=ring)
    else:
        state = modes.protected_mode(entry, bits=bits, stack=stack, ring=ring)
    tss = Tss32(
        esp0=tables + INTERRUPT_STACK if interrupt_stack is None else interrupt_stack,
        ss0=modes.DATA_SELECTOR,
        cr3=state.sregs.cr3,
        io_bitmap=IoBitmap(ports),
    )
    sregs = state.sregs
    sregs.gdt, sregs.idt, sregs.tr = write_descriptor_tables(memory, tables, tss, idt)
    if paging is not PagingMode.NONE:
        size = paging.page_sizes[-1]
        pages = PageTables(memory, paging, cr3, size=page_size)
        pages.map(0, 0, -(-identity_map // size) * size, user=ring == 3, page_size=size)
    return state


def tables_size(paging: PagingMode = PagingMode.NONE, identity_map: int = _FOUR_GIB) -> int:
    """Bytes of the area that `prepare` fills: 0x4000, and 0x1000 for every table of the map.

    Raises UsageError for a paging mode of long mode, or a map that is empty or larger than 4 GiB.
    """
    if paging not in (PagingMode.NONE, PagingMode.BITS32, PagingMode.PAE):
        raise UsageError(f"protected mode has no {paging.value}")
    if not 0 < identity_map <= _FOUR_GIB:
        raise UsageError(f"an identity map has 1 to {_FOUR_GIB:#x} bytes, not {identity_map:#x}")
    if paging is PagingMode.NONE:
        return PAGE_TABLES
    directories = -(-identity_map >> 30) if paging is PagingMode.PAE else 0
    return PAGE_TABLES + 0x1000 * (1 + directories)
