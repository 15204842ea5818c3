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
        self._bytes = vcpu.page.u8[page * PAGE : (page + 1) * PAGE]
        self._u32 = self._bytes.cast("I")

    def drain(self) -> list[IoOut | MmioWrite]:
        """The queued writes, as the exits that they would have been."""
        writes: list[IoOut | MmioWrite] = []
        first, last = self._u32[0], self._u32[1]
        while first != last:
            at = _HEADER + first * _ENTRY
            size, port = self._u32[at // 4 + 2], self._u32[at // 4 + 3]
            address = int.from_bytes(self._bytes[at : at + 8], "little")
            data = self._bytes[at + 16 : at + 16 + size].tobytes()
            writes.append(IoOut(address, data, size) if port else MmioWrite(address, data))
            first = (first + 1) % _ENTRIES
        self._u32[0] = first
        return writes
