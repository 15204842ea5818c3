"""Show what CPUID tells the guests of this host by a CPU template, or save it as a template of its own.

Templates are `host` (all that the host's KVM supports), `portable` (no instructions beyond x86-64-v2), `plain` (nothing
that KVM's own emulator lacks), or a JSON file:

  {"base": "portable", "features": {"sse4_2": false}, "brand": "My processor", "msrs": {"MISC_ENABLE": "0x1"}}

The machine adds how many processors there are and how fast their clocks are. `kvmpy doctor --cpu TEMPLATE` says what of
it guests really see here.
"""

from __future__ import annotations

import argparse
import json
import sys

from kvmpy.cli.cpu_option import HELP, cpu

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = """\
examples:
  kvmpy cpu plain                           every leaf, with the names of its features
  kvmpy cpu host --json > here.json         this host's processor, for guests elsewhere
  kvmpy run kernel.elf --cpu here.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `kvmpy cpu`."""
    parser.add_argument("template", metavar="TEMPLATE", nargs="?", type=cpu, default="host", help=HELP)
    parser.add_argument(
        "--json", action="store_true", help="print a template with every answer, which needs nothing of its host"
    )
    parser.add_argument("--device", default="/dev/kvm", metavar="PATH", help="KVM's device (default /dev/kvm)")


def run(args: argparse.Namespace) -> int:
    """Print the template as it is on this host."""
    from kvmpy.kvm import Kvm
    from kvmpy.x86.cpu_templates import CpuTemplate, cpu_template, to_dict

    template = cpu_template(args.template)
    with Kvm(args.device) as kvm:
        table = template.table(kvm.supported_cpuid())
    if args.json:
        exact = CpuTemplate.of_table(template.name, table, dict(template.msrs))
        json.dump(to_dict(exact), sys.stdout, indent=2)
        print()
    else:
        print(template, "", table, sep="\n")
    return 0
