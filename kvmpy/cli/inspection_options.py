"""The options of `kvmpy run` and `kvmpy boot` that look into the guest: gdb, coverage, profiles, crash reports."""

from __future__ import annotations

import argparse
import contextlib
import os

from kvmpy.cli.small_pc import say
from kvmpy.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmpy.debug.crash_report import CrashReport
    from kvmpy.debug.symbols import SymbolTable
    from kvmpy.machine import Machine

__all__ = ["add_inspection_arguments", "looking_into", "write_crash_report"]


def add_inspection_arguments(parser: argparse.ArgumentParser) -> None:
    """The group of these options."""
    group = parser.add_argument_group("looking into the guest")
    group.add_argument(
        "--gdb", type=gdb_address, metavar="[HOST]:PORT",
        help="let gdb attach there (`target remote :1234`), on this computer only unless a HOST is given, or at the "
        "path of a UNIX socket; the guest stands until one does",
    )  # fmt: skip
    group.add_argument(
        "--gdb-architecture", metavar="NAME",
        help="tell gdb i386:x86-64, i386 or i8086, whatever mode the guest is in when gdb attaches",
    )  # fmt: skip
    group.add_argument(
        "--coverage", metavar="FILE",
        help="write what the guest executed: .info for lcov, which needs an ELF file with source lines (-g), or .drcov",
    )  # fmt: skip
    group.add_argument(
        "--coverage-by", choices=("steps", "breakpoints"), default="steps",
        help="every instruction by itself, exact and slow, or breakpoints that go when they are reached",
    )  # fmt: skip
    group.add_argument(
        "--profile", metavar="FILE",
        help="look a hundred times a second where every processor is, and write which functions the guest was in and "
        "what Python took of the time: .folded is for flame graphs, else text",
    )  # fmt: skip
    group.add_argument(
        "--symbols", metavar="FILE",
        help="names for the addresses in a crash report or profile: a System.map, or an ELF file such as a vmlinux "
        "that was not stripped. Default: those of the image",
    )  # fmt: skip
    group.add_argument(
        "--crash-report", metavar="FILE",
        help="when the guest ends badly, write why: .html is a page for the browser, .json data, else text (-v prints "
        "it)",
    )  # fmt: skip


def gdb_address(text: str) -> tuple[str, int] | str:
    """An address of the command line, for argparse."""
    from kvmpy.debug.gdb.listening import parse_address

    try:
        return parse_address(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


@contextlib.contextmanager
def looking_into(args: argparse.Namespace, machine: Machine) -> Iterator[None]:
    """What the options ask for, around the run."""
    with contextlib.ExitStack() as stack:
        if args.symbols is not None:
            machine.symbols = _read_symbols(args.symbols)
        coverage = None
        if args.coverage is not None:
            from kvmpy.debug.coverage import coverage_format

            coverage_format(args.coverage)  # a suffix that is unknown should not come up when the run is over
            coverage = stack.enter_context(machine.coverage(args.coverage_by))
        profile = None
        if args.profile is not None:
            _check_writable(args.profile)
            profile = stack.enter_context(machine.profile())
        if args.gdb is not None:
            server = stack.enter_context(machine.serve_gdb(args.gdb, wait=True, architecture=args.gdb_architecture))
            where = server.address
            shown = where if isinstance(where, str) else f"{where[0]}:{where[1]}"
            say(f"the guest waits for gdb: target remote {shown}")
        yield
    if coverage is not None:
        coverage.write(args.coverage)
    if profile is not None:
        profile.save(args.profile)


def _check_writable(path: str) -> None:
    """Raises UsageError for a file that could not be written when the run is over."""
    try:
        with open(path, "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise UsageError(f"the profile cannot be written to {path}: {error.strerror}") from error


def _read_symbols(path: str) -> SymbolTable:
    from kvmpy.debug.symbols import SymbolTable

    with open(path, "rb") as file:
        is_elf = file.read(4) == b"\x7fELF"
    return SymbolTable.from_elf(path) if is_elf else SymbolTable.from_system_map(path)


def write_crash_report(path: str, report: CrashReport) -> None:
    """Write a crash report in the form that the suffix says."""
    suffix = os.path.splitext(path)[1]
    if suffix == ".html":
        text = f'<!DOCTYPE html>\n<meta charset="utf-8">\n<title>kvmpy crash report</title>\n{report._repr_html_()}\n'
    elif suffix == ".json":
        import json

        text = json.dumps(report.as_data(), indent=2) + "\n"
    else:
        text = f"{report}\n"
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(f"the crash report cannot be written to {path}: {error.strerror}") from error
