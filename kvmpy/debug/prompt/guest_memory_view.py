"""Reading a guest's memory for somebody who looks at it: what is not there is None, breakpoints in it are hidden."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpy.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmpy.kvm import Vcpu
    from kvmpy.machine import Machine

__all__ = ["LONGEST", "physical_cells", "virtual_bytes", "virtual_cells"]

LONGEST = 1 << 20
"""Bytes that are read at once; more is of no use on a screen."""

_PAGE = 0x1000


def virtual_cells(machine: Machine, vcpu: Vcpu, address: int, length: int) -> list[int | None]:
    """`length` bytes from a linear address on, by the vCPU's page tables; rights do not count."""
    return _by_page(lambda at, size: machine.debugger.read_memory(vcpu, at, size), address, length)


def physical_cells(machine: Machine, address: int, length: int) -> list[int | None]:
    """`length` bytes from a guest-physical address on, as they stand there."""
    return _by_page(machine.memory.read, address, length)


def virtual_bytes(machine: Machine, vcpu: Vcpu, address: int, length: int) -> bytes:
    """As many of `length` bytes from a linear address on as are there without a gap."""
    cells = virtual_cells(machine, vcpu, address, length)
    end = cells.index(None) if None in cells else len(cells)
    return bytes(cell for cell in cells[:end] if cell is not None)


def _by_page(read: Callable[[int, int], bytes], address: int, length: int) -> list[int | None]:
    if not isinstance(address, int) or not 0 <= address < 1 << 64:
        raise UsageError(f"{address!r} is no address of 64 bits")
    if not isinstance(length, int) or not 0 <= length <= LONGEST:
        raise UsageError(f"a length is 0 to {LONGEST:#x} bytes, not {length!r}")
    end = min(address + length, 1 << 64)
    cells: list[int | None] = []
    while address < end:
        size = min(end - address, _PAGE - address % _PAGE)
        try:
            cells += read(address, size)
        except UsageError:  # not mapped, or outside of memory
            cells += [None] * size
        address += size
    return cells
