"""A piece of guest-physical memory and the host memory behind it."""

import ctypes
import mmap
import os

from kvmpy.errors import KvmError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Buffer  # type: ignore[attr-defined, unused-ignore]

__all__ = ["HUGE_PAGE", "PAGE", "MemoryRegion"]

PAGE = 0x1000
HUGE_PAGE = 0x20_0000
_NORESERVE = 0x4000  # MAP_NORESERVE, which the mmap module names only since Python 3.13


class MemoryRegion:
    """`size` bytes of host memory that the guest sees from guest-physical `address` on.

    `buffer` is a writable memoryview of all of it and keeps the host memory alive: a view taken from it outlives the
    VM, and the memory is unmapped with the last view. `host_address` is where it lies in this process.
    `read_only` says that the guest may not write here (the host may, when loading).
    """

    __slots__ = ("address", "buffer", "host_address", "name", "read_only", "size")

    def __init__(
        self, address: int, buffer: memoryview, host_address: int, *, read_only: bool = False, name: str = "RAM"
    ) -> None:
        self.address = address
        self.buffer = buffer
        self.size = len(buffer)
        self.host_address = host_address
        self.read_only = read_only
        self.name = name

    @property
    def end(self) -> int:
        """The first guest-physical address behind the region."""
        return self.address + self.size

    def __repr__(self) -> str:
        return f"{self.name} {self.address:#x}..{self.end - 1:#x}"

    @classmethod
    def anonymous(
        cls, address: int, size: int, *, read_only: bool = False, huge_pages: bool = False, name: str = "RAM"
    ) -> "MemoryRegion":
        """Private zeroed memory, reserved but not yet touched.

        From 2 MiB up, host and guest addresses agree modulo 2 MiB, so that one huge page of the host can back one
        of the guest; `huge_pages` asks the host for them (madvise MADV_HUGEPAGE), which costs memory and saves faults.
        """
        check_range(address, size)
        slack = HUGE_PAGE if size >= HUGE_PAGE else 0
        try:
            mapping = mmap.mmap(-1, size + slack, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
        except OverflowError:
            raise UsageError(f"guest memory of {size:#x} bytes: no process has room for that") from None
        except OSError as error:
            raise KvmError("mmap", error.errno or 0, f"no room for guest memory of {size:#x} bytes") from None
        start = host_address_of(mapping)
        skip = (address - start) % HUGE_PAGE if slack else 0
        if huge_pages:
            mapping.madvise(mmap.MADV_HUGEPAGE)
        buffer = memoryview(mapping)[skip : skip + size]
        return cls(address, buffer, start + skip, read_only=read_only, name=name)

    @classmethod
    def from_file(
        cls, address: int, file: int, size: int, *, offset: int = 0, shared: bool = True, read_only: bool = False,
        name: str = "file",
    ) -> "MemoryRegion":  # fmt: skip
        """`size` bytes of an open file (or memfd) from `offset` on; `shared` writes through to it.

        Raises UsageError when the file is shorter: touching a page behind its end would kill the process (SIGBUS).
        """
        check_range(address, size)
        if offset % PAGE or offset < 0:
            raise UsageError(f"offset {offset:#x} in the file is not a multiple of the page size {PAGE:#x}")
        length = os.fstat(file).st_size
        if offset + size > length:
            raise UsageError(f"the file has {length:#x} bytes; {size:#x} bytes from {offset:#x} on are not there")
        flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
        # A shared mapping of a file opened for reading only can itself be read only; a private one is always writable.
        protection = mmap.PROT_READ if read_only and shared else mmap.PROT_READ | mmap.PROT_WRITE
        mapping = mmap.mmap(file, size, flags=flags, prot=protection, offset=offset)
        return cls(address, memoryview(mapping), host_address_of(mapping), read_only=read_only, name=name)

    @classmethod
    def shared_memory(
        cls, address: int, size: int, *, read_only: bool = False, name: str = "shared RAM"
    ) -> "MemoryRegion":
        """Zeroed memory in a memfd of its own, shared with processes that inherit or are passed the mapping."""
        check_range(address, size)
        file = os.memfd_create(f"kvmpy {name}")
        try:
            os.ftruncate(file, size)
            return cls.from_file(address, file, size, read_only=read_only, name=name)
        finally:
            os.close(file)  # the mapping keeps the memory


def check_range(address: int, size: int) -> None:
    """KVM_SET_USER_MEMORY_REGION's rules for a slot (KVM API, section 4.35), before the kernel says only EINVAL."""
    if not isinstance(address, int) or not isinstance(size, int):
        raise UsageError(f"guest memory at {address!r} of {size!r} bytes: address and size are ints, such as 16 * MiB")
    if size <= 0:
        raise UsageError(f"guest memory of {size} bytes: the size must be positive")
    if address < 0 or address + size >= 1 << 64:  # KVM takes an end of exactly 2^64 for a wrap
        raise UsageError(f"guest memory {address:#x}..{address + size - 1:#x} does not fit 64-bit addresses")
    if address % PAGE or size % PAGE:
        raise UsageError(
            f"guest memory at {address:#x} of {size:#x} bytes: address and size must be multiples of {PAGE:#x} (4 KiB)"
        )


def host_address_of(mapping: "Buffer") -> int:
    """Where a buffer lies in this process. The export that this takes is dropped again at once."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    except TypeError:  # a read-only buffer has no from_buffer: ask the C API for its address
        return _read_only_address(mapping)


class _PyBuffer(ctypes.Structure):
    """The head of CPython's Py_buffer, and room for the rest."""

    _fields_ = [("buf", ctypes.c_void_p), ("obj", ctypes.py_object), ("rest", ctypes.c_byte * 128)]


def _read_only_address(mapping: "Buffer") -> int:
    view = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(mapping), ctypes.byref(view), 0)
    try:
        return int(view.buf)
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(view))
