"""Memory by linear address, as instructions access it: page tables, permissions, accessed and dirty bits.

The common case, 4-level paging, has a short way of its own: a walk in `kvmpy.x86.page_walk` explains everything and
takes 20 µs. Whatever is irregular goes there, for the exact fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvmpy.errors import GuestMemoryError
from kvmpy.x86.emulator.guest_exception import GuestException
from kvmpy.x86.event_delivery.event import Event
from kvmpy.x86.flags import Cr0, Cr4, Efer, Rflags
from kvmpy.x86.page_walk import Access, FailureKind, page_fault, walk
from kvmpy.x86.paging import PhysicalMemory
from kvmpy.x86.registers import SystemRegisters

__all__ = ["DeviceMemory", "LinearMemory"]

_PAGE = 0x1000
_P, _RW, _US, _A, _D, _PS, _XD = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
_FRAME = 0x000F_FFFF_FFFF_F000
_PE, _WP, _PG = int(Cr0.PE), int(Cr0.WP), int(Cr0.PG)  # plain numbers: an operation on flags makes an object
_SMAP, _LA57 = int(Cr4.SMAP), int(Cr4.LA57)
_LMA, _NXE = int(Efer.LMA), int(Efer.NXE)
_RESERVED = 0x000F_0000_0000_0000  # what no processor of today has as address bits; the long way knows exactly


class DeviceMemory(Protocol):
    """What answers at guest-physical addresses that are no RAM, and takes what is written to ROM."""

    def read(self, address: int, size: int) -> int: ...
    def write(self, address: int, size: int, value: int) -> object: ...


class LinearMemory:
    """Accesses of one instruction. `rflags` is read for AC at each access, `devices` takes what is no RAM."""

    def __init__(
        self, physical: PhysicalMemory, sregs: SystemRegisters, general: list[int], devices: DeviceMemory | None = None
    ) -> None:
        self._physical = physical
        self._sregs = sregs
        self._general = general
        self._devices = devices
        self._cr0, self._cr4, self._efer = sregs.cr0, sregs.cr4, sregs.efer
        self._cr3 = sregs.cr3
        self._user = bool(sregs.cr0 & _PE) and sregs.ss.dpl == 3
        self._pages: dict[int, int] = {}
        """Number of a page times 2, plus 1 for writes -> its physical address, once an access has gone well."""
        self._short = bool(self._cr0 & _PG and self._efer & _LMA and self._efer & _NXE and not self._cr4 & _LA57)

    def read(self, address: int, size: int, *, implicit: bool = False) -> bytes:
        """`size` bytes at a linear address; they may cross pages. Raises GuestException."""
        room = _PAGE - address % _PAGE
        if size <= room:
            return self._read_physical(self.translate(address, Access.READ, implicit=implicit), size)
        places = [self.translate(at, Access.READ, implicit=implicit) for at in _pages(address, size)]
        parts = _parts(address, size)
        return b"".join(self._read_physical(place, part) for place, part in zip(places, parts, strict=True))

    def write(self, address: int, data: bytes, *, implicit: bool = False) -> None:
        """Write bytes at a linear address: all of them, or none when any page refuses. Raises GuestException."""
        size = len(data)
        if size <= _PAGE - address % _PAGE:
            self._write_physical(self.translate(address, Access.WRITE, implicit=implicit), data)
            return
        places = [self.translate(at, Access.WRITE, implicit=implicit) for at in _pages(address, size)]
        for place, part in zip(places, _parts(address, size), strict=True):
            self._write_physical(place, data[:part])
            data = data[part:]

    def write_pieces(self, address: int, pieces: Sequence[tuple[int, bytes]]) -> None:
        """Write bytes at several offsets from a linear address, in ascending order: all of them, or none."""
        end = pieces[-1][0] + len(pieces[-1][1])
        if address % _PAGE + end <= _PAGE:
            place = self.translate(address, Access.WRITE)
            for offset, data in pieces:
                self._write_physical(place + offset, data)
            return
        self.check_writable(address, end)
        for offset, data in pieces:
            self.write(address + offset, data)

    def check_writable(self, address: int, size: int) -> None:
        """Raise GuestException unless `size` bytes may be written: an instruction that writes later faults now."""
        for at in _pages(address, size):
            self.translate(at, Access.WRITE)

    def translate(self, address: int, access: Access, *, implicit: bool = False) -> int:
        """The guest-physical address, with the accessed and dirty bits set in the tables. Raises GuestException."""
        if not self._cr0 & _PG:
            return address
        if self._short and access is not Access.FETCH and not implicit:
            write = access is Access.WRITE
            page = self._pages.get(address >> 12 << 1 | write)
            if page is not None:
                return page | address & 0xFFF
            physical = self._translate_4_level(address, write, self._user)
            if physical is not None:
                self._pages[address >> 12 << 1 | write] = self._pages[address >> 12 << 1] = physical & ~0xFFF
                return physical
        return self._translate_long_way(address, access, implicit)

    def _translate_4_level(self, address: int, write: bool, user: bool) -> int | None:
        if address >> 47 not in (0, 0x1FFFF):
            return None
        table = self._cr3 & _FRAME
        read = self._physical.read
        rights = _RW | _US
        for shift in (39, 30, 21, 12):
            place = table + (address >> shift & 0x1FF) * 8
            try:
                entry = int.from_bytes(read(place, 8), "little")
            except GuestMemoryError:
                return None
            if not entry & _P or entry & _RESERVED:
                return None
            rights &= entry
            leaf = shift == 12 or entry & _PS
            if leaf and (shift == 39 or (shift > 12 and entry & (1 << shift) - 1 & ~0x1FFF)):
                return None
            wanted = _A | _D if leaf and write else _A
            if leaf and not self._permits(rights, write, user):
                return None
            if entry & wanted != wanted:
                self._physical.write(place, (entry | wanted).to_bytes(8, "little"))
            if leaf:
                within = (1 << shift) - 1
                return entry & _FRAME & ~within | address & within
            table = entry & _FRAME
        return None

    def _permits(self, rights: int, write: bool, user: bool) -> bool:
        if user:
            return bool(rights & _US and (rights & _RW or not write))
        if rights & _US and self._cr4 & _SMAP:
            return False  # perhaps RFLAGS.AC allows it: the long way knows
        return bool(rights & _RW or not write or not self._cr0 & _WP)

    def _translate_long_way(self, address: int, access: Access, implicit: bool) -> int:
        walked = walk(self._physical, self._sregs, address)
        if walked.failure is not None and walked.failure.kind is FailureKind.NOT_CANONICAL:
            raise GuestException(Event.exception(13, 0))
        rflags = self._general[17] & int(Rflags.AC)
        code = page_fault(walked, self._sregs, access, user=self._user, rflags=rflags, implicit=implicit)
        if code is not None or walked.physical is None:
            raise GuestException(Event.page_fault(address, int(code or 0)))
        for entry in walked.entries:
            last = entry is walked.entries[-1]
            wanted = _A | _D if last and access is Access.WRITE else _A
            if walked.mode.entry_size == 8 and len(walked.mode.levels) == 3 and entry is walked.entries[0]:
                continue  # a PAE PDPTE has no accessed bit
            if entry.value & wanted != wanted:
                size = walked.mode.entry_size
                self._physical.write(entry.address, (entry.value | wanted).to_bytes(size, "little"))
        return walked.physical

    def _read_physical(self, address: int, size: int) -> bytes:
        try:
            return self._physical.read(address, size)
        except GuestMemoryError:
            if self._devices is None:
                return b"\xff" * size
            return b"".join(
                self._devices.read(at, part).to_bytes(part, "little") for at, part in _device_parts(address, size)
            )

    def _write_physical(self, address: int, data: bytes) -> None:
        try:
            self._physical.guest_write(address, data)
        except GuestMemoryError:  # none there, or ROM, whose writes come to devices as well
            if self._devices is not None:
                for at, part in _device_parts(address, len(data)):
                    value = int.from_bytes(data[at - address : at - address + part], "little")
                    self._devices.write(at, part, value)


def _pages(address: int, size: int) -> list[int]:
    """The linear addresses at which the pieces of an access begin, one in each page; they wrap at 2^64."""
    found, done = [], 0
    for part in _parts(address, size):
        found.append(address + done & 0xFFFF_FFFF_FFFF_FFFF)
        done += part
    return found


def _parts(address: int, size: int) -> list[int]:
    parts = []
    while size:
        part = min(size, _PAGE - address % _PAGE)
        parts.append(part)
        address, size = address + part, size - part
    return parts


def _device_parts(address: int, size: int) -> list[tuple[int, int]]:
    """An access to a device in naturally sized pieces, as KVM splits it: at most 8 bytes each."""
    parts = []
    while size:
        part = 8
        while part > size:
            part //= 2
        parts.append((address, part))
        address, size = address + part, size - part
    return parts
