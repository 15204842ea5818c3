"""The ring of coalesced writes that all vCPUs of a VM share (KVM API, section 4.116)."""

from kvmpy.errors import UsageError
from kvmpy.exits import IoOut, MmioWrite
from kvmpy.kvm.vcpu import Vcpu
from kvmpy.memory.region import PAGE

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

    def drain(self) -> list[IoOut | MmioWrite]:
        """The queued writes, as the exits that they would have been."""
        writes: list[IoOut | MmioWrite] = []
        page = self._vcpu.page
        head = self._start // 4  # first u32, last u32
        first, last = page.u32[head], page.u32[head + 1]
        while first != last:
            at = self._start + _HEADER + first * _ENTRY
            address, size, port = page.u64[at // 8], page.u32[at // 4 + 2], page.u32[at // 4 + 3]
            data = page.u8[at + 16 : at + 16 + size].tobytes()
            writes.append(IoOut(address, data, size) if port else MmioWrite(address, data))
            first = (first + 1) % _ENTRIES
        page.u32[head] = first
        return writes
