"""Linux kernels: bzImage and vmlinux, with initrd and command line."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from kvmpy.boot.boot_memory import BootMemory
from kvmpy.boot.e820 import e820_map
from kvmpy.boot.elf.image import ElfImage
from kvmpy.boot.firmware_tables import place_tables
from kvmpy.boot.image import Entry, LoadedRange, RomMapping
from kvmpy.boot.image_source import ImageSource
from kvmpy.boot.linux.boot_params import BootParams, SetupData, place_setup_data
from kvmpy.boot.linux.bzimage import BzImage
from kvmpy.boot.linux.entry_states import enter_32_bit, enter_64_bit, enter_pvh, enter_real_mode
from kvmpy.boot.linux.initrd import load_initrd, open_initrd
from kvmpy.boot.linux.pvh import find_entry, place_start_info
from kvmpy.boot.linux.real_mode import RealModeSegment
from kvmpy.boot.linux.setup_header import SetupHeader, XLoadFlags
from kvmpy.boot.placement import FOUR_GIB
from kvmpy.errors import ImageError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmpy.boot.firmware_tables import FirmwareTables
    from kvmpy.boot.linux.initrd import Initrd
    from kvmpy.memory import GuestMemory

__all__ = ["LinuxKernel"]

Protocol = Literal["64", "32", "real", "pvh"]
_PROTOCOLS: tuple[Protocol, ...] = ("64", "32", "real", "pvh")

_ENTRY_64 = 0x200
"""The 64-bit entry point, from the start of the protected-mode kernel."""
_UNKNOWN_LOADER = 0xFF
_NORMAL_VIDEO = 0xFFFF


class LinuxKernel:
    """A Linux kernel for x86: a bzImage ("vmlinuz"), or the ELF file in it ("vmlinux"); a path or the bytes.

    `initrd` is a path, the bytes, or an `Initramfs`. `cmdline` is the kernel's command line.

    With `unpack` the compressed kernel in a bzImage is unpacked here and started directly, which is faster: the
    kernel's own decompressor is skipped. gzip, xz, lzma and bzip2 need nothing more; for LZ4 (Debian) and Zstandard
    (Ubuntu, Fedora) install the extra `kvmpy[linux]`. Without `unpack` the kernel's own decompressor runs. It does so
    too for an entry that only the bzImage has ("32" of a 64-bit kernel), and for one that does not say where its
    payload is (before boot protocol 2.08).

    `entry` chooses the boot protocol:

    * "64": in 64-bit mode, `boot_params` in RSI; "32": in protected mode, the same in ESI. "auto" takes the one that
      the kernel is made for.
    * "real": the setup code of a bzImage, in real mode. It asks a BIOS (INT 10h, 13h, 15h, 16h) for memory and
      devices, so there must be one; the memory map and `tables` are then the BIOS's to tell.
    * "pvh": the 32-bit entry point that Xen's ELF note XEN_ELFNOTE_PHYS32_ENTRY names; `start_info` in EBX.

    `tables` are what a firmware leaves in memory, such as an MP table: objects like
    `kvmpy.boot.firmware_tables.FirmwareTables`. None, the default, are those by which the machine that loads the kernel
    describes itself, and `()` are none at all. `acpi_rsdp_addr` is the address of an RSDP that is in guest memory
    already. `setup_data` are further nodes of the list by that name.

    The kernel is found at once, and all that is wrong with it is an ImageError that names field and offset; `load`
    raises one for what does not fit into the guest's RAM.
    """

    def __init__(
        self,
        source: bytes | bytearray | memoryview | str | os.PathLike[str],
        *,
        initrd: Initrd | None = None,
        cmdline: str | bytes = "",
        unpack: bool = True,
        entry: Literal["auto"] | Protocol = "auto",
        tables: Iterable[FirmwareTables] | None = None,
        acpi_rsdp_addr: int = 0,
        setup_data: Iterable[SetupData] = (),
    ) -> None:
        if entry != "auto" and entry not in _PROTOCOLS:
            raise UsageError(f"there is no entry {entry!r}; a kernel has auto, {', '.join(_PROTOCOLS)}")
        self._source = ImageSource(source)
        self.bzimage: BzImage | None = None
        """The file, unless it is an ELF file itself."""
        self.elf: ElfImage | None = None
        """The kernel proper when it starts without its decompressor."""
        if self._source.read(0, min(4, self._source.size), "the image") == b"\x7fELF":
            self.elf = ElfImage(self._source)
            self.header = SetupHeader.for_elf(self.elf.bits, self._source.name)
            self.protocol: Protocol = self._protocol_of_elf(self.elf, entry)
        else:
            self.bzimage = BzImage(self._source)
            self.header = self.bzimage.header
            self.protocol = self._protocol_of_bzimage(self.bzimage, entry, unpack)
        if self.protocol != "real" and self.header.version < 0x202:
            raise self.header.refusal("version", 'before 2.02 a kernel starts in real mode only: entry="real"')
        self._entry = self._find_entry()
        self._command_line = self._check_command_line(cmdline)
        self._initrd = open_initrd(initrd)
        self._tables = None if tables is None else tuple(tables)
        self._rsdp = acpi_rsdp_addr
        self._setup_data = tuple(setup_data)

    @property
    def source(self) -> ImageSource:
        """The file."""
        return self._source

    @property
    def version(self) -> str:
        """What a bzImage says about its version, builder and date; empty for a vmlinux."""
        return self.bzimage.version_text if self.bzimage is not None else ""

    def memory_needs(self) -> tuple[RomMapping, ...]:
        """Nothing: a kernel lives in RAM."""
        return ()

    @property
    def takes_tables(self) -> bool:
        """Whether `load` wants the tables of the machine: nobody gave others, and there is no BIOS to make them."""
        return self._tables is None and self.protocol != "real"

    code_is_apart = True
    """Linux keeps code and data in different pages, into none of which with code devices write."""

    def load(self, memory: GuestMemory, tables: Iterable[FirmwareTables] = ()) -> Entry:
        """Write kernel, initrd and parameters into RAM, and the tables of the mode. Raises ImageError.

        `tables` are those of the machine, for a kernel that `takes_tables`.
        """
        if not self.takes_tables:
            tables = self._tables or ()
        header = self.header.copy()
        header["type_of_loader"] = _UNKNOWN_LOADER
        header["vid_mode"] = _NORMAL_VIDEO
        if self.protocol == "real":
            return self._load_real_mode(memory, header, tables)
        area = BootMemory(memory, (), self._source.name)
        entry = self._load_kernel(area, header)
        placed = place_tables(tables, memory, area.used)
        area.ranges += placed.ranges
        memory_map = e820_map(memory, placed.memory_map)
        rsdp = self._rsdp or placed.rsdp
        command_line = area.put(self._command_line, "command line")
        if self.protocol == "pvh":
            initrd = self._load_initrd(area, header)
            modules = [(initrd.address, initrd.size)] if initrd is not None else []
            start_info = place_start_info(area, command_line, modules, memory_map, rsdp)
            return Entry(enter_pvh(area, entry, start_info), area.ranges)

        parameters = BootParams()
        address = area.place(len(parameters.data), "boot_params", alignment=0x1000)
        nodes = [*parameters.set_e820(memory_map), *self._setup_data]
        header["setup_data"] = self._place_setup_data(nodes, area, header)
        header["cmd_line_ptr"] = command_line
        enter = enter_64_bit if self.protocol == "64" else enter_32_bit
        state = enter(area, entry, address)
        initrd = self._load_initrd(area, header)
        if initrd is not None:
            parameters["ext_ramdisk_image"] = initrd.address >> 32
            parameters["ext_ramdisk_size"] = initrd.size >> 32
        parameters["acpi_rsdp_addr"] = rsdp
        parameters.set_header(header)
        memory.write(address, parameters.data)
        return Entry(state, area.ranges)

    # What starts

    def _protocol_of_elf(self, elf: ElfImage, entry: str) -> Protocol:
        native: Protocol = "64" if elf.bits == 64 else "32"
        if entry in ("auto", native):
            return native
        if entry == "pvh":
            return "pvh"
        if entry == "real":
            raise ImageError("is an ELF file, which has no real-mode code; a bzImage has", self._source.name)
        raise ImageError(f"is an ELF file of {elf.bits} bits, which has no {entry}-bit entry point", self._source.name)

    def _protocol_of_bzimage(self, image: BzImage, entry: str, unpack: bool) -> Protocol:
        header = image.header
        if entry == "real":
            return "real"
        if entry == "pvh":
            if not unpack:
                raise UsageError('entry="pvh" is a way into the unpacked kernel; unpack=False leaves it packed')
            if not image.has_payload:
                raise header.refusal("payload_offset", "the kernel cannot be unpacked, so there is no PVH entry")
            self.elf = ElfImage(image.unpack())
            return "pvh"
        has_64 = bool(header["xloadflags"] & XLoadFlags.XLF_KERNEL_64)
        if unpack and image.has_payload and not (entry == "32" and has_64):
            elf = ElfImage(image.unpack())
            native: Protocol = "64" if elf.bits == 64 else "32"
            if entry in ("auto", native):
                self.elf = elf
                return native
            if entry == "64":
                raise ImageError("is a 32-bit kernel, which has no 64-bit entry point", self._source.name)
            return "32"
        if entry == "64" and not has_64:
            raise header.refusal("xloadflags", "the kernel has no 64-bit entry point (XLF_KERNEL_64)")
        return "64" if entry == "64" or (entry == "auto" and has_64) else "32"

    def _find_entry(self) -> int:
        """The entry point of an ELF file, or that of a bzImage from the start of its protected-mode kernel."""
        if self.elf is None:
            return _ENTRY_64 if self.protocol == "64" else 0
        for segment in self.elf.segments:
            if segment.address + segment.size > FOUR_GIB:
                raise segment.header.refusal(
                    self.elf.source, "p_paddr", f"{segment.address:#x}; a Linux kernel is loaded below 4 GiB"
                )
        return find_entry(self.elf) if self.protocol == "pvh" else self.elf.physical_entry

    def _check_command_line(self, cmdline: str | bytes) -> bytes:
        line = cmdline.encode() if isinstance(cmdline, str) else bytes(cmdline)
        limit = self.header.longest_command_line
        if b"\0" in line:
            raise UsageError("a command line ends with its first zero byte, so it must not have one")
        if len(line) > limit:
            raise ImageError(
                f"a command line of {len(line)} bytes is too long for this kernel, which takes {limit} (cmdline_size)",
                self._source.name, 0x238 if "cmdline_size" in self.header and self.bzimage is not None else None,
            )  # fmt: skip
        return line + b"\0"

    # Loading

    def _load_kernel(self, area: BootMemory, header: SetupHeader) -> int:
        """Write the kernel, and answer the address of its first instruction."""
        if self.elf is not None:
            area.ranges += self.elf.load_segments(area.memory)
            if header["init_size"]:
                # Before it has read the memory map the kernel may use all of this.
                start = min(segment.address for segment in self.elf.segments)
                area.reserved.append(LoadedRange(start, header["init_size"], "kernel's first memory"))
            return self._entry
        assert self.bzimage is not None
        return self._entry + self._load_protected_mode_code(self.bzimage, area, header)

    def _load_protected_mode_code(self, image: BzImage, area: BootMemory, header: SetupHeader) -> int:
        placement = image.place(area.memory, area.ranges)
        image.source.copy_to(
            area.memory, placement.loaded.address, image.setup_size, image.protected_size, "the protected-mode kernel"
        )
        header["code32_start"] = placement.loaded.address
        header["kernel_alignment"] = placement.alignment
        area.ranges.append(placement.loaded)
        area.reserved.append(placement.unpacked)
        return placement.loaded.address

    def _load_initrd(self, area: BootMemory, header: SetupHeader) -> LoadedRange | None:
        if self._initrd is None:
            return None
        anywhere = self.protocol == "64" and bool(header["xloadflags"] & XLoadFlags.XLF_CAN_BE_LOADED_ABOVE_4G)
        loaded = load_initrd(self._initrd, area.memory, area.taken, header.highest_initrd, anywhere=anywhere)
        area.ranges.append(loaded)
        header["ramdisk_image"] = loaded.address & 0xFFFF_FFFF
        header["ramdisk_size"] = loaded.size & 0xFFFF_FFFF
        return loaded

    @staticmethod
    def _place_setup_data(nodes: Sequence[SetupData], area: BootMemory, header: SetupHeader) -> int:
        if nodes and "setup_data" not in header:
            raise header.refusal("version", "setup_data needs 2.09")
        return place_setup_data(nodes, header["setup_data"], area)

    def _load_real_mode(self, memory: GuestMemory, header: SetupHeader, tables: Iterable[FirmwareTables]) -> Entry:
        assert self.bzimage is not None
        segment = RealModeSegment.of(self.bzimage)
        area = BootMemory(memory, [segment.range], self._source.name)
        self._load_protected_mode_code(self.bzimage, area, header)
        area.ranges += place_tables(tables, memory, area.used).ranges
        header["setup_data"] = self._place_setup_data(self._setup_data, area, header)
        self._load_initrd(area, header)
        segment.fill_header(header, self._command_line)
        segment.write(memory, self.bzimage, header, self._command_line)
        return Entry(enter_real_mode(segment.base, segment.heap_end), area.ranges)

    def __repr__(self) -> str:
        packed = "" if self.elf is not None else ", packed"
        return f"<LinuxKernel {self._source.name} entry={self.protocol}{packed}>"
