"""The parts of a bzImage: setup code, the protected-mode kernel (a decompressor), and in it the compressed kernel.

Linux/x86 boot protocol, "The Real-Mode Kernel Header" and "Loading The Rest of The Kernel".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpy.boot.decompression import compression_of, decompress
from kvmpy.boot.image import LoadedRange
from kvmpy.boot.image_source import ImageSource
from kvmpy.boot.linux.setup_header import LoadFlags, SetupHeader
from kvmpy.boot.placement import FOUR_GIB, lowest_free, ram_spans, ram_text
from kvmpy.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvmpy.memory import GuestMemory

__all__ = ["BzImage", "Placement"]

SECTOR = 512
PARAGRAPH = 16
LARGEST_SETUP = 0x8000
"""The real-mode code can total up to 32 KiB."""
ONE_MIB = 0x10_0000
LOADED_LOW = 0x1_0000
"""Where a zImage goes."""
LARGEST_KERNEL = 1 << 30
"""More than this no kernel unpacks to: x86-64 maps 1 GiB for it (KERNEL_IMAGE_SIZE)."""


class Placement:
    """Where the protected-mode kernel goes, and the RAM that it needs there.

    `loaded` is where the bytes of the file go, `alignment` what that was aligned to (kernel_alignment), and `unpacked`
    what the kernel uses before it has read the memory map, empty when it does not say.
    """

    __slots__ = ("alignment", "loaded", "unpacked")

    def __init__(self, alignment: int, loaded: LoadedRange, unpacked: LoadedRange) -> None:
        self.alignment = alignment
        self.loaded = loaded
        self.unpacked = unpacked


class BzImage:
    """A bzImage (or zImage), its header checked against the file. Raises ImageError that names field and offset."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source
        self.header = header = SetupHeader.read(source)
        self.setup_size = ((header["setup_sects"] or 4) + 1) * SECTOR
        """Bytes of real-mode code: boot sector and setup code. The protected-mode kernel follows."""
        if self.setup_size > LARGEST_SETUP:
            raise header.refusal("setup_sects", f"real-mode code of {self.setup_size:#x} bytes; 0x8000 is the limit")
        self.protected_size = self._protected_size()
        """Bytes of the protected-mode kernel."""
        self.loaded_high = bool(header["loadflags"] & LoadFlags.LOADED_HIGH)
        """Whether it is loaded at 1 MiB or above, as every bzImage; a zImage goes to 64 KiB."""
        self._check_reloc_fields()

    def _protected_size(self) -> int:
        header, rest = self.header, self.source.size - self.setup_size
        if rest <= 0:
            raise header.refusal(
                "setup_sects", f"the file ends ({self.source.size:#x}) before the protected-mode kernel"
            )
        if "syssize" not in header:
            return rest
        size = header["syssize"] * PARAGRAPH
        if not size:
            raise header.refusal("syssize", "there is no protected-mode kernel")
        if size > rest:
            raise header.refusal(
                "syssize", f"{size:#x} bytes of kernel follow the setup code, but the file has {rest:#x}: truncated"
            )
        return size  # what follows is a signature

    def _check_reloc_fields(self) -> None:
        header = self.header
        alignment, least = header["kernel_alignment"], header["min_alignment"]
        if header["relocatable_kernel"] and (not alignment or alignment & (alignment - 1)):
            raise header.refusal("kernel_alignment", "not a power of two")
        if header["relocatable_kernel"] and least and 1 << least > alignment:
            raise header.refusal("min_alignment", f"2 to its power is more than kernel_alignment, {alignment:#x}")

    @property
    def version_text(self) -> str:
        """What the kernel calls itself, such as "6.1.0-13-cloud-amd64 (...)"; empty when it does not say."""
        offset = self.header["kernel_version"] + 0x200
        if offset == 0x200 or offset >= self.setup_size:
            return ""
        text = self.source.read(offset, min(0x400, self.setup_size - offset), "the kernel's version")
        return text.partition(b"\0")[0].decode("utf-8", "replace")

    # The compressed kernel

    @property
    def has_payload(self) -> bool:
        """Whether the header says where the compressed kernel is (since version 2.08)."""
        return self.header["payload_offset"] != 0

    def unpack(self) -> ImageSource:
        """The kernel proper, an ELF file, decompressed here on the host."""
        header = self.header
        offset, length = header["payload_offset"], header["payload_length"]
        if offset + length > self.protected_size:
            name = "payload_offset" if offset > self.protected_size else "payload_length"
            raise header.refusal(name, f"the payload ends behind the kernel ({self.protected_size:#x} bytes)")
        if length < 8:
            raise header.refusal("payload_length", "too short for a kernel")
        place = self.setup_size + offset
        payload = self.source.read(place, length, "the payload")
        if compression_of(payload) == "none":
            size = length
        else:
            # Every compressed payload ends with its unpacked size: gzip says it by itself, for the others it is added.
            size = int.from_bytes(payload[-4:], "little")
            if not 0 < size <= LARGEST_KERNEL or size > (header["init_size"] or LARGEST_KERNEL):
                raise ImageError(
                    f"the payload says that it unpacks to {size:#x} bytes, more than init_size or nothing",
                    self.source.name, place + length - 4,
                )  # fmt: skip
        kernel = ImageSource(decompress(payload, size, self.source.name, place))
        kernel.name = f"kernel in {self.source.name}"
        return kernel

    # Where the protected-mode kernel goes

    def place(self, memory: GuestMemory, taken: Sequence[LoadedRange]) -> Placement:
        """Choose the address of the protected-mode kernel, so that what it needs is in RAM and not in `taken`.

        A relocatable kernel goes to pref_address when that is free, else to the lowest address that is above 1 MiB, by
        the largest alignment that min_alignment allows. Raises ImageError when there is no such place.
        """
        header = self.header
        if not header["relocatable_kernel"] or not self.loaded_high:
            address = ONE_MIB if self.loaded_high else LOADED_LOW
            placement = self._placement(address, header["kernel_alignment"], header["pref_address"] or address)
            if self._fits(memory, placement, taken):
                return placement
            raise header.refusal(
                "relocatable_kernel",
                f"the kernel runs only where it is linked for, {placement.loaded} and {placement.unpacked}, which is "
                f"not all free RAM (the guest has {ram_text(memory)})",
            )
        need = max(self.protected_size, header["init_size"])
        for alignment in self._alignments():
            lowest = lowest_free(memory, need, taken, alignment=alignment, above=ONE_MIB)
            for address in (header["pref_address"], lowest or 0):
                if address < ONE_MIB or address % alignment or address + need > FOUR_GIB:
                    continue
                placement = self._placement(address, alignment, address)
                if self._fits(memory, placement, taken):
                    return placement
        raise header.refusal(
            "init_size", f"no {need:#x} bytes for the kernel are free from 1 MiB up (the guest has {ram_text(memory)})"
        )

    def _alignments(self) -> Iterator[int]:
        alignment = self.header["kernel_alignment"]
        least = 1 << self.header["min_alignment"] if self.header["min_alignment"] else alignment
        while alignment >= least:
            yield alignment
            alignment >>= 1

    def _placement(self, address: int, alignment: int, start: int) -> Placement:
        loaded = LoadedRange(address, self.protected_size, "kernel")
        return Placement(alignment, loaded, LoadedRange(start, self.header["init_size"], "unpacked kernel"))

    @staticmethod
    def _fits(memory: GuestMemory, placement: Placement, taken: Sequence[LoadedRange]) -> bool:
        spans = ram_spans(memory)
        return all(
            any(start <= wanted.address and wanted.end <= end for start, end in spans)
            and not any(used.overlaps(wanted.address, wanted.size) for used in taken)
            for wanted in (placement.loaded, placement.unpacked)
            if wanted.size
        )

    def __repr__(self) -> str:
        return f"<BzImage {self.source.name} boot protocol {self.header.protocol}>"
