"""How the first processor starts an image: its mode, its stack, and the tables that the mode needs in guest memory."""

from __future__ import annotations

from kvmpy.boot.image import Entry, LoadedRange
from kvmpy.boot.placement import FOUR_GIB, highest_free, ram_text, ram_views
from kvmpy.errors import ImageError, UsageError
from kvmpy.x86 import modes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvmpy.memory import GuestMemory
    from kvmpy.x86.registers import CpuState

__all__ = ["MODES", "Mapping", "Start", "page_mappings"]

MODES = ("real", "protected16", "protected", "long")
"""Real mode; protected mode with 16-bit and with 32-bit code, without paging; long mode with 64-bit code."""

_PAGE = 0x1000
_LARGE_PAGE = 0x20_0000
_STACK = 0x1000
"""The least stack that must fit below the tables. It may grow further, down to whatever lies there."""
_REAL_STACK_FLOOR = 0x500
"""Below are the interrupt vectors and the BIOS data area."""
_REAL_STACK = 0x100
_SEGMENT = 0x1_0000


class Mapping:
    """`size` bytes at `virtual` mapped to `physical`; all are multiples of 4 KiB."""

    __slots__ = ("physical", "size", "virtual")
    __match_args__ = ("virtual", "physical", "size")

    def __init__(self, virtual: int, physical: int, size: int) -> None:
        self.virtual = virtual
        self.physical = physical
        self.size = size

    def __repr__(self) -> str:
        return f"<Mapping {self.virtual:#x} to {self.physical:#x}, {self.size:#x} bytes>"


class Start:
    """What a caller says about the start: `mode` is one of `MODES`, the rest has defaults that suit most guests.

    The protected modes and long mode start with GDT, TSS and, in long mode, page tables ready in guest memory, so that
    a guest may load segment registers at once; the first 4 GiB of addresses are then mapped one to one with 2 MiB
    pages. `tables` is the address for them (4 KiB aligned; 0x4000 bytes in protected, 0xa000 in long mode, more for a
    kernel that runs at other virtual addresses). The default is the highest free RAM below 4 GiB: a flat image does
    not say what memory after its end it uses, but few use the very top. `Entry.ranges` says where they are.

    `stack` is the address just above the first byte pushed. The default is just below the tables; in real mode just
    below the image (0x7C00 for a boot sector), when there is RAM, else at the end of the first 64 KiB of RAM. `ring`
    is 0, or 3 in the modes "protected" and "long"; ring 3 may use all ports.

    Raises UsageError for an unknown mode or ring.
    """

    __slots__ = ("mode", "ring", "stack", "tables")

    def __init__(self, mode: str, *, stack: int | None = None, ring: int = 0, tables: int | None = None) -> None:
        if mode not in MODES:
            raise UsageError(f"there is no mode {mode!r}; an image starts in one of {', '.join(MODES)}")
        if ring not in (0, 3) or (ring and mode not in ("protected", "long")):
            raise UsageError(
                f"an image starts in ring 0, or in mode protected or long in ring 3; not {mode}, ring {ring}"
            )
        self.mode = mode
        self.stack = stack
        self.ring = ring
        self.tables = tables

    def enter(
        self,
        memory: GuestMemory,
        entry: int,
        used: Sequence[LoadedRange],
        image: str,
        mappings: Sequence[Mapping] = (),
    ) -> Entry:
        """Write the tables and return the state that starts at `entry`. `used` are the ranges that the image takes.

        `mappings`, sorted and without overlaps, are virtual addresses that long mode maps besides the first 4 GiB, and
        instead of them where they collide. Raises ImageError, naming `image`, when there is no room or no way to start
        there.
        """
        try:
            if self.mode == "real":
                stack = self._real_mode_stack(memory, used) if self.stack is None else self.stack
                return Entry(modes.real_mode(entry, stack=stack), used)
            return self._enter_with_tables(memory, entry, used, image, mappings)
        except ImageError:
            raise
        except UsageError as error:  # the entry or the stack is out of the mode's reach
            raise ImageError(str(error), image) from error

    def _enter_with_tables(
        self, memory: GuestMemory, entry: int, used: Sequence[LoadedRange], image: str, mappings: Sequence[Mapping]
    ) -> Entry:
        # Only here: a real-mode guest needs no tables, and need not wait for these imports.
        from kvmpy.x86 import long_mode, protected_mode

        if self.mode == "long":
            # Code above 4 GiB is outside of the identity map that every image gets.
            mappings = mappings or page_mappings(
                (loaded.address, loaded.address, loaded.size) for loaded in used if loaded.end > FOUR_GIB
            )
            size = long_mode.tables_size() + _tables_for(mappings)
        else:
            size = protected_mode.tables_size()
        # The processor finds the tables and the stack through the identity map, so they must not lie where `mappings`
        # put something else.
        hidden = [LoadedRange(mapping.virtual, mapping.size, "mapping of a segment") for mapping in mappings]
        tables, stack = self._place(memory, size, (*used, *hidden), image)
        area = LoadedRange(tables, size, "tables")
        state: CpuState
        if self.mode == "long":
            state = long_mode.prepare(memory, entry=entry, tables=tables, stack=stack, ring=self.ring)
            if mappings:
                cr3 = state.sregs.cr3
                self._map(memory, cr3, tables + size - cr3, mappings)
        else:
            bits = 16 if self.mode == "protected16" else 32
            state = protected_mode.prepare(memory, entry=entry, tables=tables, stack=stack, ring=self.ring, bits=bits)
        return Entry(state, (*used, area))

    def _map(self, memory: GuestMemory, cr3: int, size: int, mappings: Sequence[Mapping]) -> None:
        """The page tables again, at the same place: the identity map, and `mappings` over it."""
        from kvmpy.x86.page_tables import PageTables
        from kvmpy.x86.paging import PagingMode

        user = self.ring == 3
        pages = PageTables(memory, PagingMode.LEVEL4, cr3, size=size)
        pages.map(0, 0, FOUR_GIB, user=user, page_size=_LARGE_PAGE)
        for mapping in mappings:
            pages.map(mapping.virtual, mapping.physical, mapping.size, user=user)

    def _place(self, memory: GuestMemory, size: int, used: Sequence[LoadedRange], image: str) -> tuple[int, int]:
        """Addresses of the tables and of the top of the stack."""
        taken = list(used)
        if self.stack is not None:
            # Keep the tables out of the stack that the caller chose, as far as one can know how far it grows.
            taken.append(LoadedRange(max(self.stack - _STACK, 0), min(self.stack, _STACK), "stack"))
        if self.tables is not None:
            tables = self._check_tables(memory, self.tables, size, used, image)
            if self.stack is not None:
                return tables, self.stack
            taken.append(LoadedRange(tables, size, "tables"))
            bottom = highest_free(memory, _STACK, taken)
            if bottom is None:
                raise _no_room(memory, _STACK, "the stack", "stack=", image)
            return tables, bottom + _STACK
        if self.stack is not None:
            found = highest_free(memory, size, taken)
            if found is None:
                raise _no_room(memory, size, "the tables of the mode", "tables=", image)
            return found, self.stack
        bottom = highest_free(memory, _STACK + size, taken)
        if bottom is None:
            raise _no_room(memory, _STACK + size, "the stack and the tables of the mode", "tables= and stack=", image)
        return bottom + _STACK, bottom + _STACK

    def _check_tables(
        self, memory: GuestMemory, tables: int, size: int, used: Sequence[LoadedRange], image: str
    ) -> int:
        if tables % _PAGE or not 0 <= tables <= FOUR_GIB - size:
            raise ImageError(
                f"tables={tables:#x} must be a multiple of 4 KiB and leave {size:#x} bytes below 4 GiB", image
            )
        for loaded in used:
            if loaded.overlaps(tables, size):
                raise ImageError(f"tables={tables:#x}: the {size:#x} bytes there overlap {loaded!r}", image)
        ram_views(memory, tables, size, image, "the area for tables")
        return tables

    def _real_mode_stack(self, memory: GuestMemory, used: Sequence[LoadedRange]) -> int:
        """Just below the image when 0x100 bytes of RAM are there, else at the end of the lowest free 64 KiB."""
        lowest = min(loaded.address for loaded in used) & -0x10
        below = highest_free(memory, _REAL_STACK, used, alignment=0x10, below=min(lowest, _SEGMENT))
        if below is not None and below >= _REAL_STACK_FLOOR:
            return below + _REAL_STACK
        above = highest_free(memory, _REAL_STACK, used, alignment=0x10, below=_SEGMENT)
        if above is not None and above >= _REAL_STACK_FLOOR:
            return above + _REAL_STACK
        return lowest if lowest < _SEGMENT else 0


