"""The resources of a device, for its _CRS (ACPI 6.5, section 6.4): one function for each descriptor of ASL."""

from __future__ import annotations

import struct

from kvmpy.boot.acpi.aml import buffer

__all__ = ["dword_memory", "interrupt", "io", "irq_no_flags", "memory32_fixed", "qword_memory", "resource_template",
           "word_bus_number", "word_io"]  # fmt: skip

_IO = struct.Struct("<BBHHBB")
_IRQ = struct.Struct("<BH")
_MEMORY32_FIXED = struct.Struct("<BHBII")
_INTERRUPT = struct.Struct("<BHBBI")
_DECODES_16_BITS = 1
_READ_WRITE = 1
_END = b"\x79\x00"  # the checksum zero: "to be taken as right"

_MEMORY_RANGE, _IO_RANGE, _BUS_NUMBER_RANGE = 0, 1, 2
_MINIMUM_AND_MAXIMUM_FIXED = 0x0C
_ENTIRE_RANGE = 3  # ISA and other ports alike


def resource_template(*descriptors: bytes) -> bytes:
    """ResourceTemplate () {descriptors}"""
    return buffer(b"".join(descriptors) + _END)


def io(port: int, count: int) -> bytes:
    """IO (Decode16, port, port, 1, count)"""
    return _IO.pack(0x47, _DECODES_16_BITS, port, port, 1, count)


def irq_no_flags(irq: int) -> bytes:
    """IRQNoFlags () {irq}: an ISA interrupt, as the bus has it"""
    return _IRQ.pack(0x22, 1 << irq)


def interrupt(gsi: int, *, edge: bool, shared: bool = False) -> bytes:
    """Interrupt (ResourceConsumer, Edge or Level, ActiveHigh, Exclusive or Shared) {gsi}"""
    return _INTERRUPT.pack(0x89, 6, 1 | edge << 1 | shared << 3, 1, gsi)


def memory32_fixed(address: int, size: int) -> bytes:
    """Memory32Fixed (ReadWrite, address, size)"""
    return _MEMORY32_FIXED.pack(0x86, 9, _READ_WRITE, address, size)


def _range(kind: int, type_flags: int, first: int, last: int, *, width: int, consumer: bool = False) -> bytes:
    """An address space descriptor (6.4.3.5) with numbers of `width` bytes."""
    tag, number = {2: (0x88, "H"), 4: (0x87, "I"), 8: (0x8A, "Q")}[width]
    numbers = struct.pack(f"<5{number}", 0, first, last, 0, last - first + 1)
    body = bytes([kind, _MINIMUM_AND_MAXIMUM_FIXED | consumer, type_flags]) + numbers
    return bytes([tag]) + struct.pack("<H", len(body)) + body


def word_bus_number(first: int, last: int) -> bytes:
    """WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode, ...)"""
    return _range(_BUS_NUMBER_RANGE, 0, first, last, width=2)


def word_io(first: int, last: int) -> bytes:
    """WordIO (ResourceProducer, MinFixed, MaxFixed, PosDecode, EntireRange, ...)"""
    return _range(_IO_RANGE, _ENTIRE_RANGE, first, last, width=2)


def dword_memory(first: int, last: int) -> bytes:
    """DWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite, ...)"""
    return _range(_MEMORY_RANGE, _READ_WRITE, first, last, width=4)


def qword_memory(address: int, size: int) -> bytes:
    """QWordMemory (ResourceConsumer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite, ...)"""
    return _range(_MEMORY_RANGE, _READ_WRITE, address, address + size - 1, width=8, consumer=True)
