"""The ring of coalesced writes that all vCPUs of a VM share (KVM API, section 4.116)."""

from kvmpy.errors import UsageError
from kvmpy.exits import IoOut, MmioWrite
from kvmpy.kvm.vcpu import Vcpu
from kvmpy.memory.region import PAGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CoalescedRing"]

_CAP_COALESCED_MMIO = 15  # its value is the ring's page in the mapping of a vCPU
_ENTRY, _HEADER = 24, 8  # struct kvm_coalesced_mmio: phys_addr u64, len u32, pio u32, data u8[8]
_ENTRIES = (PAGE - _HEADER) // _ENTRY


class CoalescedRing:
    """Reads what guests wrote to ranges given to `Vm.coalesce_writes`, oldest first.

    Every vCPU's mapping shows the same ring; read it from one thread at a time, before the exit that came after it.
    """

    def __init__(self, vcpu: Vcpu) -> None:
        page = vcpu.vm.check_extension(_CAP_COALESCED_MMIO)
        if not page or (page + 1) * PAGE > vcpu.page.size:
            raise UsageError("this host's KVM has no ring of coalesced writes (KVM_CAP_COALESCED_MMIO)")
        self._vcpu = vcpu  # and no view of its mapping, which would outlive it
        self._start = page * PAGE

    @property
    def head(self) -> int:
        """Where in the vCPU's `page.u32` the ring's two indices are; while they differ, writes are queued."""
        return self._start // 4

    def take(self, handle: "Callable[[bool, int, int, int], object]") -> None:
        """Call `handle(port, address, size, value)` for each queued write; one for which it raises stays queued."""
        u8, u32, u64 = self._vcpu.page.u8, self._vcpu.page.u32, self._vcpu.page.u64
        head = self.head
        while (first := u32[head]) != u32[head + 1]:
            at = self._start + _HEADER + first * _ENTRY
            size, port = u32[at // 4 + 2], u32[at // 4 + 3]
            handle(port != 0, u64[at // 8], size, int.from_bytes(u8[at + 16 : at + 16 + size], "little"))
            u32[head] = (first + 1) % _ENTRIES

    def drain(self) -> list[IoOut | MmioWrite]:
        """The queued writes, as the exits that they would have been."""
        writes: list[IoOut | MmioWrite] = []

        def append(port: bool, address: int, size: int, value: int) -> None:
            data = value.to_bytes(size, "little")
            writes.append(IoOut(address, data, size) if port else MmioWrite(address, data))

        self.take(append)
        return writes
