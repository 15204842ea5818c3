"""Packets that look at the guest's registers and memory, or change them: g G p P m M X (gdb manual, E.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from kvmpy.debug.gdb.architecture import Architecture
from kvmpy.debug.gdb.packet import PACKET_SIZE
from kvmpy.debug.gdb.target import GdbTarget
from kvmpy.debug.gdb.target_description import GdbRegister, TargetDescription, describe
from kvmpy.debug.gdb.wire import Malformed, address_and_length, data, number, register_bytes

__all__ = ["StatePackets"]

_OK = b"OK"


class StatePackets:
    """The part of a session that needs the guest to stand, and nothing else."""

    def __init__(self, target: GdbTarget, architecture: Architecture | None) -> None:
        self.target = target
        self.thread = 1
        """The thread whose registers and memory are looked at (Hg)."""
        self._architecture = architecture
        self._description: TargetDescription | None = None

    @property
    def description(self) -> TargetDescription:
        """The registers that gdb knows of."""
        return self._description or self.describe()

    def describe(self) -> TargetDescription:
        """Choose the description anew, for the mode that the guest is in now: gdb reads it after this."""
        architecture = self._architecture or self.target.architecture()
        self._description = describe(architecture, avx=self.target.has_avx())
        return self._description

    def _read_registers(self, _: bytes) -> bytes:
        description = self.description
        values = self.target.read_registers(self.thread, description.sources)
        return b"".join(map(register_bytes, values, description.sizes))

    def _write_registers(self, text: bytes) -> bytes:
        description = self.description
        given, at = data(text), 0
        now = self.target.read_registers(self.thread, description.sources)
        changes: dict[str, int] = {}
        for register, old in zip(description.registers, now, strict=True):
            piece = given[at : at + register.size]
            at += register.size
            if len(piece) < register.size:
                break
            value = int.from_bytes(piece, "little")
            if old is not None and value != old & (1 << register.bits) - 1:
                changes[register.source] = value
        if len(given) > at:
            raise Malformed("more than there are registers")
        self.target.write_registers(self.thread, changes)
        return _OK

    def _read_register(self, text: bytes) -> bytes:
        index = number(text)
        register = self._register(index)
        (value,) = self.target.read_registers(self.thread, (register.source,))
        return register_bytes(value, register.size)

    def _write_register(self, text: bytes) -> bytes:
        index, equals, value = text.partition(b"=")
        register = self._register(number(index))
        content = data(value)
        if not equals or len(content) != register.size:
            raise Malformed(f"{register.name} has {register.size} bytes")
        self.target.write_registers(self.thread, {register.source: int.from_bytes(content, "little")})
        return _OK

    def _register(self, index: int) -> GdbRegister:
        registers = self.description.registers
        if index >= len(registers):
            raise Malformed(f"no register {index}")
        return registers[index]

    def _read_memory(self, text: bytes) -> bytes:
        address, length = address_and_length(text)
        if length == 0:
            return b""
        return self.target.read_memory(self.thread, address, min(length, PACKET_SIZE // 2)).hex().encode()

    def _write_memory(self, text: bytes) -> bytes:
        place, _, content = text.partition(b":")
        return self._write(place, data(content))

    def _write_binary(self, text: bytes) -> bytes:
        place, _, content = text.partition(b":")
        return self._write(place, content)

    def _write(self, place: bytes, content: bytes) -> bytes:
        address, length = address_and_length(place)
        if length != len(content):
            raise Malformed(f"{len(content)} bytes, not {length}")
        if content:  # gdb writes nothing to see whether the packet is known
            self.target.write_memory(self.thread, address, content)
        return _OK

    HANDLERS: ClassVar[dict[bytes, Callable[[Any, bytes], bytes | None]]] = {
        b"g": _read_registers,
        b"G": _write_registers,
        b"p": _read_register,
        b"P": _write_register,
        b"m": _read_memory,
        b"M": _write_memory,
        b"X": _write_binary,
    }
