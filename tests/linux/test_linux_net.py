"""Linux's own driver uses the network: addresses by DHCP, pings, and files that busybox fetches from the host, through
passt and through a TAP interface; a second guest."""

from __future__ import annotations

import random
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from hashlib import md5
from pathlib import Path

import pytest

from kvmpy.virtio import Feature, Passt, VirtioMmio, VirtioNet
from kvmpy.virtio.net.format import NetFeature
from linux_networks import GUEST, HOST, ip, namespace, require_passt, tap_into, web_server
from linux_session import LinuxSession, busybox, small_kernel

MAC = "52:54:00:12:34:56"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    (folder / "file").write_bytes(random.Random(7).randbytes(1 << 20))
    return folder


@pytest.fixture
def port(folder: Path) -> Iterator[int]:
    """Where a web server listens on the loopback interface."""
    with web_server(folder) as port:
        yield port


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def session_with(device: VirtioNet, *, ip: str, events: bool = True) -> LinuxSession:
    transport = VirtioMmio(device, ioeventfd=events, irqfd=events)
    return LinuxSession(small_kernel(), cmdline=f"console=ttyS0 ip={ip}", transports=[transport])


@pytest.mark.parametrize("events", [True, False], ids=["ioeventfd and irqfd", "exits and lines"])
def test_linux_has_the_hosts_network_by_passt(folder: Path, port: int, events: bool) -> None:
    require_passt()
    into_the_guest = free_port()
    device = VirtioNet(Passt(tcp_ports=f"{into_the_guest}:80", arguments=["--ipv4-only"]), mac=MAC)
    with session_with(device, ip="dhcp", events=events) as session:
        told = session.boot()
        leased = re.search(r"IP-Config: Got DHCP answer from ([\d.]+), my address is ([\d.]+)", told)
        assert leased, told
        assert device.has_feature(Feature.EVENT_IDX)
        assert device.has_feature(NetFeature.MRG_RXBUF)
        card = session.run("ifconfig eth0")
        assert f"HWaddr {MAC.upper()}" in card
        assert f"inet addr:{leased[2]}" in card
        assert "MTU:65520" in card
        gateway = session.run("route -n | grep ^0.0.0.0").split()[1]
        # To guests of passt the gateway is the host.
        fetched = session.run(f"wget -q -O - http://{gateway}:{port}/file | md5sum", 120)
        assert fetched.split()[0] == md5((folder / "file").read_bytes()).hexdigest()
        # What connects to the port of the host comes to the guest.
        session.run("echo from the guest | /bin/busybox nc -l -p 80 &")
        session.run("until grep :0050 /proc/net/tcp; do sleep 1; done")
        with (
            socket.create_connection(("127.0.0.1", into_the_guest), timeout=60) as connection,
            connection.makefile() as stream,
        ):
            connection.sendall(b"hello\n")  # passt of March 2023 wants that the client speaks first
            assert stream.readline() == "from the guest\n"
        assert session.machine.host_errors == []
        assert device.counters == {}


@pytest.fixture
def far() -> Iterator[str]:
    """A network namespace of the host."""
    with namespace("far") as name:
        yield name


def test_linux_is_a_station_at_a_tap_interface(far: str, folder: Path, tmp_path: Path) -> None:
    capture = tmp_path / "net.pcap"
    with ExitStack() as stack:
        tap = stack.enter_context(tap_into(far, folder, tmp_path))
        device = VirtioNet(tap, mac=MAC, capture=capture)
        session = stack.enter_context(session_with(device, ip="dhcp"))
        told = session.boot()
        assert f"IP-Config: Got DHCP answer from {HOST}, my address is {GUEST}" in told
        assert "MTU:1500" in session.run("ifconfig eth0")
        assert " 0% packet loss" in session.run(f"ping -c 3 -s 1400 {HOST}")
        fetched = session.run(f"wget -q -O - http://{HOST}/file | md5sum", 120)
        assert fetched.split()[0] == md5((folder / "file").read_bytes()).hexdigest()
        # And from the outside: a packet of 9000 bytes comes, and goes back, in seven frames.
        ping = subprocess.run(
            ["ip", "netns", "exec", far, "ping", "-c", "3", "-i", "0.2", "-s", "9000", "-w", "30", GUEST],
            capture_output=True, text=True,
        )  # fmt: skip
        assert "3 received" in ping.stdout, ping.stdout + ping.stderr
        # The interface goes, and the guest learns of it.
        assert session.run("cat /sys/class/net/eth0/carrier") == "1\n"
        ip("-n", far, "link", "delete", tap.interface)
        assert session.run("sleep 1; cat /sys/class/net/eth0/carrier") == "0\n"
        assert session.machine.host_errors == []
        assert set(device.counters) <= {"interface_gone", "no_driver"}
    assert MAC in (tmp_path / "leases").read_text()
    assert capture.stat().st_size > 1 << 20


def test_linux_of_the_command_line_finds_its_card_by_acpi(tmp_path: Path) -> None:
    require_passt()
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    shutil.copy(busybox(), root / "bin" / "busybox")
    for applet in ("sh", "ifconfig", "poweroff"):
        (root / "bin" / applet).symlink_to("busybox")
    (root / "init").write_text("#!/bin/sh\nifconfig eth0\npoweroff -f\n")
    (root / "init").chmod(0o755)
    command = (sys.executable, "-m", "kvmpy", "boot", small_kernel("bzImage"), "--init", root, "--memory", "128M")
    network = ("--append", "ip=dhcp", "--net", "passt", "--capture", tmp_path / "net.pcap")
    done = subprocess.run(
        [*map(str, command + network)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    leased = re.search(r"IP-Config: Got DHCP answer from [\d.]+, my address is ([\d.]+)", done.stdout)
    assert leased, done.stdout
    assert f"inet addr:{leased[1]}" in done.stdout
