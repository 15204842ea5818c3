"""Run a guest as `kvmpy run` does, and write down what it does: every exit with its time, the device that answered,
interrupts of devices, and with --steps every instruction.

The format goes by the suffix of the file: .txt has a line an event, .jsonl a JSON object an event, .json is for
Perfetto (ui.perfetto.dev), .html is a page with timeline and tables for any browser.
"""

from __future__ import annotations

import argparse
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvmpy.cli import run as run_command
from kvmpy.cli.quantities import count, duration, place
from kvmpy.cli.run_report import OTHER_ERROR
from kvmpy.cli.small_pc import say
from kvmpy.debug.trace.event import KINDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmpy.debug.trace.tracer import Tracer
    from kvmpy.machine import Machine

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = f"""\
kinds of events:
{"".join(f"  {kind:<12}  {what}{chr(10)}" for kind, what in KINDS.items())}
{run_command.STATUSES}
examples:
  kvmpy trace kernel.elf --output boot.html
  kvmpy trace --firmware /usr/share/seabios/bios.bin --timeout 10 --output seabios.json
  kvmpy trace boot.img --output com1.txt --ports 0x3f8-0x3ff --slower-than 10us
  kvmpy trace boot.img --output end.txt --steps --last 1000
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `kvmpy run`, and what is traced."""
    parser.usage = "kvmpy trace IMAGE --output FILE [options]"
    run_command.add_run_arguments(parser)
    trace = parser.add_argument_group("the trace")
    trace.add_argument("-o", "--output", required=True, metavar="FILE", help="where it is written")
    trace.add_argument(
        "--format", choices=("text", "jsonl", "chrome", "html"), help="the format, whatever the file is called"
    )
    trace.add_argument("--last", type=count, metavar="N", help="only the last N events, written at the end")
    trace.add_argument("--steps", action="store_true", help="every instruction, too; the guest becomes very slow")

    filters = parser.add_argument_group("which events (each a list with commas; an event must pass all that are given)")
    filters.add_argument("--kinds", type=_list, metavar="KIND", help="see below")
    filters.add_argument("--ports", type=_places, metavar="PORT", help="accesses there, such as 0x70,0x3f8-0x3ff")
    filters.add_argument(
        "--addresses", type=_places, metavar="ADDRESS", help="memory accesses, and instructions, there"
    )
    filters.add_argument(
        "--answered-by", type=_list, metavar="NAME", help='by devices called so; "nobody" for what nobody claims'
    )
    filters.add_argument("--vcpus", type=_numbers, metavar="N", help="of these processors, which count from 0")
    filters.add_argument(
        "--slower-than", type=duration, default=0.0, metavar="TIME", help="whose handler took so long, such as 50us"
    )


def run(args: argparse.Namespace) -> int:
    """Run the guest, traced; answers its exit status, or OTHER_ERROR where the trace is not whole."""
    tracers: list[Tracer] = []

    @contextmanager
    def around(machine: Machine) -> Iterator[None]:
        from kvmpy.debug.trace.tracer import TraceError, Tracer

        tracer = Tracer(
            machine,
            args.output,
            format=args.format,
            kinds=args.kinds,
            ports=args.ports,
            addresses=args.addresses,
            devices=args.answered_by,
            vcpus=args.vcpus,
            minimum=args.slower_than,
            ring=args.last,
            steps=args.steps,
        )
        try:
            with tracer:
                tracers.append(tracer)
                yield
        except TraceError:
            return  # said below; how the guest ended matters as well

    try:
        status = run_command.run_guest(args, around)
    finally:
        for tracer in tracers:
            trouble = "" if tracer.error is None else f" of {tracer.count}: {tracer.error.strerror}"
            say(f"{tracer.written} events in {args.output}{trouble}")
    if any(tracer.error is not None for tracer in tracers):
        return status or OTHER_ERROR
    return status


def _list(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (word.strip() for word in text.split(","))))


def _places(text: str) -> tuple[range, ...]:
    return tuple(place(word) for word in _list(text))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in _list(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers, such as 0,1") from None
