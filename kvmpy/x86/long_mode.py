"""A prepared long-mode guest: descriptor tables and page tables in its memory, and the state to enter with.

The area that `prepare` fills is laid out as `kvmpy.x86.descriptor_tables` says. For a state without tables see
`kvmpy.x86.modes.long_mode`; for other mappings build your own with `kvmpy.x86.page_tables`.
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
from kvmpy.x86.task_state import ALL_PORTS, IoBitmap, Tss64

__all__ = ["prepare", "tables_size"]

_LARGE_PAGE = 0x20_0000
_FOUR_GIB = 1 << 32


def prepare(
    memory: PhysicalMemory,
    *,
    entry: int,
    tables: int,
    stack: int | None = None,
    ring: int = 0,
    bits: int = 64,
    levels: int = 4,
    identity_map: int = _FOUR_GIB,
    ports: Iterable[tuple[int, int]] = ALL_PORTS,
    interrupt_stack: int | None = None,
    idt: Idt | None = None,
) -> CpuState:
    """Write GDT, TSS, IDT and page tables into guest memory and return the state that enters at `entry`.

    `tables` is the physical address of the scratch area, 4 KiB aligned; it takes `tables_size(identity_map)` bytes,
    0xa000 by default. The first `identity_map` bytes of the address space (rounded up to 2 MiB) are mapped one to one
    with 2 MiB pages, writable and executable, and open to ring 3 when `ring` is 3 (the tables, too).

    `ports` are (first, count) pairs that ring 3 may use through the TSS's I/O bitmap, all by default, `()` for none.
    `interrupt_stack` is RSP0, the stack that interrupts and exceptions of ring 3 switch to; by default 0xe97 bytes in
    the area. Without an `idt` every exception ends in a triple fault. `entry`, `stack`, `ring`, `bits` (64, or 32 for
    compatibility mode) and `levels` are those of `modes.long_mode`.

    Raises UsageError for arguments that cannot be, GuestMemoryError when the area is not wholly inside memory.
    """
    page_size = tables_size(identity_map, levels=levels) - PAGE_TABLES
    tss = Tss64(
        rsp0=tables + INTERRUPT_STACK if interrupt_stack is None else interrupt_stack,
        io_bitmap=IoBitmap(ports),
    )
    # The state first: it checks its arguments, and nothing should be written for a state that cannot be.
    state = modes.long_mode(entry, tables + PAGE_TABLES, stack=stack, ring=ring, bits=bits, levels=levels)
    sregs = state.sregs
    sregs.gdt, sregs.idt, sregs.tr = write_descriptor_tables(memory, tables, tss, idt)
    mode = PagingMode.LEVEL5 if levels == 5 else PagingMode.LEVEL4
    pages = PageTables(memory, mode, tables + PAGE_TABLES, size=page_size)
    length = -(-identity_map // _LARGE_PAGE) * _LARGE_PAGE
    pages.map(0, 0, length, user=ring == 3, page_size=_LARGE_PAGE)
    return state


def tables_size(identity_map: int = _FOUR_GIB, *, levels: int = 4) -> int:
    """Bytes of the area that `prepare` fills: 0x4000, and 0x1000 for every table of the map.

    Raises UsageError for a map that is empty or larger than half the address space.
    """
    if levels not in (4, 5):
        raise UsageError(f"long-mode paging has 4 or 5 levels, not {levels}")
    largest = 1 << (47 if levels == 4 else 52)  # five levels could map more, but physical addresses end at 52 bits
    if not 0 < identity_map <= largest:
        raise UsageError(f"an identity map has 1 to {largest:#x} bytes, not {identity_map:#x}")
    # One table for every GiB, 512 GiB and (with five levels) 256 TiB that the map touches, and the top one.
    shifts = (30, 39, 48)[: levels - 2]
    return PAGE_TABLES + 0x1000 * (1 + sum(-(-identity_map >> shift) for shift in shifts))
