"""One attempt at a delivery: it reads the guest's tables, and writes the stack frame only when all is settled.

A real processor may have pushed part of a frame when it finds a fault; here a failed attempt leaves memory unchanged.
The accessed bits of descriptors that a processor sets in the tables are set in the returned segments only.
"""

from __future__ import annotations

from contextlib import suppress
from typing import NoReturn, Protocol

from kvmpy.errors import GuestMemoryError
from kvmpy.x86.event_delivery.event import Event, EventKind
from kvmpy.x86.flags import Cr0, Efer, Rflags
from kvmpy.x86.page_walk import Access, FailureKind, page_fault, walk
from kvmpy.x86.paging import PhysicalMemory
from kvmpy.x86.registers import CpuState, Segment

__all__ = ["Attempt", "DeliveryFault", "LinearFault", "Translate", "page_table_translation"]

PAGE = 0x1000
NP, SS, GP = 11, 12, 13


class LinearFault(Exception):
    """An address has no usable translation: a `Translate` raises it. `error_code` is that of #PF, or None for #GP."""

    def __init__(self, address: int, error_code: int | None, reason: str) -> None:
        super().__init__(reason)
        self.address = address
        self.error_code = error_code
        self.reason = reason


class Translate(Protocol):
    """Linear to guest-physical. `implicit` marks accesses to GDT, LDT, IDT and TSS. Raises `LinearFault`."""

    def __call__(self, address: int, access: Access, *, user: bool, implicit: bool) -> int: ...


def page_table_translation(memory: PhysicalMemory, state: CpuState) -> Translate:
    """The translation by the page tables that `state` selects."""

    def translate(address: int, access: Access, *, user: bool, implicit: bool) -> int:
        walked = walk(memory, state.sregs, address)
        failure = walked.failure
        if failure is not None and failure.kind is FailureKind.NOT_CANONICAL:
            raise LinearFault(address, None, f"{address:#x} is not canonical")
        fault = page_fault(walked, state.sregs, access, user=user, rflags=state.regs.rflags, implicit=implicit)
        if fault is not None or walked.physical is None:
            why = str(failure) if failure is not None else "access not allowed"
            raise LinearFault(address, int(fault or 0), f"page fault at {address:#x}: {why}")
        return walked.physical

    return translate


