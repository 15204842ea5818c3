"""Machines made of vCPUs, memory and devices: buses, the run loop, threads, outcomes."""

from kvmpy.machine.machine import Machine
from kvmpy.machine.outcome import End, Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmpy.machine.pc import Pc as Pc

__all__ = ["End", "Machine", "Outcome", "Pc"]


if not TYPE_CHECKING:  # or a type checker would believe in every name

    def __getattr__(name: str) -> object:
        if name != "Pc":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from kvmpy.machine.pc import Pc  # its devices are loaded when there is one

        globals()[name] = Pc
        return Pc
