"""Loading images that lie, into memory that shows what was written: for tests of the boot protocols.

Low and high RAM with holes around them, ROM right behind the high RAM, all full of a pattern.
"""

import functools
from collections.abc import Callable

from hypothesis import currently_in_test_context, event, note
from hypothesis import strategies as st

from kvmpy.boot.image import Image
from kvmpy.errors import ImageError
from kvmpy.memory import GuestMemory, MemoryRegion
from kvmpy.x86 import entry_rules
from kvmpy.x86.page_walk import translate

__all__ = ["EDGES", "HIGH", "attempt", "numbers"]

PATTERN = 0xCC
LOW, HIGH = (0x0, 0x2_0000), (0x10_0000, 0x10_0000)
ROM = (0x20_0000, 0x1000)
FAR = (0x1_0000_0000, 0x1_0000)

EDGES = sorted(
    {
        max(edge + offset, 0)
        for edge in (0, 0x1000, 0x2_0000, 0x10_0000, 0x20_0000, 1 << 31, 1 << 32, 1 << 47, (1 << 64) - 1)
        for offset in (-0x1000, -8, -1, 0, 1, 8, 0x1000)
        if edge + offset < 1 << 64
    }
)
"""Numbers near which loaders break: ends of the RAM and of address widths, signs."""

numbers = st.one_of(
    st.sampled_from(EDGES), st.integers(0, (1 << 64) - 1), st.integers(0, 0x20_0000), st.integers(0, 0x100)
)


@functools.cache  # mapping memory anew for each of thousands of examples would take as long as the loading
def _guest() -> GuestMemory:
    memory = GuestMemory()
    for address, size in (LOW, HIGH, FAR):
        memory.add(MemoryRegion.anonymous(address, size))
    memory.add(MemoryRegion.anonymous(*ROM, read_only=True))
    return memory


@functools.cache
def _untouched(size: int) -> bytes:
    return bytes([PATTERN]) * size


def attempt(make: Callable[..., Image], *arguments: object, **options: object) -> bool:
    """Make the image and load it, or see it refused by ImageError; judge what is left behind. Whether it was loaded."""
    memory = _guest()
    for region in memory.regions:
        memory.fill(region.address, region.size, PATTERN)
    refusal = ""
    try:
        entry = make(*arguments, **options).load(memory)
    except ImageError as error:
        refusal = str(error)
        entry = None
    assert memory.read(*ROM) == bytes([PATTERN]) * ROM[1], "the ROM was written"
    if currently_in_test_context():
        note(refusal or repr(entry))
        event("refused" if refusal else "loaded")  # counted by pytest --hypothesis-show-statistics
    if entry is None:
        return False
    assert not entry_rules.violations(entry.state)
    first = entry.state.sregs.cs.base + entry.state.regs.rip
    assert translate(memory, entry.state.sregs, first) is not None, "the first instruction is not mapped"
    for region in memory.regions:
        for used in entry.ranges:
            start, end = max(used.address, region.address), min(used.end, region.end)
            if end > start:
                memory.fill(start, end - start, PATTERN)
        assert region.buffer.tobytes() == _untouched(region.size), "memory outside of the reported ranges was written"
    return True
