"""The setup header: what a bzImage says about itself, and what a boot loader answers in it.

Names, offsets, sizes and versions are those of the Linux/x86 boot protocol document (Documentation/arch/x86/boot.rst,
"The Real-Mode Kernel Header").
"""

from __future__ import annotations

from enum import IntFlag
from typing import TYPE_CHECKING

from kvmpy.boot.field_table import Fields
from kvmpy.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmpy.boot.image_source import ImageSource

__all__ = ["PROTOCOL", "SETUP_HEADER", "LoadFlags", "SetupHeader", "XLoadFlags"]

PROTOCOL: Mapping[str, tuple[int, int, int]] = {
    # name: offset in the file, size, the version of the protocol that brought it
    "setup_sects": (0x1F1, 1, 0x000),
    "root_flags": (0x1F2, 2, 0x000),
    "syssize": (0x1F4, 4, 0x204),
    "ram_size": (0x1F8, 2, 0x000),
    "vid_mode": (0x1FA, 2, 0x000),
    "root_dev": (0x1FC, 2, 0x000),
    "boot_flag": (0x1FE, 2, 0x000),
    "jump": (0x200, 2, 0x200),
    "header": (0x202, 4, 0x200),
    "version": (0x206, 2, 0x200),
    "realmode_swtch": (0x208, 4, 0x200),
    "start_sys_seg": (0x20C, 2, 0x200),
    "kernel_version": (0x20E, 2, 0x200),
    "type_of_loader": (0x210, 1, 0x200),
    "loadflags": (0x211, 1, 0x200),
    "setup_move_size": (0x212, 2, 0x200),
    "code32_start": (0x214, 4, 0x200),
    "ramdisk_image": (0x218, 4, 0x200),
    "ramdisk_size": (0x21C, 4, 0x200),
    "bootsect_kludge": (0x220, 4, 0x200),
    "heap_end_ptr": (0x224, 2, 0x201),
    "ext_loader_ver": (0x226, 1, 0x202),
    "ext_loader_type": (0x227, 1, 0x202),
    "cmd_line_ptr": (0x228, 4, 0x202),
    "initrd_addr_max": (0x22C, 4, 0x203),
    "kernel_alignment": (0x230, 4, 0x205),
    "relocatable_kernel": (0x234, 1, 0x205),
    "min_alignment": (0x235, 1, 0x20A),
    "xloadflags": (0x236, 2, 0x20C),
    "cmdline_size": (0x238, 4, 0x206),
    "hardware_subarch": (0x23C, 4, 0x207),
    "hardware_subarch_data": (0x240, 8, 0x207),
    "payload_offset": (0x248, 4, 0x208),
    "payload_length": (0x24C, 4, 0x208),
    "setup_data": (0x250, 8, 0x209),
    "pref_address": (0x258, 8, 0x20A),
    "init_size": (0x260, 4, 0x20A),
    "handover_offset": (0x264, 4, 0x20B),
    "kernel_info_offset": (0x268, 4, 0x20F),
}

SETUP_HEADER = {name: (offset, size) for name, (offset, size, _) in PROTOCOL.items()}
"""The table without the versions."""

START = 0x1F1
LARGEST_END = 0x290
"""Where boot_params has its next field (edd_mbr_sig_buffer): no header can be longer."""
BOOT_FLAG = 0xAA55
MAGIC = 0x5372_6448  # "HdrS"
LATEST = 0x20F
_SHORT_JUMP = 0xEB


class LoadFlags(IntFlag):
    """Bits of `loadflags`."""

    LOADED_HIGH = 1 << 0
    KASLR_FLAG = 1 << 1
    QUIET_FLAG = 1 << 5
    KEEP_SEGMENTS = 1 << 6
    CAN_USE_HEAP = 1 << 7


class XLoadFlags(IntFlag):
    """Bits of `xloadflags`."""

    XLF_KERNEL_64 = 1 << 0
    XLF_CAN_BE_LOADED_ABOVE_4G = 1 << 1
    XLF_EFI_HANDOVER_32 = 1 << 2
    XLF_EFI_HANDOVER_64 = 1 << 3
    XLF_EFI_KEXEC = 1 << 4
    XLF_5LEVEL = 1 << 5
    XLF_5LEVEL_ENABLED = 1 << 6


