"""Whatever a guest does to the console device and its queues, the device works again after a reset."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings

from kvmpy.virtio import VirtioConsole, VirtioDevice
from virtio_driver import FakeDriver
from virtio_hostile import EXAMPLES, PROGRAMS, HostileTarget

MESSAGES = tuple(
    struct.pack("<IHH", port, event, value) for port in (0, 1, 9) for event in (0, 3, 6, 5) for value in (0, 1)
)
CHANNELS: tuple[tuple[str, ...], ...] = ((), ("agent",))


def works(driver: FakeDriver) -> None:
    console = driver.device
    assert isinstance(console, VirtioConsole)
    assert driver.request([b"marker"], queue=1) == b""
    assert console.output.endswith(b"marker")
    if len(console.ports) > 1:
        driver.request([struct.pack("<IHH", 0, 6, 1)], queue=3)
    for port in console.ports:
        port._unread.clear()  # what the host has sent meanwhile
    console.send(b"typed")
    answer = driver.request(into=[100])
    assert answer is not None
    assert answer.endswith(b"typed")


def host(device: VirtioDevice, number: int) -> None:
    """Somebody types, or pulls at the window."""
    assert isinstance(device, VirtioConsole)
    if number % 4 == 0:
        device.resize(1 + number, 1 + number // 2)
    else:
        device.ports[number % len(device.ports)].send(bytes(number))


TARGETS = {
    channels: HostileTarget(
        lambda channels=channels: VirtioConsole(channels=channels, history=256),  # type: ignore[misc]
        works=works,
        requests=(b"", b"text\n", *MESSAGES),
        right=((0, (), (8,)), (1, (b"text\n",), ()), *((3, (text,), ()) for text in MESSAGES if channels)),
        config_size=12,
        host=host,
    )
    for channels in CHANNELS
}
TARGET = TARGETS[CHANNELS[-1]]  # for scripts/fuzz-virtio


@pytest.mark.parametrize("channels", CHANNELS)
@settings(max_examples=EXAMPLES // 2)
@given(program=PROGRAMS)
def test_console(channels: tuple[str, ...], program: bytes) -> None:
    TARGETS[channels].play(program)
