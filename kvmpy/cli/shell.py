"""Open a Python prompt before a guest: a flat binary, an ELF file, or with --firmware a ROM image.

The machine is that of `kvmpy run`; the guest stands at its first instruction. `machine`, `vcpu`, `regs`, `sregs`,
`memory`, `console` (COM1) and `symbols` are there, and functions to step, run, stop and look: `commands` lists them,
help(step) explains one. Numbers are shown in hex. What the guest writes to its consoles appears on the terminal;
console.send(b"...") types for it. Ctrl-C stops a guest that runs, Ctrl-D leaves.

On a pipe, statements are read from standard input, without prompts.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from kvmpy.cli.run_report import IMAGE_REFUSED, NO_KVM, OTHER_ERROR, status_of
from kvmpy.cli.small_pc import ProgramPc, add_image_arguments, add_machine_arguments, say
from kvmpy.errors import KvmError, UsageError

if TYPE_CHECKING:
    from kvmpy.cli.prompt_console import PromptConsole

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = f"""\
exit status:
  0              the prompt was left; with -c, all statements were executed
  1              a statement given with -c raised an exception
  number         what exit(number) says
  {IMAGE_REFUSED}            the image cannot be read, is not sound, or does not fit
  {NO_KVM}            KVM is not there or refused something; see `kvmpy doctor`
  {OTHER_ERROR}            any other error
  2              the command line cannot be meant so
  130            a statement given with -c was interrupted by Ctrl-C

examples:
  kvmpy shell kernel.elf
  kvmpy shell kernel.elf -c 'br("panic"); run(60); report()'
  kvmpy shell kernel.elf -c 'exit(not run(10).outcome.ok)'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `kvmpy shell`."""
    parser.usage = "kvmpy shell [options] IMAGE"
    add_image_arguments(parser)
    add_machine_arguments(parser)
    prompt = parser.add_argument_group("the prompt")
    prompt.add_argument(
        "-c", "--command", action="append", metavar="STATEMENT",
        help="execute this, and leave; several are executed one after the other, up to the first that fails",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Open the prompt; answers the exit status that `EPILOG` describes."""
    try:
        pc = ProgramPc(args)
        with pc:
            return _converse(pc, args)
    except (KvmError, UsageError, OSError) as error:
        if isinstance(error, BrokenPipeError) or args.debug:
            raise
        from kvmpy.cli import describe

        say(describe(error))
        return status_of(error)


def _converse(pc: ProgramPc, args: argparse.Namespace) -> int:
    from kvmpy.cli.guest_output import GuestOutput
    from kvmpy.cli.prompt_console import PromptConsole
    from kvmpy.debug.prompt import GuestPrompt
    from kvmpy.machine import End, Outcome

    machine = pc.machine
    output = GuestOutput()
    pc.serial.connect_sink(output.write)
    if args.debug_console is None:
        machine.debug_console.connect_sink(output.write)
    prompt = GuestPrompt(machine, pc.explained)
    if prompt.trouble:
        say(f"without symbols: {prompt.trouble}")
    names: dict[str, Any] = {"console": pc.serial, "End": End, "Outcome": Outcome}
    with PromptConsole(prompt, names, output, whole_tracebacks=args.debug) as console:
        if args.command is None:
            console.converse(_banner(args.image, console))
            return 0
        for statement in args.command:
            if status := console.execute(statement):
                return status
        output.finish_line()
        return 0


def _banner(image: str, console: PromptConsole) -> str:
    from kvmpy.x86.register_text import mode_text

    prompt = console.prompt
    return (
        f"{os.path.basename(image)} stands in {mode_text(prompt.sregs)}. "
        "`commands` lists what there is, Ctrl-D leaves.\n"
        f"{prompt.where()}"
    )
