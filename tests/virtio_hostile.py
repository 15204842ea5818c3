"""Guests that do anything to a virtio device: what each device's fuzz test plays.

A *program* is bytes; each few of them are one act of the guest: registers written at any width, descriptors, rings and
indexes with any content, requests that begin as the device's own do, rings that move while they are used, resets in the
midst, and the host's part: events, timers, a restore into a new device. However it goes,

* nothing raises, and no thread hangs (the deadline of the test);
* nothing is written outside of RAM, nor into ROM;
* no more chains are taken than the queue has room for, and none is used that was not made available;
* after a reset the device works, for a driver that keeps the rules.

A device's test is a few lines (see fuzz/test_fuzz_virtio_entropy.py)::

    TARGET = HostileTarget(Entropy, works=entropy_works, requests=(b"",))

    @settings(max_examples=EXAMPLES)
    @given(PROGRAMS)
    def test_entropy(program: bytes) -> None:
        TARGET.play(program)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from struct import pack

from hypothesis import strategies as st

from fuzz_settings import DEVICE_EXAMPLES, PROFILE
from kvmpy.memory import GuestMemory, MemoryRegion
from kvmpy.virtio import VirtioDevice
from kvmpy.virtio import mmio_registers as reg
from virtio_driver import RAM, FakeDriver, FakeQueue

__all__ = ["EXAMPLES", "PROGRAMS", "HostileTarget", "Program"]

EXAMPLES = 2 * DEVICE_EXAMPLES if PROFILE == "ci" else DEVICE_EXAMPLES
"""At least 20,000 for each device in CI."""

PROGRAMS = st.binary(min_size=40, max_size=400)

ROM = RAM  # 4 KiB right behind RAM
HIGH, HIGH_SIZE = 1 << 32, 0x4000  # more RAM
PADDING = 0x1000
REGISTERS = sorted({getattr(reg, name) for name in reg.__all__ if name != "MAGIC"})
ADDRESSES = (
    0, 0x800, 0x4_0000, 0x4_0003, 0x5_0000, RAM - 1, RAM - 0x1000, RAM, ROM, ROM + 0xFFF, ROM + 0x1000, 0xD000_0050,
    HIGH - 1, HIGH, HIGH + 0x100, HIGH + HIGH_SIZE - 16, HIGH + HIGH_SIZE, (1 << 63) - 1, (1 << 64) - 16, (1 << 64) - 1,
)  # fmt: skip
LENGTHS = (0, 1, 2, 4, 12, 16, 17, 512, 0x1000, 0x1001, 0x4000, RAM, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFF0, 0xFFFF_FFFF)
VALUES = (
    0, 1, 2, 3, 4, 7, 8, 11, 15, 16, 17, 31, 64, 128, 255, 256, 0x1000, 0x4000, 0x8000, 0xFFFF, 0x1_0000, 0x10_0000,
    0x7FFF_FFFF, 0xFFFF_FFFF,
)  # fmt: skip


class Program:
    """Bytes to draw from; zeros when they are at an end."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    @property
    def over(self) -> bool:
        return self._at >= len(self._content)

    def byte(self) -> int:
        self._at += 1
        return self._content[self._at - 1] if self._at <= len(self._content) else 0

    def number(self, choices: Sequence[int]) -> int:
        """One of the choices, one near it, or in some cases another."""
        byte = self.byte()
        value = choices[byte % len(choices)]
        if byte >= 0xE0:
            return value + self.byte() - 0x80
        return value

    def take(self, length: int) -> bytes:
        return bytes(self.byte() for _ in range(length))


Right = tuple[int, Sequence[bytes], Sequence[int]]