class SetupHeader(Fields):
    """A setup header, from offset 0x1f1 of the file to its end. `image` is the file's name, for errors.

    A field that the kernel's version of the protocol does not have reads as 0; `name in header` tells. It is not
    written either: the document forbids that.
    """

    def __init__(self, data: bytes | bytearray, image: str) -> None:
        super().__init__(SETUP_HEADER, bytearray(data), START)
        self.image = image

    @classmethod
    def read(cls, source: ImageSource) -> SetupHeader:
        """The header of a file, its own fields checked. Raises ImageError that names the field at fault."""
        what = "the setup header of a bzImage"
        header = cls(source.read(START, LARGEST_END - START, what), source.name)
        if header["boot_flag"] != BOOT_FLAG:
            raise header.refusal("boot_flag", f"not {BOOT_FLAG:#x}: this is no Linux kernel image")
        # Not by name yet: a field counts only when the version, which is one itself, says that it is there.
        if int.from_bytes(header.data[0x202 - START : 0x206 - START], "little") != MAGIC:
            raise ImageError(
                'there is no "HdrS" here: this is no Linux kernel image, or one from before version 2.00 of the boot '
                "protocol (Linux 1.3.73)", source.name, 0x202,
            )  # fmt: skip
        if header.version < 0x200:
            raise ImageError(f"version is {header.version:#x}; the first one is 0x200", source.name, 0x206)
        if header.data[0x200 - START] != _SHORT_JUMP:
            raise header.refusal("jump", "not a short jump (0xeb), which tells the header's length")
        end = 0x202 + header.data[0x201 - START]
        if not PROTOCOL["bootsect_kludge"][0] <= end <= LARGEST_END:
            raise header.refusal(
                "jump", f"the header would end at {end:#x}; it ends between 0x220 and {LARGEST_END:#x}"
            )
        header.data = header.data[: end - START]
        return header

    @classmethod
    def for_elf(cls, bits: int, image: str) -> SetupHeader:
        """What a vmlinux, which has no header, would say: an ELF file of 32 or 64 bits."""
        end = PROTOCOL["kernel_info_offset"][0] + 4
        header = cls(bytes(end - START), image)
        header.data[0x206 - START : 0x208 - START] = LATEST.to_bytes(2, "little")
        header["boot_flag"] = BOOT_FLAG
        header["jump"] = _SHORT_JUMP | end - 0x202 << 8
        header["header"] = MAGIC
        header["loadflags"] = LoadFlags.LOADED_HIGH
        header["initrd_addr_max"] = 0x7FFF_FFFF if bits == 64 else 0x37FF_FFFF
        header["kernel_alignment"] = 0x20_0000
        header["cmdline_size"] = 2047  # COMMAND_LINE_SIZE of x86, less the terminating zero
        if bits == 64:
            header["xloadflags"] = XLoadFlags.XLF_KERNEL_64 | XLoadFlags.XLF_CAN_BE_LOADED_ABOVE_4G
        return header

    @property
    def version(self) -> int:
        """The version of the boot protocol, 0x20f for 2.15."""
        return int.from_bytes(self.data[0x206 - START : 0x208 - START], "little")

    @property
    def protocol(self) -> str:
        """The version as text: "2.15"."""
        return f"{self.version >> 8}.{self.version & 0xFF:02}"

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str) or name not in PROTOCOL:
            return False
        offset, size, since = PROTOCOL[name]
        return self.version >= since and offset + size <= START + len(self.data)

    def __getitem__(self, name: str) -> int:
        return super().__getitem__(name) if name in self or name not in PROTOCOL else 0

    def __setitem__(self, name: str, value: int) -> None:
        if name in self or name not in PROTOCOL:
            super().__setitem__(name, value)

    def get(self, name: str, default: int) -> int:
        """A field, or `default` for one that this kernel's version of the protocol does not have."""
        return super().__getitem__(name) if name in self else default

    @property
    def highest_initrd(self) -> int:
        """The last address that an initrd may take; before version 2.03 the document's default."""
        return self.get("initrd_addr_max", 0x37FF_FFFF)

    @property
    def longest_command_line(self) -> int:
        """Bytes of a command line, without the terminating zero; before version 2.06 the document's default."""
        return self.get("cmdline_size", 255)

    def copy(self) -> SetupHeader:
        """A copy to be filled in."""
        return SetupHeader(self.data, self.image)

    def refusal(self, name: str, message: str) -> ImageError:
        """The error that says `message` about a field."""
        return ImageError(f"{name} is {self[name]:#x}: {message}", self.image, PROTOCOL[name][0])
