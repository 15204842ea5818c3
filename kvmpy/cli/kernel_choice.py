"""Which kernel `kvmpy boot` takes, by which loader, and with which command line and initial RAM file system."""

from __future__ import annotations

import argparse
import contextlib
import os
import stat
from typing import TYPE_CHECKING

from kvmpy.errors import ImageError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from kvmpy.boot import Initramfs, LinuxKernel, MultibootKernel
    from kvmpy.boot.image_source import ImageSource
    from kvmpy.boot.linux.initrd import Initrd

__all__ = ["add_kernel_arguments", "initramfs_of", "linux_command_line", "newest_kernel", "open_kernel"]

BOOT_FOLDER = "/boot"
_NAMES = ("vmlinuz", "vmlinux", "bzImage", "kernel")
"""What distributions call kernels, followed by a version."""

_INITS = ("sbin/init", "bin/init", "bin/sh")
"""What a folder without init may have instead, in this order; Linux has to be told."""

_ONLY_LINUX = ("initrd", "init", "entry", "unpack")


def add_kernel_arguments(parser: argparse.ArgumentParser) -> None:
    """What is booted."""
    parser.add_argument(
        "kernel", nargs="?", metavar="KERNEL", help="the file; without, the newest under /boot that may be read"
    )
    kernel = parser.add_argument_group("the kernel")
    kernel.add_argument(
        "--append", default="", metavar="TEXT",
        help="the kernel's command line. Linux also gets console=ttyS0, or hvc0 with --console virtio, unless TEXT has "
        "a console=",
    )  # fmt: skip
    files = kernel.add_mutually_exclusive_group()
    files.add_argument("--initrd", metavar="FILE", help="the initial RAM file system, for Linux")
    files.add_argument(
        "--init", metavar="PATH",
        help="make one from a folder with an executable file init; or a static program that is to be /init",
    )  # fmt: skip
    kernel.add_argument(
        "--module", action="append", default=[], metavar="FILE[=STRING]",
        help="a module for a Multiboot kernel, with its string; may be given several times",
    )  # fmt: skip
    kernel.add_argument(
        "--entry", choices=("auto", "64", "32", "real", "pvh"), default="auto",
        help="where Linux is started: its 64-bit, 32-bit, real-mode or PVH entry point",
    )  # fmt: skip
    kernel.add_argument(
        "--no-unpack", dest="unpack", action="store_false",
        help="have a bzImage unpack itself, as on a PC, instead of unpacking it here",
    )  # fmt: skip


def open_kernel(
    path: str, args: argparse.Namespace, environment: Mapping[str, str], *, virtio_console: bool = False
) -> LinuxKernel | MultibootKernel:
    """The loader for the file, told by its header. `environment` is what a Linux's init shall find in its own.

    Raises ImageError for a file that is no kernel, UsageError for options that do not go with it.
    """
    from kvmpy.boot.image_source import ImageSource

    source = ImageSource(path)
    if _is_multiboot(source):
        from kvmpy.boot import MultibootKernel, MultibootModule

        for name in _ONLY_LINUX:
            if getattr(args, name) not in (None, "auto", True):
                option = "no-unpack" if name == "unpack" else name
                raise UsageError(f"--{option} is for Linux kernels; {path} is a Multiboot kernel, which has modules")
        modules = [MultibootModule(*_module(text)) for text in args.module]
        return MultibootKernel(path, cmdline=args.append, modules=modules)

    from kvmpy.boot import LinuxKernel

    if args.module:
        raise UsageError(f"--module is for Multiboot kernels; {path} is none")
    initrd: Initrd | None = args.initrd
    words: tuple[str, ...] = ()
    if args.init is not None:
        initrd, words = initramfs_of(args.init, args.append)
    line = linux_command_line(args.append, environment, words, virtio_console=virtio_console)
    try:
        return LinuxKernel(path, initrd=initrd, cmdline=line, unpack=args.unpack, entry=args.entry)
    except UsageError as error:  # what the loader calls its parameters are options here
        text = str(error).replace("unpack=False", "--no-unpack").replace('entry="pvh"', "--entry pvh")
        error.args = (text,)
        raise


