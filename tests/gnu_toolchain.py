"""Guest programs made by the GNU tools: `assemble`, `assemble_with_symbols`, `compile_c`.

Assembly is in Intel syntax (`.intel_syntax noprefix`). A comment starts with `#`; `;` separates statements. A source
may switch modes by itself with `.code16`, `.code32` and `.code64`: everything is one 64-bit object. Inline assembly in
C is in AT&T syntax, as usual. Results are cached by content for the session. Without the tools tests skip, naming the
Debian package (they fail under KVMPY_REQUIRE_KVM=1).
"""

import atexit
import functools
import hashlib
import platform
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from elftools.elf.constants import SH_FLAGS
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

import kvm_presence

__all__ = ["AssemblerError", "GuestProgram", "assemble", "assemble_with_symbols", "compile_c"]

_GUEST_HEADERS = Path(__file__).parent.parent / "kvmpy" / "guest"

_PACKAGES = {"as": "binutils", "ld": "binutils", "gcc": "gcc"}

_FREESTANDING = (
    "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1",
    "-ffreestanding", "-nostdlib", "-static", "-fno-pic", "-fno-pie",
    "-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-fcf-protection=none",
    "-mno-red-zone",  # an interrupt in ring 0 pushes its frame right below the stack pointer
    "-mgeneral-regs-only",  # ring 0 of the test machine is emulated by KVM, which knows no SSE
)  # fmt: skip

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


class AssemblerError(Exception):
    """A tool refused a source. The message holds what it said and the source with line numbers."""

    def __init__(self, command: list[str], said: str, source: str) -> None:
        blamed = {int(number) for number in re.findall(r"^[^:\n]*:(\d+):", said, re.MULTILINE)}
        listing = "\n".join(
            f"{'>' if number in blamed else ' '}{number:4} {line}" for number, line in enumerate(source.splitlines(), 1)
        )
        super().__init__(f"{' '.join(command)}\n{said.rstrip()}\n{listing}")


@dataclass(frozen=True, slots=True)
class GuestProgram:
    """A linked program.

    `image` is its flat binary, to be placed at the address that it was linked for; what .bss wants after its end is not
    in it. `elf` is the same as an ELF file (with symbols), `entry` the address of `_start`, or of the first byte.
    `symbols` maps names to addresses.
    """

    image: bytes
    elf: Path
    entry: int
    symbols: dict[str, int]


def assemble(source: str, *, address: int = 0x1000, bits: int = 16) -> bytes:
    """The machine code of `source`, linked for guest address `address`, for a processor in 16-, 32- or 64-bit mode."""
    return _assembled(source, address, bits).image


def assemble_with_symbols(source: str, *, address: int = 0x1000, bits: int = 16) -> tuple[bytes, dict[str, int]]:
    """As `assemble`, with the address of every label."""
    program = _assembled(source, address, bits)
    return program.image, dict(program.symbols)


@functools.cache
def compile_c(source: str, *, address: int = 0x100000, bits: int = 64, flags: tuple[str, ...] = ()) -> GuestProgram:
    """A freestanding C program, linked for guest address `address`. `flags` are further options of gcc.

    Execution of the ELF file starts at `_start`. One who runs the flat image puts that function into section
    `.text.entry`, so that it comes first. Headers of kvmpy/guest/ are found.
    """
    mode = {32: ("-m32", "elf_i386"), 64: ("-m64", "elf_x86_64")}[bits]
    command = [_tool("gcc"), mode[0], *_FREESTANDING, f"-I{_GUEST_HEADERS}", *flags, "-x", "c", "-c", "-"]
    return _linked(command, source, source, address, mode[1], (command, address))


@functools.cache
def _assembled(source: str, address: int, bits: int) -> GuestProgram:
    if bits not in (16, 32, 64):
        raise ValueError(f"bits is 16, 32 or 64, not {bits}")
    # On the first line of the source, so that the line numbers of messages are the source's.
    text = f".intel_syntax noprefix; .code{bits}; {source}\n"
    command = [_tool("as"), "--64", "-mx86-used-note=no", "-"]
    return _linked(command, text, source, address, "elf_x86_64", (command, address))


def _linked(
    command: list[str], text: str, source: str, address: int, emulation: str, settings: tuple[object, ...]
) -> GuestProgram:
    """Translate `text` by `command` and link it; `source` is what errors show."""
    stem = _workspace() / hashlib.sha256(repr((text, settings)).encode()).hexdigest()[:16]
    unlinked, layout, elf = (stem.with_suffix(suffix) for suffix in (".o", ".ld", ".elf"))
    _run([*command, "-o", str(unlinked)], source, text)
    layout.write_text(_LAYOUT.format(address=address))
    # Without _start ld takes the first byte of .text as the entry, and says so: that is the rule here, not a fault.
    link = [_tool("ld"), "-m", emulation, "-static", "--build-id=none", "-z", "max-page-size=0x1000", "-T", str(layout)]
    _run([*link, "-o", str(elf), str(unlinked)], source)
    return _read(elf, address)


def _read(path: Path, address: int) -> GuestProgram:
    """The flat image and the symbols of a linked file."""
    with path.open("rb") as stream:
        elf = ELFFile(stream)
        image = bytearray()
        for section in elf.iter_sections():
            if section["sh_flags"] & SH_FLAGS.SHF_ALLOC and section["sh_type"] != "SHT_NOBITS":
                content, start = section.data(), section["sh_addr"] - address
                image.extend(bytes(max(0, start + len(content) - len(image))))
                image[start : start + len(content)] = content
        table = elf.get_section_by_name(".symtab")
        symbols = {
            symbol.name: symbol["st_value"]
            for symbol in (table.iter_symbols() if isinstance(table, SymbolTableSection) else ())
            if symbol.name and symbol["st_shndx"] != "SHN_UNDEF" and symbol["st_info"]["type"] != "STT_FILE"
        }
        return GuestProgram(bytes(image), path, elf["e_entry"], symbols)


def _run(command: list[str], source: str, text: str = "") -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        raise AssemblerError(command, done.stderr or f"exit status {done.returncode}", source)


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is not None and platform.machine() == "x86_64":
        return path
    reason = f"needs `{name}` for x86 (Debian package {_PACKAGES[name]})"
    if kvm_presence.required():
        pytest.fail(f"KVMPY_REQUIRE_KVM=1, but this {reason}", pytrace=False)
    pytest.skip(reason, allow_module_level=True)


@functools.cache
def _workspace() -> Path:
    path = Path(tempfile.mkdtemp(prefix="kvmpy-guests-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path
