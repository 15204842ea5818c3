"""What ring 0 of the guest sees, made accessible to ring 3: page tables of our own, and code that was looked through.

See `kvmpy.machine.direct_execution`. The tables map what the guest's map for ring 0, page by page as it is touched,
with the user bit set. Code is mapped as a copy, in which instructions that ring 3 executes in silence but not as ring 0
does are replaced by HLT, which faults.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpy.machine.direct_execution.code import Code, find_instructions, ways_into
from kvmpy.machine.direct_execution.context import (
    BASE,
    CR2_CELL,
    FLAGS,
    KERNEL_GS,
    PENDING,
    SAVED,
    SELECTOR_CELLS,
    SIZE,
)
from kvmpy.machine.direct_execution.guest_tables import GuestTables, Refused, changed_entries
from kvmpy.machine.direct_execution.pieces import Cells
from kvmpy.machine.direct_execution.stand_ins import HLT, HOLE, StandIns
from kvmpy.memory import GuestMemory

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DirectMemory", "Refused"]

_PAGE = 0x1000
_P, _RW, _US, _A, _D, _PS, _NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
_FRAME = 0x000F_FFFF_FFFF_F000
_LARGE = 0x20_0000

_ROOT, _PDPT, _PD = 5, 6, 7
_FLAGS, _LOW, _STAND_INS, _FIRST_TABLE, _FIRST_COPY = 10, 11, 512, 1024, 8192
_WRITES_BESIDE = 300
"""After so many writes of code to its own page, which take a step and a new copy each, KVM runs it better."""
_PAGES = SIZE // _PAGE
_BACK = 96
"""Bytes before a page from which on its instructions are found: sequences of instructions fall into step quickly."""


class _Mapping:
    __slots__ = ("cell", "entry", "frame", "tables")

    def __init__(self, cell: int, entry: int, frame: int, tables: tuple[int, ...]) -> None:
        self.cell = cell
        self.entry = entry
        self.frame = frame
        self.tables = tables


class DirectMemory(GuestTables):
    """The tables. `area` is the guest-physical address of SIZE bytes that are mapped at BASE, for ring 0."""

    def __init__(self, memory: GuestMemory, area: int) -> None:
        self._mappings: dict[int, _Mapping] = {}
        """By linear address / 4096."""
        self.codes: dict[int, Code] = {}
        """By frame."""
        self._snapshots: dict[int, tuple[memoryview, bytes]] = {}
        """Table -> where it is, and what was in it."""
        super().__init__(memory)
        self.area = area
        region = memory.region_at(area)
        assert region is not None
        start = area - region.address
        self.bytes = region.buffer[start : start + SIZE]
        self.cells = self.bytes.cast("Q")
        self.cr3 = area + _ROOT * _PAGE
        self._by_frame: dict[int, set[int]] = {}
        self._by_table: dict[int, set[int]] = {}
        self._by_root: dict[int, set[int]] = {}
        """By the index of the entry in the table at the top."""
        self._root = bytes(_PAGE)
        self._tables: dict[tuple[int, int], int] = {}
        """(shift, linear >> shift) -> page of the area that holds the entries for it."""
        self._next_table = _FIRST_TABLE
        self._free_copies = list(range(_PAGES - 1, _FIRST_COPY - 1, -1))
        self._jump_pages: dict[int, int] = {}
        """Linear address / 4096 -> page of the area with jumps to stand-ins."""
        self._writes_beside: dict[int, int] = {}
        """Frame -> how often code in it has written to it."""
        self._removed: list[int] = []
        self.written: int | None = None
        """A frame of code that the instruction writes to which was refused last."""
        stand_ins = self.bytes[_STAND_INS * _PAGE : _STAND_INS * _PAGE + _LARGE]
        places = (FLAGS, PENDING, KERNEL_GS, CR2_CELL, SAVED, SELECTOR_CELLS)
        cells = Cells(*(BASE + 8 * place for place in places))
        self.stand_ins = StandIns(BASE + _STAND_INS * _PAGE, stand_ins, cells, BASE, self._jump_at)
        self.counts = {"mapped": 0, "removed": 0, "copies": 0, "refused code": 0}
        self._set_up()

    def _set_up(self) -> None:
        cells, area = self.cells, self.area
        cells[_ROOT * 512 + (BASE >> 39 & 511)] = area + _PDPT * _PAGE | _P | _RW | _US | _A
        cells[_PDPT * 512 + (BASE >> 30 & 511)] = area + _PD * _PAGE | _P | _RW | _US | _A
        first = _PD * 512 + (BASE >> 21 & 511)
        cells[first] = area + _LOW * _PAGE | _P | _RW | _US | _A
        for index in range(512):
            cells[_LOW * 512 + index] = area + index * _PAGE | _P | _RW | _A | _D | (_US if index == _FLAGS else 0)
        cells[first + 1] = area + _STAND_INS * _PAGE | _P | _US | _A | _D | _PS
        for index in range(2, SIZE // _LARGE):
            cells[first + index] = area + index * _LARGE | _P | _RW | _A | _D | _PS
        self._tables[39, BASE >> 39] = _PDPT
        self._tables[30, BASE >> 30] = _PD

    # Mapping

    def touch(self, linear: int, write: bool, fetch: bool, rip: int, access_to_user: bool) -> None:
        """Map the page of a linear address for this access. Raises Refused where the guest does not."""
        if HOLE <= linear < BASE + SIZE:
            raise Refused("a place of our own")
        entry = linear & 0xFFF if linear == rip else None
        frame, rights, leaf, shift, tables = self.walk(linear)
        page = linear >> 12 & 0xF_FFFF_FFFF_FFFF
        if fetch:
            if rights & _NX or rights & _US:
                raise Refused("not to be executed by ring 0", 1)
            self._execute(page, frame, tables, entry)
            if not leaf & _A:
                self._or(self._place, _A)
            return
        if rights & _US and not access_to_user:
            raise Refused("a page of ring 3", 1)
        if write:
            if not rights & _RW:
                raise Refused("read-only", 1)
            if leaf & (_A | _D) != _A | _D:
                self._or(self._place, _A | _D)
            if frame in self.codes:
                running = self._mappings.get(rip >> 12)
                if running is not None and running.frame == frame:
                    self.written = frame
                    self._writes_beside[frame] = self._writes_beside.get(frame, 0) + 1
                    raise Refused("code that writes to its own page")
                self.forget_code(frame)
            self._map(page, frame, _RW, tables)
            if shift == 21 and not rights & _US:
                self._neighbours(page, frame, _RW, tables)
            return
        if not leaf & _A:
            self._or(self._place, _A)
        writable = _RW if rights & _RW and leaf & _D and frame not in self.codes else 0
        self._map(page, frame, writable, tables)
        if shift == 21 and not rights & _US:
            self._neighbours(page, frame, writable, tables)

    def _neighbours(self, page: int, frame: int, writable: int, tables: tuple[int, ...]) -> None:
        """Around a page of a large one others will be wanted soon."""
        first = page & ~15
        mappings, codes = self._mappings, self.codes
        base = frame - (page - first) * _PAGE
        for index in range(16):
            near = base + index * _PAGE
            if first + index not in mappings and near not in codes and self.page(near) is not None:
                self._map(first + index, near, writable, tables)

    def _map(self, page: int, frame: int, writable: int, tables: tuple[int, ...], target: int | None = None) -> None:
        data = target is None
        if data and self.page(frame) is None and frame != 0xFEE0_0000:
            raise Refused("no RAM")
        entry = (frame if target is None else target) | _P | _US | _A | _D | writable
        if data:
            entry |= _NX
        old = self._mappings.get(page)
        if old is not None:
            if old.entry == entry:
                return
            if (old.entry ^ entry) & ~_RW or old.entry & _RW:
                self.remove(page)
                self.flush()
            else:
                self._unlist(page, old)
        cell = self._cell(page)
        self.cells[cell] = entry
        self._mappings[page] = _Mapping(cell, entry, frame, tables)
        self._by_frame.setdefault(frame, set()).add(page)
        self._by_root.setdefault(page >> 27 & 511, set()).add(page)
        for table in tables:
            self._by_table.setdefault(table, set()).add(page)
            self._note_table(table)
        self.counts["mapped"] += 1

    def _note_table(self, table: int) -> None:
        if table not in self._snapshots:
            view = self.page(table)
            if view is not None:
                self._snapshots[table] = view, bytes(view)

    def _cell(self, page: int) -> int:
        """The index in `cells` of the entry for a page, with the tables on the way to it."""
        linear = page << 12
        number = self._tables.get((21, linear >> 21))
        if number is None:
            parent = _ROOT
            for shift in (39, 30, 21):
                number = self._tables.get((shift, linear >> shift))
                if number is None:
                    if self._next_table >= _FIRST_COPY:
                        raise Refused("out of tables")
                    number = self._next_table
                    self._next_table += 1
                    self._tables[shift, linear >> shift] = number
                    self.cells[parent * 512 + (linear >> shift & 511)] = (
                        self.area + number * _PAGE | _P | _RW | _US | _A
                    )
                parent = number
        assert number is not None
        return number * 512 + (page & 511)

    def remove(self, page: int) -> None:
        """Take a mapping away; `flush` makes it so."""
        mapping = self._mappings[page]
        self._unlist(page, mapping)
        self._removed.append(mapping.cell)
        self.counts["removed"] += 1

    def _unlist(self, page: int, mapping: _Mapping) -> None:
        del self._mappings[page]
        self._by_frame[mapping.frame].discard(page)
        self._by_root[page >> 27 & 511].discard(page)
        for table in mapping.tables:
            self._by_table[table].discard(page)

    zap: Callable[[list[int]], None]
    """Has the guest's processor clear entries, so that KVM notices. Set by who runs it."""

    def flush(self) -> None:
        """Clear the entries of removed mappings."""
        while self._removed:
            batch, self._removed = self._removed[:512], self._removed[512:]
            self.zap([BASE + 8 * cell for cell in batch])

    # Code

    def _execute(self, page: int, frame: int, tables: tuple[int, ...], entry: int | None) -> None:
        code = self.codes.get(frame)
        if code is not None:
            view = self.page(frame)
            if view is None or bytes(view) != code.original:  # written to by a device, meanwhile
                self.forget_code(frame)
                code = None
        if code is None:
            if self._writes_beside.get(frame, 0) > _WRITES_BESIDE:
                raise Refused("code with data beside it")
            code = self._copy(page, frame, entry)
            for other in [p for p in self._by_frame.get(frame, ()) if self._mappings[p].entry & _RW]:
                self.remove(other)  # what writes there shall come here first
            self.flush()
        self._map(page, frame, 0, tables, self.area + code.slot * _PAGE)

    def _copy(self, page: int, frame: int, entry: int | None) -> Code:
        view = self.page(frame)
        if view is None or not self._free_copies:
            raise Refused("no RAM, or no room")
        original = bytes(view)
        before = self._code_at(page - 1)[-_BACK:]
        after = self._code_at(page + 1)[:16]
        code = before + original + after
        previous = self.code_of(page - 1 << 12)
        if previous is not None and previous.end >= 0:
            entry, ways = None, {len(before) + previous.end}
        else:
            ways = ways_into(code, len(before))
        found = find_instructions(code, len(before), ways, entry)
        if found is None:
            self.counts["refused code"] += 1
            raise Refused("where instructions begin is not certain")
        first, last = found[0] - len(before), found[1] - len(before) - _PAGE
        end = last if len(after) == 16 else -1
        following = self.code_of(page + 1 << 12)
        if following is not None and following.uncertain and following.first != end:
            self.forget_code(self._mappings[page + 1].frame)
        made = Code(original, after, first, end, len(ways) > 1)
        if made.uncertain:
            made.copy[:first] = bytes((HLT,)) * first  # where instructions begin there is not known
        self.stand_ins.fit(made, [at - len(before) for at in found[2]], page << 12)
        made.slot = self._free_copies.pop()
        self.bytes[made.slot * _PAGE : (made.slot + 1) * _PAGE] = made.copy
        self.codes[frame] = made
        self.counts["copies"] += 1
        return made

    def _code_at(self, page: int) -> bytes:
        try:
            frame, rights, _, _, _ = self.walk(page << 12)
        except Refused:
            return b""
        view = self.page(frame)
        return b"" if rights & _NX or view is None else bytes(view)

    def look_at_regions(self) -> None:
        """Trust nothing that is mapped, either."""
        super().look_at_regions()
        for page in list(self._mappings):
            self.remove(page)
        for frame in list(self.codes):
            self.forget_code(frame)
        self._snapshots.clear()

    def forget_code(self, frame: int) -> None:
        """A page of code changes: have no copy of it any more."""
        code = self.codes.pop(frame)
        for page in list(self._by_frame.get(frame, ())):
            self.remove(page)
        self.flush()
        self._free_copies.append(code.slot)
        self.stand_ins.release(code)

    def _jump_at(self, linear: int, code: bytes) -> bool:
        """Write code where nothing of the guest is. False: there is no room."""
        for at, byte in enumerate(code, linear):
            number = self._jump_pages.get(at >> 12)
            if number is None:
                if not self._free_copies:
                    return False
                cell = self._cell(at >> 12)
                self._jump_pages[at >> 12] = number = self._free_copies.pop()
                self.bytes[number * _PAGE : (number + 1) * _PAGE] = bytes((HLT,)) * _PAGE
                self.cells[cell] = self.area + number * _PAGE | _P | _US | _A | _D
            self.bytes[number * _PAGE + (at & 0xFFF)] = byte
        return True

    def use_gs_base_instructions(self, enabled: bool) -> None:
        """Whether the guest has RDFSBASE and its like; if that has changed, code with them is looked through again."""
        if self.stand_ins.has_gs_base_instructions != enabled:
            self.stand_ins.has_gs_base_instructions = enabled
            for frame in [frame for frame, code in self.codes.items() if code.has_gs_base]:
                self.forget_code(frame)

    def may_write(self, frame: int) -> bool:
        """Not where code is that has a copy."""
        return frame not in self.codes

    def code_of(self, linear: int) -> Code | None:
        """The copy that is mapped at a linear address."""
        mapping = self._mappings.get(linear >> 12)
        return None if mapping is None or mapping.entry & _NX else self.codes.get(mapping.frame)

    # The guest may have changed its tables, or code

    def revalidate(self, cr3: int, *, code: bool = True) -> None:
        """Remove what the guest no longer maps so. After anything that we did not see it do."""
        suspects: set[int] = set()
        self.guest_cr3 = cr3
        view = self.page(cr3 & _FRAME)
        root = bytes(view) if view is not None else bytes(_PAGE)
        if root != self._root:
            # Another table at the top, which is mostly the same.
            for index in changed_entries(self._root, root):
                suspects |= self._by_root.get(index, set())
            self._root = root
        for table in [table for table, (view, was) in self._snapshots.items() if bytes(view) != was]:
            view, was = self._snapshots.pop(table)
            pages = self._by_table.get(table)
            if not pages:
                continue
            now = bytes(view)
            self._snapshots[table] = view, now
            changed = changed_entries(was, now)
            for page in pages if changed else ():
                level = self._mappings[page].tables.index(table)
                if page >> (18, 9, 0)[level] & 511 in changed:
                    suspects.add(page)
        for frame, copy in list(self.codes.items()) if code else ():
            view = self.page(frame)
            if view is None or bytes(view) != copy.original:
                self.forget_code(frame)
        for page in suspects:
            mapping = self._mappings.get(page)
            if mapping is not None and not self._still(page, mapping):
                self.remove(page)
        self.flush()

    def _still(self, page: int, mapping: _Mapping) -> bool:
        try:
            frame, rights, leaf, _, tables = self.walk(page << 12)
        except Refused:
            return False
        if frame != mapping.frame or (mapping.entry & _RW and not rights & _RW):
            return False
        if not mapping.entry & _NX and rights & (_NX | _US):
            return False
        if mapping.entry & _RW and not leaf & _D:
            return False
        if tables != mapping.tables:
            self._unlist(page, mapping)
            mapping.tables = tables
            self._mappings[page] = mapping
            self._by_frame.setdefault(frame, set()).add(page)
            self._by_root.setdefault(page >> 27 & 511, set()).add(page)
            for table in tables:
                self._by_table.setdefault(table, set()).add(page)
                self._note_table(table)
        return True