def page_mappings(ranges: Iterable[tuple[int, int, int]]) -> list[Mapping]:
    """(virtual, physical, size) in whole pages, sorted by virtual address and without overlaps.

    Ranges may share a page when they agree where it is. Raises ValueError(virtual, why) when they do not, or when
    a virtual address and its physical one differ by a part of a page.
    """
    mappings: list[Mapping] = []
    for virtual, physical, size in sorted(ranges):
        distance = virtual - physical
        if distance % _PAGE:
            raise ValueError(virtual, f"is not {physical:#x} modulo 4 KiB, so pages cannot map it there")
        start, end = virtual & -_PAGE, virtual + size + _PAGE - 1 & -_PAGE
        if mappings and start < mappings[-1].virtual + mappings[-1].size:
            last = mappings[-1]
            if last.virtual - last.physical != distance:
                raise ValueError(virtual, "is in a page that another segment has at another physical address")
            start = last.virtual + last.size
            if start >= end:
                continue
        mappings.append(Mapping(start, start - distance, end - start))
    return mappings


def _tables_for(mappings: Iterable[Mapping]) -> int:
    """An upper bound for the bytes of page tables that `mappings` need besides the identity map."""
    tables = 0
    for mapping in mappings:
        virtual, last = mapping.virtual, mapping.virtual + mapping.size - 1
        for shift in (30, 39):
            tables += (last >> shift) - (virtual >> shift) + 1
        if (virtual - mapping.physical) % _LARGE_PAGE:
            tables += (last >> 21) - (virtual >> 21) + 1
        else:
            tables += 2  # all but the two ends are whole 2 MiB pages
    return tables * _PAGE


def _no_room(memory: GuestMemory, size: int, what: str, option: str, image: str) -> ImageError:
    has = ram_text(memory)
    return ImageError(
        f"no {size:#x} bytes below 4 GiB are left for {what} (the guest has {has}); {option} chooses a place", image
    )
