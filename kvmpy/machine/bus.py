"""The two buses of a machine, ports and memory-mapped I/O: who answers at which address."""

from bisect import bisect_right, insort
from collections import Counter

from kvmpy.devices.device import Region
from kvmpy.errors import HandlerResultError, OverlapError, UsageError

__all__ = ["Bus"]

_MAX_UNCLAIMED = 4096
"""Distinct unclaimed addresses that are listed; a guest that scans memory must not fill the host's."""


class Bus:
    """Regions of one address space, without overlaps.

    `read` and `write` are the general path: they split what is wider than a device takes, and answer for addresses that
    nobody claims (reads float high, writes are lost; both are counted in `unclaimed`). The run loop keeps its own table
    of resolved handlers for the common accesses and asks here only for those that are not in it.
    """

    def __init__(self, kind: str, limit: int) -> None:
        self.kind = kind
        self.limit = limit
        self._map: tuple[tuple[int, ...], tuple[Region, ...]] = ((), ())
        """The regions' starts, for bisect, and the regions, in order of address."""
        self.unclaimed: Counter[tuple[str, int, int]] = Counter()
        """("read" or "write", address, size) -> how often the guest touched what nobody claims."""
        self.changes = 0
        """Counts up when regions come or go: resolved handlers of an older map are void."""

    def add(self, region: Region) -> None:
        """Claim a range. Raises OverlapError naming both owners, and what `check` raises."""
        self.check(region)
        for other in self.regions:
            if region.overlaps(other):
                raise OverlapError(repr(region), repr(other))
        regions = list(self.regions)
        insort(regions, region, key=lambda other: other.start)
        self._set(regions)

    def check(self, region: Region) -> None:
        """Raise UsageError for a region that is empty or outside of this space, or whose handlers are no functions."""
        start, length = region.start, region.length
        if not isinstance(start, int) or not isinstance(length, int):
            raise UsageError(f"{region.name}: a {self.kind} range is two numbers, not {start!r} and {length!r}")
        if length <= 0:
            raise UsageError(f"{region.name}: a {self.kind} range of {length} at {start:#x} is empty")
        if region.start < 0 or region.start + region.length > self.limit:
            raise UsageError(f"{region!r} does not fit the {self.kind} space, which ends at {self.limit - 1:#x}")
        if region.width not in (1, 2, 4, 8):
            raise UsageError(f"{region!r}: a device is 1, 2, 4 or 8 bytes wide, not {region.width!r}")
        for handler in (region.read, region.write):
            if handler is not None and not callable(handler):
                raise UsageError(f"{region!r}: a handler is a function, not {handler!r}")

    def remove(self, region: Region) -> None:
        """Give a range up."""
        self._set([other for other in self.regions if other is not region])

    def _set(self, regions: list[Region]) -> None:
        # Both at once, and never changed in place: vCPU threads look while another thread adds a device.
        self._map = (tuple(region.start for region in regions), tuple(regions))
        self.changes += 1

    @property
    def regions(self) -> tuple[Region, ...]:
        """What is claimed, in order of address."""
        return self._map[1]

    def find(self, address: int) -> Region | None:
        """Who claims `address`."""
        starts, regions = self._map
        index = bisect_right(starts, address) - 1
        if index < 0:
            return None
        region = regions[index]
        return region if address < region.start + region.length else None

    def whole(self, address: int, size: int) -> Region | None:
        """Who takes an access of this size at once: the region holds all of it and is wide enough."""
        region = self.find(address)
        if region is None or size > region.width or address + size > region.start + region.length:
            return None
        return region

    def read(self, address: int, size: int) -> int:
        """Read `size` bytes, in as many pieces as the devices there need."""
        region = self.whole(address, size)
        if region is not None:
            return self._read_piece(region, address, size)
        value, done = 0, 0
        while done < size:
            piece = self._piece(address + done, size - done)
            region = self.find(address + done)
            if region is None:
                self._count("read", address + done, piece)
                part = (1 << 8 * piece) - 1
            else:
                part = self._read_piece(region, address + done, piece)
            value |= part << 8 * done
            done += piece
        return value

    def write(self, address: int, size: int, value: int) -> None:
        """Write `size` bytes, in as many pieces as the devices there need."""
        done = 0
        while done < size:
            piece = self._piece(address + done, size - done)
            region = self.find(address + done)
            if region is None:
                self._count("write", address + done, piece)
            elif region.write is not None:
                offset = address + done - region.start + region.base
                region.write(offset, piece, value >> 8 * done & (1 << 8 * piece) - 1)
            done += piece

    def _read_piece(self, region: Region, address: int, size: int) -> int:
        if region.read is None:
            return (1 << 8 * size) - 1
        value = region.read(address - region.start + region.base, size)
        if not isinstance(value, int) or not 0 <= value < 1 << 8 * size:
            raise HandlerResultError(repr(region), value, size)
        return value

    def _piece(self, address: int, left: int) -> int:
        """How many bytes of an access go together: up to the next border, in a size that the owner takes."""
        region = self.find(address)
        if region is None:
            starts = self._map[0]
            following = bisect_right(starts, address)
            if following < len(starts):
                left = min(left, starts[following] - address)
            return left
        room = min(left, region.start + region.length - address, region.width)
        return 1 << room.bit_length() - 1

    def _count(self, what: str, address: int, size: int) -> None:
        key = (what, address, size)
        if len(self.unclaimed) < _MAX_UNCLAIMED or key in self.unclaimed:
            self.unclaimed[key] += 1
