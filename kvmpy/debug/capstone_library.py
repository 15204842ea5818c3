"""The shared library in the package of capstone by ctypes, as far as the text of x86 instructions needs it.

Importing the package itself takes 30 ms (measured), because it knows every architecture; a whole crash report takes
less. Only version 5 of the library is used so, for its `cs_insn` differs from that of others (capstone/capstone.h).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec

__all__ = ["LibraryDecoder", "library_decoder"]

_VERSION = 5
_ARCH_X86 = 3
_MODES = {16: 1 << 1, 32: 1 << 2, 64: 1 << 3}
_NAMES = ("libcapstone.so", f"libcapstone.so.{_VERSION}")


class _Instruction(ctypes.Structure):
    """struct cs_insn of version 5."""

    _fields_ = (
        ("id", ctypes.c_uint),
        ("address", ctypes.c_uint64),
        ("size", ctypes.c_uint16),
        ("bytes", ctypes.c_uint8 * 24),
        ("mnemonic", ctypes.c_char * 32),
        ("op_str", ctypes.c_char * 160),
        ("detail", ctypes.c_void_p),
    )


class LibraryDecoder:
    """A handle of the library. `disasm_lite` is that of `capstone.Cs`."""

    def __init__(self, library: ctypes.CDLL, bits: int) -> None:
        self._library = library
        self._handle = ctypes.c_size_t()
        if library.cs_open(_ARCH_X86, _MODES[bits], ctypes.byref(self._handle)):
            raise OSError(f"libcapstone opens no handle for {bits}-bit code")

    def disasm_lite(self, code: bytes, address: int, count: int = 0) -> Iterator[tuple[int, int, str, str]]:
        """(address, size, mnemonic, operands) up to the first that is none; `count` 0 means all."""
        found = ctypes.POINTER(_Instruction)()
        number = self._library.cs_disasm(self._handle, bytes(code), len(code), address, count, ctypes.byref(found))
        try:
            for place in range(number):
                one = found[place]
                yield one.address, one.size, one.mnemonic.decode("ascii"), one.op_str.decode("ascii")
        finally:
            if number:
                self._library.cs_free(found, number)

    def __del__(self) -> None:
        if self._handle:
            self._library.cs_close(ctypes.byref(self._handle))


def library_decoder(bits: int) -> LibraryDecoder | None:
    """A decoder for code of 16, 32 or 64 `bits`; None where the package has no library of version 5 in it."""
    library = _library()
    return LibraryDecoder(library, bits) if library is not None else None


@cache
def _library() -> ctypes.CDLL | None:
    try:
        package = find_spec("capstone")
    except ValueError:  # somebody has put something else in its place
        return None
    for folder in (package and package.submodule_search_locations) or ():
        for name in _NAMES:
            path = os.path.join(folder, "lib", name)
            if os.path.exists(path):
                return _of_our_version(path)
    return None


def _of_our_version(path: str) -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(path)
    except OSError:
        return None
    if library.cs_version(None, None) >> 8 != _VERSION:
        return None
    library.cs_disasm.restype = ctypes.c_size_t
    library.cs_disasm.argtypes = [
        ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p
    ]  # fmt: skip
    library.cs_free.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.cs_free.restype = None
    return library
