"""bzImages and vmlinux files made field by field, and guest memory to load them into."""

import gzip
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from elf_files import ElfFile, Segment
from kvmpy.memory import GuestMemory, MemoryRegion

__all__ = ["FIELDS", "KERNEL", "MIB", "BzImageFile", "pack", "ram", "vmlinux", "xen_note"]

MIB = 0x10_0000
KERNEL = 16 * MIB
"""Where the vmlinux files here are linked for."""
PATTERN = 0xCC

# From the boot protocol document, not from kvmpy: offset in the file, and a struct format.
FIELDS = {
    "setup_sects": (0x1F1, "B"), "root_flags": (0x1F2, "H"), "syssize": (0x1F4, "I"), "ram_size": (0x1F8, "H"),
    "vid_mode": (0x1FA, "H"), "root_dev": (0x1FC, "H"), "boot_flag": (0x1FE, "H"),
    "jump": (0x200, "H"), "header": (0x202, "I"), "version": (0x206, "H"),
    "realmode_swtch": (0x208, "I"), "start_sys_seg": (0x20C, "H"),
    "kernel_version": (0x20E, "H"), "type_of_loader": (0x210, "B"), "loadflags": (0x211, "B"),
    "setup_move_size": (0x212, "H"), "code32_start": (0x214, "I"), "ramdisk_image": (0x218, "I"),
    "ramdisk_size": (0x21C, "I"), "bootsect_kludge": (0x220, "I"), "heap_end_ptr": (0x224, "H"),
    "ext_loader_ver": (0x226, "B"), "ext_loader_type": (0x227, "B"), "cmd_line_ptr": (0x228, "I"),
    "initrd_addr_max": (0x22C, "I"), "kernel_alignment": (0x230, "I"), "relocatable_kernel": (0x234, "B"),
    "min_alignment": (0x235, "B"), "xloadflags": (0x236, "H"), "cmdline_size": (0x238, "I"),
    "hardware_subarch": (0x23C, "I"), "hardware_subarch_data": (0x240, "Q"),
    "payload_offset": (0x248, "I"), "payload_length": (0x24C, "I"), "setup_data": (0x250, "Q"),
    "pref_address": (0x258, "Q"), "init_size": (0x260, "I"), "handover_offset": (0x264, "I"),
    "kernel_info_offset": (0x268, "I"),
}  # fmt: skip
HEADER_END = 0x26C


@dataclass
class BzImageFile:
    """A bzImage as Linux 6.1 has it. `protected` is its protected-mode code; a `payload` is appended to that.

    Fields follow from these; `lies` overrides any.
    """

    protected: bytes = b"\xf4" * 0x400
    payload: bytes = b""
    setup: bytes = b""
    lies: Mapping[str, int] = field(default_factory=dict)
    version_text: bytes = b"6.1.0-test (builder@host) #1"

    def to_bytes(self) -> bytes:
        """Boot sector, four sectors of setup code, protected-mode code, and something like a signature."""
        protected = self.protected + self.payload
        protected += bytes(-len(protected) % 16)
        fields = {
            "setup_sects": 4, "syssize": len(protected) // 16, "vid_mode": 0xFFFF, "boot_flag": 0xAA55,
            "jump": 0xEB | HEADER_END - 0x202 << 8, "header": 0x5372_6448, "version": 0x20F, "kernel_version": 0x200,
            "loadflags": 1, "code32_start": MIB, "initrd_addr_max": 0x7FFF_FFFF, "kernel_alignment": 0x20_0000,
            "relocatable_kernel": 1, "min_alignment": 21, "xloadflags": 3, "cmdline_size": 2047,
            "payload_offset": len(self.protected) if self.payload else 0, "payload_length": len(self.payload),
            "pref_address": KERNEL, "init_size": 0x40_0000,
        }  # fmt: skip
        setup = bytearray(5 * 512)
        setup[:0x1F1] = b"\xee" * 0x1F1  # what must not get into boot_params
        setup[0x1EF] = 0xFF  # sentinel
        setup[HEADER_END : HEADER_END + len(self.setup)] = self.setup
        setup[0x400 : 0x400 + len(self.version_text) + 1] = self.version_text + b"\0"
        for name, value in (fields | dict(self.lies)).items():
            offset, code = FIELDS[name]
            struct.pack_into(f"<{code}", setup, offset, value)
        return bytes(setup) + protected + b"signature"


def pack(plain: bytes) -> bytes:
    """A payload as Linux has it with CONFIG_KERNEL_GZIP: its last four bytes are the unpacked size."""
    return gzip.compress(plain, 1, mtime=0)


def xen_note(entry: int, *, kind: int = 18, bits: int = 64, name: bytes = b"Xen\0") -> bytes:
    """The ELF note with the PVH entry point."""
    description = struct.pack("<Q" if bits == 64 else "<I", entry)
    return struct.pack("<III", len(name), len(description), kind) + name + description


def vmlinux(
    *, bits: int = 64, code: bytes = b"\xf4" * 0x100, note: bytes = b"", notes_align: int = 4, at: int = KERNEL
) -> bytes:
    """A kernel `at` a physical address, linked for the upper half; e_entry is physical as Linux has it for 64 bits."""
    upper = 0xFFFF_FFFF_8000_0000 if bits == 64 else 0xC000_0000
    data = Segment(upper + at + 0x1000, b"data", paddr=at + 0x1000, memsz=0x3000)
    segments = [Segment(upper + at, code, paddr=at), data]
    if note:
        segments.append(Segment(0, note, type=4, align=notes_align))
    return ElfFile(segments, bits=bits, entry=at).to_bytes()


def ram(*regions: tuple[int, int]) -> GuestMemory:
    """Memory full of 0xcc, 32 MiB by default."""
    memory = GuestMemory()
    for address, size in regions or ((0, 32 * MIB),):
        memory.add(MemoryRegion.anonymous(address, size))
        memory.fill(address, size, PATTERN)
    return memory
