"""kvmpy: virtual machines over /dev/kvm, in Python.

`Kvm`, `Vm` and `Vcpu` are the KVM API; `Machine` puts devices and a run loop around them; the exit classes (`IoOut`,
`MmioRead`, `Hlt` ...) are what a vCPU comes back with. Names are resolved when they are first used, so that a script
pays only for what it needs, and `import kvmpy` works on any computer.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmpy import errors as errors
    from kvmpy.errors import *  # noqa: F403
    from kvmpy.exits import *  # noqa: F403
    from kvmpy.kvm import DeviceFd as DeviceFd
    from kvmpy.kvm import Kvm as Kvm
    from kvmpy.kvm import Vcpu as Vcpu
    from kvmpy.kvm import Vm as Vm
    from kvmpy.machine import End as End
    from kvmpy.machine import Machine as Machine
    from kvmpy.machine import Outcome as Outcome
    from kvmpy.memory import GuestMemory as GuestMemory
    from kvmpy.memory import MemoryRegion as MemoryRegion

__version__ = "0.1.0"

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30

_HOMES = {
    "DeviceFd": "kvm", "Kvm": "kvm", "Vcpu": "kvm", "Vm": "kvm",
    "End": "machine", "Machine": "machine", "Outcome": "machine",
    "GuestMemory": "memory", "MemoryRegion": "memory",
}  # fmt: skip
"""Public name -> the module of this package that has it; exits and errors are found in their modules."""

__all__ = ["GiB", "KiB", "MiB", "__version__", *_HOMES]


if not TYPE_CHECKING:  # or a type checker would believe in every name

    def __getattr__(name: str) -> object:
        if name.startswith("_"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        for home in (_HOMES[name],) if name in _HOMES else ("exits", "errors"):
            module = __import__(f"{__name__}.{home}", fromlist=("__all__",))  # importlib would cost half a millisecond
            if name in _HOMES or name in module.__all__:
                value: object = getattr(module, name)
                globals()[name] = value
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    from kvmpy import errors, exits

    return sorted({*globals(), *__all__, *exits.__all__, *errors.__all__})
