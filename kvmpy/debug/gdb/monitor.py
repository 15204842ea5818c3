"""gdb's `monitor` command: what a machine knows beyond what gdb can ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from kvmpy.errors import KvmpyError

if TYPE_CHECKING:
    from kvmpy.kvm import Vcpu
    from kvmpy.machine import Machine

__all__ = ["monitor"]

_LAST = 16
"""How many of the last exits are listed."""
_LONGEST_STATE = 400
"""Characters; the state of a device that needs more (a disk, a console with its text) is left out."""


class _Command(NamedTuple):
    usage: str
    what: str
    run: Callable[[Machine, Vcpu, list[str]], str]


def monitor(machine: Machine, vcpu: Vcpu, line: str) -> str:
    """The text that a command prints. Never raises for what is wrong with the command, but says it."""
    words = line.split()
    name, arguments = (words[0], words[1:]) if words else ("help", [])
    command = _COMMANDS.get(name)
    if command is None:
        return f"no command {name!r}; `monitor help` lists them"
    if len(arguments) != len(command.usage.split()) - 1:
        return f"usage: monitor {command.usage}"
    try:
        return command.run(machine, vcpu, arguments)
    except KvmpyError as error:
        return str(error)


def _help(_: Machine, __: Vcpu, ___: list[str]) -> str:
    width = max(len(command.usage) for command in _COMMANDS.values())
    return "\n".join(f"{command.usage:<{width}}  {command.what}" for command in _COMMANDS.values())


def _registers(_: Machine, vcpu: Vcpu, __: list[str]) -> str:
    return f"vCPU {vcpu.id}\n{vcpu.cpu_state()}"


def _walk(_: Machine, vcpu: Vcpu, arguments: list[str]) -> str:
    try:
        address = int(arguments[0], 0)
    except ValueError:
        return f"{arguments[0]!r} is no number; write 0x... for hex"
    return str(vcpu.walk(address))


def _exits(machine: Machine, vcpu: Vcpu, _: list[str]) -> str:
    recent = machine.recent_exits(machine.vcpus.index(vcpu))[-_LAST:]
    lines = ["exits so far, of all vCPUs:", str(machine.statistics()) or "    none"]
    if recent:
        lines += [f"the last ones of vCPU {vcpu.id}:", *(f"    {event!r}" for event in recent)]
    return "\n".join(lines)


def _devices(machine: Machine, _: Vcpu, __: list[str]) -> str:
    lines = []
    for device in machine.devices:
        lines.append(device.name)
        lines += [f"    {region!r}" for region in device.regions()]
        if device.counters:
            counted = ", ".join(f"{name} {count}" for name, count in device.counters.items())
            lines.append(f"    counted: {counted}")
        state = ", ".join(f"{name}={value!r}" for name, value in device.state().items())
        if 0 < len(state) <= _LONGEST_STATE:
            lines.append(f"    state: {state}")
    named = {repr(region) for device in machine.devices for region in device.regions()}
    others = [region for bus in (machine.ports, machine.mmio) for region in bus.regions if repr(region) not in named]
    lines += [f"{region!r}" for region in others]
    return "\n".join(lines) or "no devices"


def _memory(machine: Machine, _: Vcpu, __: list[str]) -> str:
    lines = [
        f"{region.address:#018x} .. {region.end - 1:#018x}  {region.name}{', read-only' if region.read_only else ''}"
        for region in machine.memory.regions
    ]
    return "\n".join(lines)


_COMMANDS = {
    "help": _Command("help", "this list", _help),
    "registers": _Command("registers", "all registers of the selected vCPU, flags by name", _registers),
    "walk": _Command("walk ADDRESS", "where a linear address leads, and each page-table entry on the way", _walk),
    "exits": _Command("exits", "how often the guest came out and why, and the last times", _exits),
    "devices": _Command("devices", "what is plugged in, where, and what it counted", _devices),
    "memory": _Command("memory", "guest-physical memory", _memory),
}
