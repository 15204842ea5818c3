"""Calls from the guest to the host's program: a hypercall of our own, by one port or one memory register.

VMCALL and VMMCALL are KVM's: it answers most of them itself (Documentation/virt/kvm/x86/hypercalls.rst), and there are
hosts on which they do not work in ring 0. A write to this channel works everywhere. The guest's side is
`<kvmpy/hypercall.h>`.

The guest puts a call into 64 bytes of its memory (number, six arguments, result; each 64 bits) and writes the block's
physical address. When the write is done, so is the call, and the result is in the block.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

from kvmpy.devices.device import Device, Region
from kvmpy.errors import GuestMemoryError, UsageError

__all__ = ["EFAULT", "ENOSYS", "Hypercall", "HypercallChannel"]

ENOSYS, EFAULT = 38, 14
"""Results, negative as those of KVM's own hypercalls: nobody answers this number; an address is not in memory."""

SIGNATURE = int.from_bytes(b"kvmp", "little")
VERSION = 1
ADDRESS, ADDRESS_HIGH = 0, 4
LENGTH = 8
_BLOCK = struct.Struct("<7Q")
_RESULT = struct.Struct("<Q")
_64_BITS = (1 << 64) - 1


class Hypercall:
    """One call: its `number`, its six `arguments` (unsigned, 64 bits), and guest memory to read from and write to."""

    __slots__ = ("_memory", "arguments", "number")

    def __init__(self, number: int, arguments: tuple[int, ...], memory: Any) -> None:
        self.number = number
        self.arguments = arguments
        self._memory = memory

    def read(self, address: int, length: int) -> bytes:
        """Guest memory by physical address. What is outside of it ends the call with -EFAULT."""
        data: bytes = self._memory.read(address, length)
        return data

    def write(self, address: int, data: bytes) -> None:
        """Write guest memory by physical address, likewise; not ROM."""
        self._memory.guest_write(address, data)

    def __repr__(self) -> str:
        return f"<Hypercall {self.number} ({', '.join(map(hex, self.arguments))})>"


class HypercallChannel(Device):
    """Port 0x5C0 (`port`, None for no port) and a register in memory at 0xFED8_0000 (`address`, None for none).

    `on(number, handler)` has calls of a number answered by `handler(call)`: an int, 0 for None. Numbers without a
    handler get -ENOSYS, and are counted as `unknown`; addresses outside guest memory -EFAULT, counted as `bad_address`.
    What a handler raises besides leaves `Machine.run`; the call is made again when the guest goes on.

    Registers, the same at both places: offset 0, 32 or 64 bits, the address, whose write makes the call; offset 4, its
    upper half, to be written before, 0 after each call. Reads give "kvmp" at 0 and the version, 1, at 4. `calls` counts
    by number.
    """

    name = "hypercall channel"

    def __init__(self, port: int | None = 0x5C0, address: int | None = 0xFED8_0000) -> None:
        super().__init__()
        if port is None and address is None:
            raise UsageError("a hypercall channel needs a port or an address")
        self.port = port
        self.address = address
        self.calls: Counter[int] = Counter()
        self._handlers: dict[int, Callable[[Hypercall], int | None]] = {}
        self._high = 0

    def on(self, number: int, handler: Callable[[Hypercall], int | None]) -> None:
        """Have `handler` answer the calls of `number` (64 bits, unsigned) from now on. One handler a number."""
        if not isinstance(number, int) or not 0 <= number <= _64_BITS or not callable(handler):
            raise UsageError(f"on() takes a number of 64 bits and a function, not {number!r} and {handler!r}")
        self._handlers[number] = handler

    def regions(self) -> tuple[Region, ...]:
        found = []
        if self.port is not None:
            found.append(Region("port", self.port, LENGTH, self.name, self.read, self.write, width=4))
        if self.address is not None:
            found.append(Region("mmio", self.address, LENGTH, self.name, self.read, self.write))
        return tuple(found)

    def read(self, offset: int, size: int) -> int:
        both = SIGNATURE | VERSION << 32
        return both >> 8 * offset & (1 << 8 * size) - 1 if offset < LENGTH else (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == ADDRESS and size in (4, 8):
            address, self._high = self._high << 32 | value, 0
            self._call(value if size == 8 else address)
        elif offset == ADDRESS_HIGH and size == 4:
            self._high = value
        else:
            self.counters["bad_access"] += 1

    def _call(self, block: int) -> None:
        memory = self.board.memory if self.board is not None else None
        if memory is None:
            self.counters["call_without_board"] += 1
            return
        result = block + _BLOCK.size
        try:
            number, *arguments = _BLOCK.unpack(memory.read(block, _BLOCK.size))
            memory.guest_write(result, memory.read(result, _RESULT.size))  # it has a place
        except GuestMemoryError:  # there is nowhere to say so
            self.counters["bad_address"] += 1
            return
        memory.guest_write(result, _RESULT.pack(self._answer(Hypercall(number, tuple(arguments), memory))))

    def _answer(self, call: Hypercall) -> int:
        handler = self._handlers.get(call.number)
        if handler is None:
            self.counters["unknown"] += 1
            return -ENOSYS & _64_BITS
        try:
            result = handler(call) or 0
        except GuestMemoryError:
            self.counters["bad_address"] += 1
            return -EFAULT & _64_BITS
        if not -(1 << 63) <= result <= _64_BITS:
            raise UsageError(f"the handler of hypercall {call.number} answers {result:#x}, which has more than 64 bits")
        self.calls[call.number] += 1
        return result & _64_BITS

    def reset(self) -> None:
        self._high = 0

    def state(self) -> dict[str, Any]:
        return {"high": self._high}

    def restore(self, state: dict[str, Any]) -> None:
        self._high = state["high"]
