"""Run a guest: a flat binary, an ELF file (told by its first bytes), or with --firmware a ROM image.

The machine is a small PC: COM1 (0x3F8) and the debug console (port 0xE9) write to standard output, COM1 reads standard
input; there are POST port 0x80, keyboard controller, CMOS clock, KVM's interrupt controllers and timer, and a
debug-exit port at 0xF4. A firmware image also gets a PCI host bridge and QEMU's fw_cfg. Without one there is no BIOS:
a boot sector that calls it ends with a message that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import stat
import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

from kvmpy.cli.quantities import address, count, seconds, size
from kvmpy.cli.run_report import (
    ENDED_BADLY,
    IMAGE_REFUSED,
    NO_KVM,
    OTHER_ERROR,
    TIMED_OUT,
    as_data,
    device_counters,
    exit_status,
)
from kvmpy.errors import ImageError, KvmError, UsageError

if TYPE_CHECKING:
    from kvmpy.boot import Image
    from kvmpy.devices import Uart16550
    from kvmpy.machine import Machine, Outcome

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = f"""\
keys, when standard input is a terminal (which is then in raw mode: Ctrl-C goes to the guest):
  Ctrl-A x       end the run              Ctrl-A h       list the keys
  Ctrl-A b       send a break             Ctrl-A Ctrl-A  send Ctrl-A

exit status:
  0              the guest ended well: it halted, shut down or reset itself, or was ended by Ctrl-A x
  odd number     the guest wrote a value v to port 0xF4: the status is (v << 1) | 1, as with QEMU's isa-debug-exit
  {ENDED_BADLY}            the guest ended badly: triple fault, panic, or something KVM could not go on with
  {TIMED_OUT}            --timeout was over
  {IMAGE_REFUSED}            the image cannot be read, is not sound, or does not fit
  {NO_KVM}            KVM is not there or refused something; see `kvmpy doctor`
  {OTHER_ERROR}            any other error
  2              the command line cannot be meant so
  130            interrupted by Ctrl-C

examples:
  kvmpy run boot.img                        a boot sector: 512 bytes that end in 55 AA, at 0x7C00
  kvmpy run hello.bin --address 0x8000      any real-mode code
  kvmpy run kernel.elf --memory 64M --cpus 2
  kvmpy run --firmware /usr/share/seabios/bios.bin --timeout 10
"""

MODES = ("real", "protected16", "protected", "long")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `kvmpy run`."""
    parser.usage = "kvmpy run [options] IMAGE"
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

    machine = parser.add_argument_group("the machine")
    machine.add_argument(
        "--memory", type=size, default=16 << 20, metavar="SIZE", help="RAM, such as 512K, 16M (the default) or 2G"
    )
    machine.add_argument(
        "--cpus", type=count, default=1, metavar="N", help="processors; all but the first wait for INIT and SIPI"
    )
    machine.add_argument(
        "--timeout", type=seconds, metavar="SECONDS", help=f"end the run after so long, with status {TIMED_OUT}"
    )
    machine.add_argument("--device", default="/dev/kvm", metavar="PATH", help="KVM's device (default /dev/kvm)")

    report = parser.add_argument_group("what is said")
    report.add_argument(
        "--debug-console", metavar="FILE",
        help="write what comes from port 0xE9 there instead of to standard output, and also listen at 0x402, where "
        "firmware writes its log; - is standard error",
    )  # fmt: skip
    report.add_argument(
        "--json", nargs="?", const="-", metavar="FILE",
        help="write how the run ended, and statistics, as JSON to FILE, or to standard error when no FILE follows",
    )  # fmt: skip
    report.add_argument(
        "--stats", action="store_true", help="print statistics of ports, addresses and exits at the end"
    )
    report.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="say what is loaded where, how the run ended, and the registers when it ended badly",
    )


def run(args: argparse.Namespace) -> int:
    """Run the guest; answers the exit status that `EPILOG` describes."""
    report: TextIO | None = sys.stderr if args.json == "-" else None
    with contextlib.ExitStack() as stack:
        try:
            if args.json not in (None, "-"):  # first: a run whose report cannot be written is not begun
                report = stack.enter_context(open(args.json, "w", encoding="utf-8"))
            status, data = _run(args)
        except (KvmError, UsageError, OSError) as error:
            if isinstance(error, BrokenPipeError) or args.debug:
                raise
            from kvmpy.cli import describe

            status = _status_of(error)
            data = {"status": status, "error": describe(error)}
            if report is not sys.stderr:
                _say(describe(error))
        if report is not None:
            json.dump(data, report, indent=2)
            report.write("\n")
    return status


def _status_of(error: Exception) -> int:
    if isinstance(error, (ImageError, _ImageUnreadable)):
        return IMAGE_REFUSED
    if isinstance(error, KvmError):
        return NO_KVM
    return 2 if isinstance(error, UsageError) else OTHER_ERROR


class _ImageUnreadable(OSError):
    """The file system refused the image."""


