"""The machine of the commands that run a guest: a small PC around an image, connected to the terminal."""

from __future__ import annotations

import argparse
import contextlib
import os
import stat
import sys

from kvmpy.cli.cpu_option import HELP, cpu
from kvmpy.cli.net_option import add_net_arguments, plug_in_network
from kvmpy.cli.quantities import address, count, size
from kvmpy.cli.virtio_options import add_virtio_arguments, plug_in_virtio
from kvmpy.errors import ImageError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Any, Self

    from kvmpy.boot import Entry, Image
    from kvmpy.devices import FwCfg, Uart16550
    from kvmpy.machine import Outcome
    from kvmpy.machine.pc import Pc
    from kvmpy.virtio import VirtioConsole

__all__ = [
    "ImageUnreadable", "ProgramPc", "SmallPc", "add_image_arguments", "add_machine_arguments", "say",
    "to_standard_output",
]  # fmt: skip

MODES = ("real", "protected16", "protected", "long")


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """What is run, and how it starts."""
    parser.add_argument("image", metavar="IMAGE", help="the file to run")
    image = parser.add_argument_group("the image")
    image.add_argument(
        "--mode", choices=MODES,
        help="how the processor starts; protected16 is protected mode with 16-bit code. Default: real for a flat "
        "binary; protected or long for an ELF file, by its class",
    )  # fmt: skip
    image.add_argument(
        "--address", type=address, metavar="ADDRESS",
        help="where a flat binary goes (default 0x1000; 0x7C00 for 512 bytes that end in 55 AA), or where a "
        "position-independent ELF file goes",
    )  # fmt: skip
    image.add_argument(
        "--entry", type=address, metavar="ADDRESS",
        help="the first instruction. Default: the first byte of a flat binary, e_entry of an ELF file",
    )  # fmt: skip
    image.add_argument(
        "--ring", type=int, choices=(0, 3), default=0, help="the privilege level to start in (modes protected, long)"
    )
    image.add_argument(
        "--firmware", action="store_true", help="IMAGE is a ROM: it ends at 4 GiB and starts at the reset vector"
    )
    image.add_argument(
        "--floppy", metavar="FILE",
        help="with --firmware, if that is SeaBIOS: the disk to boot from. It prints by INT 10h on COM1, and INT 16h "
        "reads what COM1 receives",
    )  # fmt: skip


def add_machine_arguments(parser: argparse.ArgumentParser, memory: int = 16 << 20) -> argparse._ArgumentGroup:
    """What it runs on; answers the group, for more of the kind."""
    machine = parser.add_argument_group("the machine")
    machine.add_argument(
        "--memory",
        type=size,
        default=memory,
        metavar="SIZE",
        help=f"RAM, such as 512K, 2G or {memory >> 20}M (the default)",
    )
    machine.add_argument(
        "--cpus", type=count, default=1, metavar="N", help="processors; all but the first wait for INIT and SIPI"
    )
    machine.add_argument("--cpu", type=cpu, default="host", metavar="TEMPLATE", help=f"what they are: {HELP}")
    add_virtio_arguments(machine)
    add_net_arguments(machine)
    machine.add_argument("--device", default="/dev/kvm", metavar="PATH", help="KVM's device (default /dev/kvm)")
    machine.add_argument(
        "--debug-console", metavar="FILE",
        help="write what comes from port 0xE9 there instead of to standard output, and also listen at 0x402, where "
        "firmware writes its log; - is standard error",
    )  # fmt: skip
    return machine


class ImageUnreadable(OSError):
    """The file system refused the image."""


class SmallPc:
    """The machine that the arguments ask for, with the image loaded; closed at the end of the `with` block."""

    def __init__(self, args: argparse.Namespace) -> None:
        if args.cpus > 0x100:
            raise UsageError(f"--cpus is at most 256, not {args.cpus}: a PC's CMOS cannot say more")
        self.args = args
        try:
            self.image = self.open_image()
        except OSError as error:
            raise ImageUnreadable(error.errno, error.strerror, error.filename) from error
        self._stack = contextlib.ExitStack()
        self.machine: Pc
        self.entry: Entry

    @property
    def serial(self) -> Uart16550:
        """COM1."""
        return self.machine.serial

    @property
    def typed_at(self) -> Uart16550 | VirtioConsole:
        """The console that gets what is typed."""
        return self.serial

    def __enter__(self) -> Self:
        from kvmpy.cli import without_garbage_collection

        args = self.args
        with without_garbage_collection(), self._stack as stack:
            from kvmpy.kvm import Kvm
            from kvmpy.machine.pc import Pc

            kvm = stack.enter_context(Kvm(args.device))
            debug_sink: Any = to_standard_output
            if args.debug_console is not None:
                debug_sink = sys.stderr.buffer
                if args.debug_console != "-":
                    debug_sink = stack.enter_context(open(args.debug_console, "wb"))
            pc = Pc(
                args.memory, args.cpus, cpu=args.cpu, kvm=kvm, rom=self.image.memory_needs(),
                sink=to_standard_output, debug_sink=debug_sink,
            )  # fmt: skip
            self.machine = stack.enter_context(pc)
            if args.debug_console is not None:
                from kvmpy.devices import DebugConsole

                # Not by default: what SeaBIOS says on COM1 it says here too, and the two would be mixed.
                pc.add(DebugConsole(0x402, sink=debug_sink, queued=True))
            self.plug_in()
            self.load()
            self._stack = stack.pop_all()
        return self

    def open_image(self) -> Image:
        """What is to be run, found and checked before there is a machine."""
        raise NotImplementedError

    def plug_in(self) -> None:
        """Add the devices that the arguments ask for."""
        plug_in_virtio(self.args, self.machine)
        plug_in_network(self.args, self.machine)

    def load(self) -> None:
        """Put it into the machine."""
        self.entry = self.machine.load(self.image)

    def explained(self, outcome: Outcome) -> Outcome:
        """How the guest ended, if more can be said of it than the machine does."""
        return outcome

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def run(self, timeout: float | None) -> Outcome:
        """Run the guest with standard input on its console, until it ends."""
        with self.console():
            return self.explained(self.machine.run(timeout))

    @contextlib.contextmanager
    def console(self) -> Iterator[None]:
        """Connect standard input to the console: a terminal in raw mode, anything else as it is."""
        from kvmpy.devices.host_input import InputStream

        machine, send = self.machine, self.typed_at.send
        if not os.isatty(0):
            # At its end, or when the writer goes away, input stops and the guest runs on.
            machine.listen(InputStream(0, send))
            yield
            return
        from kvmpy.cli import terminal

        if not terminal.is_ours(0):
            yield
            return
        keys = terminal.EscapeKey(
            send,
            {
                "x": machine.stop,
                "b": self.serial.send_break,
                "h": lambda: os.write(2, terminal.HELP.encode()),
                "?": lambda: os.write(2, terminal.HELP.encode()),
            },
        )
        say("Ctrl-A x ends the run, Ctrl-A h lists the keys")
        with terminal.RawTerminal(0):
            machine.listen(InputStream(0, keys.feed))
            yield


