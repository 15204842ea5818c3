"""KVM's binary statistics of a VM or vCPU (KVM API, section 4.133)."""

import ctypes
import os

from kvmpy.abi.structs import kvm_stats_desc, kvm_stats_header, sized
from kvmpy.kvm.descriptor import Descriptor

__all__ = ["Statistics"]


class Statistics(Descriptor):
    """A statistics descriptor. `read()` gives the counters now; the layout is asked for once."""

    kind = "statistics"

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        header = kvm_stats_header.from_buffer_copy(os.pread(fd, ctypes.sizeof(kvm_stats_header), 0))
        self._data_offset = int(header.data_offset)
        self._layout: list[tuple[str, int, int]] = []  # name, byte offset in the data, number of values
        stride = ctypes.sizeof(kvm_stats_desc) + header.name_size
        kind = sized(kvm_stats_desc, header.name_size)
        for index in range(header.num_desc):
            raw = os.pread(fd, stride, header.desc_offset + index * stride)
            entry = kind.from_buffer_copy(raw)
            self._layout.append((entry.name.decode(), entry.offset, entry.size))
        self._places = {name: self._data_offset + offset for name, offset, count in self._layout if count == 1}

    def counter(self, name: str) -> int:
        """One counter now, by one system call; -1 when KVM has none of that name."""
        place = self._places.get(name)
        if place is None:
            return -1
        return int.from_bytes(os.pread(self._fd, 8, place), "little")

    def read(self) -> dict[str, int | list[int]]:
        """Counter name -> value, or a list of values for a histogram."""
        self._check_usable()
        counters: dict[str, int | list[int]] = {}
        for name, offset, count in self._layout:
            raw = os.pread(self._fd, 8 * count, self._data_offset + offset)
            values = list(memoryview(raw).cast("Q"))
            counters[name] = values[0] if count == 1 else values
        return counters
