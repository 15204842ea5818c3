"""The command `kvmpy`: one module per command, imported when that command is asked for.

A command's module has `add_arguments(parser)`, `run(args) -> int`, which answers the exit status, and a docstring,
which is the beginning of its help; `EPILOG`, if there is one, is the end.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager

from kvmpy.errors import KvmpyError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

__all__ = ["COMMANDS", "describe", "main", "without_garbage_collection"]

COMMANDS = {
    "doctor": "say what this host's KVM can do, and what to do about what it cannot",
    "cpu": "show or save what a CPU template tells guests here",
    "run": "run a flat binary, an ELF file or a firmware image",
    "boot": "boot Linux or a Multiboot kernel, with its console on this terminal",
    "trace": "run it and write down what the guest does",
    "shell": "open a Python prompt before it: step, look, change, go on",
    "bench": "measure exits, starts and kicks against a C loop",
}
"""The commands, each the name of a module of this package, and what they do."""

USAGE_STATUS = 2
"""Exit status for a command line that cannot be meant so, as argparse has it."""

ERROR_STATUS = 1
"""Exit status for an error that the command has no status of its own for."""

_DESCRIPTION = "Virtual machines over /dev/kvm, in Python."
_EPILOG = "`kvmpy COMMAND --help` explains a command. Start with `kvmpy doctor`."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (by default the process's) and answer the exit status.

    What a user can do something about is one line on the standard error; `--debug` shows where it came from.
    """
    import gc

    _occupy_standard_descriptors()
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(given)
    finally:
        gc.unfreeze()


def _run(given: list[str]) -> int:
    with without_garbage_collection():
        args = _parse(given)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("kvmpy: interrupted", file=sys.stderr)
        return 130  # 128 + SIGINT, as shells say it
    except BrokenPipeError:
        _die_of_broken_pipe()
    except (KvmpyError, OSError, MemoryError) as error:
        if args.debug:
            raise
        print(f"kvmpy: {describe(error)}", file=sys.stderr)
        return ERROR_STATUS
    return status


def describe(error: BaseException) -> str:
    """An error in one line (more only where the error itself lists what is broken)."""
    if isinstance(error, OSError) and not isinstance(error, KvmpyError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _occupy_standard_descriptors() -> None:
    """Where the caller has closed descriptor 0, 1 or 2, put the null device: else the next file opened would be it."""
    import os

    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor, which is `fd`
    # Python has no stream for a descriptor that was closed when it started.
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _parse(given: list[str]) -> argparse.Namespace:
    """What the command line says. It ends the process for a help, and for what cannot be meant so."""
    if given and given[0] in COMMANDS:
        return _command_parser(given[0]).parse_args(given[1:])
    parser = _overview()  # which --help prints
    parser.parse_args(given)
    parser.error("the command comes first")


def _command_parser(command: str) -> argparse.ArgumentParser:
    import argparse
    from importlib import import_module

    module = import_module(f"kvmpy.cli.{command}")
    epilog = getattr(module, "EPILOG", None)
    parser = argparse.ArgumentParser(f"kvmpy {command}", None, module.__doc__, epilog, formatter_class=_formatter)
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    parser.set_defaults(run=module.run)
    return parser


def _overview() -> argparse.ArgumentParser:
    """The commands, by name only."""
    import argparse

    from kvmpy import __version__

    parser = argparse.ArgumentParser("kvmpy", None, _DESCRIPTION, _EPILOG, formatter_class=_formatter)
    parser.add_argument("--version", action="version", version=f"kvmpy {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        subparsers.add_parser(name, help=summary, add_help=False)
    return parser


def _formatter(prog: str) -> argparse.HelpFormatter:
    """argparse makes one for each argument; with a width of its own it need not load shutil, and that bz2 and lzma."""
    import argparse

    return argparse.RawDescriptionHelpFormatter(prog, width=_columns() - 2)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Modules are no garbage: looking for some among what they define takes a tenth of the time of loading them.

    What is there at the end is not looked at later either, until `main` is over.
    """
    import gc

    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def _columns() -> int:
    """How wide a help may be: as COLUMNS says, or the terminal, or 80."""
    import os

    try:
        return int(os.environ["COLUMNS"]) or 80
    except (KeyError, ValueError):
        pass
    try:
        return os.get_terminal_size(sys.__stdout__.fileno()).columns or 80 if sys.__stdout__ else 80
    except (OSError, ValueError):
        return 80


def _die_of_broken_pipe() -> None:
    """Whoever read our output has gone (`kvmpy doctor | head`): end as a program without a handler would."""
    import os
    import signal

    # What is still buffered must not fail again while the interpreter ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGPIPE)
