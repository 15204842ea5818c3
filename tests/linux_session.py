"""Linux guests with a busybox shell on their console, driven as a person at a terminal would.

    with LinuxSession(kernel, vcpus=2) as session:
        print(session.boot())
        print(session.run("uname -a"))
        outcome = session.power_off()

The console is the serial port, or with `terminal=VirtioConsole()` hvc0. The root file system is in memory, or with
`disk_root=True` the first of the disks among `transports`, which `write_root` and Debian's tools make.

The kernels come from scripts/build-kernel and scripts/fetch-kernel; `small_kernel`, `cloud_kernel` and `busybox` skip
the test, saying why, where they are missing.
"""

import hashlib
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pytest

from kvmpy import MiB
from kvmpy.boot import Initramfs, LinuxKernel
from kvmpy.boot.initramfs import DeviceNode, Entry, File, Link
from kvmpy.devices import Uart16550
from kvmpy.devices.console_output import ExpectTimeout
from kvmpy.machine import Machine, Outcome
from kvmpy.machine.pc import Pc
from kvmpy.virtio import VirtioConsole, VirtioMmio, linux_parameters

__all__ = [
    "PROMPT", "LinuxSession", "busybox", "busybox_initramfs", "cloud_kernel", "on_the_terminal", "small_kernel",
    "write_root",
]  # fmt: skip

_SCRIPTS = Path(__file__).parents[1] / "scripts"

PROMPT = "kvmpy# "
_KERNEL_MESSAGE = re.compile(r"^\[ *\d+\.\d{6}\] .*\n", re.MULTILINE)

APPLETS = (
    "blkdiscard", "blockdev", "cat", "chmod", "cmp", "cp", "cut", "date", "dd", "dmesg", "echo", "env", "false", "find",
    "free", "getty", "grep", "halt", "head", "hexdump", "hostname", "ifconfig", "init", "kill", "ls", "md5sum", "mkdir",
    "mknod", "mount", "nproc", "od", "ping", "poweroff", "ps", "reboot", "rm", "route", "sed", "seq", "sh", "sha256sum",
    "sleep", "sort", "stat", "stty", "sync", "tail", "taskset", "tee", "test", "touch", "tr", "true", "tty", "umount",
    "uname", "uniq", "vi", "wc", "wget", "xargs", "yes",
)  # fmt: skip
_FOLDERS = ("proc", "sys", "tmp", "root", "mnt")

_RC = """#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
[ -e /dev/kmsg ] || mount -t devtmpfs devtmpfs /dev
echo userspace reached
"""
_PROFILE = f"PS1='{PROMPT}'\n"


def _settings(terminal: str) -> dict[str, bytes]:
    """The files below etc/ by which init starts a login shell on `terminal`."""
    return {
        "etc/inittab": f"::sysinit:/etc/rc\n{terminal}::respawn:-/bin/sh\n::ctrlaltdel:/bin/reboot\n".encode(),
        "etc/profile": _PROFILE.encode(),
        "etc/passwd": b"root::0:0:root:/root:/bin/sh\n",
    }


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


def busybox_initramfs(files: Mapping[str, Entry] | None = None, terminal: str = "ttyS0") -> Initramfs:
    """A root file system in which busybox is init, and a login shell runs on `terminal`; `files` are added."""
    archive = Initramfs(
        {
            "bin/busybox": busybox().read_bytes(),
            "init": Link("bin/busybox"),
            **{name: File(content) for name, content in _settings(terminal).items()},
            "etc/rc": _RC,
            "dev/console": DeviceNode("c", 5, 1),
            "dev/null": DeviceNode("c", 1, 3, 0o666),
            "dev/ttyS0": DeviceNode("c", 4, 64),
            **dict.fromkeys(_FOLDERS),
            **{f"bin/{applet}": Link("busybox") for applet in APPLETS},
        }
    )
    for name, entry in (files or {}).items():
        archive.add(name, entry)
    return archive


