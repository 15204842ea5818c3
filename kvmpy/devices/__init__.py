"""Devices that trap to the hypervisor: each a class of its own, with registers as its data sheet names them.

The classes are imported when they are first named: `from kvmpy.devices import Uart16550`.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmpy.devices.acpi_pm import AcpiPm as AcpiPm
    from kvmpy.devices.acpi_pm import AcpiSleep as AcpiSleep
    from kvmpy.devices.ata import AtaDisk as AtaDisk
    from kvmpy.devices.cmos import Cmos as Cmos
    from kvmpy.devices.console_output import ConsoleOutput as ConsoleOutput
    from kvmpy.devices.console_output import ExpectTimeout as ExpectTimeout
    from kvmpy.devices.debug_console import DebugConsole as DebugConsole
    from kvmpy.devices.debug_exit import DebugExit as DebugExit
    from kvmpy.devices.device import Board as Board
    from kvmpy.devices.device import Device as Device
    from kvmpy.devices.device import InterruptLine as InterruptLine
    from kvmpy.devices.device import Region as Region
    from kvmpy.devices.fw_cfg import FwCfg as FwCfg
    from kvmpy.devices.host_input import HostInput as HostInput
    from kvmpy.devices.hypercall_channel import Hypercall as Hypercall
    from kvmpy.devices.hypercall_channel import HypercallChannel as HypercallChannel
    from kvmpy.devices.i8042 import I8042 as I8042
    from kvmpy.devices.pci_host import HostBridge as HostBridge
    from kvmpy.devices.pci_host import PciFunction as PciFunction
    from kvmpy.devices.pci_host import PciHostBridge as PciHostBridge
    from kvmpy.devices.pit import Pit8254 as Pit8254
    from kvmpy.devices.post_port import PostPort as PostPort
    from kvmpy.devices.pvpanic import PvPanic as PvPanic
    from kvmpy.devices.uart16550 import Uart16550 as Uart16550

__all__ = [
    "I8042",
    "AcpiPm",
    "AcpiSleep",
    "AtaDisk",
    "Board",
    "Cmos",
    "ConsoleOutput",
    "DebugConsole",
    "DebugExit",
    "Device",
    "ExpectTimeout",
    "FwCfg",
    "HostBridge",
    "HostInput",
    "Hypercall",
    "HypercallChannel",
    "InterruptLine",
    "PciFunction",
    "PciHostBridge",
    "Pit8254",
    "PostPort",
    "PvPanic",
    "Region",
    "Uart16550",
]

_MODULE_OF = {
    "AcpiPm": "acpi_pm",
    "AcpiSleep": "acpi_pm",
    "AtaDisk": "ata",
    "Board": "device",
    "Cmos": "cmos",
    "ConsoleOutput": "console_output",
    "DebugConsole": "debug_console",
    "DebugExit": "debug_exit",
    "Device": "device",
    "ExpectTimeout": "console_output",
    "FwCfg": "fw_cfg",
    "HostBridge": "pci_host",
    "HostInput": "host_input",
    "Hypercall": "hypercall_channel",
    "HypercallChannel": "hypercall_channel",
    "I8042": "i8042",
    "InterruptLine": "device",
    "PciFunction": "pci_host",
    "PciHostBridge": "pci_host",
    "Pit8254": "pit",
    "PostPort": "post_port",
    "PvPanic": "pvpanic",
    "Region": "device",
    "Uart16550": "uart16550",
}


def __getattr__(name: str) -> object:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
