"""The network device on real KVM: a station in C that speaks ARP, ICMP, UDP and DHCP meets other stations, passt, and
the host's own network stack at a TAP interface."""

from __future__ import annotations

import ipaddress
import os
import select
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from gnu_toolchain import compile_c
from kvmpy import End, Machine, MiB
from kvmpy.boot import ElfImage
from kvmpy.devices import DebugExit
from kvmpy.guest.program import GuestProgram
from kvmpy.machine import Outcome
from kvmpy.pytest_plugin.requirement import skip_or_fail
from kvmpy.virtio import DatagramSocket, Feature, Passt, Tap, VirtioMmio, VirtioNet, datagram_pair
from kvmpy.virtio import mmio_registers as reg
from kvmpy.virtio.net.format import NetFeature
from network_cable import MAC, Inverter, arp_request

SOURCE = str(Path(__file__).with_name("virtio_net.c"))
ADDRESS = 0xD000_0000
EVENT_IDX = 1 << Feature.EVENT_IDX
OWN, PEER = "192.0.2.5", "192.0.2.6"


def station(
    work: str, *, count: int = 5, size: int = 56, own: str = OWN, peer: str = PEER, port: int = 0,
    wanted: int = EVENT_IDX | 1 << NetFeature.MRG_RXBUF,
) -> GuestProgram:  # fmt: skip
    return compile_c(
        SOURCE, flags=(
            f"-DADDRESS={ADDRESS:#x}", f"-DWANTED={wanted:#x}ULL", f"-DWORK={work}", f"-DCOUNT={count}",
            f"-DSIZE={size}", f"-DOWN_IP={int(ipaddress.ip_address(own)):#x}",
            f"-DPEER_IP={int(ipaddress.ip_address(peer)):#x}", f"-DPORT={port}",
        ),
    )  # fmt: skip


class Station:
    """A machine with a network card that runs a program of virtio_net.c."""

    def __init__(self, device: VirtioNet, program: GuestProgram, *, ioeventfd: bool = True, ring: int = 3) -> None:
        self.device = device
        self.program = program
        self.machine = Machine(memory=16 * MiB)
        self.machine.add(VirtioMmio(device, address=ADDRESS, irq=5, ioeventfd=ioeventfd))
        self.machine.add(DebugExit())
        self.machine.load(ElfImage(program.elf, ring=ring))

    def __enter__(self) -> Station:
        return self

    def __exit__(self, *_: object) -> None:
        self.machine.close()

    def ended_well(self, outcome: Outcome) -> None:
        assert (outcome.end, (outcome.code or 0) >> 1) == (End.EXITED, 0)
        assert self.machine.host_errors == []

    def run(self) -> None:
        self.ended_well(self.machine.run(timeout=30))

    @property
    def notifications(self) -> int:
        """Exits for the register that notifies."""
        return self.machine.statistics().count("mmio", ADDRESS + reg.QUEUE_NOTIFY)


# --- two guests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ring", [0, 3])
@pytest.mark.parametrize("ioeventfd", [False, True], ids=["exits", "ioeventfd"])
@pytest.mark.parametrize("wanted", [0, EVENT_IDX | 1 << NetFeature.MRG_RXBUF], ids=["bare", "all features"])
def test_a_guest_pings_another(wanted: int, ioeventfd: bool, ring: int) -> None:
    first, second = datagram_pair()
    size = 1400 if ring == 3 else 64  # KVM may emulate ring 0, which takes its time for checksums
    asks = station("PING", size=size, wanted=wanted)
    answers = station("STATION", own=PEER, wanted=wanted)
    with (
        Station(VirtioNet(first), asks, ioeventfd=ioeventfd, ring=ring) as here,
        Station(VirtioNet(second), answers, ioeventfd=ioeventfd, ring=ring) as there,
    ):
        there.machine.start()
        here.run()
        there.ended_well(there.machine.wait(timeout=30))
        assert here.device.sent >= 6  # one to find the other, and the pings
        assert there.device.received + there.device.counters["no_driver"] == here.device.sent
        assert here.device.received >= 6
        assert {*here.device.counters, *there.device.counters} <= {"no_driver"}
        if ioeventfd:
            assert here.notifications == 0


def test_what_was_exchanged_is_in_a_capture(tmp_path: Path) -> None:
    first, second = datagram_pair()
    capture = tmp_path / "net.pcap"
    with (
        Station(VirtioNet(first, capture=capture), station("PING", size=100)) as here,
        Station(VirtioNet(second), station("STATION", own=PEER)) as there,
    ):
        there.machine.start()
        here.run()
    if shutil.which("tcpdump") is None:
        pytest.skip("tcpdump is not installed (Debian package tcpdump)")
    told = subprocess.run(["tcpdump", "-nr", capture], capture_output=True, text=True, check=True).stdout
    assert f"ARP, Request who-has {PEER} tell {OWN}" in told
    assert f"ARP, Reply {PEER} is-at {there.device.mac}" in told
    assert told.count(f"{OWN} > {PEER}: ICMP echo request") == 5
    assert told.count(f"{PEER} > {OWN}: ICMP echo reply") == 5


def ping_with_stops() -> list[int]:
    """One guest pings another while their devices are stopped by turns; how much had been sent at each stop."""
    first, second = datagram_pair()
    stops: list[int] = []
    with (
        Station(VirtioNet(first), station("PING", count=80, size=1000)) as here,
        Station(VirtioNet(second), station("STATION", count=80, own=PEER)) as there,
    ):

        def stop_and_go() -> None:
            for turn in range(50):
                transport = (here, there)[turn % 2].device.transport
                assert isinstance(transport, VirtioMmio)
                transport.quiesce()
                stops.append(here.device.sent)
                transport.resume()
                threading.Event().wait(0.001)

        thread = threading.Thread(target=stop_and_go)
        there.machine.start()
        thread.start()
        here.run()
        thread.join()
        there.ended_well(there.machine.wait(timeout=30))
    return stops


