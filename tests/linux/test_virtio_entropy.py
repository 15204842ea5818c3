"""Linux's own driver takes random numbers from the entropy device, of today's kind and of before version 1."""

from __future__ import annotations

from hashlib import md5

import pytest

from kvmpy.virtio import DeviceStatus, Entropy, Feature, VirtioMmio, linux_parameters
from linux_session import LinuxSession, small_kernel

READ = "head -c 64 /dev/hwrng | md5sum"
CURRENT = "/sys/class/misc/hw_random/rng_current"


@pytest.mark.parametrize("events", [True, False], ids=["ioeventfd and irqfd", "exits and lines"])
def test_linux_reads_random_numbers(events: bool) -> None:
    modern, legacy = Entropy(lambda length: b"\x11" * length), Entropy(lambda length: b"\x22" * length)
    transports = [
        VirtioMmio(modern, 0xD000_0000, 5, ioeventfd=events, irqfd=events),
        VirtioMmio(legacy, 0xD000_1000, 10, legacy=True, ioeventfd=events, irqfd=events),
    ]
    # Without ACPI, where Linux would find them a second time.
    cmdline = f"console=ttyS0 acpi=off {linux_parameters(transports)}"
    with LinuxSession(small_kernel(), cmdline=cmdline) as session:
        for transport in transports:
            session.machine.add(transport)
        session.boot()
        assert modern.status == 15
        assert legacy.status == DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER | DeviceStatus.DRIVER_OK
        assert modern.has_feature(Feature.EVENT_IDX)
        assert legacy.has_feature(Feature.EVENT_IDX)
        for number, expected in enumerate((b"\x11", b"\x22")):
            session.run(f"echo virtio_rng.{number} > {CURRENT}")
            assert session.run(READ).split()[0] == md5(expected * 64).hexdigest()
        interrupts = session.run("grep virtio /proc/interrupts")
        assert "5-edge      virtio0" in interrupts
        assert "10-edge      virtio1" in interrupts
        assert session.machine.host_errors == []
        assert modern.counters == legacy.counters == {}
