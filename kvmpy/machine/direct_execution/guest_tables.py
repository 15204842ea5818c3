"""The guest's page tables, as ring 0 sees memory through them: 4-level paging with pages of 4 KiB, 2 MiB, 1 GiB."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmpy.memory import GuestMemory

__all__ = ["GuestTables", "Refused", "changed_entries"]

_PAGE = 0x1000
_P, _RW, _US, _A, _D, _PS, _NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
_FRAME = 0x000F_FFFF_FFFF_F000


class Refused(Exception):
    """An access that is not made possible. `present` is the bit P of the page fault that the guest gets for it.

    None: it is no fault of the guest's.
    """

    def __init__(self, why: str, present: int | None = None) -> None:
        super().__init__(why)
        self.present = present


_BUT_ACCESSED = int.from_bytes((~_A & (1 << 64) - 1).to_bytes(8, "little") * 512, "little")


def changed_entries(old: bytes, new: bytes) -> set[int]:
    """Which entries of a table differ in more than the bit A."""
    found = set()
    changed = (int.from_bytes(old, "little") ^ int.from_bytes(new, "little")) & _BUT_ACCESSED
    while changed:
        index = (changed & -changed).bit_length() - 1 >> 6
        found.add(index)
        changed &= -1 << 64 * (index + 1)
    return found


class GuestTables:
    """A walk, and reads and writes of memory by linear address. `guest_cr3` says where the tables are."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self.look_at_regions()
        self.guest_cr3 = 0
        self._place = 0
        """Where the last entry is that was met."""

    def look_at_regions(self) -> None:
        """The host may have given the guest other memory."""
        self._seen = self._memory.regions
        self._regions = [(r.address, r.end, r.buffer, r.buffer.cast("Q")) for r in self._seen]

    def has_other_regions(self) -> bool:
        """Whether it has."""
        return self._memory.regions is not self._seen

    def _read(self, address: int) -> int:
        for start, end, _, cells in self._regions:
            if start <= address < end:
                return cells[(address - start) >> 3]
        raise Refused(f"a page table at {address:#x}")

    def _or(self, address: int, bits: int) -> None:
        for start, end, _, cells in self._regions:
            if start <= address < end:
                cells[(address - start) >> 3] |= bits
                return

    def page(self, frame: int) -> memoryview | None:
        """The page of RAM at a guest-physical address, or None."""
        for start, end, view, _ in self._regions:
            if start <= frame < end:
                return view[frame - start : frame - start + _PAGE]
        return None

    def walk(self, linear: int) -> tuple[int, int, int, int, tuple[int, ...]]:
        """Frame, rights (RW, US, and NX if any level has it), leaf entry, its shift, and the tables on the way."""
        if linear >> 47 not in (0, 0x1FFFF):
            raise Refused("not canonical")
        table = self.guest_cr3 & _FRAME
        rights = _RW | _US
        no_execute = 0
        tables = []
        for shift in (39, 30, 21, 12):
            if shift < 39:
                tables.append(table)
            place = table + (linear >> shift & 511) * 8
            entry = self._read(place)
            if not entry & _P:
                raise Refused(f"{linear:#x} is not mapped", 0)
            rights &= entry
            no_execute |= entry & _NX
            if shift == 12 or entry & _PS:
                if shift == 39:
                    raise Refused("reserved")
                within = (1 << shift) - 1
                self._place = place
                return (
                    (entry & _FRAME & ~within) | (linear & within & ~0xFFF),
                    rights | no_execute,
                    entry,
                    shift,
                    tuple(tables),
                )
            if not entry & _A:
                self._or(place, _A)
            table = entry & _FRAME
        raise Refused("unreachable")

    def may_write(self, frame: int) -> bool:
        """Whether `write_linear` may write to a page of RAM."""
        return True

    def read_linear(self, linear: int, size: int) -> bytes:
        """What ring 0 would read."""
        out = b""
        while size:
            frame = self.walk(linear)[0]
            view = self.page(frame)
            if view is None:
                raise Refused("no RAM")
            at = linear & 0xFFF
            part = bytes(view[at : at + size])
            out += part
            linear += len(part)
            size -= len(part)
        return out

    def write_linear(self, linear: int, data: bytes) -> None:
        """What ring 0 would write."""
        while data:
            frame, rights, _, _, _ = self.walk(linear)
            view = self.page(frame)
            if view is None or not rights & _RW or not self.may_write(frame):
                raise Refused("not to be written")
            self._or(self._place, _A | _D)
            at = linear & 0xFFF
            part = data[: _PAGE - at]
            view[at : at + len(part)] = part
            linear += len(part)
            data = data[len(part) :]
