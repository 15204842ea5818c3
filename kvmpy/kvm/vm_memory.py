"""Memory slots: guest-physical memory as KVM knows it, and which of its pages are dirty (KVM API, 4.8, 4.35, 4.117)."""

import ctypes
from struct import Struct

from kvmpy.abi.ioctls import IOCTLS
from kvmpy.errors import UsageError
from kvmpy.kvm.checked_struct import filled
from kvmpy.kvm.descriptor import Descriptor
from kvmpy.memory import GuestMemory, MemoryRegion
from kvmpy.memory.region import PAGE, check_range

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmpy.kvm.vcpu import Vcpu

__all__ = ["VmMemory"]

_LOG_DIRTY_PAGES, _READONLY, _GUEST_MEMFD = 1, 2, 4  # KVM_MEM_*
_CAP_MANUAL_DIRTY_LOG_PROTECT2 = 168
_SET_USER_MEMORY_REGION = IOCTLS["KVM_SET_USER_MEMORY_REGION"]
_MEMORY_REGION = Struct("=IIQQQ")  # struct kvm_userspace_memory_region


class _Slot:
    """What KVM was told about one region: one slot, or several where single pages of it are restricted."""

    __slots__ = ("flags", "more", "number", "region", "restricted")

    def __init__(self, number: int, region: MemoryRegion, flags: int) -> None:
        self.number = number
        self.region = region
        self.flags = flags
        self.restricted: dict[int, str] = {}
        """Page's guest-physical address -> "read" or "none"."""
        self.more: list[int] = []
        """Numbers of the further slots."""

    def pieces(self) -> "list[tuple[int, int, int]]":
        """(address, size, flags) of each slot that the region needs, with holes where the guest has no access."""
        found, at = [], self.region.address
        for page, access in sorted(self.restricted.items()):
            if at < page:
                found.append((at, page - at, self.flags))
            if access == "read":
                found.append((page, PAGE, _READONLY))
            at = page + PAGE
        if at < self.region.end:
            found.append((at, self.region.end - at, self.flags))
        return found


