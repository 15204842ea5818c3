"""Guest programs made by GNU as, gcc and ld: `GnuToolchain` and the `GuestProgram` that it makes.

Assembly is in Intel syntax (`.intel_syntax noprefix`). A comment starts with `#`; `;` separates statements. A source
may switch modes by itself with `.code16`, `.code32` and `.code64`: everything is one 64-bit object. In C, inline
assembly is in AT&T syntax, as usual.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from kvmpy.errors import KvmpyError, UsageError
from kvmpy.guest import include_folder
from kvmpy.guest.program import GuestProgram

__all__ = ["GnuToolchain", "GuestProgram", "SourceError", "ToolMissingError"]

_PACKAGES = {"as": "binutils", "ld": "binutils", "gcc": "gcc"}

FREESTANDING = (
    "-std=gnu11", "-Wall", "-Wextra", "-O1", "-g",
    "-ffreestanding", "-nostdlib", "-static", "-fno-pic", "-fno-pie",
    "-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-fcf-protection=none",
    "-mno-red-zone",  # an interrupt in ring 0 pushes its frame right below the stack pointer
    "-mgeneral-regs-only",  # where KVM's emulator runs ring 0, there is no SSE
)  # fmt: skip
"""What a C program without an operating system is compiled with. Flags of the caller come later, and win."""

# The code is first, so that a flat image starts with its first instruction (in C: with section .text.entry).
_LAYOUT = """
ENTRY(_start)
SECTIONS
{{
    . = {address:#x};
    .text : {{ *(.text.entry) *(.text .text.*) }}
    .rodata : {{ *(.rodata .rodata.*) }}
    .data : {{ *(.data .data.*) }}
    .bss : {{ *(.bss .bss.*) *(COMMON) }}
    /DISCARD/ : {{ *(.comment) *(.note .note.*) *(.eh_frame) }}
}}
"""

_PATIENCE = 60
"""Seconds that a tool may take."""


class ToolMissingError(KvmpyError):
    """`tool` is not installed, or not for x86; `package` is the Debian package that has it."""

    def __init__(self, tool: str, package: str) -> None:
        super().__init__(f"needs `{tool}` for x86 (Debian package {package})")
        self.tool = tool
        self.package = package


class SourceError(UsageError):
    """A tool refused a source. `said` is what it said; the message also shows a source that is no file, with lines."""

    def __init__(self, command: Sequence[str], said: str, source: str = "") -> None:
        blamed = {int(number) for number in re.findall(r"^[^:\n]*:(\d+):", said, re.MULTILINE)}
        listing = "".join(
            f"\n{'>' if number in blamed else ' '}{number:4} {line}"
            for number, line in enumerate(source.splitlines(), 1)
        )
        super().__init__(f"{said.rstrip()}{listing}\n(said {' '.join(command)})")
        self.command = tuple(command)
        self.said = said


class GnuToolchain:
    """Assembles and compiles guests, each once, into `folder`.

    Programs are kept there by the content of their sources, the flags and the tools, and put there in one step, so that
    several processes can share it. Files that a source includes are not looked at again: a folder is for one session.
    Without `folder` it is a temporary one, removed when the interpreter ends.

    All raise ToolMissingError, which names the Debian package, and SourceError for what a tool refuses.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._made: dict[str, GuestProgram] = {}

    def assemble(self, source: str, *, address: int = 0x1000, bits: int = 16) -> GuestProgram:
        """The program of `source`, linked for guest address `address`, for a processor in 16-, 32- or 64-bit mode."""
        if bits not in (16, 32, 64):
            raise UsageError(f"bits is 16, 32 or 64, not {bits}")
        # On the first line of the source, so that the line numbers of messages are the source's.
        text = f".intel_syntax noprefix; .code{bits}; {source}\n"
        command = [_tool("as"), "--64", "-mx86-used-note=no", "-"]
        return self._program([_Unit(command, text, source)], "elf_x86_64", bits, address)

    def compile_c(
        self,
        *sources: str | os.PathLike[str],
        address: int = 0x10_0000,
        bits: int = 64,
        flags: Sequence[str] = (),
        linker_script: str | os.PathLike[str] | None = None,
        folder: str | os.PathLike[str] = ".",
    ) -> GuestProgram:
        """A freestanding program of C (and .S, .s) `sources`, linked for guest address `address`, of 32 or 64 bits.

        A source is a path, relative to `folder`, or C text; a str is a path when it is one line that ends in .c, .S or
        .s. Execution of the ELF file starts at `_start`. One who runs the flat image puts that function into section
        `.text.entry`, so that it comes first. `flags` are further options of gcc, which runs in `folder`; the headers
        of `kvmpy.guest` are found. A `linker_script` of one's own replaces the layout, and with it `address`.
        """
        if not sources:
            raise UsageError("there is nothing to compile: no source was given")
        if bits not in (32, 64):
            raise UsageError(f"C is compiled for 32 or 64 bits, not {bits}")
        option, emulation = {32: ("-m32", "elf_i386"), 64: ("-m64", "elf_x86_64")}[bits]
        command = [_tool("gcc"), option, *FREESTANDING, f"-I{include_folder()}", *flags, "-c"]
        at = Path(folder).resolve()
        units = []
        for source in sources:
            if isinstance(source, str) and not _is_path(source):
                units.append(_Unit([*command, "-x", "c", "-"], source, source, at))
            else:
                # As it was given: that is how it is called in messages, in __FILE__ and in line numbers.
                units.append(_Unit([*command, os.fspath(source)], "", "", at, (at / source).read_bytes()))
        script = None if linker_script is None else (at / linker_script).read_text("utf-8")
        return self._program(units, emulation, bits, address, script)

    def _program(
        self, units: list[_Unit], emulation: str, bits: int, address: int, linker_script: str | None = None
    ) -> GuestProgram:
        linker = _tool("ld")
        layout = _LAYOUT.format(address=address) if linker_script is None else linker_script
        key = _digest([linker, emulation, layout, *(part for unit in units for part in unit.identity())])
        if key not in self._made:
            home = self._home() / key
            if not (home / "program.elf").exists():
                self._build(units, home, [linker, "-m", emulation], layout)
            base = address if linker_script is None else None
            warnings = (home / "warnings").read_text("utf-8")
            self._made[key] = GuestProgram(home / "program.elf", bits=bits, base=base, warnings=warnings)
        return self._made[key]

    def _build(self, units: list[_Unit], home: Path, link: list[str], layout: str) -> None:
        """Make the program in a folder of our own, and put that into its place at once, unless somebody else has."""
        work = Path(tempfile.mkdtemp(dir=home.parent, prefix="building-"))
        try:
            said = [unit.translate(work / f"{number}.o") for number, unit in enumerate(units)]
            (work / "layout.ld").write_text(layout, "utf-8")
            objects = [str(work / f"{number}.o") for number in range(len(units))]
            # Without _start ld takes the first byte of .text as the entry, and says so: that is the rule here.
            options = ["-static", "--build-id=none", "-z", "max-page-size=0x1000", "-T", str(work / "layout.ld")]
            _run([*link, *options, "-o", str(work / "program.elf"), *objects], units[0].source)
            (work / "warnings").write_text("".join(said), "utf-8")
            with suppress(OSError):  # somebody else was first
                os.rename(work, home)
            if not (home / "program.elf").exists():
                raise OSError(f"cannot put a guest program into {home.parent}")
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _home(self) -> Path:
        if self._folder is None:
            import atexit

            self._folder = Path(tempfile.mkdtemp(prefix="kvmpy-guests-"))
            atexit.register(_remove, self._folder, os.getpid())
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder


class _Unit:
    """One source: the command that translates it, with `text` as standard input; `source` is what errors show."""

    def __init__(
        self, command: list[str], text: str, source: str, folder: Path | None = None, content: bytes = b""
    ) -> None:
        self.command = command
        self.text = text
        self.source = source
        self.folder = folder
        self.content = content

    def identity(self) -> Iterable[object]:
        """What decides about the result, as far as we look."""
        return (*self.command, self.text, str(self.folder), self.content)

    def translate(self, into: Path) -> str:
        """Run the command; answers its warnings."""
        return _run([*self.command, "-o", str(into)], self.source, self.text, self.folder)


def _is_path(source: str) -> bool:
    return "\n" not in source and source.endswith((".c", ".S", ".s"))


def _digest(parts: Iterable[object]) -> str:
    return hashlib.sha256(repr(list(parts)).encode()).hexdigest()[:24]


def _run(command: list[str], source: str, text: str = "", folder: Path | None = None) -> str:
    done = subprocess.run(
        command, input=text, cwd=folder, env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True,
        timeout=_PATIENCE, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise SourceError(command, done.stderr or f"exit status {done.returncode}", source)
    return done.stderr


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is not None and platform.machine() == "x86_64":
        return path
    raise ToolMissingError(name, _PACKAGES[name])


def _remove(folder: Path, process: int) -> None:
    """At the end of the interpreter that made it; a child of fork leaves it alone."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
