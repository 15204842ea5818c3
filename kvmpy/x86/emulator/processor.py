"""What an instruction works on: registers, memory, extended state of one processor that stands.

`Processor` is what the host of the emulator offers (for KVM: `kvmpy.machine.emulated_processor`). `Operands` is what
the rows of the table are written with; it computes addresses, asks the page tables, and raises what the processor would
raise as `GuestException`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from kvmpy.x86.emulator.extended_state import ExtendedState
from kvmpy.x86.emulator.guest_exception import GuestException
from kvmpy.x86.emulator.linear_memory import LinearMemory
from kvmpy.x86.instruction import Instruction, MemoryOperand
from kvmpy.x86.registers import GENERAL_REGISTERS, Segment, SystemRegisters

__all__ = ["RFLAGS", "RIP", "Operands", "Processor", "within_limit"]

_GP, _SS, _UD = 13, 12, 6
_RSP, _RBP = 4, 5


class Processor(Protocol):
    """A processor that stands before the instruction."""

    general: list[int]
    """RAX, RBX, RCX, RDX, RSI, RDI, RSP, RBP, R8 to R15, RIP, RFLAGS, in the order of GENERAL_REGISTERS; changed in
    place, written back by who owns the processor when the instruction is complete."""
    sregs: SystemRegisters

    @property
    def memory(self) -> LinearMemory:
        """Memory by linear address."""

    def extended_state(self, replaced: int = 0) -> ExtendedState:
        """x87, SSE, AVX ... state; changes are written back.

        `replaced` are components that the instruction will overwrite, if it does anything: what they hold need not be
        in it.
        """

    def read_msr(self, index: int) -> int | None:
        """An MSR, or None when there is none (#GP)."""

    def write_msr(self, index: int, value: int) -> bool:
        """Write an MSR. False: it is refused (#GP)."""

    def xcr0(self) -> int:
        """XCR0."""

    def timestamp(self) -> int:
        """The TSC."""

    def flush_translations(self) -> None:
        """Forget what is known of the page tables (INVPCID)."""

    def alone(self) -> AbstractContextManager[object]:
        """While this lasts, no other processor of the guest executes anything: LOCK."""


# The number of a register in an instruction is not its place in struct kvm_regs.
_PLACE = tuple(
    GENERAL_REGISTERS.index(name)
    for name in (
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
    )
)  # fmt: skip
RIP, RFLAGS = GENERAL_REGISTERS.index("rip"), GENERAL_REGISTERS.index("rflags")


class Operands:
    """The operands of one decoded instruction on one processor.

    `target` is the RIP that the instruction gives, None for the next instruction's.
    """

    __slots__ = ("cpu", "general", "it", "target")

    def __init__(self, cpu: Processor, it: Instruction) -> None:
        self.cpu = cpu
        self.it = it
        self.general = cpu.general
        self.target: int | None = None

    # Registers

    def register(self, number: int, size: int = 8) -> int:
        """The low `size` bytes of a general register (not AH, CH, DH, BH)."""
        value = self.general[_PLACE[number]]
        return value if size == 8 else value & (1 << 8 * size) - 1

    def set_register(self, number: int, value: int, size: int = 8) -> None:
        """Write the low `size` bytes; 4 bytes clear the upper half (SDM vol. 1, 3.4.1.1)."""
        place = _PLACE[number]
        mask = (1 << 8 * size) - 1
        if size < 4:
            value = self.general[place] & ~mask | value & mask
        self.general[place] = value & mask if size >= 4 else value

    @property
    def flags(self) -> int:
        """RFLAGS."""
        return self.general[RFLAGS]

    def set_flags(self, value: int, mask: int) -> None:
        """Give the flags in `mask` the values that they have in `value`."""
        self.general[RFLAGS] = self.general[RFLAGS] & ~mask | value & mask

    @property
    def cpl(self) -> int:
        """The privilege level: SS.DPL (SDM vol. 3, 5.5). 0 in real mode."""
        return self.cpu.sregs.ss.dpl if self.cpu.sregs.cr0 & 1 else 0

    # Memory

    def address(self) -> int:
        """The linear address of the memory operand. Raises GuestException (#GP, #SS) when it cannot be one."""
        return self.linear(0)

    def linear(self, offset: int, operand: MemoryOperand | None = None) -> int:
        """The linear address `offset` bytes into the memory operand, or into one that the instruction implies."""
        it = self.it
        operand = operand or it.memory
        assert operand is not None  # a row that says memory has one
        value = operand.displacement + offset
        if operand.base is not None:
            value += self.general[_PLACE[operand.base]]
        if operand.index is not None:
            value += self.general[_PLACE[operand.index]] * operand.scale
        if operand.rip_relative:
            value += self.general[RIP] + it.length
        value &= (1 << 8 * it.address_size) - 1
        if it.bits == 64:
            if operand.segment in ("fs", "gs"):
                segment: Segment = getattr(self.cpu.sregs, operand.segment)
                value = value + segment.base & 0xFFFF_FFFF_FFFF_FFFF
            if not _canonical(value, self.cpu.sregs.cr4):
                raise GuestException.of(_SS if operand.segment == "ss" else _GP, 0)
            return value
        segment = getattr(self.cpu.sregs, operand.segment)
        return value + segment.base & 0xFFFF_FFFF

    def load(self, size: int) -> int:
        """`size` bytes of the memory operand as a number."""
        return int.from_bytes(self.load_bytes(size), "little")

    def load_bytes(self, size: int) -> bytes:
        """`size` bytes of the memory operand."""
        self.check_limit(size)
        return self.cpu.memory.read(self.address(), size)

    def store(self, value: int, size: int) -> None:
        """Write the memory operand."""
        self.store_bytes(value.to_bytes(size, "little"))

    def store_bytes(self, data: bytes) -> None:
        """Write bytes to the memory operand."""
        self.check_limit(len(data))
        self.cpu.memory.write(self.address(), data)

    def source(self, size: int) -> int:
        """The operand that ModRM.rm names, register or memory."""
        return self.register(self.it.rm, size) if self.it.memory is None else self.load(size)

    def check_limit(self, size: int, operand: MemoryOperand | None = None) -> None:
        """Segment limits outside 64-bit mode (SDM vol. 3, 5.3), of the memory operand or of another one."""
        it = self.it
        operand = operand or it.memory
        if it.bits == 64 or operand is None:
            return
        segment: Segment = getattr(self.cpu.sregs, operand.segment)
        if not within_limit(segment, self.linear(0, operand) - segment.base & 0xFFFF_FFFF, size):
            raise GuestException.of(_SS if operand.segment == "ss" else _GP, 0)


def within_limit(segment: Segment, first: int, size: int) -> bool:
    """Whether a segment has `size` bytes at offset `first` (SDM vol. 3, 5.3)."""
    last = first + size - 1
    if segment.unusable or (segment.s and segment.type & 0xC == 4):  # data, expand down
        return not segment.unusable and first > segment.limit and last <= (0xFFFF_FFFF if segment.db else 0xFFFF)
    return last <= segment.limit


def _canonical(address: int, cr4: int) -> bool:
    bits = 56 if cr4 & 1 << 12 else 47  # CR4.LA57
    return address >> bits in (0, (1 << 64 - bits) - 1)
