"""The options --net and --capture: a network card for the guest, and what goes over it in a file."""

import argparse
from functools import partial

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmpy.machine import Machine
    from kvmpy.virtio import NetBackend

    Network = Callable[[], NetBackend]

__all__ = ["add_net_arguments", "network", "plug_in_network"]


def add_net_arguments(machine: "argparse._ArgumentGroup") -> None:
    """Add both to the group of what the machine consists of."""
    machine.add_argument(
        "--net", type=network, metavar="NET",
        help="a virtio network card: passt (the host's network, without root; Debian's package passt), passt:PORTS "
        "(and the host's TCP ports lead into the guest, such as 2222:22), tap:NAME (a TAP interface), or none (the "
        "default)",
    )  # fmt: skip
    machine.add_argument("--capture", metavar="FILE", help="with --net: write what goes over it to a pcap file")


def network(text: str) -> "Network | None":
    """What makes the card's backend; None for no card."""
    kind, _, rest = text.partition(":")
    if text == "none":
        return None
    if kind == "passt":
        return partial(_passt, rest)
    if kind == "tap" and rest:
        return partial(_tap, rest)
    raise argparse.ArgumentTypeError(f"{text!r} is none of passt, passt:PORTS, tap:NAME and none")


def plug_in_network(args: argparse.Namespace, machine: "Machine") -> None:
    """Give the machine what the arguments ask for: before an image is loaded, whose tables tell of devices.

    Raises UsageError where passt is not installed, OSError where it does not start or an interface cannot be had.
    """
    if args.net is None:
        if args.capture is not None:
            from kvmpy.errors import UsageError

            raise UsageError("--capture goes with --net")
        return
    from kvmpy.virtio import VirtioNet

    machine.add(VirtioNet(args.net(), capture=args.capture))


def _passt(ports: str) -> "NetBackend":
    from kvmpy.virtio import Passt

    return Passt(tcp_ports=ports)


def _tap(name: str) -> "NetBackend":
    from kvmpy.virtio import Tap

    return Tap(name)
