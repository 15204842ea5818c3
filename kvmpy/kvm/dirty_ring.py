"""A vCPU's dirty ring: pages that the guest wrote, in order, without a bitmap (KVM API, section 8.29)."""

import ctypes
import mmap

from kvmpy.abi.structs import kvm_dirty_gfn
from kvmpy.errors import ClosedError, UsageError
from kvmpy.kvm.vcpu import Vcpu
from kvmpy.memory.region import PAGE

__all__ = ["DirtyRing"]

_PAGE_OFFSET = 64  # KVM_DIRTY_LOG_PAGE_OFFSET
_DIRTY, _RESET = 1, 2  # KVM_DIRTY_GFN_F_*


class DirtyRing:
    """Maps the ring of `vcpu`, whose VM had `enable_dirty_ring` called before.

    `collect()` takes what is new; `Vm.reset_dirty_rings()` afterwards has KVM watch those pages again and frees the
    room. A full ring is a `DirtyRingFull` exit. It is closed with the vCPU.
    """

    def __init__(self, vcpu: Vcpu) -> None:
        size = vcpu.vm.dirty_ring_size
        if not size:
            raise UsageError("the VM has no dirty rings: enable_dirty_ring() before the first vCPU")
        mapping = mmap.mmap(vcpu.fileno(), size, offset=_PAGE_OFFSET * PAGE)
        self._entries: ctypes.Array[kvm_dirty_gfn] | None = (
            kvm_dirty_gfn * (size // ctypes.sizeof(kvm_dirty_gfn))
        ).from_buffer(mapping)
        self._next = 0
        vcpu.attach(self)

    def close(self) -> None:
        """Unmap the ring."""
        self._entries = None

    def collect(self) -> list[tuple[int, int]]:
        """(slot number, page offset in the slot) of every page written since the last call, oldest first.

        A page that is written again may come again.
        """
        pages: list[tuple[int, int]] = []
        entries = self._entries
        if entries is None:
            raise ClosedError("the dirty ring was used after it was closed")
        while len(pages) < len(entries) and (entry := entries[self._next % len(entries)]).flags & _DIRTY:
            pages.append((entry.slot, entry.offset))
            entry.flags = _RESET
            self._next += 1
        return pages
