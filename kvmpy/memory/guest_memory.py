"""The one door to guest memory: every access by guest-physical address is checked here, and only here."""

import ctypes
from bisect import bisect_right
from struct import Struct

from kvmpy.errors import GuestMemoryError, OverlapError, UsageError
from kvmpy.memory.region import MemoryRegion

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    S = TypeVar("S", bound=ctypes.Structure | ctypes.Union)

__all__ = ["GuestMemory"]

_U16 = Struct("<H")
_U32 = Struct("<I")
_U64 = Struct("<Q")


def _address(region: MemoryRegion) -> int:
    return region.address


def _number(value: int, size: int) -> bytes:
    """An unsigned number as `size` bytes, little endian."""
    try:
        return value.to_bytes(size, "little")
    except OverflowError:
        raise UsageError(f"{value:#x} is not an unsigned number of {size} bytes") from None


class GuestMemory:
    """All memory regions of one guest, in order of their addresses, with holes between them.

    Every method takes guest-physical addresses in bytes and raises GuestMemoryError, with the address and the length,
    when any byte of the access is not in a region; nothing is then read or written. Numbers are little endian.
    """

    __slots__ = ("_map", "regions")

    def __init__(self) -> None:
        self.regions: tuple[MemoryRegion, ...] = ()
        self._map: tuple[tuple[int, ...], tuple[int, ...], tuple[MemoryRegion, ...]] = (), (), ()
        """Where the regions start, where they end, and they themselves."""

    # Regions

    def add(self, region: MemoryRegion) -> None:
        """Make `region` part of the guest's memory. Raises OverlapError, naming both, when another one is there."""
        if self.regions:
            self.check_free(region.address, region.size, region)
        self._set((*self.regions, region))

    def remove(self, region: MemoryRegion) -> None:
        """Take a region out. Views of it stay valid."""
        self._set(tuple(other for other in self.regions if other is not region))

    def check_free(self, address: int, size: int, new: object) -> None:
        """Raise OverlapError when a region lies in `size` bytes from `address` on."""
        for other in self.regions:
            if address < other.end and other.address < address + size and other is not new:
                raise OverlapError(str(new), str(other))

    def _set(self, regions: tuple[MemoryRegion, ...]) -> None:
        # New tuples instead of changed lists: a reader in another thread sees the old map or the new one.
        self.regions = regions = tuple(sorted(regions, key=_address)) if len(regions) > 1 else regions
        self._map = tuple(map(_address, regions)), tuple([region.end for region in regions]), regions

    def region_at(self, address: int) -> MemoryRegion | None:
        """The region that holds the byte at `address`, or None for a hole."""
        starts, ends, regions = self._map
        index = bisect_right(starts, address) - 1
        return None if index < 0 or address >= ends[index] else regions[index]

    def _outside(self, address: int, length: int) -> GuestMemoryError:
        where = ", ".join(map(repr, self.regions)) or "none"
        span = (
            f"{length} bytes at {address:#x}" if length >= 0 else f"{length} bytes (a negative length) at {address:#x}"
        )
        return GuestMemoryError(f"{span} are not in guest memory (there is: {where})", address, length)

    # Bytes

    def view(self, address: int, length: int) -> memoryview:
        """A zero-copy view of `length` bytes, within one region. It stays valid after the VM is closed."""
        region = self.region_at(address)
        if region is None or length < 0 or address + length > region.end:
            raise self._outside(address, length)
        start = address - region.address
        return region.buffer[start : start + length]

    def read(self, address: int, length: int) -> bytes:
        """`length` bytes from `address` on; they may span adjacent regions."""
        if length == 0:
            return b""
        region = self.region_at(address)
        if region is not None:
            start = address - region.address
            if 0 < length <= region.size - start:
                return region.buffer[start : start + length].tobytes()
        return b"".join(piece.tobytes() for piece in self._pieces(address, length, writable=False))

    def write(self, address: int, data: "bytes | bytearray | memoryview") -> None:
        """Write `data` (anything with bytes in it) at `address`; it may span adjacent regions."""
        source = data if type(data) is bytes else memoryview(data).cast("B")
        region = self.region_at(address)
        if region is not None and not region.buffer.readonly:
            start = address - region.address
            end = start + len(source)
            if end <= region.size:
                region.buffer[start:end] = source
                return
        done = 0
        for piece in self._pieces(address, len(source)):
            piece[:] = source[done : done + len(piece)]
            done += len(piece)

    def guest_write(self, address: int, data: "bytes | bytearray | memoryview") -> None:
        """`write` on behalf of the guest: GuestMemoryError also for ROM, which only the host may write."""
        end = address + len(data)
        for region in self.regions:
            if region.read_only and region.address < end and address < region.end:
                raise GuestMemoryError(f"{region!r} is read-only for the guest", address, len(data))
        self.write(address, data)

    def fill(self, address: int, length: int, byte: int = 0) -> None:
        """Set `length` bytes to `byte`, 0 to 0xff; ValueError for others."""
        bytes((byte,))
        for piece in self._pieces(address, length):
            ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(piece)), byte, len(piece))

    def _pieces(self, address: int, length: int, *, writable: bool = True) -> list[memoryview]:
        """Views of all regions that the range touches: the whole list, before anything is written."""
        pieces: list[memoryview] = []
        position, left = address, length
        while left > 0:
            region = self.region_at(position)
            if region is None:
                raise self._outside(address, length)
            start = position - region.address
            piece = region.buffer[start : start + left]
            if writable and piece.readonly:
                raise GuestMemoryError(f"{region!r} is mapped from a file that may only be read", address, length)
            pieces.append(piece)
            position += len(piece)
            left -= len(piece)
        if left < 0:
            raise self._outside(address, length)
        return pieces

    # Numbers

    def read_u8(self, address: int) -> int:
        """The byte at `address`."""
        return self.view(address, 1)[0]

    def read_u16(self, address: int) -> int:
        """The 16-bit number at `address`."""
        value: int = _U16.unpack(self.read(address, 2))[0]
        return value

    def read_u32(self, address: int) -> int:
        """The 32-bit number at `address`."""
        value: int = _U32.unpack(self.read(address, 4))[0]
        return value

    def read_u64(self, address: int) -> int:
        """The 64-bit number at `address`."""
        value: int = _U64.unpack(self.read(address, 8))[0]
        return value

    def write_u8(self, address: int, value: int) -> None:
        """Write an 8-bit number. Like its wider sisters it raises UsageError when the value does not fit."""
        self.write(address, _number(value, 1))

    def write_u16(self, address: int, value: int) -> None:
        """Write a 16-bit number."""
        self.write(address, _number(value, 2))

    def write_u32(self, address: int, value: int) -> None:
        """Write a 32-bit number."""
        self.write(address, _number(value, 4))

    def write_u64(self, address: int, value: int) -> None:
        """Write a 64-bit number."""
        self.write(address, _number(value, 8))

    # Structures and strings

    def read_struct(self, address: int, structure: "type[S]") -> "S":
        """A copy of the ctypes structure at `address`."""
        copy: S = structure.from_buffer_copy(self.read(address, ctypes.sizeof(structure)))  # type: ignore[assignment]
        return copy

    def view_struct(self, address: int, structure: "type[S]") -> "S":
        """The ctypes structure at `address`, live: what is assigned to its fields, the guest sees."""
        live: S = structure.from_buffer(self.view(address, ctypes.sizeof(structure)))  # type: ignore[assignment]
        return live

    def write_struct(self, address: int, structure: "ctypes.Structure | ctypes.Union") -> None:
        """Write a ctypes structure at `address`."""
        self.write(address, bytes(structure))

    def read_cstring(self, address: int, limit: int = 0x1000) -> bytes:
        """The bytes from `address` up to a zero byte, without it; `limit` bytes at the most, and never past RAM."""
        text = bytearray()
        while (left := limit - len(text)) > 0:
            region = self.region_at(address + len(text))
            if region is None:
                if not text:
                    raise self._outside(address, 1)
                break
            start = address + len(text) - region.address
            piece = region.buffer[start : start + left].tobytes()
            end = piece.find(b"\0")
            if end >= 0:
                return bytes(text) + piece[:end]
            text += piece
        return bytes(text)

    # Host addresses

    def host_address(self, address: int, length: int = 1) -> int:
        """Where the guest's byte at `address` lies in this process; all `length` bytes must lie in one region."""
        region = self.region_at(address)
        if region is None or length < 0 or address + length > region.end:
            raise self._outside(address, length)
        return region.host_address + address - region.address

    def __repr__(self) -> str:
        return f"<GuestMemory {', '.join(map(repr, self.regions)) or 'empty'}>"
