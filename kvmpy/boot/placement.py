"""Where in guest RAM things lie: what fits, and where there is still room."""

from __future__ import annotations

from kvmpy.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmpy.boot.image import LoadedRange
    from kvmpy.memory import GuestMemory

__all__ = ["FOUR_GIB", "highest_free", "lowest_free", "ram_spans", "ram_text", "ram_views"]

FOUR_GIB = 1 << 32


def ram_spans(memory: GuestMemory) -> list[tuple[int, int]]:
    """(start, end) of every stretch of RAM, in order of address; adjacent regions are one stretch. ROM is not RAM."""
    spans: list[tuple[int, int]] = []
    for region in sorted(memory.regions, key=lambda region: region.address):
        if region.read_only:
            continue
        end = region.address + region.size
        if spans and spans[-1][1] == region.address:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((region.address, end))
    return spans


def ram_text(memory: GuestMemory) -> str:
    """The RAM in words, for errors."""
    spans = ", ".join(f"{start:#x}..{end - 1:#x}" for start, end in ram_spans(memory))
    return f"RAM {spans}" if spans else "no RAM"


def ram_views(
    memory: GuestMemory, address: int, length: int, image: str, what: str, offset: int | None = None
) -> list[memoryview]:
    """Views of all of `length` bytes of RAM from `address` on: one for each region that they touch.

    Raises ImageError, naming `image`, `what` and the place `offset` in the file, when a byte is not in RAM. GuestMemory
    would refuse too, but it does not know what was to be put there, and it lets the host write a guest's ROM.
    """
    views: list[memoryview] = []
    position, end = address, address + length
    for region in sorted(memory.regions, key=lambda region: region.address):
        region_end = region.address + region.size
        if position < end and region.address <= position < region_end and not region.read_only:
            piece = min(end, region_end) - position
            views.append(memory.view(position, piece))
            position += piece
    if position < end:
        raise ImageError(
            f"{what} goes to {address:#x}..{end - 1:#x}, which is not all in RAM (the guest has {ram_text(memory)})",
            image,
            offset,
        )
    return views


def highest_free(
    memory: GuestMemory, size: int, taken: Iterable[LoadedRange], *, alignment: int = 0x1000, below: int = FOUR_GIB
) -> int | None:
    """The highest aligned address below `below` with `size` bytes of RAM that nothing in `taken` uses, or None."""
    used = sorted(taken, key=lambda loaded: loaded.address, reverse=True)
    for start, end in reversed(ram_spans(memory)):
        top = min(end, below)
        candidate = (top - size) & -alignment
        # From the top down: every range that is in the way pushes the candidate below itself.
        for loaded in used:
            if loaded.overlaps(candidate, size):
                candidate = (loaded.address - size) & -alignment
        if candidate >= start:
            return candidate
    return None


def lowest_free(
    memory: GuestMemory,
    size: int,
    taken: Iterable[LoadedRange],
    *,
    alignment: int = 0x1000,
    above: int = 0,
    below: int = FOUR_GIB,
) -> int | None:
    """The lowest aligned address from `above` on with `size` bytes of RAM below `below` that nothing uses, or None."""
    used = sorted(taken, key=lambda loaded: loaded.address)
    for start, end in ram_spans(memory):
        candidate = max(start, above) + alignment - 1 & -alignment
        # From the bottom up: every range that is in the way pushes the candidate above itself.
        for loaded in used:
            if loaded.overlaps(candidate, size):
                candidate = loaded.end + alignment - 1 & -alignment
        if candidate + size <= min(end, below):
            return candidate
    return None
