"""The parts of an ELF file that loading needs: header, program headers, dynamic section (System V gABI, chapters 4 and
5).

Own code instead of pyelftools, for two reasons. Importing pyelftools costs more than starting the guest. And a loader
must survive hostile files: here every number is checked once, where it is read, and the error names file, field and
offset; pyelftools trusts its input and answers a lie with whatever its parser happens to raise.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvmpy._value import frozen
from kvmpy.errors import ImageError

if TYPE_CHECKING:
    from kvmpy.boot.image_source import ImageSource

__all__ = ["DT_NULL", "EM_386", "ET_DYN", "PT_DYNAMIC", "PT_LOAD", "ElfHeader", "ProgramHeader", "read_dynamic_section"]

ET_REL, ET_EXEC, ET_DYN, ET_CORE = 1, 2, 3, 4
EM_386, EM_X86_64 = 3, 62
PT_LOAD, PT_DYNAMIC = 1, 2
PN_XNUM = 0xFFFF
DT_NULL = 0

_CLASS_BITS = {1: 32, 2: 64}
_MACHINES = {32: (EM_386, "i386"), 64: (EM_X86_64, "x86-64")}
_OTHER_MACHINES = {3: "i386", 8: "MIPS", 20: "PowerPC", 21: "PowerPC 64", 22: "S/390", 40: "Arm", 62: "x86-64",
                   183: "AArch64", 243: "RISC-V", 258: "LoongArch"}  # fmt: skip
_TYPES = {0: "no file type", ET_REL: "a relocatable object, which must be linked first", ET_CORE: "a core dump"}

# Without e_ident, which takes the first 16 bytes. Order and offsets as in struct Elf32_Ehdr and Elf64_Ehdr.
_HEADER = {32: struct.Struct("<HHIIIIIHHHHHH"), 64: struct.Struct("<HHIQQQIHHHHHH")}
_PROGRAM_HEADER = {32: struct.Struct("<IIIIIIII"), 64: struct.Struct("<IIQQQQQQ")}
_DYNAMIC_ENTRY = {32: struct.Struct("<II"), 64: struct.Struct("<QQ")}
# Where in the file a field of the header is: e_phnum and e_shnum differ by class because addresses do.
_FIELD_OFFSETS = {
    32: {"e_type": 0x10, "e_machine": 0x12, "e_version": 0x14, "e_entry": 0x18, "e_phoff": 0x1C, "e_ehsize": 0x28,
         "e_phentsize": 0x2A, "e_phnum": 0x2C},
    64: {"e_type": 0x10, "e_machine": 0x12, "e_version": 0x14, "e_entry": 0x18, "e_phoff": 0x20, "e_ehsize": 0x34,
         "e_phentsize": 0x36, "e_phnum": 0x38},
}  # fmt: skip
_SEGMENT_FIELD_OFFSETS = {
    32: {"p_offset": 0x04, "p_vaddr": 0x08, "p_paddr": 0x0C, "p_filesz": 0x10, "p_memsz": 0x14, "p_align": 0x1C},
    64: {"p_offset": 0x08, "p_vaddr": 0x10, "p_paddr": 0x18, "p_filesz": 0x20, "p_memsz": 0x28, "p_align": 0x30},
}  # fmt: skip


@frozen
class ElfHeader:
    """The ELF header, checked: little endian, i386 in class ELF32 or x86-64 in class ELF64, ET_EXEC or ET_DYN.

    `bits` is 32 or 64; `type`, `machine` and `entry` are e_type, e_machine and e_entry; `section_table` is
    (e_shoff, e_shentsize, e_shnum) and `section_names` e_shstrndx, as they stand in the file, unchecked: loading does
    without sections.
    """

    bits: int
    type: int
    machine: int
    entry: int
    program_headers_offset: int
    program_header_count: int
    section_table: tuple[int, int, int]
    section_names: int

    @property
    def entry_offset(self) -> int:
        """Where in the file e_entry is, for errors."""
        return _FIELD_OFFSETS[self.bits]["e_entry"]

    @classmethod
    def read(cls, source: ImageSource) -> ElfHeader:
        """Read and check the header. Raises ImageError that names the field at fault."""
        ident = source.read(0, 16, "the ELF identification (e_ident)")
        if ident[:4] != b"\x7fELF":
            raise ImageError(f"not an ELF file: it starts with {ident[:4].hex(' ')}", source.name, 0)
        bits = _CLASS_BITS.get(ident[4])
        if bits is None:
            raise ImageError(f"EI_CLASS is {ident[4]}, neither ELFCLASS32 (1) nor ELFCLASS64 (2)", source.name, 4)
        if ident[5] != 1:
            raise ImageError(f"EI_DATA is {ident[5]}; x86 is little endian, ELFDATA2LSB (1)", source.name, 5)
        if ident[6] != 1:
            raise ImageError(f"EI_VERSION is {ident[6]}, not EV_CURRENT (1)", source.name, 6)

        layout = _HEADER[bits]
        raw = source.read(16, layout.size, f"the ELF{bits} header")
        (
            type_, machine, version, entry, phoff, shoff, _flags, ehsize, phentsize, phnum, shentsize, shnum, shstrndx,
        ) = layout.unpack(raw)  # fmt: skip
        offsets = _FIELD_OFFSETS[bits]

        def refuse(field: str, message: str) -> ImageError:
            return ImageError(f"{field} is {message}", source.name, offsets[field])

        expected_machine, machine_name = _MACHINES[bits]
        if machine != expected_machine:
            found = _OTHER_MACHINES.get(machine)
            found_text = f"{machine}, {found}" if found else f"{machine}, an unknown machine"
            raise refuse("e_machine", f"{found_text}; class ELF{bits} goes with {machine_name} ({expected_machine})")
        if type_ not in (ET_EXEC, ET_DYN):
            kind = _TYPES.get(type_, "unknown")
            raise refuse("e_type", f"{type_}, {kind}; an image is ET_EXEC (2) or ET_DYN (3)")
        if version != 1:
            raise refuse("e_version", f"{version}, not EV_CURRENT (1)")
        if ehsize < 16 + layout.size:
            raise refuse("e_ehsize", f"{ehsize}; a header of class ELF{bits} has {16 + layout.size} bytes")
        if phnum == 0:
            raise refuse("e_phnum", "0: there is no program header, so nothing to load")
        if phnum == PN_XNUM:
            raise refuse("e_phnum", "PN_XNUM (0xffff), more program headers than an image can need")
        entry_size = _PROGRAM_HEADER[bits].size
        if phentsize != entry_size:
            raise refuse("e_phentsize", f"{phentsize}; a program header of class ELF{bits} has {entry_size} bytes")
        if phoff + phnum * entry_size > source.size:
            raise refuse(
                "e_phoff", f"{phoff:#x} and e_phnum {phnum}: the program headers end behind the file ({source.size:#x})"
            )
        return cls(bits, type_, machine, entry, phoff, phnum, (shoff, shentsize, shnum), shstrndx)

    def read_program_headers(self, source: ImageSource) -> list[ProgramHeader]:
        """All program headers in the order of the file; PT_LOAD and PT_DYNAMIC ones are checked."""
        layout = _PROGRAM_HEADER[self.bits]
        raw = source.read(self.program_headers_offset, self.program_header_count * layout.size, "the program headers")
        headers = []
        for index, fields in enumerate(layout.iter_unpack(raw)):
            if self.bits == 32:
                type_, offset, vaddr, paddr, filesz, memsz, flags, align = fields
            else:
                type_, flags, offset, vaddr, paddr, filesz, memsz, align = fields
            header = ProgramHeader(
                type_, flags, offset, vaddr, paddr, filesz, memsz, align,
                index=index, bits=self.bits, file_offset=self.program_headers_offset + index * layout.size,
            )  # fmt: skip
            if type_ in (PT_LOAD, PT_DYNAMIC):
                header.check(source)
            headers.append(header)
        return headers


@frozen
class ProgramHeader:
    """A program header: the manual's fields without their `p_`, and where it stands (`index`, `file_offset`)."""

    type: int
    flags: int
    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int
    align: int
    index: int
    bits: int
    file_offset: int

    @property
    def name(self) -> str:
        """How errors call it."""
        return f"program header {self.index}"

    def field_offset(self, field: str) -> int:
        """Where in the file a field ("p_vaddr") is."""
        return self.file_offset + _SEGMENT_FIELD_OFFSETS[self.bits][field]

    def refusal(self, source: ImageSource, field: str, message: str) -> ImageError:
        """The error that says `message` about `field`."""
        return ImageError(f"{self.name}: {field} is {message}", source.name, self.field_offset(field))

    def check(self, source: ImageSource) -> None:
        """Raise ImageError when the segment is not in the file, or wraps around the end of the address space."""
        if self.offset + self.filesz > source.size:
            field = "p_offset" if self.offset > source.size else "p_filesz"
            value = self.offset if self.offset > source.size else self.filesz
            raise self.refusal(
                source, field,
                f"{value:#x}: {self.filesz:#x} bytes at {self.offset:#x} end behind the file ({source.size:#x})",
            )  # fmt: skip
        if self.type != PT_LOAD:
            return
        if self.filesz > self.memsz:
            raise self.refusal(source, "p_filesz", f"{self.filesz:#x}, more than p_memsz {self.memsz:#x}")
        self.check_address(source, "p_vaddr")
        if self.align & (self.align - 1):
            raise self.refusal(source, "p_align", f"{self.align:#x}, not a power of two")

    def check_address(self, source: ImageSource, field: str) -> None:
        """Raise ImageError when the segment at its "p_vaddr" or "p_paddr" wraps around the end of the address space.

        p_paddr is checked only by who uses it: the gABI leaves its contents unspecified for programs.
        """
        address = self.paddr if field == "p_paddr" else self.vaddr
        if address + self.memsz > 1 << self.bits:
            raise self.refusal(
                source, field, f"{address:#x}; with p_memsz {self.memsz:#x} it wraps around at 2^{self.bits}"
            )


def read_dynamic_section(source: ImageSource, header: ProgramHeader) -> list[tuple[int, int]]:
    """(d_tag, d_val) of the PT_DYNAMIC segment, up to DT_NULL or its end."""
    layout = _DYNAMIC_ENTRY[header.bits]
    raw = source.read(header.offset, header.filesz - header.filesz % layout.size, "the dynamic section")
    entries: list[tuple[int, int]] = []
    for tag, value in layout.iter_unpack(raw):
        if tag == DT_NULL:
            break
        entries.append((tag, value))
    return entries
