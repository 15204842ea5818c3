"""ELF files made field by field, for tests that need one which no linker would write."""

import struct
from dataclasses import dataclass, field

__all__ = ["DYNAMIC", "EM_386", "EM_X86_64", "ET_DYN", "ET_EXEC", "LOAD", "ElfFile", "Segment", "dynamic_section"]

ET_EXEC, ET_DYN = 2, 3
EM_386, EM_X86_64 = 3, 62
LOAD, DYNAMIC = 1, 2

_HEADER = {
    32: (("e_type", "H"), ("e_machine", "H"), ("e_version", "I"), ("e_entry", "I"), ("e_phoff", "I"), ("e_shoff", "I"),
         ("e_flags", "I"), ("e_ehsize", "H"), ("e_phentsize", "H"), ("e_phnum", "H"), ("e_shentsize", "H"),
         ("e_shnum", "H"), ("e_shstrndx", "H")),
    64: (("e_type", "H"), ("e_machine", "H"), ("e_version", "I"), ("e_entry", "Q"), ("e_phoff", "Q"), ("e_shoff", "Q"),
         ("e_flags", "I"), ("e_ehsize", "H"), ("e_phentsize", "H"), ("e_phnum", "H"), ("e_shentsize", "H"),
         ("e_shnum", "H"), ("e_shstrndx", "H")),
}  # fmt: skip
_PROGRAM_HEADER = {
    32: (("p_type", "I"), ("p_offset", "I"), ("p_vaddr", "I"), ("p_paddr", "I"), ("p_filesz", "I"), ("p_memsz", "I"),
         ("p_flags", "I"), ("p_align", "I")),
    64: (("p_type", "I"), ("p_flags", "I"), ("p_offset", "Q"), ("p_vaddr", "Q"), ("p_paddr", "Q"), ("p_filesz", "Q"),
         ("p_memsz", "Q"), ("p_align", "Q")),
}  # fmt: skip


@dataclass
class Segment:
    """A program header and its contents. Fields that are None follow from these; `lies` overrides any."""

    vaddr: int
    data: bytes = b"\xf4"
    paddr: int | None = None
    memsz: int | None = None
    type: int = LOAD
    align: int = 0x1000
    lies: dict[str, int] = field(default_factory=dict)


@dataclass
class ElfFile:
    """A file of class `bits`; `lies` overrides fields of the header ("e_phnum"), `ident` bytes of e_ident."""

    segments: list[Segment]
    bits: int = 64
    type: int = ET_EXEC
    entry: int | None = None
    lies: dict[str, int] = field(default_factory=dict)
    ident: dict[int, int] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Header, program headers, then the segments one after the other, 16-byte aligned."""
        header_size = 16 + struct.calcsize(_format(_HEADER[self.bits]))
        entry_size = struct.calcsize(_format(_PROGRAM_HEADER[self.bits]))
        offset = header_size + entry_size * len(self.segments) + 15 & -16
        table, contents = b"", b""
        for segment in self.segments:
            place = offset + len(contents)
            fields = {
                "p_type": segment.type, "p_flags": 7, "p_offset": place, "p_vaddr": segment.vaddr,
                "p_paddr": segment.vaddr if segment.paddr is None else segment.paddr, "p_filesz": len(segment.data),
                "p_memsz": len(segment.data) if segment.memsz is None else segment.memsz, "p_align": segment.align,
            }  # fmt: skip
            table += _pack(_PROGRAM_HEADER[self.bits], fields | segment.lies)
            contents += segment.data + bytes(-len(segment.data) % 16)
        ident = bytearray(b"\x7fELF" + bytes([self.bits // 32, 1, 1]) + bytes(9))
        for index, value in self.ident.items():
            ident[index] = value
        entry = self.entry
        if entry is None:
            entry = self.segments[0].vaddr if self.segments else 0x1000
        fields = {
            "e_type": self.type, "e_machine": EM_X86_64 if self.bits == 64 else EM_386, "e_version": 1,
            "e_entry": entry, "e_phoff": header_size,
            "e_shoff": 0, "e_flags": 0, "e_ehsize": header_size, "e_phentsize": entry_size,
            "e_phnum": len(self.segments), "e_shentsize": 0, "e_shnum": 0, "e_shstrndx": 0,
        }  # fmt: skip
        head = bytes(ident) + _pack(_HEADER[self.bits], fields | self.lies) + table
        return head.ljust(offset, b"\0") + contents


def dynamic_section(entries: list[tuple[int, int]], bits: int = 64) -> bytes:
    """The contents of a PT_DYNAMIC segment: (d_tag, d_val) pairs, and DT_NULL."""
    word = "Q" if bits == 64 else "I"
    return b"".join(struct.pack(f"<2{word}", tag, value) for tag, value in [*entries, (0, 0)])


def _format(fields: tuple[tuple[str, str], ...]) -> str:
    return "<" + "".join(code for _, code in fields)


def _pack(fields: tuple[tuple[str, str], ...], values: dict[str, int]) -> bytes:
    return struct.pack(_format(fields), *(values[name] for name, _ in fields))
