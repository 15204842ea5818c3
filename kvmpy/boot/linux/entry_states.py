"""The states in which the boot protocols start a kernel: the 64-bit, the 32-bit and the real-mode one, and PVH.

Linux/x86 boot protocol, "64-bit Boot Protocol", "32-bit Boot Protocol", "Running the Kernel"; Xen, "x86/HVM direct boot
ABI" (docs/misc/pvh.pandoc). Interrupts are off in all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpy.boot.placement import FOUR_GIB
from kvmpy.x86 import modes
from kvmpy.x86.descriptors import CODE32, CODE64, DATA32, Gdt
from kvmpy.x86.page_tables import PageTables
from kvmpy.x86.paging import PagingMode

if TYPE_CHECKING:
    from kvmpy.boot.boot_memory import BootMemory
    from kvmpy.x86.registers import CpuState, Segment

__all__ = ["BOOT_CS", "BOOT_DS", "enter_32_bit", "enter_64_bit", "enter_pvh", "enter_real_mode"]

BOOT_CS = 0x10
BOOT_DS = 0x18
_LARGE_PAGE = 0x20_0000
_TABLES = 0x6000
"""Page tables for 4 GiB in 2 MiB pages: one, one, and four with 512 pages each."""
_STACK = 0x1000


def enter_64_bit(area: BootMemory, entry: int, boot_params: int) -> CpuState:
    """64-bit mode with the first 4 GiB mapped one to one, and RSI = boot_params."""
    tables = area.place(_TABLES, "page tables", alignment=0x1000)
    pages = PageTables(area.memory, PagingMode.LEVEL4, tables, size=_TABLES)
    pages.map(0, 0, FOUR_GIB, page_size=_LARGE_PAGE)
    state = modes.long_mode(entry, pages.cr3, stack=_stack(area))
    _load_segments(state, area, CODE64)
    state.regs.rsi = boot_params
    return state


def enter_32_bit(area: BootMemory, entry: int, boot_params: int) -> CpuState:
    """32-bit protected mode without paging, ESI = boot_params and EBP = EDI = EBX = 0."""
    state = modes.protected_mode(entry, stack=_stack(area))
    _load_segments(state, area, CODE32)
    state.regs.rsi = boot_params
    return state


def enter_pvh(area: BootMemory, entry: int, start_info: int) -> CpuState:
    """As the 32-bit protocol, but EBX = start_info."""
    state = enter_32_bit(area, entry, 0)
    state.regs.rbx = start_info
    return state


def enter_real_mode(base: int, heap_end: int) -> CpuState:
    """Real mode at the setup code, 0x200 bytes from `base`; all data segments begin at `base`, SP is `heap_end`."""
    segment = base >> 4
    state = modes.real_mode(segment=segment + 0x20, data_segment=segment)
    state.sregs.ss = state.sregs.ds
    state.regs.rsp = heap_end
    return state


def _stack(area: BootMemory) -> int:
    # The protocols promise none. Linux makes its own at once; a kernel that does not must not destroy anything.
    return area.place(_STACK, "stack", alignment=0x10) + _STACK


def _load_segments(state: CpuState, area: BootMemory, code: Segment) -> None:
    gdt = Gdt(long_mode=bool(code.l))
    gdt.append(None)
    gdt.append(code)  # 0x10
    gdt.append(DATA32)  # 0x18
    state.sregs.gdt = gdt.register(area.put(gdt.to_bytes(), "GDT"))
    state.sregs.cs = code.replace(selector=BOOT_CS)
    data = DATA32.replace(selector=BOOT_DS)
    state.sregs.ds = state.sregs.es = state.sregs.fs = state.sregs.gs = state.sregs.ss = data
