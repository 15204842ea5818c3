"""Measure what kvmpy costs, against a C loop that is compiled on the spot and against QEMU where it is installed.

Everything is measured in one run and in turns, so that what disturbs the machine disturbs all alike; the ratios carry
over to other machines, the times do not. Nothing is asserted.
"""

from __future__ import annotations

import json
import sys
import time

from kvmpy.bench.report import as_data, as_markdown, as_text
from kvmpy.bench.suite import BENCHMARKS, WITHOUT_KVM, run_benchmarks
from kvmpy.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

__all__ = ["EPILOG", "add_arguments", "run"]

FEWEST_ROUNDS = 5

EPILOG = """benchmarks, for --only:
  memory     resident memory of an idle VM
  exits      cost of a port or memory access that a device in Python answers
  python     of that, Python's own part: the run loop over a stub in place of KVM_RUN (needs no /dev/kvm)
  serial     16550 output per character
  virtio     exits and time of requests to a virtio device, one by one and in batches
  disk       reads from a virtio disk
  console    output on a virtio console
  folder     requests to a shared folder
  start      the whole process `python hello.py`, and the import
  boot       SeaBIOS and a Multiboot kernel, from the command to what they print
  lifecycle  VMs created, run to the first exit and closed, a second
  kicks      from vcpu.kick() to the return of a busy guest
  lock       an exit beside a Python thread that computes
  registers  reading registers in a handler, with SYNC_REGS and without
  completion instructions that KVM gives up on, done in software, beside a bare exit

It takes about a minute, two where KVM runs guests in software. The machine should have nothing else to do.

`kvmpy bench ways` is another thing: one guest program, the same work in three ways, with exits counted exactly. It
needs gcc and binutils, and takes some seconds; docs/three-ways.md explains what it shows."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line of `kvmpy bench`."""
    parser.add_argument(
        "what", nargs="?", choices=["ways"],
        help="ways: the same work by emulated hardware, by paravirtual devices and cooperatively; exits, time, bytes",
    )  # fmt: skip
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print all samples as JSON")
    output.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument(
        "--only", action="append", metavar="NAME", choices=list(BENCHMARKS),
        help="run this benchmark only; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=_rounds, default=15, metavar="N",
        help=f"how often the contenders take turns (default 15, at least {FEWEST_ROUNDS})",
    )  # fmt: skip
    parser.add_argument(
        "--plot", metavar="FILE", help="ways: draw them into FILE, an .svg or .png (needs matplotlib, extra `plot`)"
    )
    parser.add_argument("--no-qemu", action="store_true", help="do not compare with QEMU")


def run(args: argparse.Namespace) -> int:
    """Measure and print. Raises KvmUnavailableError when a benchmark needs /dev/kvm and there is none."""
    if args.what == "ways":
        return _ways(args)
    if args.plot:
        raise UsageError("--plot is for `kvmpy bench ways`")
    names = [name for name in BENCHMARKS if not args.only or name in args.only]
    if not WITHOUT_KVM.issuperset(names):
        from kvmpy.kvm import Kvm

        with Kvm():  # says what is wrong with /dev/kvm before anything is compiled
            pass
    progress = _Progress(len(names))
    results = run_benchmarks(names, rounds=args.rounds, qemu=not args.no_qemu, began=progress.began)
    progress.end()
    if args.json:
        print(json.dumps(as_data(results), indent=2))
    else:
        print(as_markdown(results) if args.markdown else as_text(results))
    return 0


def _ways(args: argparse.Namespace) -> int:
    from kvmpy.bench import ways, ways_report
    from kvmpy.kvm import Kvm

    if args.markdown or args.only:
        raise UsageError("--markdown and --only are not for `kvmpy bench ways`")
    if args.plot and not args.plot.lower().endswith(ways_report.FORMATS):
        raise UsageError(f"a plot is an {' or '.join(ways_report.FORMATS)} file, not {args.plot}")
    with Kvm():
        pass
    progress = _Progress(len(ways.WAYS))
    results = ways.three_ways(began=progress.began)
    progress.end()
    print(json.dumps(ways.as_data(results), indent=2) if args.json else ways_report.as_text(results))
    if args.plot:
        ways_report.draw(results, args.plot)
    return 0


def _rounds(text: str) -> int:
    from argparse import ArgumentTypeError

    if not text.isdecimal() or int(text) < FEWEST_ROUNDS:
        raise ArgumentTypeError(f"{text!r} is not a number of at least {FEWEST_ROUNDS}")
    return int(text)


class _Progress:
    """One line on a terminal that says what is being measured; nothing elsewhere."""

    def __init__(self, count: int) -> None:
        self._shown = sys.stderr.isatty()
        self._count = count
        self._number = 0
        self._start = time.monotonic()

    def began(self, name: str) -> None:
        self._number += 1
        self._say(f"[{self._number}/{self._count}] {name}, {time.monotonic() - self._start:.0f} s so far")

    def end(self) -> None:
        self._say("")

    def _say(self, text: str) -> None:
        if self._shown:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
