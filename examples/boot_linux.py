"""Linux, up to a shell that a script types commands to.

You learn: how to boot a kernel that others built. `Pc` is a machine with the devices that a kernel looks for, the
initial RAM file system is made here from a static busybox, and the serial console is waited for and typed to.
`scripts/build-kernel` makes a small kernel (or `scripts/fetch-kernel kernel` fetches Debian's, which takes longer to
start), `scripts/fetch-kernel busybox` the busybox; without root, into ~/.cache/kvmpy.

Output::

    uname -sm: Linux x86_64
    grep -c processor /proc/cpuinfo: 1
    seq 1 100 | md5sum: d632eba71107bf7bc3ec423eab256d78  -
    The guest switched itself off.
"""

import os
import re
import sys
from pathlib import Path

from kvmpy import MiB
from kvmpy.boot import Initramfs, LinuxKernel
from kvmpy.boot.initramfs import Link
from kvmpy.machine import Pc

CACHE = Path(os.environ.get("KVMPY_CACHE") or Path.home() / ".cache" / "kvmpy")
COMMANDS = ("uname -sm", "grep -c processor /proc/cpuinfo", "seq 1 100 | md5sum")
PROMPT = "guest> "
ANSWER = re.compile(f"\\n(.+)\\r\\n{PROMPT}")  # the line before the next prompt; behind the echo of the command

kernels = [*CACHE.glob("small-kernel-*/vmlinux"), *CACHE.glob("linux-image-*/boot/vmlinuz-*")]
busybox = CACHE / "busybox-static/bin/busybox"
if not kernels or not busybox.exists():
    sys.exit("This example needs a kernel and a busybox: run scripts/build-kernel, and scripts/fetch-kernel busybox")

files = Initramfs({"init": "#!/bin/sh\nmount -t proc proc /proc\nPS1='guest> ' exec sh\n", "proc": None})
files.add("bin/busybox", busybox.read_bytes())
for name in ("sh", "mount", "uname", "grep", "seq", "md5sum", "poweroff"):
    files.add(f"bin/{name}", Link("busybox"))

with Pc(memory=128 * MiB) as machine:
    console = machine.serial
    machine.load(LinuxKernel(kernels[0], initrd=files, cmdline="console=ttyS0 quiet"))
    machine.start(timeout=600)
    console.expect(PROMPT, timeout=600)
    for command in COMMANDS:
        console.send(command + "\r")
        print(f"{command}: {console.expect(ANSWER, timeout=60)[1]}")
    console.send("poweroff -f\r")
    outcome = machine.wait()
    print("The guest switched itself off." if outcome.ok else outcome)