class _Driver(FakeDriver):
    """Puts buffers into either RAM, as the bits of `high` say, lowest first."""

    high = 0
    _high_free = 0

    def place(self, data: bytes, alignment: int = 1) -> int:
        high, self.high = self.high & 1, self.high >> 1
        if not high or len(data) > HIGH_SIZE:
            return super().place(data, alignment)
        start = -(-self._high_free // alignment) * alignment
        if start + len(data) > HIGH_SIZE:
            start = 0
        self.memory.write(HIGH + start, data)
        self._high_free = start + len(data)
        return HIGH + start


class HostileTarget:
    """A kind of device to be attacked: `make` makes one, `works(driver)` asserts that it does what it is for.

    `requests` are how its requests begin, `right` some that are as they should be: the queue, what is to be read, and
    sizes of buffers to be written. `config_size` is how many bytes of its configuration space are of interest.
    `host(device, number)` does something with the device that comes from the host, such as data that arrives.
    """

    def __init__(
        self, make: Callable[[], VirtioDevice], *, works: Callable[[FakeDriver], None],
        requests: Sequence[bytes] = (b"",), right: Sequence[Right] = ((0, (), (16,)),), config_size: int = 16,
        host: Callable[[VirtioDevice, int], None] = lambda device, number: None,
    ) -> None:  # fmt: skip
        self.make, self.works, self.config_size = make, works, config_size
        self.requests, self.right = tuple(requests), tuple(right)
        self.host = host
        high = PADDING + RAM + 0x1000 + PADDING
        self._backing = bytearray(high + HIGH_SIZE + PADDING)
        whole = memoryview(self._backing)
        self.memory = GuestMemory()
        self.memory.add(MemoryRegion(0, whole[PADDING : PADDING + RAM], 0))
        self.memory.add(MemoryRegion(ROM, whole[PADDING + RAM :][:0x1000], 0, read_only=True, name="ROM"))
        self.memory.add(MemoryRegion(HIGH, whole[high : high + HIGH_SIZE], 0))
        self._around = (slice(0, PADDING), slice(PADDING + RAM, high), slice(high + HIGH_SIZE, None))
        for part in self._around:
            self._backing[part] = b"\xa5" * len(self._backing[part])

    def play(self, content: bytes) -> None:
        """Play a program, and check the promises above."""
        _Play(self, Program(content)).run()
        for part in self._around:
            assert self._backing[part].count(0xA5) == len(self._backing[part]), "the device wrote outside of RAM"


class _Play:
    def __init__(self, target: HostileTarget, program: Program) -> None:
        self.target, self.program = target, program
        how = program.byte()
        self.legacy = how & 7 == 7
        self.driver = _Driver(target.make(), legacy=self.legacy, events=bool(how & 8), memory=target.memory)
        if how & 0x10 or self.legacy:  # a driver that has not begun well
            self.rings()
        else:
            self.driver.start(without=[28] if how & 0x20 else [29] if how & 0x40 else [], size=8)

    @property
    def device(self) -> VirtioDevice:
        return self.driver.device

    def rings(self) -> None:
        """Rings in memory, of which the device was told nothing."""
        self.driver.queues = []
        for index in range(len(self.device.queues)):
            base = 0x1000 if not self.driver.queues else self.driver.queues[-1].end
            self.driver.queues.append(FakeQueue(self.driver, index, 8, base))

    def run(self) -> None:
        acts: tuple[Callable[[], None], ...] = (
            self.register, self.any_width, self.status, self.descriptor, self.descriptor, self.offer, self.offer,
            self.kick, self.kick, self.request, self.request, self.request, self.request, self.poke, self.index,
            self.set_up, self.host, self.host, self.config, self.restore, self.indirect, self.indirect, self.ring,
            self.begin_again, self.begin_again, self.right, self.right, self.right,
        )  # fmt: skip
        try:
            while not self.program.over:
                acts[self.program.byte() % len(acts)]()
                for queue in self.device.queues:
                    assert queue.in_flight <= queue.size
            self.after_a_reset()
        finally:
            self.driver.mmio.close()

    def after_a_reset(self) -> None:
        self.driver.write(reg.STATUS, 0)
        assert self.driver.status == 0
        assert all(not queue.ready and not queue.in_flight for queue in self.device.queues)
        if self.driver.mmio.legacy:
            return
        self.driver.start(size=8)
        self.target.works(self.driver)

    def queue(self) -> FakeQueue:
        queues = self.driver.queues
        return queues[self.program.byte() % len(queues)]

    # What a guest does

    def begin_again(self) -> None:
        """A driver that has got NEEDS_RESET, or is not ready, does it right this time; else this is nothing."""
        if not self.legacy and not any(queue.open for queue in self.device.queues):
            self.driver.start(without=[28] if self.program.byte() & 1 else [], size=8)

    def ring(self) -> None:
        """Chains of good buffers in the whole table, of which some of the available ring may then make use."""
        queue, program = self.queue(), self.program
        loop = program.byte() & 0xC0 == 0
        for index in range(8):
            byte = program.byte()
            flags = 1 if loop else byte >> 6
            length = 0 if loop else LENGTHS[byte >> 3 & 7]
            queue.desc(index, 0x5_0000 + 0x1000 * (byte & 7), length, flags, index + 1 & 7)

    def register(self) -> None:
        offset = REGISTERS[self.program.byte() % len(REGISTERS)]
        if self.program.byte() & 1:
            self.driver.write(offset, self.program.number(VALUES) & 0xFFFF_FFFF)
        else:
            assert 0 <= self.driver.read(offset) < 1 << 32

    def any_width(self) -> None:
        size = 1 << self.program.byte() % 4
        offset = self.program.byte() * 2 + (self.program.byte() & 1)
        offset = min(offset, self.driver.mmio.size - size)
        value = int.from_bytes(self.program.take(size), "little")
        self.driver.write(offset, value, size)
        assert 0 <= self.driver.read(offset, size) < 1 << 8 * size

    def config(self) -> None:
        size = 1 << self.program.byte() % 4
        offset = reg.CONFIG + self.program.byte() % (self.target.config_size + 8)
        if self.program.byte() & 1:
            self.driver.write(offset, int.from_bytes(self.program.take(size), "little"), size)
        assert 0 <= self.driver.read(offset, size) < 1 << 8 * size

    def status(self) -> None:
        bits = (15, 1, 3, 11, 0, 4, 8, 64, 128, 0xFFFF_FFFF, 15, 79)
        self.driver.write(reg.STATUS, bits[self.program.byte() % len(bits)])
        assert not self.driver.status & ~0xCF

    def set_up(self) -> None:
        """A queue where it was, elsewhere, or nowhere: also while it is used."""
        queue = self.queue()
        how = self.program.byte()
        if how & 1:
            queue.table = self.program.number(ADDRESSES) & (1 << 64) - 1
        if how & 2:
            queue.used_ring = self.program.number(ADDRESSES) & (1 << 64) - 1
        if how & 4:
            self.driver.write(reg.QUEUE_SEL, queue.index)
            self.driver.write(reg.QUEUE_READY, 0)
        size, queue.size = queue.size, (queue.size if how & 8 else self.program.number(VALUES) & 0xFFFF)
        self.driver.enable(queue)
        queue.size = size
        queue.table, queue.used_ring = queue.available - 16 * 8, FakeQueue.used_at(queue.available - 16 * 8, 8)

    def descriptor(self) -> None:
        queue, program = self.queue(), self.program
        index, flags, next = program.byte() % 8, program.byte() & 7, program.byte() % 12
        address, length = program.number(ADDRESSES), program.number(LENGTHS)
        queue.desc(index, address & (1 << 64) - 1, length & 0xFFFF_FFFF, flags, next)

    def indirect(self) -> None:
        """A table of a few descriptors, good or not, made available."""
        queue, program = self.queue(), self.program
        count = program.byte() % 5
        table = b"".join(
            pack(
                "<QIHH", program.number(ADDRESSES) & (1 << 64) - 1, program.number(LENGTHS) & 0xFFFF_FFFF,
                program.byte() & (7 if program.byte() & 8 else 3), at + 1 if program.byte() & 3 else program.byte(),
            )
            for at in range(count)
        )  # fmt: skip
        length = len(table) if program.byte() & 3 else program.number(LENGTHS) & 0xFFFF_FFFF
        queue.desc(0, self.driver.place(table, 16), length, 4 | program.byte() & 3, 0)
        queue.make_available(0)

    def offer(self) -> None:
        self.queue().make_available(self.program.byte() % 10)

    def kick(self) -> None:
        byte = self.program.byte()
        if byte & 0xC0:
            self.queue().kick()
        else:
            self.driver.write(reg.QUEUE_NOTIFY, self.program.number(VALUES) & 0xFFFF_FFFF)

    def request(self) -> None:
        """A chain as the device expects it, more or less."""
        queue, program = self.queue(), self.program
        begin = self.target.requests[program.byte() % len(self.target.requests)]
        how = program.byte()
        if how & 1:
            at = program.byte() % (len(begin) + 1)
            begin = begin[:at] + program.take(4) + begin[at + 4 :]
        out = [begin] if not how & 2 else [begin[: len(begin) // 2], begin[len(begin) // 2 :]]
        if how & 4:
            out.append(program.take(8))
        into = [LENGTHS[program.byte() % 11]] if how & 8 else []
        if how & 16:
            into.append(1)
        out = [part for part in out if part or how & 32]
        if out or into:
            queue.add(out, into, indirect=bool(how & 64))
            if how & 128:
                queue.kick()

    def right(self) -> None:
        """Requests with nothing wrong, by one notification: there may be more of them than the queue has room for."""
        program = self.program
        how = program.byte()
        number, out, into = self.target.right[program.byte() % len(self.target.right)]
        queue = self.driver.queues[number]
        indirect = bool(how & 8)
        for _ in range(1 + how % 8 if indirect else min(1 + how % 8, max(1, 8 // (len(out) + len(into))))):
            self.driver.high = program.byte() if how & 16 else 0
            queue.add(out, into, indirect=indirect)
        self.driver.high = 0
        if how & 0xE0:
            queue.kick()

    def poke(self) -> None:
        """Anything into the rings, or near them."""
        queue = self.queue()
        address = (queue.table, queue.available, queue.used_ring, 0x1000)[self.program.byte() % 4]
        offset = self.program.byte() * (1 + self.program.byte() % 4)
        self.target.memory.write(address + offset, self.program.take(1 + self.program.byte() % 8))

    def index(self) -> None:
        """The available ring's index jumps."""
        queue = self.queue()
        jump = (1, 2, 1, 1, 7, 8, 9, 0x100, 0x7FFF, 0x8000, 0xFFFF)[self.program.byte() % 11]
        queue.avail_idx = queue.avail_idx + jump & 0xFFFF
        self.target.memory.write_u16(queue.available + 2, queue.avail_idx)

    # What the host does meanwhile

    def host(self) -> None:
        board = self.driver.board
        for timer in board.timers:
            if timer.deadline is not None:
                timer.deadline = None
                timer.call()
        for event in list(board.write_events.values()):
            event.call()
        number = self.program.byte()
        if number % 16 == 15:
            self.driver.mmio.quiesce()
            assert all(queue.in_flight == 0 for queue in self.device.queues)
            self.driver.mmio.resume()
        self.target.host(self.device, number)

    def restore(self) -> None:
        """The machine is saved and restored, perhaps with requests in flight; memory may have changed meanwhile."""
        state = self.driver.mmio.state()
        queues, free = self.driver.queues, self.driver._free
        self.driver.mmio.close()
        other = _Driver(
            self.target.make(), legacy=self.legacy, events=self.driver.board.has_events, memory=self.target.memory
        )
        other.mmio.restore(state)
        assert other.mmio.state() == state
        other.mmio.resume()
        other.queues, other._free = queues, free
        for queue in queues:
            queue.driver = other
        self.driver = other
