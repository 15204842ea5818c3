"""What a guest image is: a value that puts itself into guest memory and says how the first processor starts.

A machine asks an image twice. First `memory_needs()`: memory that the image must have where no RAM is (the ROM of a
firmware); the machine maps it. Then `load(memory)`, which writes the image into RAM and returns an `Entry`. An image
can be loaded any number of times, into any number of guests, and does not change by it.

No dataclasses and no typing here, nor in the modules for flat images: they would cost a small guest, whose whole life
takes 40 ms, another 20.
"""

from __future__ import annotations

from kvmpy._value import frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Protocol

    from kvmpy.memory import GuestMemory
    from kvmpy.x86.registers import CpuState
else:
    Protocol = object

__all__ = ["Entry", "Image", "LoadedRange", "RomMapping"]


@frozen
class RomMapping:
    """Memory that the machine must map before it loads the image: `data` at guest-physical `address`.

    Address and size are multiples of 4 KiB. `read_only` asks for a slot that the guest cannot write (KVM API, section
    4.35, KVM_MEM_READONLY: a write becomes an MMIO exit). `name` is what errors call it.
    """

    address: int
    data: bytes
    read_only: bool = True
    name: str = "ROM"

    @property
    def size(self) -> int:
        """Bytes mapped."""
        return len(self.data)

    def __repr__(self) -> str:
        return f"<RomMapping {self.name} {self.address:#x}..{self.address + self.size - 1:#x}>"


@frozen
class LoadedRange:
    """`size` bytes from guest-physical `address` on that an image uses. `name` says for what."""

    address: int
    size: int
    name: str

    @property
    def end(self) -> int:
        """The first address behind the range."""
        return self.address + self.size

    def overlaps(self, address: int, size: int) -> bool:
        """Whether any byte is also in `size` bytes from `address` on. An empty range overlaps nothing."""
        return max(self.address, address) < min(self.end, address + size)

    def __repr__(self) -> str:
        return f"<LoadedRange {self.name} {self.address:#x}..{self.end - 1:#x}>"


class Entry:
    """What loading an image gives: the registers of the boot processor, and what lies where in guest memory.

    `state` is the caller's to change. `ranges` is in order of address and holds the image's parts and the tables (GDT,
    TSS, page tables) that its mode needs; a stack is in none of them.
    """

    __slots__ = ("ranges", "state")
    __match_args__ = ("state", "ranges")

    def __init__(self, state: CpuState, ranges: Iterable[LoadedRange]) -> None:
        self.state = state
        self.ranges = tuple(sorted(ranges, key=lambda loaded: loaded.address))

    @property
    def low(self) -> int:
        """The lowest address that the image or its tables use."""
        return self.ranges[0].address

    @property
    def high(self) -> int:
        """The first address above all that the image and its tables use."""
        return max(loaded.end for loaded in self.ranges)

    def __repr__(self) -> str:
        return f"<Entry {self.state!r} {', '.join(map(repr, self.ranges))}>"


class Image(Protocol):
    """Every image format is one of these."""

    def memory_needs(self) -> tuple[RomMapping, ...]:
        """What the machine must map, outside of RAM, before `load`."""

    def load(self, memory: GuestMemory) -> Entry:
        """Write the image into RAM. Raises ImageError when it does not fit there; RAM may then be partly written."""