class DeliveryFault(Exception):
    """The attempt failed for `reason`; `raises` is the exception that takes its place, None if unknown."""

    def __init__(self, reason: str, raises: Event | None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.raises = raises


class Attempt:
    """The state, the event, and memory as the processor sees it while it delivers.

    `ext` is the EXT bit of error codes: set unless the event is INT n, INT3 or INTO (SDM vol. 3, 6.13).
    """

    def __init__(self, memory: PhysicalMemory, state: CpuState, event: Event, translate: Translate) -> None:
        self.memory = memory
        self.state = state
        self.event = event
        self.translate = translate
        self.ext = 0 if event.software else 1
        self.gate = "no gate"
        self._writes: list[tuple[int, bytes]] = []

    @property
    def real_mode(self) -> bool:
        return not self.state.sregs.cr0 & Cr0.PE

    @property
    def long_mode(self) -> bool:
        return bool(self.state.sregs.efer & Efer.LMA)

    @property
    def virtual_8086(self) -> bool:
        return bool(self.state.regs.rflags & Rflags.VM)

    @property
    def cpl(self) -> int:
        """SS.DPL is the CPL (SDM vol. 3, 24.4.1): CS.DPL differs in conforming code."""
        if self.real_mode:
            return 0
        return 3 if self.virtual_8086 else self.state.sregs.ss.dpl

    @property
    def return_address(self) -> int:
        return self.state.regs.rip + (self.event.instruction_length if self.event.software else 0)

    @property
    def pushed_flags(self) -> int:
        return self.state.regs.rflags | (int(Rflags.RF) if self.event.sets_resume_flag else 0)

    # How an attempt fails.

    def fail(self, vector: int, error_code: int, reason: str) -> NoReturn:
        """Raise exception `vector`. In real mode no exception has an error code."""
        code = None if self.real_mode else error_code
        raise DeliveryFault(reason, Event(vector, EventKind.EXCEPTION, code))

    def fail_gate(self, vector: int, reason: str) -> NoReturn:
        """The error code points to the IDT: index, IDT bit, EXT."""
        self.fail(vector, self.event.vector << 3 | 2 | self.ext, reason)

    def fail_selector(self, vector: int, selector: int, reason: str) -> NoReturn:
        """The error code points to a descriptor: selector without RPL, EXT."""
        self.fail(vector, (selector & 0xFFFC) | self.ext, reason)

    def fail_unsupported(self, reason: str) -> NoReturn:
        raise DeliveryFault(reason, None)

    # Memory.

    def linear(self, address: int) -> int:
        """Linear addresses have 32 bits outside long mode."""
        return address & (0xFFFF_FFFF_FFFF_FFFF if self.long_mode else 0xFFFF_FFFF)

    def _pieces(self, address: int, length: int) -> list[tuple[int, int]]:
        """(linear address, length) without page crossings."""
        pieces = []
        while length:
            here = self.linear(address)
            size = min(length, PAGE - here % PAGE)
            pieces.append((here, size))
            address += size
            length -= size
        return pieces

    def _physical(self, address: int, access: Access, *, user: bool, implicit: bool, what: str) -> int:
        try:
            return self.translate(address, access, user=user, implicit=implicit)
        except LinearFault as fault:
            reason = f"{what}: {fault.reason}"
            if fault.error_code is None:
                self.fail(GP, self.ext, reason)
            raise DeliveryFault(reason, Event.page_fault(fault.address, fault.error_code)) from None

    def read(self, address: int, length: int, what: str) -> bytes:
        """Bytes of a system table; always a supervisor access. `what` names it for the report."""
        data = b""
        for here, size in self._pieces(address, length):
            physical = self._physical(here, Access.READ, user=False, implicit=True, what=what)
            try:
                data += self.memory.read(physical, size)
            except GuestMemoryError:
                self.fail_unsupported(f"{what}: physical address {physical:#x} is not in memory")
        return data

    def read_number(self, address: int, length: int, what: str) -> int:
        return int.from_bytes(self.read(address, length, what), "little")

    def plan_write(self, address: int, value: int, length: int, *, user: bool) -> None:
        """Check that the stack can be written and remember to write it."""
        data = (value & ((1 << 8 * length) - 1)).to_bytes(length, "little")
        for here, size in self._pieces(address, length):
            physical = self._physical(here, Access.WRITE, user=user, implicit=False, what="stack")
            try:
                self.memory.read(physical, size)
            except GuestMemoryError:
                self.fail_unsupported(f"stack: physical address {physical:#x} is not in memory")
            self._writes.append((physical, data[:size]))
            data = data[size:]

    def commit(self) -> None:
        for physical, data in self._writes:
            with suppress(GuestMemoryError):  # ROM: such a write is lost
                self.memory.guest_write(physical, data)

    # Stack segments of 16 and 32 bits.

    def push(
        self, segment: Segment, pointer: int, items: list[tuple[str, int]], size: int, *, user: bool, selector: int
    ) -> int:
        """Push `items` of `size` bytes each and return the new ESP, or #SS with `selector` where the segment ends.

        A segment with B=0 pushes by SP and leaves the upper bits of ESP alone.
        """
        wide = bool(segment.db)
        mask = 0xFFFF_FFFF if wide else 0xFFFF
        for name, value in items:
            offset = (pointer - size) & mask
            if not _within(segment, offset, size, wide):
                self.fail_selector(
                    SS, selector, f"no room on the stack for {name}: offset {offset:#x}, limit {segment.limit:#x}"
                )
            self.plan_write(segment.base + offset, value, size, user=user)
            pointer = (pointer & ~mask) | offset
        return pointer


def _within(segment: Segment, offset: int, size: int, wide: bool) -> bool:
    last = offset + size - 1
    if segment.s and segment.type & 0xC == 4:  # expand-down data: the limit is below the segment
        return offset > segment.limit and last <= (0xFFFF_FFFF if wide else 0xFFFF)
    return last <= segment.limit
