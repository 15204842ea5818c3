"""The fixtures `kvm_guest_asm` and `kvm_guest_c`: guests made at test time, each once in a session."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence

import pytest

from kvmpy.guest.program import GuestProgram
from kvmpy.guest.toolchain import GnuToolchain, SourceError, ToolMissingError
from kvmpy.pytest_plugin.requirement import skip_or_fail

__all__ = ["GuestSourceWarning", "KvmGuestAsm", "KvmGuestC", "session_toolchain"]

_toolchain = pytest.StashKey[GnuToolchain]()


class GuestSourceWarning(UserWarning):
    """What gcc warned of in the source of a guest."""


def session_toolchain(config: pytest.Config, folders: pytest.TempPathFactory) -> GnuToolchain:
    """The tool chain of this session. Under pytest-xdist, all workers share its folder."""
    if _toolchain not in config.stash:
        base = folders.getbasetemp()
        if hasattr(config, "workerinput"):  # a worker's own folder lies in the session's
            base = base.parent
        config.stash[_toolchain] = GnuToolchain(base / "kvmpy-guests")
    return config.stash[_toolchain]


class _Maker:
    def __init__(self, request: pytest.FixtureRequest, toolchain: GnuToolchain) -> None:
        self._config = request.config
        self._folder = request.path.parent
        self._toolchain = toolchain

    def _make(self, make: Callable[[], GuestProgram]) -> GuestProgram:
        __tracebackhide__ = True
        try:
            program = make()
        except (ToolMissingError, SourceError) as error:
            why = error
        else:
            if program.warnings:
                warnings.warn(GuestSourceWarning(program.warnings), stacklevel=3)
            return program
        # Out here, so that the report shows one failure and not two.
        if isinstance(why, ToolMissingError):
            skip_or_fail(str(why), self._config)
        pytest.fail(str(why))


class KvmGuestAsm(_Maker):
    """Assembles guests with GNU as."""

    def __call__(self, source: str | os.PathLike[str], *, bits: int = 16, address: int = 0x1000) -> GuestProgram:
        """The program of `source`, for a processor in 16-, 32- or 64-bit mode, linked for guest address `address`.

        `source` is a text, or a Path of a file, relative to that of the test. The syntax is Intel's
        (`.intel_syntax noprefix`); a comment starts with `#`. Execution starts at `_start`, or at the first byte. A
        file that `as` refuses fails the test.
        """
        __tracebackhide__ = True
        text = source if isinstance(source, str) else (self._folder / source).read_text("utf-8")
        return self._make(lambda: self._toolchain.assemble(text, address=address, bits=bits))


class KvmGuestC(_Maker):
    """Compiles guests with gcc."""

    def __call__(
        self,
        *sources: str | os.PathLike[str],
        bits: int = 64,
        address: int = 0x10_0000,
        flags: Sequence[str] = (),
        linker_script: str | os.PathLike[str] | None = None,
    ) -> GuestProgram:
        """The freestanding program of C and assembly `sources`, linked for guest address `address`.

        A source is C text, or a path relative to the file of the test; gcc runs in that folder, so `-I` in `flags` is
        relative to it, too. Execution starts at `_start`. See `GnuToolchain.compile_c`. A file that gcc refuses fails
        the test; what it warns of is a `GuestSourceWarning`.
        """
        __tracebackhide__ = True
        return self._make(
            lambda: self._toolchain.compile_c(
                *sources, address=address, bits=bits, flags=flags, linker_script=linker_script, folder=self._folder
            )
        )