def test_devices_that_are_stopped_and_go_on_lose_nothing() -> None:
    for _ in range(10):  # guests may be done before anybody stops their devices
        if len(set(ping_with_stops())) > 2:  # they were stopped in the midst
            return
    pytest.fail("the guests were always quicker than who stopped their devices")


def test_the_cable_is_pulled_and_plugged_in_elsewhere_while_the_guest_runs() -> None:
    def asks(far: DatagramSocket) -> bytes:
        """The answer of the station at the other end to who looks for it."""
        for _ in range(100):  # what comes before its driver is ready is lost
            far.send([memoryview(arp_request(OWN, sender=PEER))])
            if select.select([far], [], [], 0.2)[0]:
                return bytes(far.receive() or b"")
        raise AssertionError("no answer")

    near, far = datagram_pair()
    with Station(VirtioNet(near), station("STATION")) as guest:
        guest.machine.start()
        for _ in range(20):
            answer = asks(far)
            assert (answer[:6], answer[6:12].hex(":"), answer[20:22]) == (MAC, guest.device.mac, b"\0\2")
            guest.device.connect(None)
            while far.receive() is not None:  # answers to what was asked more than once
                pass
            assert not far.connected
            far.close()
            near, far = datagram_pair()
            guest.device.connect(near)
        far.close()
        assert guest.machine.host_errors == []


# --- passt ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def passt() -> Passt:
    if shutil.which("passt") is None:
        skip_or_fail("passt is not installed (Debian package passt)")
    try:
        return Passt(arguments=["--ipv4-only"])
    except OSError as error:
        pytest.skip(f"{error}: the host has no network that passt could show")


def test_a_guest_gets_an_address_from_passt_and_talks_to_a_server_of_the_host(passt: Passt) -> None:
    with (
        Inverter() as server,
        Station(VirtioNet(passt), station("LEASE", size=1200, port=server.port)) as guest,
    ):
        guest.run()
        assert server.lengths == [1200] * 5
        leased = guest.machine.memory.read_u32(guest.program.symbols["leased"])
    # passt gives the guest the host's own address.
    addresses = subprocess.run(["ip", "-4", "-brief", "address"], capture_output=True, text=True, check=True).stdout
    assert f" {ipaddress.ip_address(leased)}/" in addresses
    assert passt.process.returncode is not None


# --- TAP ------------------------------------------------------------------------------------------------------------


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network namespace of the host, with nothing in it."""
    name = f"kvmpy-test-{os.getpid()}"
    if os.geteuid() != 0:
        pytest.skip("network namespaces and TAP interfaces need root")
    if shutil.which("ip") is None:
        skip_or_fail("ip is not installed (Debian package iproute2)")
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
    yield name
    ip("netns", "delete", name)


@pytest.fixture
def tap(namespace: str) -> Iterator[Tap]:
    """A TAP interface whose host end is in the namespace, with the address PEER."""
    try:
        tap = Tap()
    except OSError as error:
        pytest.skip(str(error))
    with ExitStack() as stack:
        stack.callback(tap.close)
        inside = ("-n", namespace)
        ip("link", "set", tap.interface, "netns", namespace)
        ip(*inside, "address", "add", f"{PEER}/24", "dev", tap.interface)
        ip(*inside, "link", "set", tap.interface, "up")
        yield tap


def test_a_guest_answers_a_ping_of_the_host(namespace: str, tap: Tap) -> None:
    if shutil.which("ping") is None:
        skip_or_fail("ping is not installed (Debian package iputils-ping)")
    with Station(VirtioNet(tap), station("STATION")) as guest:
        guest.machine.start()
        ping = subprocess.run(
            ["ip", "netns", "exec", namespace, "ping", "-c", "5", "-i", "0.01", "-s", "1400", "-w", "20", OWN],
            capture_output=True, text=True,
        )  # fmt: skip
        assert "5 received" in ping.stdout, ping.stdout + ping.stderr
        guest.ended_well(guest.machine.wait(timeout=20))


def test_a_guest_pings_the_host(namespace: str, tap: Tap) -> None:
    with Station(VirtioNet(tap), station("PING", size=1400)) as guest:
        guest.run()


def test_the_link_goes_down_when_the_interface_is_deleted(namespace: str, tap: Tap) -> None:
    with Station(VirtioNet(tap), station("STATION")) as guest:
        guest.machine.start()
        ip("-n", namespace, "link", "delete", tap.interface)
        for _ in range(1000):
            if not guest.device.link_up:
                break
            threading.Event().wait(0.01)
        assert not guest.device.link_up
        assert guest.device.counters["interface_gone"] == 1
        assert guest.machine.host_errors == []


def test_an_interface_is_used_once(tap: Tap) -> None:
    name = f"kvmpyt{os.getpid() % 100000}"
    first = Tap(name)
    try:
        assert first.interface == name
        with pytest.raises(OSError, match="another program uses it"):
            Tap(name)
    finally:
        first.close()


def test_what_is_sent_while_the_interface_is_down_is_lost_and_counted(namespace: str) -> None:
    tap = Tap()
    try:
        assert not tap.send([memoryview(bytes(60))])
        assert tap.counters == {"host_EIO": 1}
        assert tap.connected
    finally:
        tap.close()
