"""Run a guest: a flat binary, an ELF file (told by its first bytes), or with --firmware a ROM image.

The machine is a small PC: COM1 (0x3F8) and the debug console (port 0xE9) write to standard output, COM1 reads standard
input; there are POST port 0x80, keyboard controller, CMOS clock, KVM's interrupt controllers and timer, and a
debug-exit port at 0xF4. A firmware image also gets a PCI host bridge and QEMU's fw_cfg. Without one there is no BIOS:
a boot sector that calls it ends with a message that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time

from kvmpy.cli.inspection_options import add_inspection_arguments, looking_into, write_crash_report
from kvmpy.cli.quantities import seconds
from kvmpy.cli.run_report import (
    ENDED_BADLY,
    IMAGE_REFUSED,
    NO_KVM,
    OTHER_ERROR,
    TIMED_OUT,
    as_data,
    device_counters,
    exit_status,
    status_of,
)
from kvmpy.cli.small_pc import ProgramPc, add_image_arguments, add_machine_arguments, say
from kvmpy.errors import KvmError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TextIO

    from kvmpy.cli.small_pc import SmallPc
    from kvmpy.machine import Machine, Outcome

    Around = Callable[[Machine], contextlib.AbstractContextManager[object]]

__all__ = [
    "EPILOG",
    "KEYS",
    "STATUSES",
    "add_arguments",
    "add_report_arguments",
    "add_run_arguments",
    "run",
    "run_guest",
]

STATUSES = f"""\
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
"""
"""For the help of all commands that run a guest."""

KEYS = """\
keys, when standard input is a terminal (which is then in raw mode: Ctrl-C goes to the guest):
  Ctrl-A x       end the run              Ctrl-A h       list the keys
  Ctrl-A b       send a break             Ctrl-A Ctrl-A  send Ctrl-A
"""

EPILOG = f"""\
{KEYS}
{STATUSES}
examples:
  kvmpy run boot.img                        a boot sector: 512 bytes that end in 55 AA, at 0x7C00
  kvmpy run hello.bin --address 0x8000      any real-mode code
  kvmpy run kernel.elf --memory 64M --cpus 2
  kvmpy run --firmware /usr/share/seabios/bios.bin --timeout 10
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `kvmpy run`."""
    parser.usage = "kvmpy run [options] IMAGE"
    add_run_arguments(parser)
    add_inspection_arguments(parser)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that every command has which runs a guest to its end."""
    add_image_arguments(parser)
    add_report_arguments(parser, add_machine_arguments(parser))


def add_report_arguments(parser: argparse.ArgumentParser, machine: argparse._ArgumentGroup) -> None:
    """How long a run may take, and what is said about it."""
    machine.add_argument(
        "--timeout", type=seconds, metavar="SECONDS", help=f"end the run after so long, with status {TIMED_OUT}"
    )
    report = parser.add_argument_group("what is said")
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
        help="say what is loaded where, how the run ended, and print a crash report when it ended badly",
    )


def run(args: argparse.Namespace) -> int:
    """Run the guest; answers the exit status that `EPILOG` describes."""
    return run_guest(args, lambda machine: looking_into(args, machine))


def run_guest(
    args: argparse.Namespace, around: Around | None = None, pc: Callable[[argparse.Namespace], SmallPc] = ProgramPc
) -> int:
    """Run the guest of `pc(args)` within the context `around(machine)`, report, and answer the exit status."""
    report: TextIO | None = sys.stderr if args.json == "-" else None
    with contextlib.ExitStack() as stack:
        try:
            if args.json not in (None, "-"):  # first: a run whose report cannot be written is not begun
                report = stack.enter_context(open(args.json, "w", encoding="utf-8"))
            status, data = _run(pc(args), args, around)
        except (KvmError, UsageError, OSError) as error:
            if isinstance(error, BrokenPipeError) or args.debug:
                raise
            from kvmpy.cli import describe

            status = status_of(error)
            data = {"status": status, "error": describe(error)}
            if report is not sys.stderr:
                say(describe(error))
        if report is not None:
            import json

            json.dump(data, report, indent=2)
            report.write("\n")
    return status


def _run(pc: SmallPc, args: argparse.Namespace, around: Around | None) -> tuple[int, dict[str, Any]]:
    with pc:
        if args.verbose:
            say(f"{pc.image!r}")
            for loaded in pc.entry.ranges:
                say(f"{loaded.address:#x}..{loaded.end - 1:#x} {loaded.name}")
        began = time.monotonic()
        with contextlib.nullcontext() if around is None else around(pc.machine):
            outcome = pc.run(args.timeout)
        took = time.monotonic() - began
        _report(args, pc.machine, outcome, took)
        return exit_status(outcome), as_data(outcome, pc.machine, took)


def _report(args: argparse.Namespace, machine: Machine, outcome: Outcome, took: float) -> None:
    """For people, on standard error; nothing when the guest ended well and nobody asked."""
    if args.verbose:
        say(f"{outcome}, after {took:.3f} s")
        if outcome.report is not None:
            print(outcome.report, file=sys.stderr)
    elif not outcome.ok and args.json != "-":
        say(str(outcome))
        if outcome.console and not sys.stdout.isatty():  # else it is in sight
            print(outcome.console, file=sys.stderr)
    if outcome.report is not None and getattr(args, "crash_report", None) is not None:
        write_crash_report(args.crash_report, outcome.report)
    if args.stats:
        print(machine.statistics(), file=sys.stderr)
        for name, counters in device_counters(machine).items():
            for what, times in counters.items():
                print(f"{times:>10}  {name}: {what}", file=sys.stderr)
