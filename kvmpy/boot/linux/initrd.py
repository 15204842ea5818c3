"""The initial RAM disk: where it comes from and where it goes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from kvmpy.boot.image import LoadedRange
from kvmpy.boot.image_source import ImageSource
from kvmpy.boot.initramfs import Initramfs
from kvmpy.boot.placement import highest_free, ram_text
from kvmpy.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmpy.memory import GuestMemory

__all__ = ["Initrd", "load_initrd", "open_initrd"]

Initrd = bytes | bytearray | memoryview | str | os.PathLike[str] | Initramfs
"""A path, the bytes, or an archive that `Initramfs` makes."""

NO_LIMIT = 1 << 64


def open_initrd(initrd: Initrd | None) -> ImageSource | None:
    """The bytes of an initrd, or None when there is none or it is empty. Raises ImageError, OSError."""
    if initrd is None:
        return None
    source = ImageSource(initrd.to_bytes() if isinstance(initrd, Initramfs) else initrd)
    if isinstance(initrd, (Initramfs, bytes, bytearray, memoryview)):
        source.name = f"initrd of {source.size:#x} bytes"
    return source if source.size else None


def load_initrd(
    source: ImageSource, memory: GuestMemory, taken: Sequence[LoadedRange], highest: int, *, anywhere: bool
) -> LoadedRange:
    """Write an initrd as high in RAM as it may be: page aligned, its last byte at `highest` at the most.

    With `anywhere` it may be above that when it does not fit below. Raises ImageError when there is no room.
    """
    address = highest_free(memory, source.size, taken, below=highest + 1)
    if address is None and anywhere:
        address = highest_free(memory, source.size, taken, below=NO_LIMIT)
    if address is None:
        raise ImageError(
            f"no {source.size:#x} bytes are free for the initrd at or below {highest:#x} "
            f"(the guest has {ram_text(memory)})", source.name,
        )  # fmt: skip
    source.copy_to(memory, address, 0, source.size, "the initrd")
    return LoadedRange(address, source.size, "initrd")
