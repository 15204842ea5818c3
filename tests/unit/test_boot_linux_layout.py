"""The tables of fields against the C compiler and the kernel's own header."""

import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from kvmpy.boot.linux.boot_params import BOOT_PARAMS, E820_ENTRY, E820_LIMIT, E820_TABLE, SIZE
from kvmpy.boot.linux.setup_header import BOOT_FLAG, LARGEST_END, MAGIC, PROTOCOL, LoadFlags, XLoadFlags
from kvmpy.pytest_plugin.requirement import skip_or_fail

HEADER = Path("/usr/include/x86_64-linux-gnu/asm/bootparam.h")


def evaluate(tmp_path: Path, expressions: list[str]) -> list[int]:
    """What C makes of `expressions`."""
    gcc = shutil.which("gcc")
    if gcc is None or not HEADER.exists():
        skip_or_fail("needs gcc and asm/bootparam.h (Debian packages gcc and linux-libc-dev)")
    lines = "\n".join(f'    printf("%llu\\n", (unsigned long long) ({expression}));' for expression in expressions)
    source = f"#include <stddef.h>\n#include <stdio.h>\n#include <asm/bootparam.h>\nint main(void)\n{{\n{lines}\n}}\n"
    (tmp_path / "layout.c").write_text(source)
    subprocess.run([gcc, "-o", "layout", "layout.c"], cwd=tmp_path, check=True, timeout=60)
    done = subprocess.run([tmp_path / "layout"], capture_output=True, text=True, check=True, timeout=60)
    return [int(line) for line in done.stdout.split()]


def test_every_field_is_where_the_kernel_has_it(tmp_path: Path) -> None:
    expressions = []
    for name in BOOT_PARAMS:
        member = f"hdr.{name}" if name in PROTOCOL else name
        expressions += [f"offsetof(struct boot_params, {member})", f"sizeof(((struct boot_params *)0)->{member})"]
    numbers = evaluate(tmp_path, expressions)
    found = dict(zip(BOOT_PARAMS, zip(numbers[::2], numbers[1::2], strict=True), strict=True))
    assert found == BOOT_PARAMS


def test_flags_and_sizes_are_the_kernels(tmp_path: Path) -> None:
    # The others of these flags are not in the header; the document has them.
    flags: list[LoadFlags | XLoadFlags] = [*LoadFlags, *XLoadFlags]
    names = [str(flag.name) for flag in flags]
    sizes = ["sizeof(struct boot_params)", "offsetof(struct boot_params, e820_table)", "E820_MAX_ENTRIES_ZEROPAGE",
             "sizeof(struct boot_e820_entry)", "offsetof(struct boot_params, edd_mbr_sig_buffer)"]  # fmt: skip
    assert evaluate(tmp_path, names + sizes) == [
        *flags, SIZE, E820_TABLE, E820_LIMIT, E820_ENTRY.size, LARGEST_END,
    ]  # fmt: skip


def test_the_magic_numbers_are_the_documents() -> None:
    assert (MAGIC.to_bytes(4, "little"), BOOT_FLAG) == (b"HdrS", 0xAA55)


def test_the_header_has_no_hole_and_ends_before_the_next_field() -> None:
    places = sorted((offset, size) for offset, size, _ in PROTOCOL.values())
    assert all(start + size == following for (start, size), (following, _) in pairwise(places))
    assert (places[0][0], sum(places[-1]) <= LARGEST_END) == (0x1F1, True)


@pytest.mark.parametrize(("name", "since"), [("heap_end_ptr", 0x201), ("init_size", 0x20A), ("syssize", 0x204)])
def test_each_field_says_which_version_brought_it(name: str, since: int) -> None:
    assert PROTOCOL[name][2] == since