def _is_multiboot(source: ImageSource) -> bool:
    """Whether a file that is no bzImage has a Multiboot header. Raises ImageError for one that is nothing known."""
    from kvmpy.boot.multiboot.header import Multiboot1Header
    from kvmpy.boot.multiboot.header2 import Multiboot2Header

    beginning = source.read(0, min(source.size, 0x206), "the image")
    if beginning[0x202:0x206] == b"HdrS":
        return False
    if Multiboot1Header.find(source) is not None or Multiboot2Header.find(source) is not None:
        return True
    if beginning[:4] == b"\x7fELF":
        return False  # a vmlinux, it is hoped
    raise ImageError(
        "is no kernel: neither bzImage nor ELF file, nor is there a Multiboot header. `kvmpy run` runs other programs",
        source.name,
    )


def _module(text: str) -> tuple[str, str]:
    path, _, string = text.partition("=")
    return path, string


def linux_command_line(
    text: str, environment: Mapping[str, str], words: Iterable[str] = (), *, virtio_console: bool = False
) -> str:
    """`text`, before it `words`, a console, and variables: Linux hands NAME=VALUE that it does not know to init.

    What `text` says already, by the same name, is not said again.
    """
    given = {word.partition("=")[0] for word in text.split()}
    # What Linux says before it has found a virtio console never gets there: until then, it goes to the serial port.
    consoles = ["earlyprintk=ttyS0", "console=hvc0"] if virtio_console else ["console=ttyS0"]
    added = [] if "console" in given else [word for word in consoles if word.partition("=")[0] not in given]
    added += [f"{name}={value}" for name, value in environment.items() if name not in given]
    return " ".join([*added, *words, *filter(None, [text])])


def initramfs_of(path: str, command_line: str) -> tuple[Initramfs, tuple[str, ...]]:
    """The initramfs that a folder or a program makes, and what the command line needs to say so that it is started."""
    from kvmpy.boot.initramfs import DeviceNode, Initramfs

    words: tuple[str, ...] = ()
    if os.path.isdir(path):
        archive = Initramfs.from_folder(path)
        if "init" not in archive and "rdinit=" not in command_line:
            init = next((name for name in _INITS if name in archive), None)
            if init is None:
                raise UsageError(f"{path} has no init, and no {' or '.join(_INITS)}: Linux would find nothing to start")
            words = (f"rdinit=/{init}",)
    else:
        with open(path, "rb") as file:
            archive = Initramfs({"init": file.read()})
    if "dev/console" not in archive:
        archive.add("dev/console", DeviceNode("c", 5, 1))  # without it, init has no standard output
    return archive, words


def newest_kernel(folder: str = BOOT_FOLDER) -> str:
    """The kernel in `folder` that was built last, of those that may be read. Raises UsageError when there is none."""
    kernels: list[tuple[float, str]] = []
    closed: list[tuple[float, str]] = []
    with os.scandir(folder) if os.path.isdir(folder) else contextlib.nullcontext(()) as entries:
        for entry in entries:
            if entry.name.startswith(_NAMES) and "rescue" not in entry.name:
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(status.st_mode):
                    readable = os.access(entry.path, os.R_OK)
                    (kernels if readable else closed).append((status.st_mtime, entry.path))
    if kernels:
        return max(kernels)[1]
    if closed:
        what = f"{max(closed)[1]} may not be read by you: copy it with sudo, or name another kernel"
    else:
        what = (
            f"there is no kernel in {folder}: name one. Debian and Ubuntu have packages, such as linux-image-amd64; "
            "scripts/fetch-kernel in kvmpy's sources fetches one without installing it"
        )
    raise UsageError(what)
