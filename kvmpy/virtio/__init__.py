"""Paravirtual devices as virtio 1.2 (OASIS) has them: split virtqueues, the MMIO transport, and devices.

A device is a subclass of `VirtioDevice` and knows neither transport nor KVM. The classes are imported when they are
first named: `from kvmpy.virtio import Entropy`.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmpy.virtio.block.device import Block as Block
    from kvmpy.virtio.chain import Chain as Chain
    from kvmpy.virtio.console.device import VirtioConsole as VirtioConsole
    from kvmpy.virtio.console.port import ConsolePort as ConsolePort
    from kvmpy.virtio.device import VirtioDevice as VirtioDevice
    from kvmpy.virtio.entropy import Entropy as Entropy
    from kvmpy.virtio.features import DeviceStatus as DeviceStatus
    from kvmpy.virtio.features import Feature as Feature
    from kvmpy.virtio.mmio import VirtioMmio as VirtioMmio
    from kvmpy.virtio.mmio import linux_parameters as linux_parameters
    from kvmpy.virtio.net.backend import NetBackend as NetBackend
    from kvmpy.virtio.net.datagram_socket import DatagramSocket as DatagramSocket
    from kvmpy.virtio.net.datagram_socket import datagram_pair as datagram_pair
    from kvmpy.virtio.net.device import VirtioNet as VirtioNet
    from kvmpy.virtio.net.passt import Passt as Passt
    from kvmpy.virtio.net.pcap import PcapFile as PcapFile
    from kvmpy.virtio.net.stream_socket import StreamSocket as StreamSocket
    from kvmpy.virtio.net.tap import Tap as Tap
    from kvmpy.virtio.ninep.device import Plan9 as Plan9
    from kvmpy.virtio.virtqueue import Virtqueue as Virtqueue
    from kvmpy.virtio.vsock.device import Vsock as Vsock
    from kvmpy.virtio.vsock.listener import VsockListener as VsockListener

_MODULE_OF = {
    "Block": "block.device",
    "Chain": "chain",
    "ConsolePort": "console.port",
    "DatagramSocket": "net.datagram_socket",
    "DeviceStatus": "features",
    "Entropy": "entropy",
    "Feature": "features",
    "NetBackend": "net.backend",
    "Passt": "net.passt",
    "PcapFile": "net.pcap",
    "StreamSocket": "net.stream_socket",
    "Tap": "net.tap",
    "Plan9": "ninep.device",
    "VirtioConsole": "console.device",
    "VirtioDevice": "device",
    "VirtioMmio": "mmio",
    "VirtioNet": "net.device",
    "Virtqueue": "virtqueue",
    "Vsock": "vsock.device",
    "VsockListener": "vsock.listener",
    "datagram_pair": "net.datagram_socket",
    "linux_parameters": "mmio",
}

__all__ = [
    "Block",
    "Chain",
    "ConsolePort",
    "DatagramSocket",
    "DeviceStatus",
    "Entropy",
    "Feature",
    "NetBackend",
    "Passt",
    "PcapFile",
    "Plan9",
    "StreamSocket",
    "Tap",
    "VirtioConsole",
    "VirtioDevice",
    "VirtioMmio",
    "VirtioNet",
    "Virtqueue",
    "Vsock",
    "VsockListener",
    "datagram_pair",
    "linux_parameters",
]


if not TYPE_CHECKING:  # a type checker that saw it would take every misspelt name for one of ours

    def __getattr__(name: str) -> object:
        module = _MODULE_OF.get(name)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
