"""Devices that trap to the hypervisor: each a class of its own, with registers as its data sheet names them.

The classes are imported when they are first named: `from kvmpy.devices import Uart16550`.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmpy.devices.console_output import ConsoleOutput as ConsoleOutput
    from kvmpy.devices.console_output import ExpectTimeout as ExpectTimeout
    from kvmpy.devices.device import Board as Board
    from kvmpy.devices.device import Device as Device
    from kvmpy.devices.device import InterruptLine as InterruptLine
    from kvmpy.devices.device import Region as Region
    from kvmpy.devices.host_input import HostInput as HostInput
    from kvmpy.devices.uart16550 import Uart16550 as Uart16550

_MODULES = {
    "Board": "device",
    "ConsoleOutput": "console_output",
    "Device": "device",
    "ExpectTimeout": "console_output",
    "HostInput": "host_input",
    "InterruptLine": "device",
    "Region": "device",
    "Uart16550": "uart16550",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> object:
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
