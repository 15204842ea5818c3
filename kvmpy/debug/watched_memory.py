"""Watchpoints without debug registers: the page is taken from the guest, so that its accesses come out as MMIO exits.

A page that only writes are watched of becomes read-only; for reads it is taken away altogether (then the guest cannot
execute from it, or have its stack, page tables or descriptor tables in it). Whatever the guest does to the page is done
here to its memory, and those accesses that touch a watched byte are told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmpy.debug.breakpoint import Watchpoint
from kvmpy.devices.device import Region
from kvmpy.memory.region import PAGE

if TYPE_CHECKING:
    from kvmpy.machine import Machine

__all__ = ["WatchedMemory"]


class _Page:
    """One watched page: a device in place of memory."""

    def __init__(self, machine: Machine, address: int, tell: Callable[[Watchpoint], None]) -> None:
        self.address = address
        self.points: list[tuple[Watchpoint, int, int]] = []
        """(point, first offset, offset behind the last)."""
        self._memory = machine.memory
        self._tell = tell
        self.region = Region("mmio", address, PAGE, f"watched page {address:#x}", self._read, self._write)

    def _read(self, offset: int, size: int) -> int:
        self._look(offset, size, "access")
        return int.from_bytes(self._memory.read(self.address + offset, size), "little")

    def _write(self, offset: int, size: int, value: int) -> None:
        self._memory.write(self.address + offset, value.to_bytes(size, "little"))
        self._look(offset, size, "write")

    def _look(self, offset: int, size: int, what: str) -> None:
        for point, first, end in self.points:
            if offset < end and first < offset + size and (what == "write" or point.access == "access"):
                self._tell(point)

    @property
    def access(self) -> str:
        """What the guest keeps of the page, as `Vm.restrict_page` has it."""
        if not self.points:
            return "all"
        return "none" if any(point.access == "access" for point, _, _ in self.points) else "read"


class WatchedMemory:
    """The watched pages of one machine; `tell` is called with each watchpoint that the guest touches, by whichever
    thread runs the vCPU, in the midst of the access."""

    def __init__(self, machine: Machine, tell: Callable[[Watchpoint], None]) -> None:
        self._machine = machine
        self._tell = tell
        self._pages: dict[int, _Page] = {}

    def add(self, point: Watchpoint) -> None:
        """Watch the pieces of `point`. No vCPU may run meanwhile. Raises UsageError where there is no RAM."""
        done: list[int] = []
        try:
            for physical, length in point.physical:
                address = physical & -PAGE
                page = self._pages.get(address) or _Page(self._machine, address, self._tell)
                page.points.append((point, physical - address, physical - address + length))
                self._pages[address] = page
                done.append(address)
                self._restrict(page)
        except BaseException:
            self._forget(point, done)
            raise

    def remove(self, point: Watchpoint) -> None:
        """Stop watching. No vCPU may run meanwhile."""
        self._forget(point, [physical & -PAGE for physical, _ in point.physical])

    def _forget(self, point: Watchpoint, addresses: list[int]) -> None:
        for address in addresses:
            page = self._pages[address]
            page.points = [entry for entry in page.points if entry[0] is not point]
            if not page.points:
                del self._pages[address]
            self._restrict(page)

    def _restrict(self, page: _Page) -> None:
        bus, region = self._machine.mmio, page.region
        there = region in bus.regions
        if page.points and not there:
            bus.add(region)
        self._machine.vm.restrict_page(page.address, page.access)
        if not page.points and there:
            bus.remove(region)
