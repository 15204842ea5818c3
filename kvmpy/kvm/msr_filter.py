"""MSR filters: which MSRs a guest reaches without asking (KVM API, section 4.97)."""

import ctypes

from kvmpy.abi.structs import kvm_msr_filter
from kvmpy.errors import UsageError
from kvmpy.kvm.checked_struct import fits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["MsrFilterRange", "to_struct"]

_READ, _WRITE, _DEFAULT_DENY = 1, 2, 1
_MAX_RANGES, _MAX_BYTES = 16, 0x600


class MsrFilterRange:
    """`count` MSRs from `first` on for which reads, writes, or both are denied, except those in `allow`.

    A denied access raises #GP in the guest, or is a `RdMsr` or `WrMsr` exit after `Vm.exit_on_msrs` with
    KVM_MSR_EXIT_REASON_FILTER.
    """

    __slots__ = ("allow", "count", "first", "reads", "writes")

    def __init__(
        self, first: int, count: int = 1, *, reads: bool = True, writes: bool = True, allow: "Iterable[int]" = ()
    ) -> None:
        if not (reads or writes):
            raise UsageError("an MSR filter range filters reads, writes, or both")
        if not 0 < count <= _MAX_BYTES * 8:
            raise UsageError(f"an MSR filter range covers 1 to {_MAX_BYTES * 8} MSRs, not {count}")
        self.first = fits("first MSR", first, 32)
        self.count = count
        self.reads = reads
        self.writes = writes
        self.allow = frozenset(allow)

    def bitmap(self) -> bytes:
        """One bit for each MSR, 1 where it is allowed; whole 64-bit words."""
        bits = 0
        for index in self.allow:
            if 0 <= index - self.first < self.count:
                bits |= 1 << (index - self.first)
        return bits.to_bytes((self.count + 63) // 64 * 8, "little")


def to_struct(ranges: "Iterable[MsrFilterRange]", default_allow: bool) -> "tuple[kvm_msr_filter, list[object]]":
    """The kernel's form, and the bitmaps that it points to and that must outlive the ioctl."""
    table = list(ranges)
    if len(table) > _MAX_RANGES:
        raise UsageError(f"an MSR filter has at most {_MAX_RANGES} ranges, not {len(table)}")
    filter = kvm_msr_filter(flags=0 if default_allow else _DEFAULT_DENY)
    bitmaps: list[object] = []
    for slot, entry in zip(filter.ranges, table, strict=False):
        buffer = ctypes.create_string_buffer(entry.bitmap())
        bitmaps.append(buffer)
        slot.flags = (_READ if entry.reads else 0) | (_WRITE if entry.writes else 0)
        slot.base, slot.nmsrs = entry.first, entry.count
        slot.bitmap = ctypes.addressof(buffer)
    return filter, bitmaps
