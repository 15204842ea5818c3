"""Linux guests with a busybox shell on their serial console, driven as a person at a terminal would.

    with LinuxSession(kernel, vcpus=2) as session:
        print(session.boot())
        print(session.run("uname -a"))
        outcome = session.power_off()

The kernels come from scripts/build-kernel and scripts/fetch-kernel; `small_kernel`, `cloud_kernel` and `busybox` skip
the test, saying why, where they are missing.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import pytest

from kvmpy import MiB
from kvmpy.boot import Initramfs, LinuxKernel
from kvmpy.boot.initramfs import DeviceNode, Entry, File, Link
from kvmpy.devices.console_output import ExpectTimeout
from kvmpy.machine import Machine, Outcome
from kvmpy.machine.pc import Pc

__all__ = ["PROMPT", "LinuxSession", "busybox", "busybox_initramfs", "cloud_kernel", "small_kernel"]

_SCRIPTS = Path(__file__).parents[1] / "scripts"

PROMPT = "kvmpy# "
_KERNEL_MESSAGE = re.compile(r"^\[ *\d+\.\d{6}\] .*\n", re.MULTILINE)

APPLETS = (
    "cat", "chmod", "cmp", "cut", "date", "dd", "dmesg", "echo", "env", "false", "free", "getty", "grep", "halt",
    "head", "hexdump", "hostname", "ifconfig", "init", "kill", "ls", "md5sum", "mkdir", "mknod", "mount", "nproc", "od",
    "ping", "poweroff", "ps", "reboot", "rm", "route", "sed", "seq", "sh", "sha256sum", "sleep", "sort", "stat", "sync",
    "tail", "taskset", "tee", "test", "touch", "tr", "true", "umount", "uname", "uniq", "vi", "wc", "wget", "yes",
)  # fmt: skip

_RC = """#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
echo userspace reached
"""
_INITTAB = """::sysinit:/etc/rc
ttyS0::respawn:-/bin/sh
::ctrlaltdel:/bin/reboot
"""
_PROFILE = f"PS1='{PROMPT}'\n"


def _cache() -> Path:
    return Path(os.environ.get("KVMPY_CACHE") or Path.home() / ".cache" / "kvmpy")


def _newest(pattern: str, script: str, package: str) -> Path:
    found = sorted(_cache().glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        # "Debian package" makes the skip a failure where everything must run: see conftest.py.
        pytest.skip(f"no {pattern} in {_cache()}: scripts/{script} puts it there (from the Debian package {package})")
    return found[-1]


def small_kernel(file: str = "vmlinux") -> Path:
    """vmlinux, bzImage or System.map of the kernel that scripts/build-kernel has built with today's configuration."""
    key = hashlib.sha256((_SCRIPTS / "small-kernel.config").read_bytes()).hexdigest()[:12]
    return _newest(f"small-kernel-*-{key}/{file}", "build-kernel", "linux-source-6.1")


def cloud_kernel() -> Path:
    """Debian's own kernel, as it comes from the package."""
    return _newest("linux-image-*-cloud-amd64/boot/vmlinuz-*", "fetch-kernel", "linux-image-cloud-amd64")


def busybox() -> Path:
    """A static busybox."""
    return _newest("busybox-static/bin/busybox", "fetch-kernel", "busybox-static")


def busybox_initramfs(files: Mapping[str, Entry] | None = None) -> Initramfs:
    """A root file system in which busybox is init, and a login shell runs on the serial port; `files` are added."""
    archive = Initramfs(
        {
            "bin/busybox": busybox().read_bytes(),
            "init": Link("bin/busybox"),
            "etc/inittab": File(_INITTAB.encode()),
            "etc/profile": File(_PROFILE.encode()),
            "etc/passwd": File(b"root::0:0:root:/root:/bin/sh\n"),
            "etc/rc": _RC,
            "dev/console": DeviceNode("c", 5, 1),
            "dev/null": DeviceNode("c", 1, 3, 0o666),
            "dev/ttyS0": DeviceNode("c", 4, 64),
            **dict.fromkeys(("proc", "sys", "tmp", "root", "mnt")),
            **{f"bin/{applet}": Link("busybox") for applet in APPLETS},
        }
    )
    for name, entry in (files or {}).items():
        archive.add(name, entry)
    return archive