def write_root(folder: Path, terminal: str = "ttyS0") -> None:
    """The same as a folder, for the root of a disk; `files` in it has some of random content, in three folders."""
    for name in ("bin", "dev", "etc", "files/deep/er", *_FOLDERS):
        (folder / name).mkdir(parents=True)
    shutil.copy(busybox(), folder / "bin" / "busybox")
    for applet in APPLETS:
        (folder / "bin" / applet).symlink_to("busybox")
    for name, content in _settings(terminal).items():
        (folder / name).write_bytes(content)
    (folder / "etc" / "rc").write_text(_RC)
    (folder / "etc" / "rc").chmod(0o755)
    source = random.Random(5)
    for number, size in enumerate((0, 1, 511, 4096, 70_000, 700_000)):
        path = folder / ("files", "files/deep", "files/deep/er")[number % 3] / f"file-{number}"
        path.write_bytes(source.randbytes(size))


def on_the_terminal(config: pytest.Config) -> Callable[[str], None]:
    """What writes a line for whoever watches the tests, also while their output is captured."""
    plugins = config.pluginmanager
    reporter, capture = plugins.get_plugin("terminalreporter"), plugins.get_plugin("capturemanager")

    def write(line: str) -> None:
        if reporter is not None and capture is not None and reporter.verbosity >= 0:
            with capture.global_and_fixture_disabled():
                reporter.ensure_newline()
                reporter.write(f"    | {line}\n", flush=True)

    return write


class LinuxSession:
    """A PC with a kernel and a busybox shell. `say` is told what the guest prints, line by line.

    `machine` and `console` are the parts below; `options` go to `Pc`. `transports` are plugged in, and Linux is told of
    them on its command line, without ACPI, in which it would find them a second time; with `acpi` it finds them there
    only. Other devices can be added before `boot`. `terminal` is one of the consoles among them.
    """

    def __init__(
        self, kernel: Path | str, *, vcpus: int = 1, memory: int = 128 * MiB, cmdline: str | None = None,
        files: Mapping[str, Entry] | None = None, say: Callable[[str], None] | None = None,
        transports: Sequence[VirtioMmio] = (), acpi: bool = False, terminal: VirtioConsole | None = None,
        disk_root: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        name = "ttyS0" if terminal is None else "hvc0"
        self._kernel = kernel
        self._initrd = None if disk_root else busybox_initramfs(files, name)
        self._cmdline = f"console={name}" if cmdline is None else cmdline
        self._say = say
        self._lines: list[bytes] = []
        self._running = False
        self.seconds_to_init = 0.0
        """From the start of the vCPUs to the first line of a program in the guest."""
        self.machine: Machine = Pc(memory, vcpus, sink=self._sink, **options)
        self.console: Uart16550 | VirtioConsole = self.machine.serial
        if terminal is not None:
            self.console = terminal
            terminal.connect_sink(self._sink)
            self.machine.watch_for_panic(terminal.ports[0])
        for transport in transports:
            self.machine.add(transport)
        if transports and not acpi:
            self._cmdline += f" acpi=off {linux_parameters(transports)}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.machine.close()

    def _sink(self, data: bytes) -> None:
        if self._say is None:
            return
        self._lines.append(data)
        if data.endswith(b"\n"):
            for line in b"".join(self._lines).splitlines():
                self._say(line.decode(errors="replace"))
            self._lines.clear()

    def load(self) -> None:
        """Load kernel and initial RAM file system: before, devices can be added."""
        self.machine.load(LinuxKernel(self._kernel, initrd=self._initrd, cmdline=self._cmdline))

    def boot(self, timeout: float = 300) -> str:
        """Load, start, and wait for the shell. Answers what the guest has printed until then."""
        self.load()
        return self.start(timeout)

    def start(self, timeout: float = 300) -> str:
        """Start what is loaded, and wait for the shell."""
        started = time.monotonic()
        self.machine.start()
        self._running = True
        # A virtio console with ports is set up while init already runs: then nobody hears its first words.
        heard = self._expect(re.compile(f"userspace reached|{re.escape(PROMPT)}"), timeout)
        self.seconds_to_init = time.monotonic() - started
        if heard[0] != PROMPT:
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
