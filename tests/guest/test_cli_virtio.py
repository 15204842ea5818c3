"""`kvmpy run --disk --share --vsock`: virtio devices on the command line, on real KVM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gnu_toolchain import compile_c

FIND = """
#include <kvmpy.h>

#define REGISTER(device, offset) (*(volatile unsigned *)(device + offset))

void _start(void)
{
    for (unsigned long device = 0xd0000000; device < 0xd0008000; device += 0x1000) {
        if (REGISTER(device, 0) != 0x74726976 || !REGISTER(device, 8))
            continue;
        REGISTER(device, 0x14) = 0; /* features 0 to 31; 5 is a disk's VIRTIO_BLK_F_RO */
        kvmpy_print_unsigned(REGISTER(device, 8));
        kvmpy_print(REGISTER(device, 8) == 2 && REGISTER(device, 0x10) & 1 << 5 ? " ro " : " ");
        if (REGISTER(device, 8) == 9)
            for (unsigned at = 0; at < *(volatile unsigned char *)(device + 0x100); at++)
                kvmpy_put(*(volatile char *)(device + 0x102 + at));
        kvmpy_put('\\n');
    }
    kvmpy_exit(0);
}
"""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvmpy", "run", *map(str, arguments), "--timeout", "20"]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=50, check=False
    )  # fmt: skip


def test_a_guest_finds_the_devices_in_their_order(tmp_path: Path) -> None:
    disk, other = tmp_path / "disk.img", tmp_path / "other.img"
    for image in (disk, other):
        image.write_bytes(bytes(0x1000))
    done = run(
        compile_c(FIND).elf, "--disk", disk, "--disk", f"{other},ro", "--share", tmp_path,
        "--share", f"{tmp_path},ro,tag=src", "--vsock", tmp_path / "vsock",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines() == ["2 ", "2 ro ", "9 host", "9 src", "19 "]
    assert not (tmp_path / "vsock").exists(), "the socket goes with the machine"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--disk", "nowhere.img"), "No such file"),
        (("--share", "nowhere"), "No such file"),
        (("--share", ".,rw"), "'rw' is neither ro nor tag=NAME"),
        (("--share", ".,tag="), "'tag=' is neither ro nor tag=NAME"),
    ],
)
def test_what_cannot_be_is_said(arguments: tuple[str, ...], complaint: str, tmp_path: Path) -> None:
    image = tmp_path / "hlt.bin"
    image.write_bytes(b"\xf4")
    done = run(image, *arguments)
    assert done.returncode not in (0, 1)
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