class ProgramPc(SmallPc):
    """The machine of `kvmpy run`: a program of one's own, or a firmware."""

    def __init__(self, args: argparse.Namespace) -> None:
        if args.floppy is not None and not args.firmware:
            raise UsageError("--floppy goes with --firmware: IMAGE is then SeaBIOS, such as Debian's bios.bin")
        super().__init__(args)
        self._without_bios = False

    def open_image(self) -> Image:
        """The loader for the file, by --firmware, by its magic number, or else flat; and the floppy."""
        args = self.args
        self._floppy = None if args.floppy is None else _read_floppy(args.floppy)
        return _choose_image(args)

    def load(self) -> None:
        args, machine = self.args, self.machine
        if args.firmware:
            from kvmpy.devices import FwCfg

            configuration = machine.add(FwCfg(cpus=args.cpus, ram_size=args.memory, memory=machine.memory))
            configuration.defer(lambda: _add_smbios(configuration, machine))
            if self._floppy is not None:
                configuration.add_floppy(self._floppy)
        super().load()
        if not args.firmware:
            from kvmpy.cli import absent_bios

            self._without_bios = absent_bios.install(machine.memory, self.entry)

    def explained(self, outcome: Outcome) -> Outcome:
        """A guest that called the BIOS, which is not there, is told so."""
        if not self._without_bios:
            return outcome
        from kvmpy.cli import absent_bios

        return absent_bios.explained(outcome, self.machine)


def say(text: str) -> None:
    """A line for people, on standard error."""
    print(f"kvmpy: {text}", file=sys.stderr, flush=True)


def _add_smbios(configuration: FwCfg, machine: Pc) -> None:
    from kvmpy.boot.smbios import SmbiosTables
    from kvmpy.machine.platform_tables import platform_of

    configuration.add_smbios(*SmbiosTables(platform_of(machine)).for_firmware(machine.memory))


def _choose_image(args: argparse.Namespace) -> Image:
    if args.firmware:
        from kvmpy.boot import FirmwareImage

        for name in ("mode", "address", "entry"):
            if getattr(args, name) is not None:
                raise UsageError(f"--{name} does not go with --firmware, which starts at the reset vector")
        length = os.stat(args.image).st_size
        # A ROM of 256 KiB wants all of itself under 1 MiB; smaller ones have no more than their size.
        return FirmwareImage(args.image, shadow=min(max(length & -0x1000, 0x1_0000), 0x4_0000))
    if _magic(args.image) == b"\x7fELF":
        from kvmpy.boot import ElfImage

        return ElfImage(args.image, base=args.address, entry=args.entry, mode=args.mode, ring=args.ring)
    from kvmpy.boot import FlatImage

    return FlatImage(args.image, args.address, args.mode or "real", entry=args.entry, ring=args.ring)


def _magic(path: str) -> bytes:
    """The first four bytes of a regular file. Others are refused later, by whoever loads them."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a FIFO would block
        return b""
    with open(path, "rb") as file:
        return file.read(4)


def _read_floppy(path: str) -> bytes:
    from kvmpy.boot.image_source import ImageSource
    from kvmpy.devices.fw_cfg import FLOPPY_SIZES

    file = ImageSource(path)
    if not 0 < file.size <= FLOPPY_SIZES[-1]:
        raise ImageError(f"has {file.size} bytes; a floppy image has 1 to {FLOPPY_SIZES[-1]} (2880 KiB)", file.name)
    return file.read_all()


def to_standard_output(data: bytes) -> None:
    """Unbuffered: what the guest has written is on the terminal when the process is killed."""
    while data:
        data = data[os.write(1, data) :]