def _run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    if args.cpus > 0x100:
        raise UsageError(f"--cpus is at most 256, not {args.cpus}: a PC's CMOS cannot say more")
    try:
        image = _choose_image(args)
    except OSError as error:
        raise _ImageUnreadable(error.errno, error.strerror, error.filename) from error
    from kvmpy.cli import absent_bios
    from kvmpy.kvm import Kvm
    from kvmpy.machine import Machine

    with contextlib.ExitStack() as stack:
        kvm = stack.enter_context(Kvm(args.device))
        machine = stack.enter_context(Machine(args.memory, args.cpus, kvm=kvm))
        serial = _plug_in_devices(machine, args, stack)
        entry = machine.load(image)
        if args.verbose:
            _say(f"{image!r}")
            for loaded in entry.ranges:
                _say(f"{loaded.address:#x}..{loaded.end - 1:#x} {loaded.name}")
        without_bios = not args.firmware and absent_bios.install(machine.memory, entry)
        began = time.monotonic()
        with _console(machine, serial):
            outcome = machine.run(args.timeout)
        if without_bios:
            outcome = absent_bios.explained(outcome, machine)
        took = time.monotonic() - began
        _report(args, machine, outcome, took)
        return exit_status(outcome), as_data(outcome, machine, took)


def _choose_image(args: argparse.Namespace) -> Image:
    """The loader for the file: by --firmware, by its magic number, or else flat."""
    from kvmpy.boot import ElfImage, FirmwareImage, FlatImage

    if args.firmware:
        for name in ("mode", "address", "entry"):
            if getattr(args, name) is not None:
                raise UsageError(f"--{name} does not go with --firmware, which starts at the reset vector")
        length = os.stat(args.image).st_size
        # A ROM of 256 KiB wants all of itself under 1 MiB; smaller ones have no more than their size.
        return FirmwareImage(args.image, shadow=min(max(length & -0x1000, 0x1_0000), 0x4_0000))
    if _magic(args.image) == b"\x7fELF":
        return ElfImage(args.image, base=args.address, entry=args.entry, mode=args.mode, ring=args.ring)
    return FlatImage(args.image, args.address, args.mode or "real", entry=args.entry, ring=args.ring)


def _magic(path: str) -> bytes:
    """The first four bytes of a regular file. Others are refused later, by whoever loads them."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a FIFO would block
        return b""
    with open(path, "rb") as file:
        return file.read(4)


def _plug_in_devices(machine: Machine, args: argparse.Namespace, stack: contextlib.ExitStack) -> Uart16550:
    from kvmpy.devices import I8042, Cmos, DebugConsole, DebugExit, FwCfg, PciHostBridge, PostPort, Uart16550

    debug_sink: Any = _to_standard_output
    if args.debug_console is not None:
        debug_sink = sys.stderr.buffer
        if args.debug_console != "-":
            debug_sink = stack.enter_context(open(args.debug_console, "wb"))  # noqa: SIM115
        # Not by default: what SeaBIOS says on COM1 it says here too, and the two would be mixed.
        machine.add(DebugConsole(0x402, sink=debug_sink))
    below = sum(region.size for region in machine.memory.regions if region.end <= 1 << 32)
    above = args.memory - below
    serial = machine.add(Uart16550(sink=_to_standard_output))
    machine.add(DebugConsole(0xE9, sink=debug_sink))
    machine.add(PostPort())
    machine.add(DebugExit())
    machine.add(I8042())
    machine.add(Cmos(memory_below_4g=below, memory_above_4g=above, cpus=args.cpus))
    if args.firmware:
        machine.add(PciHostBridge())
        machine.add(FwCfg(cpus=args.cpus, ram_size=args.memory, memory=machine.memory))
    return serial


def _to_standard_output(data: bytes) -> None:
    """Unbuffered: what the guest has written is on the terminal when the process is killed."""
    while data:
        data = data[os.write(1, data) :]


@contextlib.contextmanager
def _console(machine: Machine, serial: Uart16550) -> Any:
    """Connect standard input to the serial line: a terminal in raw mode, anything else as it is."""
    from kvmpy.devices.host_input import InputStream

    if not os.isatty(0):
        # At its end, or when the writer goes away, input stops and the guest runs on.
        machine.listen(InputStream(0, serial.send))
        yield
        return
    from kvmpy.cli import terminal

    if not terminal.is_ours(0):
        yield
        return
    keys = terminal.EscapeKey(
        serial.send,
        {
            "x": machine.stop,
            "b": serial.send_break,
            "h": lambda: os.write(2, terminal.HELP.encode()),
            "?": lambda: os.write(2, terminal.HELP.encode()),
        },
    )
    _say("Ctrl-A x ends the run, Ctrl-A h lists the keys")
    with terminal.RawTerminal(0):
        machine.listen(InputStream(0, keys.feed))
        yield


def _report(args: argparse.Namespace, machine: Machine, outcome: Outcome, took: float) -> None:
    """For people, on standard error; nothing when the guest ended well and nobody asked."""
    if args.verbose:
        _say(f"{outcome}, after {took:.3f} s")
        if not outcome.ok:
            vcpu = machine.vcpus[outcome.vcpu or 0]
            print(f"{vcpu.regs}\n{vcpu.sregs}", file=sys.stderr)
    elif not outcome.ok and args.json != "-":
        _say(str(outcome))
    if args.stats:
        print(machine.statistics(), file=sys.stderr)
        for name, counters in device_counters(machine).items():
            for what, times in counters.items():
                print(f"{times:>10}  {name}: {what}", file=sys.stderr)


def _say(text: str) -> None:
    print(f"kvmpy: {text}", file=sys.stderr, flush=True)
