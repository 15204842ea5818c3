"""Debian's kernel, when `scripts/fetch-kernel` has fetched it: unpacked, and ready to start in every way it has."""

import os
from pathlib import Path

import pytest

from kvmpy.boot import LinuxKernel
from kvmpy.x86 import entry_rules
from linux_images import MIB, ram

CACHE = Path(os.environ.get("KVMPY_CACHE") or Path.home() / ".cache" / "kvmpy")
KERNELS = sorted(CACHE.glob("linux-image-*-cloud-amd64/boot/vmlinuz-*"))

pytestmark = pytest.mark.skipif(not KERNELS, reason="`scripts/fetch-kernel` has not been run")


def test_it_is_unpacked_and_says_its_version() -> None:
    file = KERNELS[-1]
    kernel = LinuxKernel(file)
    assert kernel.version.startswith(file.name.removeprefix("vmlinuz-") + " ")
    assert (kernel.protocol, kernel.header.version >= 0x20F) == ("64", True)
    assert kernel.elf is not None
    assert kernel.elf.physical_entry == kernel.header["pref_address"]


@pytest.mark.parametrize(
    ("entry", "unpack"), [("64", True), ("64", False), ("32", False), ("real", False), ("pvh", True)]
)
def test_it_has_every_entry(entry: str, unpack: bool) -> None:
    kernel = LinuxKernel(KERNELS[-1], entry=entry, unpack=unpack, initrd=b"initrd", cmdline="quiet")  # type: ignore[arg-type]
    memory = ram((0, 128 * MIB))
    started = kernel.load(memory)
    assert not entry_rules.violations(started.state)
    code = memory.read(started.state.sregs.cs.base + started.state.regs.rip, 16)
    assert code not in (b"\xcc" * 16, bytes(16)), "there is code at the entry"
