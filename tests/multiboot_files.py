"""Multiboot headers and kernels made field by field, after the specifications and not after kvmpy."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from elf_files import ElfFile, Segment

__all__ = ["LOAD", "Header1", "Header2", "elf_kernel", "flat_kernel", "tag"]

LOAD = 0x10_0000
"""Where the kernels here go."""


@dataclass
class Header1:
    """A Multiboot 1 header; with `addresses` (header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr)."""

    flags: int = 0
    addresses: tuple[int, int, int, int, int] | None = None
    magic: int = 0x1BAD_B002
    wrong_by: int = 0
    video: tuple[int, int, int, int] | None = None

    def to_bytes(self) -> bytes:
        flags = self.flags | (1 << 16 if self.addresses else 0) | (1 << 2 if self.video else 0)
        header = struct.pack("<III", self.magic, flags, -(self.magic + flags) + self.wrong_by & 0xFFFF_FFFF)
        if self.addresses or self.video:
            header += struct.pack("<5I", *(self.addresses or (0, 0, 0, 0, 0)))
        return header + (struct.pack("<4I", *self.video) if self.video else b"")


def tag(kind: int, *words: int, optional: bool = False, size: int | None = None) -> bytes:
    """A tag of a Multiboot2 header."""
    data = struct.pack(f"<{len(words)}I", *words)
    length = 8 + len(data) if size is None else size
    return struct.pack("<HHI", kind, optional, length) + data + bytes(-len(data) % 8)


@dataclass
class Header2:
    """A Multiboot2 header. `end` is the last tag."""

    tags: Sequence[bytes] = ()
    end: bytes = struct.pack("<HHI", 0, 0, 8)
    magic: int = 0xE852_50D6
    architecture: int = 0
    length: int | None = None
    wrong_by: int = 0

    def to_bytes(self) -> bytes:
        body = b"".join(self.tags) + self.end
        length = 16 + len(body) if self.length is None else self.length
        checksum = -(self.magic + self.architecture + length) + self.wrong_by & 0xFFFF_FFFF
        return struct.pack("<4I", self.magic, self.architecture, length, checksum) + body


def elf_kernel(header: bytes, code: bytes = b"\xf4", *, bits: int = 32, address: int = LOAD) -> bytes:
    """An ELF kernel whose header is the first thing in its only segment, and whose code follows."""
    data = header + bytes(-len(header) % 16)
    return ElfFile(
        [Segment(address, data + code, memsz=len(data + code) + 0x1000)], bits=bits, entry=address + len(data)
    ).to_bytes()


def flat_kernel(header: bytes, code: bytes = b"\xf4") -> bytes:
    """A file that is no ELF file: eight bytes, the header, the code."""
    return b"flat\0\0\0\0" + header + code
