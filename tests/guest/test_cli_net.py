"""`kvmpy run --net`: a guest's network card on the command line, on real KVM."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gnu_toolchain import compile_c
from kvmpy.pytest_plugin.requirement import skip_or_fail
from network_cable import Inverter

SOURCE = str(Path(__file__).with_name("virtio_net.c"))


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvmpy", "run", *map(str, arguments)]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=50, check=False
    )  # fmt: skip


def guest(port: int = 9) -> str:
    """A program that gets an address by DHCP, and has a server of the host invert a datagram."""
    flags = ("WANTED=0", "WORK=LEASE", "COUNT=1", "SIZE=56", "OWN_IP=0", "PEER_IP=0", f"PORT={port}")
    return str(compile_c(SOURCE, flags=("-DADDRESS=0xd0000000", *(f"-D{flag}" for flag in flags))).elf)


def test_a_guest_gets_its_address_from_passt_and_all_is_captured(tmp_path: Path) -> None:
    if shutil.which("passt") is None:
        skip_or_fail("passt is not installed (Debian package passt)")
    capture = tmp_path / "net.pcap"
    with Inverter() as server:
        done = run(guest(server.port), "--net", "passt", "--capture", capture, "--timeout", "30")
    if "passt does not start" in done.stderr:
        pytest.skip(f"{done.stderr.strip()}: the host has no network that passt could show")
    assert (done.returncode, done.stderr) == (1, "")  # kvmpy_exit(0)
    content = capture.read_bytes()
    for kind in (1, 2, 3, 5):  # discover, offer, request, acknowledged
        assert bytes([53, 1, kind]) in content


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--net", "bridge"), "none of passt, passt:PORTS, tap:NAME and none"),
        (("--net", "tap:"), "none of passt, passt:PORTS, tap:NAME and none"),
        (("--capture", "net.pcap"), "--capture goes with --net"),
        (("--net", "none", "--capture", "net.pcap"), "--capture goes with --net"),
        (("--net", "tap:a-name-that-is-too-long"), "1 to 15 bytes"),
        (("--net", "passt:no-port"), "passt does not start"),
    ],
)
def test_what_cannot_be_is_said(arguments: tuple[str, ...], complaint: str) -> None:
    if "passt:no-port" in arguments and shutil.which("passt") is None:
        skip_or_fail("passt is not installed (Debian package passt)")
    done = run(guest(), *arguments)
    assert done.returncode != 0
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert not os.path.exists("net.pcap")


def test_without_a_network_there_is_no_card() -> None:
    done = run(guest(), "--net", "none")
    assert "value 0x1" in done.stderr  # the guest found none
    assert done.returncode == 3  # kvmpy_exit(1)
