"""The instruction at RIP about to execute: the processor's mode, the instruction's bytes, registers and addresses."""

from __future__ import annotations

from functools import cached_property

from kvmpy.debug.crash_report.first_event.decoder import Decoded, decode
from kvmpy.debug.crash_report.memory_overlay import CopyOnWriteMemory
from kvmpy.errors import GuestMemoryError, UsageError
from kvmpy.x86.flags import Cr0, Efer, Rflags
from kvmpy.x86.page_walk import translate
from kvmpy.x86.register_text import code_bits
from kvmpy.x86.registers import CpuState, Segment

__all__ = ["GENERAL", "SEGMENTS", "Execution", "read_linear"]

GENERAL = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
"""General registers by their number in an instruction."""
SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")
"""Segment registers by their number in an instruction."""

_PAGE = 0x1000
_64_BITS = (1 << 64) - 1


def read_linear(memory: CopyOnWriteMemory, state: CpuState, address: int, length: int) -> bytes:
    """As many of `length` bytes from a linear address on as the page tables and memory give; rights do not count."""
    data = b""
    wide = bool(state.sregs.efer & Efer.LMA)
    while len(data) < length:
        here = (address + len(data)) & (_64_BITS if wide else 0xFFFF_FFFF)
        size = min(length - len(data), _PAGE - here % _PAGE)
        physical = translate(memory, state.sregs, here)
        if physical is None:
            break
        try:
            data += memory.read(physical, size)
        except (GuestMemoryError, OverflowError):
            break
    return data


class Execution:
    """What an instruction sees of the processor in `state`, with memory of its own to write to."""

    def __init__(self, memory: CopyOnWriteMemory, state: CpuState) -> None:
        self.memory = memory
        self.state = state
        self.regs = state.regs
        self.sregs = state.sregs
        self.bits = code_bits(state.sregs)

    # The mode

    @property
    def protected(self) -> bool:
        """Protected or long mode, virtual-8086 mode aside: selectors pick descriptors."""
        return bool(self.sregs.cr0 & Cr0.PE) and not self.regs.rflags & Rflags.VM

    @property
    def long_mode(self) -> bool:
        return bool(self.sregs.efer & Efer.LMA)

    @property
    def cpl(self) -> int:
        if not self.sregs.cr0 & Cr0.PE:
            return 0
        return 3 if self.regs.rflags & Rflags.VM else self.sregs.ss.dpl

    @property
    def iopl(self) -> int:
        return self.regs.rflags >> 12 & 3

    # The instruction

    @cached_property
    def rip(self) -> int:
        """The linear address of the instruction."""
        return self.linear("cs", self.regs.rip)

    @cached_property
    def code(self) -> bytes:
        """Up to 15 bytes from RIP on, as many as there are."""
        return read_linear(self.memory, self.state, self.rip, 15)

    @cached_property
    def decoded(self) -> Decoded | None:
        return decode(self.code, self.bits)

    # Registers and addresses

    def register(self, number: int, bits: int, *, rex: int = 0) -> int:
        """A general register by its number in the instruction; 4 to 7 with 8 bits are AH to BH without REX."""
        if bits == 8 and not rex and 4 <= number < 8:
            value: int = getattr(self.regs, GENERAL[number - 4]) >> 8 & 0xFF
            return value
        value = getattr(self.regs, GENERAL[number])
        return value & ((1 << bits) - 1)

    def segment(self, name: str) -> Segment:
        segment: Segment = getattr(self.sregs, name)
        return segment

    def linear(self, name: str, offset: int) -> int:
        """The linear address of an offset in a segment, without any check (SDM vol. 3, 3.4)."""
        if self.bits == 64:
            base = self.segment(name).base if name in ("fs", "gs") else 0
            return (base + offset) & _64_BITS
        return (self.segment(name).base + offset) & 0xFFFF_FFFF

    def effective_address(self, decoded: Decoded) -> tuple[str, int]:
        """(segment, offset) of the ModRM operand, which must be in memory."""
        operand = decoded.memory
        if operand is None:
            raise UsageError("the operand is a register")
        offset = operand.displacement
        if operand.rip_relative:
            offset += self.regs.rip + decoded.length
        if operand.base is not None:
            offset += getattr(self.regs, GENERAL[operand.base])
        if operand.index is not None:
            offset += getattr(self.regs, GENERAL[operand.index]) * operand.scale
        return operand.segment, offset & ((1 << decoded.address_bits) - 1)

    @property
    def stack_bits(self) -> int:
        """The width of the stack pointer."""
        return 64 if self.bits == 64 else 32 if self.sregs.ss.db else 16

    def stack_offset(self, distance: int) -> int:
        """The stack pointer moved by `distance` bytes, within its width."""
        return (self.regs.rsp + distance) & ((1 << self.stack_bits) - 1)

    def stack_items(self, count: int, size: int, *, skip: int = 0) -> list[int] | None:
        """`count` numbers of `size` bytes from the top of the stack on; None when they cannot be read."""
        first = self.stack_offset(skip)
        if first + count * size <= 1 << self.stack_bits:
            data = self.read("ss", first, count * size)
            if data is None:
                return None
            return [int.from_bytes(data[at : at + size], "little") for at in range(0, len(data), size)]
        values = []
        for index in range(count):  # around the end of the segment
            data = self.read("ss", self.stack_offset(skip + index * size), size)
            if data is None:
                return None
            values.append(int.from_bytes(data, "little"))
        return values

    def read(self, segment: str, offset: int, length: int) -> bytes | None:
        """Bytes at an offset in a segment, or None when they are not in memory. Rights do not count."""
        data = read_linear(self.memory, self.state, self.linear(segment, offset), length)
        return data if len(data) == length else None

    def operand(self, decoded: Decoded, bits: int) -> int | None:
        """The value of the ModRM operand, a register or memory; None when it cannot be read."""
        if decoded.memory is None:
            return self.register(decoded.rm, bits, rex=decoded.rex)
        data = self.read(*self.effective_address(decoded), bits // 8)
        return None if data is None else int.from_bytes(data, "little")
