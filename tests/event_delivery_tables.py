"""Guests for the event delivery tests: descriptor tables written out bit by bit, no builder involved."""

from __future__ import annotations

import struct

from entry_rule_breaks import Bytes
from kvmpy.x86 import modes
from kvmpy.x86.page_walk import Access
from kvmpy.x86.registers import CpuState, DescriptorTable, Segment

GDT, IDT, TSS, LDT = 0x1000, 0x2000, 0x3000, 0x4000
KERNEL_STACK, USER_STACK, IST_STACK = 0x9000, 0x7FF0, 0xA008
HANDLER = 0x5000

CODE32, DATA32, USER_CODE32, USER_DATA32 = 0x08, 0x10, 0x18, 0x20
CODE64, USER_CODE64, CONFORMING32, ABSENT_CODE = 0x28, 0x30, 0x38, 0x40
READ_ONLY, ABSENT_DATA, SMALL_CODE, CODE16 = 0x48, 0x50, 0x58, 0x60
SMALL_STACK, CODE64_AND_32, RING1_CODE, CONFORMING64 = 0x68, 0x70, 0x78, 0x80
ABSENT_CODE64, DATA16 = 0x88, 0x90
BEYOND = 0x98

DESCRIPTORS = {
    CODE32: 0x00CF_9B00_0000_FFFF,
    DATA32: 0x00CF_9300_0000_FFFF,
    USER_CODE32: 0x00CF_FB00_0000_FFFF,
    USER_DATA32: 0x00CF_F300_0000_FFFF,
    CODE64: 0x00AF_9B00_0000_FFFF,
    USER_CODE64: 0x00AF_FB00_0000_FFFF,
    CONFORMING32: 0x00CF_9F00_0000_FFFF,
    ABSENT_CODE: 0x00CF_1B00_0000_FFFF,
    READ_ONLY: 0x00CF_9100_0000_FFFF,
    ABSENT_DATA: 0x00CF_1300_0000_FFFF,
    SMALL_CODE: 0x0040_9B00_0000_0FFF,
    CODE16: 0x0000_9B00_0000_FFFF,
    SMALL_STACK: 0x0040_9300_0000_0007,
    CODE64_AND_32: 0x00EF_9B00_0000_FFFF,
    RING1_CODE: 0x00CF_BB00_0000_FFFF,
    CONFORMING64: 0x00AF_9F00_0000_FFFF,
    ABSENT_CODE64: 0x00AF_1B00_0000_FFFF,
    DATA16: 0x0000_9300_0000_FFFF,
}

INTERRUPT32, TRAP32, INTERRUPT16, TASK = 0x8E, 0x8F, 0x86, 0x85
DPL3 = 0x60


def tables() -> Bytes:
    """Memory with the GDT above, an empty IDT, and a TSS that has esp0/rsp0 and ss0."""
    memory = Bytes(0x1_0000)
    for selector, descriptor in DESCRIPTORS.items():
        memory.write(GDT + selector, struct.pack("<Q", descriptor))
    return memory


def gate32(
    memory: Bytes, vector: int, selector: int = CODE32, offset: int = HANDLER, access: int = INTERRUPT32
) -> None:
    data = struct.pack("<HHBBH", offset & 0xFFFF, selector, 0, access, offset >> 16)
    memory.write(IDT + 8 * vector, data)


def gate64(
    memory: Bytes, vector: int, selector: int = CODE64, offset: int = HANDLER, access: int = INTERRUPT32, ist: int = 0
) -> None:
    high = struct.pack("<HII", offset >> 16 & 0xFFFF, offset >> 32, 0)
    memory.write(IDT + 16 * vector, struct.pack("<HHBB", offset & 0xFFFF, selector, ist, access) + high)


def tss32(memory: Bytes, esp: int = KERNEL_STACK, ss: int = DATA32, ring: int = 0) -> None:
    memory.write(TSS + 4 + 8 * ring, struct.pack("<IH", esp, ss))


def protected(ring: int = 0) -> CpuState:
    state = modes.protected_mode(0x1234, stack=USER_STACK if ring else KERNEL_STACK, ring=ring)
    state.regs.rflags = 0x202
    _with_tables(state, 0xFF * 8 + 7)
    if ring:
        state.sregs.cs = state.sregs.cs.replace(selector=USER_CODE32 | 3)
        state.sregs.ss = state.sregs.ss.replace(selector=USER_DATA32 | 3)
    else:
        state.sregs.cs = state.sregs.cs.replace(selector=CODE32)
        state.sregs.ss = state.sregs.ss.replace(selector=DATA32)
    return state


def long(ring: int = 0) -> CpuState:
    state = modes.long_mode(0x1234, 0, stack=USER_STACK if ring else KERNEL_STACK, ring=ring)
    state.regs.rflags = 0x202
    _with_tables(state, 0xFF * 16 + 15)
    if ring:
        state.sregs.cs = state.sregs.cs.replace(selector=USER_CODE64 | 3)
        state.sregs.ss = state.sregs.ss.replace(selector=USER_DATA32 | 3)
    else:
        state.sregs.cs = state.sregs.cs.replace(selector=CODE64)
        state.sregs.ss = state.sregs.ss.replace(selector=DATA32)
    return state


def virtual_8086(iopl: int = 3) -> CpuState:
    state = modes.protected_mode(0x100)
    state.regs.rsp = 0x200
    state.regs.rflags = 0x2_0202 | iopl << 12
    for index, name in enumerate(("cs", "ss", "ds", "es", "fs", "gs")):
        setattr(state.sregs, name, Segment(0x600 + index, (0x600 + index) << 4, 0xFFFF, type=3, dpl=3))
    _with_tables(state, 0xFF * 8 + 7)
    return state


def _with_tables(state: CpuState, idt_limit: int) -> None:
    state.sregs.gdt = DescriptorTable(GDT, BEYOND - 1)
    state.sregs.idt = DescriptorTable(IDT, idt_limit)
    state.sregs.tr = Segment(0xA0, TSS, 0x67, type=11, s=0)


def identity(address: int, access: Access, *, user: bool, implicit: bool) -> int:
    return address


def words(memory: Bytes, address: int, count: int, size: int) -> list[int]:
    """`count` numbers of `size` bytes from `address` up."""
    data = memory.read(address, count * size)
    return [int.from_bytes(data[at : at + size], "little") for at in range(0, len(data), size)]