class VmMemory(Descriptor):
    """Guest memory of a VM: every region is one memory slot. Mixed into `Vm`."""

    vcpus: "tuple[Vcpu, ...]"

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.memory = GuestMemory()
        self._slots: dict[MemoryRegion, _Slot] = {}

    # Adding, moving, removing

    def add_ram(self, address: int = 0, *, size: int, huge_pages: bool = False, name: str = "RAM") -> MemoryRegion:
        """Zeroed RAM of `size` bytes at guest-physical `address`, both multiples of 4 KiB.

        Raises UsageError for sizes and addresses that cannot be, OverlapError naming both regions when the place is
        taken. Host memory is used only for pages that are touched.
        """
        if self.memory.regions:
            check_range(address, size)
            self.memory.check_free(address, size, f"{name} {address:#x}..{address + size - 1:#x}")
        return self.add_memory(MemoryRegion.anonymous(address, size, huge_pages=huge_pages, name=name))

    def add_rom(self, address: int, data: bytes, *, name: str = "ROM") -> MemoryRegion:
        """Read-only memory with `data` in it, rounded up to 4 KiB. What the guest writes there is an MMIO exit."""
        size = -(-len(data) // PAGE) * PAGE
        check_range(address, size)
        self.memory.check_free(address, size, f"{name} {address:#x}..{address + size - 1:#x}")
        region = MemoryRegion.anonymous(address, size, read_only=True, name=name)
        region.buffer[: len(data)] = data
        return self.add_memory(region)

    def add_memory(self, region: MemoryRegion, *, log_dirty: bool = False) -> MemoryRegion:
        """Any region (a file, a memfd: see `MemoryRegion`) as a slot of this VM."""
        self._check_usable()
        self.memory.add(region)
        flags = (_READONLY if region.read_only else 0) | (_LOG_DIRTY_PAGES if log_dirty else 0)
        slot = _Slot(self._free_number() if self._slots else 0, region, flags)
        try:
            self._set_region(slot.number, flags, region.address, region.size, region.host_address)
        except BaseException:
            self.memory.remove(region)
            raise
        self._slots[region] = slot
        return region

    def move_memory(self, region: MemoryRegion, address: int) -> None:
        """Give a region another guest-physical address; the guest sees it at once."""
        slot = self._whole_slot(region)
        check_range(address, region.size)
        if any(other is not region and address < other.end and other.address < address + region.size
               for other in self.memory.regions):  # fmt: skip
            self.memory.check_free(address, region.size, region)
        old = region.address
        region.address = address
        try:
            self._tell(slot, slot.flags)
        except BaseException:
            region.address = old
            raise
        self.memory.remove(region)
        self.memory.add(region)

    def remove_memory(self, region: MemoryRegion) -> None:
        """Take a region out of the guest, which then sees a hole: accesses are MMIO exits. Views stay valid."""
        slot = self._slot(region)
        self._delete(slot)
        del self._slots[region]
        self.memory.remove(region)

    def restrict_page(self, address: int, access: str) -> None:
        """What the guest may do with the 4 KiB page at guest-physical `address`: "read", "none", or "all" again.

        All else is an MMIO exit. No vCPU may run meanwhile: the region is gone for a moment (KVM can neither split a
        slot nor make one read-only: section 4.35). Raises UsageError where there is no page of RAM.
        """
        page = address & -PAGE
        region = self.memory.region_at(address)
        if region is None or access not in ("read", "none", "all"):
            raise UsageError(f"there is no page at {address:#x} that could be made {access!r}")
        slot = self._slot(region)
        if slot.flags & (_READONLY | _GUEST_MEMFD):
            raise UsageError(f"{region!r} is not plain RAM: its pages cannot be restricted")
        self._delete(slot)
        slot.restricted.pop(page, None)
        if access != "all":
            slot.restricted[page] = access
        for index, (start, size, flags) in enumerate(slot.pieces()):
            number = slot.number
            if index:
                number = self._free_number()
                slot.more.append(number)
            host = region.host_address + start - region.address
            self._set_region(number, flags, start, size, host)

    def create_guest_memfd(self, size: int, flags: int = 0) -> int:
        """The descriptor of a new guest_memfd of `size` bytes (section 4.142), which the caller closes."""
        from kvmpy.abi.structs import kvm_create_guest_memfd

        return self.ioctl("KVM_CREATE_GUEST_MEMFD", filled(kvm_create_guest_memfd, size=size, flags=flags))

    def add_guest_memfd(self, region: MemoryRegion, memfd: int, offset: int = 0) -> MemoryRegion:
        """A region whose private pages live in a guest_memfd (KVM_SET_USER_MEMORY_REGION2, section 4.140)."""
        from kvmpy.abi.structs import kvm_userspace_memory_region2

        self.memory.add(region)
        slot = _Slot(self._free_number(), region, _GUEST_MEMFD)
        request = kvm_userspace_memory_region2(
            slot=slot.number, flags=_GUEST_MEMFD, guest_phys_addr=region.address, memory_size=region.size,
            userspace_addr=region.host_address, guest_memfd=memfd, guest_memfd_offset=offset,
        )  # fmt: skip
        try:
            self.ioctl("KVM_SET_USER_MEMORY_REGION2", request)
        except BaseException:
            self.memory.remove(region)
            raise
        self._slots[region] = slot
        return region

    def slot_number(self, region: MemoryRegion) -> int:
        """The number of the memory slot, as dirty rings name it."""
        return self._whole_slot(region).number

    def _slot(self, region: MemoryRegion) -> _Slot:
        slot = self._slots.get(region)
        if slot is None:
            raise UsageError(f"{region!r} is not memory of {self!r}")
        return slot

    def _whole_slot(self, region: MemoryRegion) -> _Slot:
        slot = self._slot(region)
        if slot.restricted:
            pages = ", ".join(map(hex, slot.restricted))
            raise UsageError(f"{region!r} is several memory slots as long as pages of it are restricted: {pages}")
        return slot

    def _delete(self, slot: _Slot) -> None:
        for number in (slot.number, *slot.more):
            self._set_region(number, 0, 0, 0, 0)
        slot.more = []

    def _free_number(self) -> int:
        taken = {number for slot in self._slots.values() for number in (slot.number, *slot.more)}
        return next(number for number in range(len(taken) + 1) if number not in taken)

    def _tell(self, slot: _Slot, flags: int) -> None:
        region = slot.region
        self._set_region(slot.number, flags, region.address, region.size, region.host_address)
        slot.flags = flags

    def _set_region(self, number: int, flags: int, address: int, size: int, host_address: int) -> None:
        self._call(_SET_USER_MEMORY_REGION, _MEMORY_REGION.pack(number, flags, address, size, host_address))

    # Dirty pages

    def set_dirty_logging(self, region: MemoryRegion, on: bool = True) -> None:
        """Start or stop recording which pages of a region the guest writes (KVM_MEM_LOG_DIRTY_PAGES)."""
        slot = self._whole_slot(region)
        self._tell(slot, slot.flags & ~_LOG_DIRTY_PAGES | (_LOG_DIRTY_PAGES if on else 0))

    def enable_manual_dirty_log(self, *, initially_set: bool = False) -> None:
        """`dirty_bitmap` shall only report, `clear_dirty_bitmap` re-arm (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 7.18)."""
        from kvmpy.kvm.capability import enable_cap

        enable_cap(self, _CAP_MANUAL_DIRTY_LOG_PROTECT2, (3 if initially_set else 1,), 0)

    def dirty_bitmap(self, region: MemoryRegion) -> bytes:
        """One bit per 4 KiB page that the guest has written since the last call (KVM_GET_DIRTY_LOG, section 4.8).

        Writes by this process are not in it.
        """
        from kvmpy.abi.structs import kvm_dirty_log

        bitmap = ctypes.create_string_buffer(_bitmap_size(region))
        request = kvm_dirty_log(slot=self._whole_slot(region).number)
        request.dirty_bitmap = ctypes.addressof(bitmap)
        self.ioctl("KVM_GET_DIRTY_LOG", request)
        return bitmap.raw

    def dirty_pages(self, region: MemoryRegion) -> list[int]:
        """The guest-physical addresses of the pages in `dirty_bitmap`."""
        bits = int.from_bytes(self.dirty_bitmap(region), "little")
        pages = []
        while bits:
            lowest = bits & -bits
            pages.append(region.address + (lowest.bit_length() - 1) * PAGE)
            bits ^= lowest
        return pages

    def clear_dirty_bitmap(self, region: MemoryRegion, bitmap: bytes, first_page: int = 0) -> None:
        """Watch again the pages whose bit is set in `bitmap` (KVM_CLEAR_DIRTY_LOG, section 4.117).

        `first_page` is a multiple of 64; the bitmap covers a multiple of 64 pages, or reaches the end of the region.
        """
        from kvmpy.abi.structs import kvm_clear_dirty_log

        buffer = ctypes.create_string_buffer(bitmap)
        pages = min(len(bitmap) * 8, region.size // PAGE - first_page)
        request = filled(kvm_clear_dirty_log, slot=self._slot(region).number, num_pages=pages, first_page=first_page)
        request.dirty_bitmap = ctypes.addressof(buffer)
        self.ioctl("KVM_CLEAR_DIRTY_LOG", request)

    def enable_dirty_ring(self, size: int) -> None:
        """Give every vCPU to come a dirty ring of `size` bytes, a power of two (KVM_CAP_DIRTY_LOG_RING, section 8.29).

        Before the first vCPU. Then `kvmpy.kvm.dirty_ring.DirtyRing(vcpu)` reads the vCPU's ring, and `dirty_bitmap` is
        no longer there. KVM stops a vCPU 64 entries before its ring is full, but a KVM that emulates looks only every
        1,024 instructions and may run over the end of a small one: 64 KiB are safe.
        """
        from kvmpy.abi.capabilities import Cap
        from kvmpy.kvm.capability import enable_cap

        if self.vcpus:
            raise UsageError("enable_dirty_ring() must come before the first create_vcpu()")
        enable_cap(self, Cap.DIRTY_LOG_RING, (size,), 0)
        self.dirty_ring_size = size

    dirty_ring_size = 0
    """Bytes of each vCPU's dirty ring; 0 without."""

    def reset_dirty_rings(self) -> int:
        """Watch again the pages that were collected from all rings (section 8.29); answers how many."""
        return self.ioctl("KVM_RESET_DIRTY_RINGS")


def _bitmap_size(region: MemoryRegion) -> int:
    """KVM writes whole 64-bit words."""
    return (region.size // PAGE + 63) // 64 * 8
