"""Guest-physical memory: regions of host memory at guest addresses, and the one bounds-checked door to them."""

from kvmpy.memory.guest_memory import GuestMemory
from kvmpy.memory.region import MemoryRegion

__all__ = ["GuestMemory", "MemoryRegion"]
