"""The options --disk, --share, --vsock and --console: virtio devices by which a guest reaches files, programs and the
user of the host."""

import argparse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmpy.machine import Machine
    from kvmpy.virtio import VirtioConsole

__all__ = ["add_console_argument", "add_virtio_arguments", "plug_in_console", "plug_in_virtio"]


def add_virtio_arguments(machine: "argparse._ArgumentGroup") -> None:
    """Add them to the group of what the machine consists of."""
    machine.add_argument(
        "--disk", action="append", default=[], metavar="FILE[,ro]",
        help="a raw image as a virtio disk (/dev/vda, vdb ... of Linux); with ,ro the guest may not write to it",
    )  # fmt: skip
    machine.add_argument(
        "--share", action="append", default=[], type=share, metavar="FOLDER[,ro][,tag=NAME]",
        help="a folder of the host, by 9p: `mount -t 9p -o trans=virtio,version=9p2000.L NAME /mnt` in Linux; NAME is "
        "by default host, host1 ...",
    )  # fmt: skip
    machine.add_argument(
        "--vsock", metavar="PATH",
        help="sockets between guest and host: a UNIX socket PATH, to which programs say CONNECT PORT; the guest's own "
        "connections to port N go to PATH_N",
    )  # fmt: skip


def add_console_argument(machine: "argparse._ArgumentGroup") -> None:
    """Add --console to that group."""
    machine.add_argument(
        "--console", choices=("serial", "virtio"), default="serial",
        help="what is on the terminal: COM1 (the default), or a virtio console, hvc0 of Linux, which is quicker and "
        "knows the size of the window",
    )  # fmt: skip


def share(text: str) -> tuple[str, bool, str]:
    """(folder, read-only, tag); the tag is empty where none is given."""
    folder, *options = text.split(",")
    read_only, tag = False, ""
    for option in options:
        if option == "ro":
            read_only = True
        elif option.startswith("tag=") and len(option) > 4:
            tag = option[4:]
        else:
            raise argparse.ArgumentTypeError(f"{option!r} is neither ro nor tag=NAME")
    return folder, read_only, tag


def plug_in_virtio(args: argparse.Namespace, machine: "Machine") -> None:
    """Give the machine what the arguments ask for: before an image is loaded, whose tables tell of devices.

    Raises UsageError or OSError for files and folders that cannot be had.
    """
    if not (args.disk or args.share or args.vsock is not None):
        return
    from kvmpy.virtio import Block, Plan9, Vsock

    for text in args.disk:
        machine.add(Block(text.removesuffix(",ro"), read_only=text.endswith(",ro")))
    for number, (folder, read_only, tag) in enumerate(args.share):
        machine.add(Plan9(folder, tag=tag or f"host{number or ''}", read_only=read_only))
    if args.vsock is not None:
        machine.add(Vsock(uds_path=args.vsock))


def plug_in_console(machine: "Machine", size: tuple[int, int] | None) -> "VirtioConsole":
    """Give the machine a virtio console of `size` (columns, rows). A panic that Linux prints there ends the run."""
    from kvmpy.virtio import VirtioConsole

    console = machine.add(VirtioConsole() if size is None else VirtioConsole(size=size))
    machine.watch_for_panic(console.ports[0])
    return console
