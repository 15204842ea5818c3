"""What is at the other end of a Linux guest's network cable: network namespaces of the host, with DHCP and web servers.

    with namespace("far") as far, tap_into(far, folder, tmp_path) as tap:
        device = VirtioNet(tap)

The functions skip the test, saying why, where that cannot be had; they need root.
"""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kvmpy.pytest_plugin.requirement import skip_or_fail
from kvmpy.virtio import Passt, Tap

__all__ = [
    "BESIDE_GATEWAY",
    "GATEWAY",
    "GUEST",
    "HOST",
    "ip",
    "namespace",
    "passt_between",
    "require_passt",
    "tap_into",
    "web_server",
]

HOST, GUEST = "192.0.2.1", "192.0.2.77"
"""The ends of a TAP interface's cable. Its web server listens at HOST, port 80."""
GATEWAY, BESIDE_GATEWAY = "198.51.100.1", "198.51.100.2"
"""The ends of the cable between the namespaces of `passt_between`. What is at the second is the guest's address."""
ANYONE = "0 2147483647"


class _Files(SimpleHTTPRequestHandler):
    """Serves a folder, and says nothing."""

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def web_server(folder: Path) -> Iterator[int]:
    """Serve a folder on the host's loopback interface; answers the port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Files, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ip(*arguments: str) -> None:
    """Run ip(8)."""
    subprocess.run(["ip", *arguments], check=True)


def _inside(namespace: str, *command: str) -> list[str]:
    """The command that runs in a namespace."""
    return ["ip", "netns", "exec", namespace, *command]


@contextmanager
def namespace(name: str) -> Iterator[str]:
    """A network namespace of the host, with nothing in it; answers its whole name."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces and TAP interfaces need root")
    for program, package in (("ip", "iproute2"), ("dnsmasq", "dnsmasq-base"), ("ping", "iputils-ping")):
        if shutil.which(program) is None:
            skip_or_fail(f"{program} is not installed (Debian package {package})")
    name = f"kvmpy-{name}-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
    try:
        yield name
    finally:
        ip("netns", "delete", name)


@contextmanager
def _servers(namespace: str, log: Path, *commands: list[str]) -> Iterator[None]:
    """Run commands in a namespace until the end of the block."""
    with ExitStack() as stack:
        file = stack.enter_context(log.open("wb"))
        for command in commands:
            server = subprocess.Popen(_inside(namespace, *command), stdout=file, stderr=file)
            stack.callback(server.wait)
            stack.callback(server.terminate)
        yield


def _web_server(folder: Path, address: str) -> list[str]:
    return [sys.executable, "-m", "http.server", "80", "--bind", address, "--directory", str(folder)]


@contextmanager
def tap_into(namespace: str, folder: Path, scratch: Path) -> Iterator[Tap]:
    """A TAP interface into the namespace, where a DHCP server gives the guest the address GUEST, and a web server
    serves `folder` at HOST, port 80. The leases are in `scratch`."""
    try:
        tap = Tap()
    except OSError as error:
        pytest.skip(str(error))
    dhcp = [
        "dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--port=0", "--bind-interfaces", "--user=root", "--pid-file",
        f"--interface={tap.interface}", f"--dhcp-range={GUEST},{GUEST},1h", f"--dhcp-option=3,{HOST}",
        f"--dhcp-leasefile={scratch / 'leases'}",
    ]  # fmt: skip
    with ExitStack() as stack:
        stack.callback(tap.close)
        ip("link", "set", tap.interface, "netns", namespace)
        ip("-n", namespace, "address", "add", f"{HOST}/24", "dev", tap.interface)
        ip("-n", namespace, "link", "set", tap.interface, "up")
        stack.enter_context(_servers(namespace, scratch / "servers.log", dhcp, _web_server(folder, HOST)))
        yield tap


def require_passt() -> None:
    """Skip the test where passt is not installed."""
    if shutil.which("passt") is None:
        skip_or_fail("passt is not installed (Debian package passt)")


@contextmanager
def passt_between(near: str, far: str, folder: Path, scratch: Path) -> Iterator[Passt]:
    """passt in the namespace `near`, which is a host whose gateway is `far`. It may send pings (a user's ping sockets
    are for the groups in net.ipv4.ping_group_range, by default none), and GATEWAY answers. A web server serves `folder`
    on the loopback interface of `near`, port 80: to guests of passt that is the gateway's port 80."""
    require_passt()
    ends = (("host0", near, BESIDE_GATEWAY), ("gateway0", far, GATEWAY))
    ip("link", "add", "host0", "netns", near, "type", "veth", "peer", "name", "gateway0", "netns", far)
    for interface, place, address in ends:
        ip("-n", place, "address", "add", f"{address}/24", "dev", interface)
        ip("-n", place, "link", "set", interface, "up")
        ip("-n", place, "link", "set", "lo", "up")
    ip("-n", near, "route", "add", "default", "via", GATEWAY)
    subprocess.run(_inside(near, "sh", "-c", f"echo {ANYONE} > /proc/sys/net/ipv4/ping_group_range"), check=True)
    program = scratch / "passt-in-namespace"
    program.write_text(f'#!/bin/sh\nexec ip netns exec {near} passt "$@"\n')
    program.chmod(0o755)
    with ExitStack() as stack:
        stack.enter_context(_servers(near, scratch / "servers.log", _web_server(folder, "127.0.0.1")))
        passt = Passt(program=str(program), arguments=["--ipv4-only"])
        stack.callback(passt.close)
        yield passt