class LinuxSession:
    """A PC with a kernel and a busybox shell. `say` is told what the guest prints, line by line, while it boots.

    `machine` and `console` are the parts below; `options` go to `Pc`, and devices can be added before `boot`.
    """

    def __init__(
        self, kernel: Path | str, *, vcpus: int = 1, memory: int = 128 * MiB, cmdline: str = "console=ttyS0",
        files: Mapping[str, Entry] | None = None, say: Callable[[str], None] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self._image = LinuxKernel(kernel, initrd=busybox_initramfs(files), cmdline=cmdline)
        self._say = say
        self._lines: list[bytes] = []
        self._running = False
        self.seconds_to_init = 0.0
        """From the start of the vCPUs to the first line of a program in the guest."""
        self.machine: Machine = Pc(memory, vcpus, sink=self._sink, **options)
        self.console = self.machine.serial

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.machine.close()

    def _sink(self, data: bytes) -> None:
        if self._say is None:
            return
        self._lines.append(data)
        if data.endswith(b"\n"):
            self._say(b"".join(self._lines).decode(errors="replace").rstrip("\r\n"))
            self._lines.clear()

    def load(self) -> None:
        """Load kernel and initial RAM file system: before, devices can be added."""
        self.machine.load(self._image)

    def boot(self, timeout: float = 300) -> str:
        """Load, start, and wait for the shell. Answers what the guest has printed until then."""
        self.load()
        return self.start(timeout)

    def start(self, timeout: float = 300) -> str:
        """Start what is loaded, and wait for the shell."""
        started = time.monotonic()
        self.machine.start()
        self._running = True
        self._expect("userspace reached", timeout)
        self.seconds_to_init = time.monotonic() - started
        self._expect(PROMPT, timeout)
        return self.console.text

    def run(self, command: str, timeout: float = 60) -> str:
        """Type a command, and answer what it prints until the next prompt, without the echo."""
        self.console.send(command + "\n")
        return self.answer(timeout).partition("\n")[2]

    def answer(self, timeout: float = 60) -> str:
        """What programs print from here up to the next prompt, with line feeds only. The kernel's messages are not."""
        match = self._expect(re.compile(f"^(.*?){re.escape(PROMPT)}", re.DOTALL), timeout)
        return _KERNEL_MESSAGE.sub("", str(match[1]).replace("\r", ""))

    def _expect(self, pattern: Any, timeout: float) -> Any:
        """`expect`, which also ends when the guest does."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                return self.console.expect(pattern, timeout=min(2.0, max(0.01, deadline - time.monotonic())))
            except ExpectTimeout:
                if not self.machine.running:
                    pytest.fail(f"the guest ended: {self.machine.wait(timeout=1)}\n{self.console.text[-2000:]}")
                if time.monotonic() > deadline:
                    pytest.fail(f"no {pattern!r} within {timeout:g} s; the console ends:\n{self.console.text[-2000:]}")

    def power_off(self, timeout: float = 60) -> Outcome:
        """Type `poweroff`, and wait for the end of the run."""
        self.console.send("poweroff\n")
        outcome: Outcome = self.machine.wait(timeout=timeout)
        return outcome

    def completed(self) -> dict[str, int]:
        """How often each instruction was done in software, on all processors."""
        counts: dict[str, int] = {}
        for runner in self.machine.runners:
            for name, count in (runner.completion.counts if runner.completion else {}).items():
                counts[name] = counts.get(name, 0) + count
        return counts
