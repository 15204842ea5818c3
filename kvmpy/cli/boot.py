"""Boot a kernel: Linux (bzImage or vmlinux) or Multiboot, told by its header. Without KERNEL, the newest under /boot.

The machine is a PC: COM1 is the console, on this terminal; port 0xE9 writes there, too. There are keyboard controller,
CMOS clock, PCI host bridge, KVM's interrupt controllers and timer, pvpanic, and a debug-exit port at 0xF4. A kernel
that panics ends the run, with status 126.

Linux hands the size of the window (LINES, COLUMNS) and TERM to init. A shell in the guest asks for a new size by
`resize`, or is told it: `stty rows 40 cols 120`. A virtio console (--console virtio) knows the size, and its changes.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from kvmpy.cli.inspection_options import add_inspection_arguments, looking_into
from kvmpy.cli.kernel_choice import add_kernel_arguments, newest_kernel, open_kernel
from kvmpy.cli.progress import Progress
from kvmpy.cli.run import KEYS, STATUSES, add_report_arguments, run_guest
from kvmpy.cli.small_pc import SmallPc, add_machine_arguments, say, to_standard_output
from kvmpy.cli.virtio_options import add_console_argument, plug_in_console
from kvmpy.cli.window_size import following_window, window_size

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from kvmpy.boot import LinuxKernel, MultibootKernel
    from kvmpy.devices import DebugConsole, Uart16550
    from kvmpy.machine import Outcome
    from kvmpy.virtio import VirtioConsole

__all__ = ["EPILOG", "BootPc", "add_arguments", "run"]

EPILOG = f"""\
{KEYS}
{STATUSES}
examples:
  kvmpy boot vmlinuz --init root/ --timeout 600
  kvmpy boot vmlinuz --initrd initrd.img --append "root=/dev/ram0 quiet" --cpus 2 --memory 1G
  kvmpy boot kernel.elf --module disk.img=/dev/ram    a Multiboot kernel
"""

_MEMORY = 256 << 20
"""Enough for the kernels and initrds of distributions."""


_SLOW = "erms,fsrm,smap,popcnt"
"""What KVM's emulator cannot hide from Linux: it copies byte by byte with ERMS, and gives up on the other two."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `kvmpy boot`."""
    parser.usage = "kvmpy boot [options] [KERNEL]"
    add_kernel_arguments(parser)
    machine = add_machine_arguments(parser, memory=_MEMORY)
    add_console_argument(machine)
    machine.add_argument(
        "--no-direct", dest="direct", action="store_false",
        help="where KVM has no VT-x or AMD-V below it, leave all of Linux's ring 0 to KVM's instruction emulator, and "
        f"tell Linux clearcpuid={_SLOW}, which is slow there",
    )  # fmt: skip
    add_report_arguments(parser, machine)
    add_inspection_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Boot the kernel; answers the exit status that `EPILOG` describes."""
    return run_guest(args, lambda machine: looking_into(args, machine), BootPc)


class BootPc(SmallPc):
    """The machine of `kvmpy boot`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._progress = Progress()
        self._virtio_console: VirtioConsole | None = None
        try:
            super().__init__(args)
        finally:
            self._progress.end()

    def open_image(self) -> LinuxKernel | MultibootKernel:
        """The kernel, unpacked."""
        path = self.args.kernel
        if path is None:
            path = newest_kernel()
            say(f"boots {path}, the newest kernel there")
        self._progress.phase(f"opening {path}")
        virtio = self.args.console == "virtio"
        variables = _environment(with_size=not virtio)
        if not self.args.direct:
            variables |= _without_slow_instructions()
        return open_kernel(path, self.args, variables, virtio_console=virtio)

    def plug_in(self) -> None:
        """Devices, and the virtio console that may be the terminal."""
        super().plug_in()
        if self.args.console == "virtio":
            self._virtio_console = plug_in_console(self.machine, window_size())

    @property
    def typed_at(self) -> Uart16550 | VirtioConsole:
        """The console on the terminal."""
        return self._virtio_console or self.serial

    @contextlib.contextmanager
    def console(self) -> Iterator[None]:
        """Connect it; a virtio console has the size of the window."""
        console = self._virtio_console
        with contextlib.ExitStack() as stack:
            if console is not None and console.board is not None:
                stack.enter_context(following_window(console.board, console.resize))
            stack.enter_context(super().console())
            yield

    def load(self) -> None:
        super().load()
        if not self.args.direct:
            for runner in self.machine.runners:
                runner.runs_ring_0_directly = False

    def run(self, timeout: float | None) -> Outcome:
        """Run it; as long as it is silent, tell how long that has been."""
        machine, progress = self.machine, Progress()
        consoles: list[Uart16550 | VirtioConsole | DebugConsole] = [machine.serial, self.typed_at]
        if self.args.debug_console is None:
            consoles.append(machine.debug_console)

        def first(data: bytes) -> None:
            progress.end()
            for console in consoles:
                console.connect_sink(to_standard_output)
            to_standard_output(data)

        for console in consoles:
            console.connect_sink(first)
        progress.phase("the kernel has said nothing yet")
        try:
            return super().run(timeout)
        finally:
            progress.end()

    def explained(self, outcome: Outcome) -> Outcome:
        """A Linux that found no root file system is told how to get one."""
        if "Unable to mount root fs" in outcome.message and self.args.initrd is None and self.args.init is None:
            outcome.message += "; --init FOLDER or --initrd FILE gives it one"
        return outcome


def _without_slow_instructions() -> dict[str, str]:
    """What has Linux do without the instructions that KVM's emulator is slow with, if it is what runs ring 0 here."""
    from kvmpy.machine.ring3_entry import needs_repair

    return {"clearcpuid": _SLOW} if needs_repair() else {}


def _environment(*, with_size: bool) -> dict[str, str]:
    """The kind of terminal, and the size of its window, as the environment of a program has it; nothing without one.

    A size there would be obeyed for ever, also where the guest's terminal knows a newer one.
    """
    if not (os.isatty(0) and os.isatty(1)):
        return {}
    size = window_size() if with_size else None
    found = {"LINES": str(size[1]), "COLUMNS": str(size[0])} if size else {}
    term = os.environ.get("TERM", "")
    if term not in ("", "dumb"):
        found["TERM"] = term
    return found
