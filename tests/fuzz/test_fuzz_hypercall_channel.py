"""Whatever a guest writes to the hypercall channel, it answers, writes nothing but results, and works afterwards."""

from __future__ import annotations

import struct

from hypothesis import given, settings

from device_board import RecordingBoard
from kvmpy.devices.hypercall_channel import EFAULT, ENOSYS, LENGTH, Hypercall, HypercallChannel
from kvmpy.memory import GuestMemory, MemoryRegion
from virtio_hostile import EXAMPLES, PROGRAMS, Program

RAM = 0x1_0000
ROM = RAM  # right behind RAM, with nothing in it
HIGH = 5 << 32
PADDING = 0x1000
BLOCK = struct.Struct("<7Q")
ADDRESSES = (
    0, 0x100, 0x1001, RAM - 64, RAM - 56, RAM - 1, ROM, ROM + 0xFC0, ROM + 0x1000,
    HIGH, HIGH + 0xFC0, HIGH + 0x1000, 1 << 32, (1 << 63) - 1, (1 << 64) - 64, (1 << 64) - 1,
)  # fmt: skip
NUMBERS = (0, 1, 2, 3, 4, 5, (1 << 64) - 1)
LENGTHS = (0, 1, 8, 64, 0x1000, RAM, 1 << 32, (1 << 64) - 1)
_64_BITS = (1 << 64) - 1


class HypercallTarget:
    """Plays programs: blocks and addresses of any kind, registers written at any width and place."""

    def play(self, content: bytes) -> None:
        """Play a program, and check all that was promised."""
        _Play(Program(content)).run()


class _Play:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.backing = bytearray(b"\xa5" * (PADDING + RAM + 0x1000 + PADDING))
        whole = memoryview(self.backing)
        self.memory = GuestMemory()
        self.memory.add(MemoryRegion(0, whole[PADDING : PADDING + RAM], 0))
        self.rom = MemoryRegion.anonymous(ROM, 0x1000, read_only=True)
        self.memory.add(self.rom)
        self.memory.add(MemoryRegion(HIGH, whole[PADDING + RAM :][:0x1000], 0))
        self.board = RecordingBoard()
        self.board.memory = self.memory
        self.channel = HypercallChannel()
        self.connect()

    def connect(self) -> None:
        self.channel.attach(self.board)
        self.channel.on(1, lambda call: len(call.read(call.arguments[0], call.arguments[1])))
        self.channel.on(2, self.fill)
        self.channel.on(3, lambda call: call.arguments[0] - (1 << 63))
        self.channel.on(_64_BITS, lambda call: None)

    def fill(self, call: Hypercall) -> int:
        call.write(call.arguments[0], bytes(call.arguments[1] % 0x1001))
        return 1

    def run(self) -> None:
        acts = (self.block, self.block, self.call, self.call, self.call, self.any_write, self.read, self.restore)
        while not self.program.over:
            acts[self.program.byte() % len(acts)]()
        self.channel.reset()
        self.works()
        assert self.rom.buffer.tobytes().count(0) == 0x1000
        assert self.backing[:PADDING].count(0xA5) == PADDING == self.backing[-PADDING:].count(0xA5)

    # What a guest does

    def block(self) -> None:
        """A call in memory, or a part of one where memory ends."""
        program = self.program
        address = program.number(ADDRESSES) & _64_BITS
        words = [program.number(NUMBERS), program.number(ADDRESSES), program.number(LENGTHS)]
        data = BLOCK.pack(*(word & _64_BITS for word in words), *program.take(4))
        region = self.memory.region_at(address)
        if region is not None and not region.read_only:
            self.memory.write(address, data[: region.end - address])

    def call(self) -> None:
        """A call by the registers, in one access or in two; only the result changes, unless it writes memory."""
        address = self.program.number(ADDRESSES) & _64_BITS
        before = bytes(self.backing)
        counted = self.channel.counters.copy()
        if self.program.byte() & 1:
            self.channel.write(0, 8, address)
        else:
            self.channel.write(4, 4, address >> 32)
            self.channel.write(0, 4, address & 0xFFFF_FFFF)
        region = self.memory.region_at(address)
        if region is None or region.read_only or address + 64 > region.end:
            assert bytes(self.backing) == before
            assert self.channel.counters["bad_address"] == counted["bad_address"] + 1
            return
        place = PADDING + address - (0 if region.address == 0 else HIGH - RAM)
        number, first = struct.unpack_from("<QQ", before, place)
        (result,) = struct.unpack_from("<q", self.backing, place + 56)
        if number == 2:
            assert result in (1, -EFAULT)
            return
        assert self.backing[: place + 56] == before[: place + 56]
        assert self.backing[place + 64 :] == before[place + 64 :]
        if number == 3:
            assert result == first - (1 << 63)
        elif number == _64_BITS:
            assert result == 0
        elif number == 1:
            assert result >= 0 or result == -EFAULT
        else:
            assert result == -ENOSYS

    def any_write(self) -> None:
        size = 1 << self.program.byte() % 4
        offset = self.program.byte() % (LENGTH - size + 1)
        self.channel.write(offset, size, int.from_bytes(self.program.take(size), "little"))

    def read(self) -> None:
        size = 1 << self.program.byte() % 4
        assert 0 <= self.channel.read(self.program.byte() % 8, size) < 1 << 8 * size

    def restore(self) -> None:
        state = self.channel.state()
        self.channel = HypercallChannel()
        self.connect()
        self.channel.restore(state)
        assert self.channel.state() == state

    def works(self) -> None:
        self.memory.write(0x100, BLOCK.pack(3, (1 << 63) + 7, 0, 0, 0, 0, 0))
        self.channel.write(0, 4, 0x100)
        assert self.memory.read_u64(0x138) == 7


TARGET = HypercallTarget()


@settings(max_examples=EXAMPLES)
@given(PROGRAMS)
def test_hypercall_channel(program: bytes) -> None:
    TARGET.play(program)
