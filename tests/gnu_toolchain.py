"""Guest programs for tests: `assemble`, `assemble_with_symbols`, `compile_c`, by kvmpy.guest.toolchain.

Results are kept for the session. Without the tools tests skip, naming the Debian package (they fail under
KVMPY_REQUIRE_KVM=1 or --require-kvm).
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from kvmpy.guest.toolchain import GnuToolchain, GuestProgram, SourceError, ToolMissingError
from kvmpy.pytest_plugin.requirement import skip_or_fail

__all__ = ["GuestProgram", "SourceError", "assemble", "assemble_with_symbols", "compile_c"]

TOOLCHAIN = GnuToolchain()

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _or_skip(make: Callable[_P, _R]) -> Callable[_P, _R]:
    def made(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return make(*args, **kwargs)
        except ToolMissingError as error:
            skip_or_fail(str(error))

    return made


@functools.cache  # the tool chain remembers, too, but looks at the tools each time, which property tests would feel
def _assembled(source: str, address: int, bits: int) -> GuestProgram:
    return TOOLCHAIN.assemble(source, address=address, bits=bits)


@_or_skip
def assemble(source: str, *, address: int = 0x1000, bits: int = 16) -> bytes:
    """The machine code of `source`, linked for guest address `address`, for a processor in 16-, 32- or 64-bit mode."""
    return _assembled(source, address, bits).image


@_or_skip
def assemble_with_symbols(source: str, *, address: int = 0x1000, bits: int = 16) -> tuple[bytes, dict[str, int]]:
    """As `assemble`, with the address of every label."""
    program = _assembled(source, address, bits)
    return program.image, dict(program.symbols)


@_or_skip
def compile_c(source: str, *, address: int = 0x100000, bits: int = 64, flags: tuple[str, ...] = ()) -> GuestProgram:
    """A freestanding C program; see `GnuToolchain.compile_c`. A warning is an error here."""
    return TOOLCHAIN.compile_c(source, address=address, bits=bits, flags=("-Werror", *flags))
