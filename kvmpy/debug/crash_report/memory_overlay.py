"""Guest memory to try things out in: what is written stays here, the guest's own bytes are only read."""

from __future__ import annotations

from kvmpy.x86.paging import PhysicalMemory

__all__ = ["CopyOnWriteMemory"]


class CopyOnWriteMemory:
    """`memory` as `kvmpy.x86.paging.PhysicalMemory`, for replays of event delivery.

    Reads raise GuestMemoryError where `memory` does. Writes must be inside it, too; those to read-only regions are
    dropped, as KVM drops them (KVM API, section 4.35, KVM_MEM_READONLY).
    """

    def __init__(self, memory: PhysicalMemory) -> None:
        self._memory = memory
        self._written: dict[int, int] = {}  # by byte: a stack frame has at most a few dozen

    def read(self, address: int, length: int) -> bytes:
        """`length` bytes with what was written here."""
        data = self._memory.read(address, length)
        if not self._written:
            return data
        written = self._written
        return bytes(written.get(address + at, byte) for at, byte in enumerate(data))

    def write(self, address: int, data: bytes) -> None:
        """Keep `data`. Raises GuestMemoryError when the range is not wholly inside memory."""
        self._memory.read(address, len(data))
        for at, byte in enumerate(data):
            if not self.read_only(address + at):
                self._written[address + at] = byte

    guest_write = write

    def contains(self, address: int) -> bool:
        """Whether there is memory at this physical address."""
        from kvmpy.errors import GuestMemoryError

        try:
            self._memory.read(address, 1)
        except (GuestMemoryError, OverflowError):
            return False
        return True

    def read_only(self, address: int) -> bool:
        """Whether the guest cannot write here: a ROM."""
        region_at = getattr(self._memory, "region_at", None)
        region = region_at(address) if region_at is not None else None
        return bool(region is not None and region.read_only)

    def fork(self) -> CopyOnWriteMemory:
        """Another overlay over this one: what is written there is not seen here."""
        return CopyOnWriteMemory(self)
