"""Say what this host's KVM can do, by asking the kernel and by running small guests, and what to do about the rest.

It takes a second or two and changes nothing. Every probe has a time limit.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import textwrap
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kvmpy.cli import host_probe
from kvmpy.cli.cpu_option import HELP, cpu
from kvmpy.cli.diagnosis import SOFTWARE_NS, Advice, guest_advice, open_advice
from kvmpy.errors import KvmError, KvmUnavailableError
from kvmpy.kvm import Kvm

if TYPE_CHECKING:
    from kvmpy.cli.guest_probe import ModeCost
    from kvmpy.x86.cpu_templates import CpuTemplate

__all__ = ["EPILOG", "add_arguments", "examine", "run"]

EPILOG = """\
exit status:
  0   guests can run here
  1   they cannot; the advice says why

--json prints one object: `usable`, `kernel`, `device`, `module`, `processor`, `advice` (a list of `problem` and
`advice`), `seconds`; and, when usable, `api_version`, `limits`, `capabilities` (what KVM_CHECK_EXTENSION answers),
`costs` (per mode, `exit_us` and `instruction_ns`, or null), `paging`, `ring3`, `hypercalls`, `template` (the name of
the CPU template that guests were given), `cpuid` (features that a guest sees and was not given, and the reverse),
`left_out` (features that a Machine with several processors does not pass on), `instructions` (what ring 0 does with
each that CPUID announces).
"""


_WIDTH = 110
"""Columns of the text."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `kvmpy doctor`."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON, for scripts")
    parser.add_argument(
        "--cpu", type=cpu, default="host", metavar="TEMPLATE", help=f"what CPUID tells the guests: {HELP}"
    )
    parser.add_argument("--device", default="/dev/kvm", metavar="PATH", help="KVM's device (default /dev/kvm)")


def run(args: argparse.Namespace) -> int:
    """Examine the host and print; 0 when guests can run."""
    findings = examine(args.device, args.cpu)
    if args.json:
        json.dump(findings, sys.stdout, indent=2)
        print()
    else:
        print("\n".join(_lines(findings)))
    return 0 if findings["usable"] else 1


def examine(path: str = "/dev/kvm", cpu: str | CpuTemplate = "host") -> dict[str, Any]:
    """Everything that can be found out, as plain data; the keys are those in `EPILOG`.

    Guests are given the CPUID of the template `cpu`.
    """
    began = time.monotonic()
    device, module, processor = host_probe.device_file(path), host_probe.module(), host_probe.processor()
    system = os.uname()
    findings: dict[str, Any] = {
        "usable": False,
        "kernel": f"{system.sysname} {system.release} {system.machine}",
        "device": asdict(device),
        "module": asdict(module),
        "processor": asdict(processor),
    }
    advice: list[Advice] = []
    try:
        with Kvm(path) as kvm:
            findings |= _ask(kvm, cpu)
            advice += guest_advice(findings)
            findings["usable"] = True
    except KvmUnavailableError as error:
        if error.errno == errno.ENOTTY:  # it was opened, but does not know KVM's ioctls
            advice.append(Advice(f"{path} is not KVM's device", "use --device only for another name of /dev/kvm"))
        else:
            advice.append(open_advice(device, module, processor))
    except _NoGuest as problem:
        advice.append(Advice(str(problem), "look at `dmesg`; another hypervisor may hold the processor"))
    except KvmError as error:
        advice.append(Advice(str(error), error.advice or "look at `dmesg`"))
    findings["advice"] = [asdict(item) for item in advice]
    findings["seconds"] = round(time.monotonic() - began, 3)
    return findings


class _NoGuest(Exception):
    """A VM can be made, but not even the smallest guest runs in it."""


def _ask(kvm: Kvm, cpu: str | CpuTemplate) -> dict[str, Any]:
    """The part that needs an open device."""
    from kvmpy.cli import guest_probe
    from kvmpy.x86.cpu_templates import cpu_template

    if not guest_probe.runs_a_guest(kvm):
        raise _NoGuest("a VM can be created, but a guest of two instructions does not run in it")
    template = cpu_template(cpu)
    cpuid = template.table(kvm.supported_cpuid())
    ring0, present = guest_probe.cpuid_difference(kvm, "long ring 0", cpuid)
    ring3, native = guest_probe.cpuid_difference(kvm, "long ring 3", cpuid)
    # These two do something else where they do not exist. Code that was compiled for them does not ask CPUID.
    present |= native & {"abm", "bmi1"}
    hypercalls = guest_probe.hypercalls(kvm, cpuid)
    return {
        "api_version": kvm.ioctl("KVM_GET_API_VERSION"),
        "limits": host_probe.limits(kvm),
        "capabilities": host_probe.capabilities(kvm),
        "costs": {mode: _cost(guest_probe.mode_cost(kvm, mode, cpuid)) for mode in guest_probe.MODES},
        "paging": guest_probe.paging(kvm, cpuid),
        "ring3": {
            "syscall": guest_probe.syscall_in_ring_3(kvm, cpuid),
            "int n": guest_probe.interrupt_in_ring_3(kvm, cpuid),
        },
        "hypercalls": hypercalls,
        "left_out": guest_probe.hypercall_features(cpuid, hypercalls),
        "template": template.name,
        "cpuid": {"ring 0": asdict(ring0), "ring 3": asdict(ring3)},
        "instructions": guest_probe.instructions(kvm, cpuid, present),
    }


