"""Programs with debugging information made by gcc, and what binutils say about them: `nm`, `objdump`, `addr2line`.

Three sources in two folders, one of them assembly; an inlined function of a header that both C files include; two
static functions of one name; a label of assembly inside a function.
"""

import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from gnu_toolchain import TOOLCHAIN, GuestProgram
from kvmpy.guest.toolchain import ToolMissingError
from kvmpy.pytest_plugin.requirement import skip_or_fail

__all__ = ["SOURCES", "addr2line", "code_addresses", "line_of", "nm", "objdump", "program"]

SOURCES = {
    "shared.h": """static inline int twice(int value)
{
    int result = 0;
    for (int i = 0; i < 2; i++)
        result += value;
    return result;
}
""",
    "main.c": """#include "shared.h"
int other(int);
static int local(int value) { return value * 3; }
volatile int total;
static int helper(int n)
{
    int sum = 0;
    for (int i = 0; i < n; i++) {   /* loop */
        if (i & 1)
            sum += twice(i);        /* odd */
        else
            sum -= other(i);        /* even */
    }
    return sum;
}
void _start(void)
{
    total = helper(10) + local(total);  /* first */
    total += twice(total);              /* second */
    for (;;)
        ;
}
""",
    "drivers/other.c": """#include "../shared.h"
volatile int seen;
const char *const message = "hello";
static int local(int value)
{
    return value + seen;        /* here */
}
int other(int value)
{
    seen = twice(value);
    return local(value) / 2;
}
""",
    "entry.S": """    .intel_syntax noprefix
    .text
    .globl assembly
    .equ CONSTANT, 0x1234
assembly:
    xor eax, eax
    inc eax     /* inner */
inner:
    dec eax
    jnz inner
    ret
    .globl sized
    .type sized, @function
sized:
    nop
within:
    ret
    .size sized, . - sized
""",
}


@functools.cache
def _folder() -> Path:
    import atexit

    folder = Path(tempfile.mkdtemp(prefix="kvmpy-debug-info-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, text in SOURCES.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


def program(*flags: str, bits: int = 64, dwarf: int = 5, address: int = 0x10_0000) -> GuestProgram:
    """The program of all sources, linked for `address`; made once for each set of arguments."""
    options = ("-g", f"-gdwarf-{dwarf}", *flags)
    try:
        return TOOLCHAIN.compile_c(
            "main.c", "drivers/other.c", "entry.S", address=address, bits=bits, flags=options, folder=_folder()
        )
    except ToolMissingError as error:
        skip_or_fail(str(error))


def line_of(file: str, comment: str) -> int:
    """The number of the line in a source that has `/* comment */`."""
    return next(number for number, line in enumerate(SOURCES[file].splitlines(), 1) if f"/* {comment} */" in line)


def objdump(elf: Path) -> list[tuple[int, bytes, str]]:
    """(address, bytes, text) of every instruction in the sections of code."""
    found: list[tuple[int, bytes, str]] = []
    for line in _said("objdump", "-d", "-M", "intel", "--wide", "--insn-width=16", str(elf)):
        match = re.fullmatch(r" *([0-9a-f]+):\t((?:[0-9a-f]{2} )+) *\t(.*)", line)
        if match:
            found.append((int(match[1], 16), bytes.fromhex(match[2]), match[3].strip()))
    return found


def code_addresses(elf: Path) -> list[int]:
    """Where the instructions start."""
    return [address for address, _, _ in objdump(elf)]


def addr2line(elf: Path, addresses: list[int]) -> list[str]:
    """ "path:line" for each address, or "??:?"."""
    said = _said("addr2line", "-e", str(elf), *map(hex, addresses))
    return [line.split(" (discriminator")[0] for line in said]


def nm(elf: Path) -> list[tuple[int, int, str, str]]:
    """(address, size, letter, name) of every symbol that is defined."""
    found = []
    for line in _said("nm", "-S", "--defined-only", str(elf)):
        address, *size, letter, name = line.split()
        found.append((int(address, 16), int(size[0], 16) if size else 0, letter, name))
    return found


def _said(tool: str, *arguments: str) -> list[str]:
    if shutil.which(tool) is None:
        skip_or_fail(f"needs `{tool}` (Debian package binutils)")
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.splitlines()
