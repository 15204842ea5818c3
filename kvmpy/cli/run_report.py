"""What `kvmpy run` says about a run: its exit status, a line for people, and JSON for scripts."""

from __future__ import annotations

from kvmpy.cli.small_pc import ImageUnreadable
from kvmpy.errors import ImageError, KvmError, UsageError
from kvmpy.machine.outcome import End

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvmpy.machine import Machine, Outcome
    from kvmpy.machine.statistics import AccessCount, Statistics

__all__ = [
    "ENDED_BADLY",
    "IMAGE_REFUSED",
    "NO_KVM",
    "OTHER_ERROR",
    "TIMED_OUT",
    "as_data",
    "device_counters",
    "exit_status",
    "status_of",
]

# Even numbers: the code of a debug-exit port is odd, so none of these can be the guest's.
OTHER_ERROR = 118
"""What is none of the others, such as a full disk."""
NO_KVM = 120
"""/dev/kvm is missing, may not be opened, or the kernel refused something."""
IMAGE_REFUSED = 122
"""The image cannot be read, is not sound, or does not fit."""
TIMED_OUT = 124
"""As the command timeout has it."""
ENDED_BADLY = 126
"""A triple fault, a panic, or something KVM could not go on with."""


def exit_status(outcome: Outcome) -> int:
    """The status of the process for a guest that ended so: its own code where it gave one, of which 8 bits are left."""
    if outcome.end is End.EXITED:
        return (outcome.code or 0) & 0xFF
    if outcome.end is End.TIMEOUT:
        return TIMED_OUT
    return 0 if outcome.ok else ENDED_BADLY


def status_of(error: Exception) -> int:
    """The status of the process for an error of the image, of KVM, or of the command line."""
    if isinstance(error, (ImageError, ImageUnreadable)):
        return IMAGE_REFUSED
    if isinstance(error, KvmError):
        return NO_KVM
    return 2 if isinstance(error, UsageError) else OTHER_ERROR


def as_data(outcome: Outcome, machine: Machine, seconds: float) -> dict[str, Any]:
    """The run as plain data for JSON. Times in seconds, addresses as numbers."""
    statistics: Statistics = machine.statistics()
    return {
        "status": exit_status(outcome),
        "outcome": {
            "end": str(outcome.end),
            "ok": outcome.ok,
            "code": outcome.code,
            "message": outcome.message,
            "vcpu": outcome.vcpu,
            "console": outcome.console,
        },
        "seconds": round(seconds, 6),
        "statistics": {
            "accesses": [_access(access) for access in statistics.accesses],
            "unclaimed": [_access(access) for access in statistics.unclaimed],
            "exits": statistics.exits,
            "completed": statistics.completed,
            "devices": device_counters(machine),
        },
    }


def device_counters(machine: Machine) -> dict[str, dict[str, int]]:
    """What the guest did wrong to devices, by the device's name; devices without such counts are left out."""
    return {device.name: dict(device.counters) for device in machine.devices if device.counters}


def _access(access: AccessCount) -> dict[str, Any]:
    return {name: getattr(access, name) for name in access.__match_args__}