def _cost(cost: ModeCost | None) -> dict[str, float] | None:
    return None if cost is None else {name: round(value, 3) for name, value in asdict(cost).items()}


# Text


def _lines(findings: dict[str, Any]) -> list[str]:
    device, module, processor = findings["device"], findings["module"], findings["processor"]
    lines = ["host", _row("kernel", findings["kernel"])]
    inside = ", itself a virtual machine" if processor["hypervisor"] else ""
    lines.append(_row("processor", f"{processor['model'] or 'unknown'}{inside}"))
    lines.append(_row("device", _device_text(device)))
    nested = {True: "; guests may run guests", False: "; guests may not run guests", None: ""}[module["nested"]]
    described = f" ({module['description']})" if module["description"] else ""
    lines.append(_row("module", f"{module['vendor'] or ('kvm' if module['kvm'] else 'none')}{described}{nested}"))
    if findings["usable"]:
        lines += _usable_lines(findings)
    lines += ["", "advice" if findings["advice"] else "nothing to advise"]
    for item in findings["advice"]:
        lines += textwrap.wrap(item["problem"], _WIDTH, initial_indent="  * ", subsequent_indent="    ")
        lines += textwrap.wrap(item["advice"], _WIDTH, initial_indent="    -> ", subsequent_indent="       ")
    verdict = "guests can run here" if findings["usable"] else "guests cannot run here"
    return [*lines, "", f"{verdict} (examined in {findings['seconds']:.1f} s)"]


def _device_text(device: dict[str, Any]) -> str:
    if not device["exists"]:
        return f"{device['path']} is not there"
    may = "may be opened" if device["may_open"] else "may not be opened by this user"
    return f"{device['path']}, {device['owner']}:{device['group']} {device['mode']}, {may}"


def _usable_lines(findings: dict[str, Any]) -> list[str]:
    from kvmpy.cli.guest_probe import MODES

    limits = findings["limits"]
    lines = [_row("KVM API", f"version {findings['api_version']}")]
    lines.append(
        _row(
            "limits",
            f"{limits['vcpus']} vCPUs ({limits['recommended_vcpus']} recommended), "
            f"{limits['memory_slots']} memory slots, {limits['msrs']} MSRs of state",
        )
    )
    lines += ["", "cost of a port write to user space and back, and of one instruction"]
    for mode, cost in findings["costs"].items():
        if cost is None:
            lines.append(f"  {MODES[mode]:<38} not usable")
            continue
        where = "in software" if cost["instruction_ns"] > SOFTWARE_NS else "natively"
        numbers = f"{cost['exit_us']:7.1f} us {cost['instruction_ns']:8.1f} ns, {where}"
        lines.append(f"  {MODES[mode]:<38} {numbers}")
    lines += ["", "what a guest can do"]
    lines += [
        _row(mode if "page" in mode else f"{mode} paging", _yes(works), 26)
        for mode, works in findings["paging"].items()
    ]
    lines.append(_row("SYSCALL in ring 3", findings["ring3"]["syscall"], 26))
    lines.append(_row("INT n in ring 3", findings["ring3"]["int n"], 26))
    lines += [_row(name.upper(), answer, 26) for name, answer in findings["hypercalls"].items()]
    if findings["left_out"]:
        lines += _wrapped("CPUID of a Machine with several processors leaves out", findings["left_out"])
    given = "" if findings["template"] == "host" else f" (template {findings['template']})"
    for ring, difference in findings["cpuid"].items():
        for what, names in (("not asked for, but seen", difference["added"]), ("asked for", difference["missing"])):
            if names:
                unseen = ", but not seen" if what == "asked for" else ""
                lines += _wrapped(f"CPUID in {ring}{given}: {what}{unseen}", names)
    by_answer: dict[str, list[str]] = {}
    for name, answer in findings["instructions"].items():
        by_answer.setdefault(answer, []).append(name)
    for answer, names in by_answer.items():
        lines += _wrapped(f"ring-0 instructions: {answer}", names)
    lines += ["", "capabilities"]
    for capability, purpose in host_probe.CAPABILITIES.items():
        value = findings["capabilities"][capability.name]
        shown = "no" if not value else "yes" if value == 1 else str(value)
        lines.append(f"  {capability.name:<28} {shown:>8}  {purpose}")
    return lines


def _row(name: str, text: str, width: int = 12) -> str:
    return f"  {name:<{width}} {text}"


def _wrapped(title: str, names: list[str]) -> list[str]:
    text = ", ".join(names)
    return [f"  {title}", *textwrap.wrap(text, _WIDTH, initial_indent="      ", subsequent_indent="      ")]


def _yes(works: bool) -> str:
    return "works" if works else "does not work"
