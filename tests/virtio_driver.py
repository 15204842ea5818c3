"""A virtio driver in Python, on plain guest memory: what tests of devices need of a guest.

`FakeDriver(device)` finds the device behind virtio-mmio as a driver does, register by register, and `start` negotiates
and sets its queues up. `request` is a whole round; `add`, `kick` and `used` are its parts. Anything illegal can be
written with `desc`, `make_available` and `write`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from struct import pack

from device_board import RecordingBoard
from kvmpy.memory import GuestMemory, MemoryRegion
from kvmpy.virtio import DeviceStatus, VirtioDevice, VirtioMmio
from kvmpy.virtio import mmio_registers as reg

__all__ = ["EMPTY_ROOM", "FakeDriver", "FakeQueue", "buffer_memory"]

RAM = 0x10_0000
RINGS = 0x1000
BUFFERS = 0x4_0000
"""From here to the end of RAM are buffers."""
EMPTY_ROOM = 0x4000_0000
"""An address where there is nothing."""
NEXT, WRITE, INDIRECT = 1, 2, 4


def buffer_memory(size: int = RAM) -> GuestMemory:
    """RAM from address 0 on."""
    memory = GuestMemory()
    memory.add(MemoryRegion.anonymous(0, size))
    return memory


class FakeQueue:
    """The driver's side of one split virtqueue (virtio 1.2, section 2.7)."""

    def __init__(self, driver: FakeDriver, index: int, size: int, base: int) -> None:
        self.driver, self.index, self.size = driver, index, size
        self.memory = driver.memory
        self.table = base
        self.available = base + 16 * size
        self.used_ring = self.used_at(base, size)
        self.end = self.used_ring + 0x1000 * (1 + (8 * size + 6) // 0x1000)
        self.memory.fill(base, self.end - base)
        self.next_free = 0
        self.avail_idx = 0
        self.seen = 0
        self.chains: dict[int, list[tuple[int, int]]] = {}
        """Head -> address and length of its writable buffers."""

    @staticmethod
    def used_at(base: int, size: int) -> int:
        """Where the used ring of a queue at `base` is."""
        return base + 0x1000 * (1 + (24 * size) // 0x1000)

    def desc(self, index: int, address: int, length: int, flags: int = 0, next: int = 0) -> None:
        """Write a descriptor."""
        self.memory.write(self.table + 16 * index, pack("<QIHH", address, length, flags, next))

    def make_available(self, head: int, *, index: int | None = None) -> None:
        """Put a head into the available ring and publish the index."""
        self.memory.write_u16(self.available + 4 + 2 * (self.avail_idx % self.size), head)
        self.avail_idx = self.avail_idx + 1 & 0xFFFF if index is None else index
        self.memory.write_u16(self.available + 2, self.avail_idx)

    def add(self, out: Iterable[bytes] = (), into: Iterable[int] = (), *, indirect: bool = False) -> int:
        """Make a chain of these buffers available, without a notification; answers its head."""
        buffers = [(self.driver.place(data), len(data), 0) for data in out]
        buffers += [(self.driver.place(bytes(length)), length, WRITE) for length in into]
        count = len(buffers)
        if indirect:
            table = b"".join(
                pack("<QIHH", address, length, flags | (NEXT if at + 1 < count else 0), at + 1)
                for at, (address, length, flags) in enumerate(buffers)
            )
            head = self.next_free % self.size
            self.next_free += 1
            self.desc(head, self.driver.place(table, 16), len(table), INDIRECT)
        else:
            indexes = [(self.next_free + at) % self.size for at in range(count)]
            self.next_free += count
            head = indexes[0]
            for at, (address, length, flags) in enumerate(buffers):
                last = at + 1 == count
                self.desc(indexes[at], address, length, flags | (0 if last else NEXT), 0 if last else indexes[at + 1])
        self.chains[head] = [(address, length) for address, length, flags in buffers if flags & WRITE]
        self.make_available(head)
        return head

    def kick(self) -> None:
        """Notify the device."""
        self.driver.write(reg.QUEUE_NOTIFY, self.index)

    @property
    def used_idx(self) -> int:
        return self.memory.read_u16(self.used_ring + 2)

    def used(self) -> list[tuple[int, int, bytes]]:
        """What was used since the last look: head, bytes written, and these bytes."""
        done = []
        while self.seen != self.used_idx:
            at = self.used_ring + 4 + 8 * (self.seen % self.size)
            head, length = self.memory.read_u32(at), self.memory.read_u32(at + 4)
            content = b"".join(self.memory.read(address, size) for address, size in self.chains.get(head, []))
            done.append((head, length, content[:length]))
            self.seen = self.seen + 1 & 0xFFFF
        return done

    @property
    def flags(self) -> int:
        """VIRTQ_USED_F_NO_NOTIFY or 0."""
        return self.memory.read_u16(self.used_ring)

    @property
    def avail_event(self) -> int:
        return self.memory.read_u16(self.used_ring + 4 + 8 * self.size)

    def set_used_event(self, index: int) -> None:
        """Interrupt when entry `index` of the used ring is written."""
        self.memory.write_u16(self.available + 4 + 2 * self.size, index)

    def set_no_interrupt(self, on: bool) -> None:
        self.memory.write_u16(self.available, int(on))


class FakeDriver:
    """Drives `device` behind virtio-mmio on a board of its own, or behind `mmio`, which is plugged in already."""

    def __init__(
        self, device: VirtioDevice, *, legacy: bool = False, events: bool = False, memory: GuestMemory | None = None,
        mmio: VirtioMmio | None = None,
    ) -> None:  # fmt: skip
        self.device = device
        self.board = RecordingBoard()
        self.board.has_events = events
        self.memory = self.board.memory = buffer_memory() if memory is None else memory
        if mmio is None:
            mmio = VirtioMmio(device, legacy=legacy)
            mmio.place(self.board)
            mmio.attach(self.board)
        self.mmio = mmio
        self.queues: list[FakeQueue] = []
        self._free = BUFFERS

    def read(self, offset: int, size: int = 4) -> int:
        return self.mmio.read(offset, size)

    def write(self, offset: int, value: int, size: int = 4) -> None:
        self.mmio.write(offset, size, value)

    def config(self, offset: int, size: int) -> int:
        return self.read(reg.CONFIG + offset, size)

    def place(self, data: bytes, alignment: int = 1) -> int:
        """Put bytes into a buffer, in memory that is used again when it has come to its end."""
        self._free = -(-self._free // alignment) * alignment
        if self._free + len(data) > self.memory.regions[0].end:
            self._free = BUFFERS
        address = self._free
        self.memory.write(address, data)
        self._free += len(data)
        return address

    # Setting up (virtio 1.2, section 3.1.1)

    @property
    def status(self) -> DeviceStatus:
        return DeviceStatus(self.read(reg.STATUS))

    @property
    def offered(self) -> int:
        features = 0
        for sel in (0, 1):
            self.write(reg.DEVICE_FEATURES_SEL, sel)
            features |= self.read(reg.DEVICE_FEATURES) << 32 * sel
        return features

    def accept(self, features: int) -> None:
        for sel in (0, 1):
            self.write(reg.DRIVER_FEATURES_SEL, sel)
            self.write(reg.DRIVER_FEATURES, features >> 32 * sel & 0xFFFF_FFFF)

    def negotiate(self, *, without: Sequence[int] = ()) -> DeviceStatus:
        """Reset, and accept all that is offered but for `without`, up to FEATURES_OK."""
        self.write(reg.STATUS, 0)
        self.write(reg.STATUS, DeviceStatus.ACKNOWLEDGE)
        self.write(reg.STATUS, self.status | DeviceStatus.DRIVER)
        features = self.offered
        for bit in without:
            features &= ~(1 << bit)
        self.accept(features)
        self.write(reg.STATUS, self.status | DeviceStatus.FEATURES_OK)
        return self.status

    def set_up_queue(self, index: int, size: int = 16) -> FakeQueue:
        base = RINGS if not self.queues else self.queues[-1].end
        queue = FakeQueue(self, index, size, base)
        assert queue.end <= BUFFERS
        self.enable(queue)
        self.queues.append(queue)
        return queue

    def enable(self, queue: FakeQueue) -> None:
        """Tell the device where a queue is."""
        self.write(reg.QUEUE_SEL, queue.index)
        self.write(reg.QUEUE_NUM, queue.size)
        for register, address in (
            (reg.QUEUE_DESC_LOW, queue.table), (reg.QUEUE_DRIVER_LOW, queue.available),
            (reg.QUEUE_DEVICE_LOW, queue.used_ring),
        ):  # fmt: skip
            self.write(register, address & 0xFFFF_FFFF)
            self.write(register + 4, address >> 32)
        self.write(reg.QUEUE_READY, 1)

    def start(self, *, without: Sequence[int] = (), size: int = 16) -> FakeDriver:
        """Negotiate, set all queues up with `size` entries, and say DRIVER_OK."""
        status = self.negotiate(without=without)
        assert status & DeviceStatus.FEATURES_OK
        self.queues = []
        for index, queue in enumerate(self.device.queues):
            self.set_up_queue(index, min(size, queue.size_max))
        self.write(reg.STATUS, self.status | DeviceStatus.DRIVER_OK)
        return self

    def request(
        self, out: Iterable[bytes] = (), into: Iterable[int] = (), *, queue: int = 0, indirect: bool = False
    ) -> bytes | None:
        """One request, from the first buffer to the answer; None when it was not completed at once."""
        ring = self.queues[queue]
        ring.add(out, into, indirect=indirect)
        ring.kick()
        done = ring.used()
        return done[-1][2] if done else None

    @property
    def interrupt_status(self) -> int:
        return self.read(reg.INTERRUPT_STATUS)

    def acknowledge(self) -> int:
        """Read and acknowledge what interrupted; answers that."""
        cause = self.interrupt_status
        self.write(reg.INTERRUPT_ACK, cause)
        return cause
