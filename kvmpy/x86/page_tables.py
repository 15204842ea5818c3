"""Building page tables in guest memory, for every paging mode (SDM vol. 3, 4.3 to 4.5; APM vol. 2, 5.2 and 5.3)."""

from __future__ import annotations

import struct

from kvmpy.errors import OverlapError, UsageError
from kvmpy.x86.paging import PageFlag, PagingMode, PhysicalMemory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["PageTables"]

_PAGE = 0x1000
_ADDRESS = 0x000F_FFFF_FFFF_F000
_P, _RW, _US, _PS, _G = (int(flag) for flag in (PageFlag.P, PageFlag.RW, PageFlag.US, PageFlag.PS, PageFlag.G))
_XD, _PAT_LARGE = int(PageFlag.XD), int(PageFlag.PAT_LARGE)


class PageTables:
    """Page tables that grow in guest-physical memory from `base` on; `cr3` is what CR3 must hold.

    Table pages come from `base` upwards, at most `size` bytes (no limit when None: then memory's own bounds count).
    Tables above the last level permit everything, so the permissions of a mapping are those of its own entry.
    `gigabyte_pages` lets `map` choose 1 GiB pages by itself, for processors that have them (CPUID 0x80000001, EDX
    bit 26). PAE page-directory pointers are read when CR3 is loaded: map all gigabytes that are needed before that.

    Raises UsageError for PagingMode.NONE, a `base` that is not 4 KiB aligned, or one beyond 4 GiB in a 32-bit mode.
    """

    def __init__(
        self,
        memory: PhysicalMemory,
        mode: PagingMode,
        base: int,
        *,
        size: int | None = None,
        gigabyte_pages: bool = False,
    ) -> None:
        if mode is PagingMode.NONE:
            raise UsageError("there are no page tables without paging")
        if base < 0 or base % _PAGE:
            raise UsageError(f"page tables begin on a 4 KiB boundary, not at {base:#x}")
        self.memory = memory
        self.mode = mode
        self.base = base
        self.size = size
        self.end = base
        """The first address that no table has taken yet."""
        self._levels = mode.levels
        self._entry = mode.entry_size
        self._code = "I" if self._entry == 4 else "Q"
        self._automatic = tuple(
            level_size
            for level_size in reversed(mode.page_sizes)
            if level_size < 0x4000_0000 or gigabyte_pages
        )  # fmt: skip
        self.cr3 = self._allocate()

    def map(
        self,
        virtual: int,
        physical: int,
        length: int,
        *,
        writable: bool = True,
        user: bool = False,
        no_execute: bool = False,
        global_page: bool = False,
        page_size: int | None = None,
        flags: int = 0,
    ) -> None:
        """Map `length` bytes at `virtual` to `physical`; all three are multiples of the page size.

        `page_size` is one that the mode offers, in bytes; by default every part gets the largest that its alignment and
        length allow. `no_execute` needs EFER.NXE and a mode other than 32-bit paging; `global_page` needs CR4.PGE;
        4 MiB pages need CR4.PSE. `flags` are further bits for the entries (PWT, PCD, A, D, PAT). What was mapped there
        before is replaced; a larger page that the range cuts is split first.

        Raises UsageError for a misaligned or impossible range and when `size` is used up, OverlapError where a large
        page would cover tables of smaller ones (`unmap` them first; nothing is mapped then), GuestMemoryError where
        table pages leave memory.
        """
        if no_execute and self.mode is PagingMode.BITS32:
            raise UsageError("32-bit paging has no execute-disable bit")
        alignment = page_size or _PAGE
        self._check_range(virtual, length, alignment)
        if physical < 0 or physical % alignment:
            raise UsageError(f"physical {physical:#x} is not aligned to {alignment:#x} bytes")
        limit = 32 if self.mode is PagingMode.BITS32 else 52
        if physical + length > 1 << limit:
            raise UsageError(f"{length:#x} bytes at physical {physical:#x} exceed {limit} address bits")
        bits = int(flags) | _P
        bits |= (_RW if writable else 0) | (_US if user else 0)
        bits |= (_XD if no_execute else 0) | (_G if global_page else 0)
        parts = list(self._parts(virtual, physical, length, page_size))
        for part, _, depth, count in parts:
            if depth < len(self._levels) - 1:
                self._refuse_tables(part, depth, count)
        for part, frame, depth, count in parts:
            leaf = bits | (_PS if depth < len(self._levels) - 1 else 0)
            place = self._table(part, depth) + self._index(part, depth) * self._entry
            size = 1 << self._levels[depth].shift
            entries = range(frame | leaf, (frame | leaf) + count * size, size)
            self.memory.write(place, struct.pack(f"<{count}{self._code}", *entries))

    def _parts(
        self, virtual: int, physical: int, length: int, page_size: int | None
    ) -> Iterator[tuple[int, int, int, int]]:
        """The range as (virtual, physical, depth, count): `count` entries of one table at `depth`."""
        while length:
            size = page_size or self._largest(virtual, physical, length)
            depth = self._depth(size)
            count = min(length // size, (1 << self._levels[depth].bits) - self._index(virtual, depth))
            yield virtual, physical, depth, count
            virtual += count * size
            physical += count * size
            length -= count * size

    def unmap(self, virtual: int, length: int) -> None:
        """Make `length` bytes at `virtual` not present, both multiples of 4 KiB. Larger pages that are cut are split.

        Tables that become empty are detached, but their pages are not used again. Raises as `map` does.
        """
        self._check_range(virtual, length, _PAGE)
        end = virtual + length
        while virtual < end:
            virtual = self._unmap_one(virtual, end)

    def _unmap_one(self, virtual: int, end: int) -> int:
        """Clear the one entry that covers `virtual`; the address after what it covered."""
        table = self.cr3
        for depth, level in enumerate(self._levels):
            place = table + self._index(virtual, depth) * self._entry
            value = self._read(place)
            whole = not virtual & ((1 << level.shift) - 1) and end - virtual >= 1 << level.shift
            if not value & _P or whole:
                if value & _P:
                    self._write(place, 0)
                return min((virtual >> level.shift) + 1 << level.shift, end)
            if value & _PS:
                value = self._split(depth, place, value)
            table = value & _ADDRESS
        raise AssertionError("the last level always covers one page")

    def _check_range(self, virtual: int, length: int, alignment: int) -> None:
        if alignment not in self.mode.page_sizes:
            sizes = ", ".join(hex(size) for size in self.mode.page_sizes)
            raise UsageError(f"{self.mode.value} has pages of {sizes} bytes, not {alignment:#x}")
        if virtual % alignment or length % alignment or length <= 0:
            raise UsageError(f"{length:#x} bytes at virtual {virtual:#x} are not a range of {alignment:#x}-byte pages")
        last = virtual + length - 1
        half = self.mode.address_bits - 1
        if virtual < 0 or not self.mode.is_canonical(virtual) or not self.mode.is_canonical(last):
            raise UsageError(f"virtual {virtual:#x} to {last:#x} is not canonical in {self.mode.value}")
        if self.mode.address_bits > 32 and virtual >> half != last >> half:
            raise UsageError(f"virtual {virtual:#x} to {last:#x} crosses the addresses that are not canonical")

    def _largest(self, virtual: int, physical: int, length: int) -> int:
        for size in self._automatic:
            if length >= size and not (virtual | physical) % size:
                return size
        return _PAGE

    def _depth(self, size: int) -> int:
        return next(depth for depth, level in enumerate(self._levels) if 1 << level.shift == size)

    def _table(self, virtual: int, depth: int) -> int:
        """The address of the table at `depth` that covers `virtual`, made if need be."""
        table = self.cr3
        for upper in range(depth):
            place = table + self._index(virtual, upper) * self._entry
            value = self._read(place)
            if not value & _P:
                value = self._link(upper, self._allocate())
                self._write(place, value)
            elif value & _PS:
                value = self._split(upper, place, value)
            table = value & _ADDRESS
        return table

    def _link(self, depth: int, table: int) -> int:
        """The entry at `depth` that points to `table`. A PAE PDPTE has no RW and US (SDM vol. 3, table 4-8)."""
        if self.mode is PagingMode.PAE and depth == 0:
            return table | _P
        return table | _P | _RW | _US

    def _split(self, depth: int, place: int, value: int) -> int:
        """Replace the large page in the entry at `place` by a table of smaller pages with the same permissions."""
        level, lower = self._levels[depth], self._levels[depth + 1]
        last = depth + 2 == len(self._levels)
        frame = value & _ADDRESS & -(1 << level.shift)
        bits = value & ~_ADDRESS
        if value & _PAT_LARGE:  # PAT moves from bit 12 of a large page to bit 7 of a small one
            bits |= 0 if last else _PAT_LARGE
        elif last:
            bits &= ~_PS
        count = 1 << lower.bits
        table = self._allocate()
        entries = range(frame | bits, (frame | bits) + (count << lower.shift), 1 << lower.shift)
        self.memory.write(table, struct.pack(f"<{count}{self._code}", *entries))
        link = self._link(depth, table)
        self._write(place, link)
        return link

    def _refuse_tables(self, virtual: int, depth: int, count: int) -> None:
        """Large pages may replace large pages, not tables."""
        table = self.cr3
        for upper in range(depth):
            value = self._read(table + self._index(virtual, upper) * self._entry)
            if not value & _P or value & _PS:
                return
            table = value & _ADDRESS
        data = self.memory.read(table + self._index(virtual, depth) * self._entry, count * self._entry)
        for number, value in enumerate(struct.unpack(f"<{count}{self._code}", data)):
            if value & _P and not value & _PS:
                raise OverlapError(
                    f"a large page for virtual {virtual:#x}",
                    f"the table at {value & _ADDRESS:#x} (entry {number} of the range)",
                )

    def _index(self, virtual: int, depth: int) -> int:
        """Which entry of a table at `depth` is for `virtual`."""
        level = self._levels[depth]
        return virtual >> level.shift & ((1 << level.bits) - 1)

    def _allocate(self) -> int:
        table = self.end
        if self.size is not None and table + _PAGE > self.base + self.size:
            raise UsageError(f"the {self.size:#x} bytes for page tables at {self.base:#x} are used up")
        if self.mode.address_bits == 32 and table + _PAGE > 1 << 32:
            raise UsageError(f"tables of {self.mode.value} must lie below 4 GiB, not at {table:#x}")
        self.memory.write(table, bytes(_PAGE))
        self.end = table + _PAGE
        return table

    def _read(self, address: int) -> int:
        return int.from_bytes(self.memory.read(address, self._entry), "little")

    def _write(self, address: int, value: int) -> None:
        self.memory.write(address, value.to_bytes(self._entry, "little"))

    def __repr__(self) -> str:
        return f"<PageTables {self.mode.value} cr3={self.cr3:#x} {self.end - self.base:#x} bytes>"
