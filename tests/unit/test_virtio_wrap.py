"""The indexes of rings wrap at 65536: whichever way requests are taken and answered, none is lost there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from struct import pack

import pytest

from kvmpy.virtio import Block, Entropy, Feature, VirtioConsole, VirtioDevice
from virtio_devices import Echo
from virtio_driver import FakeDriver

START = 0xFFFA
REQUESTS = 40
SECTOR = 512

Request = tuple[list[bytes], list[int]]


def disk(folder: Path) -> VirtioDevice:
    path = folder / "disk.img"
    path.write_bytes(b"".join(bytes([number]) * SECTOR for number in range(REQUESTS)))
    return Block(path)


def read(number: int) -> Request:
    return [pack("<IIQ", 0, 0, number)], [SECTOR, 1]


DEVICES: dict[str, tuple[Callable[[Path], VirtioDevice], int, Callable[[int], Request], Callable[[int], bytes]]] = {
    # The device; the queue; a request; its answer.
    "chain by chain": (lambda folder: Echo(), 0, lambda n: ([bytes([n])], [1]), lambda n: bytes([n])),
    "in order": (lambda folder: Entropy(lambda length: b"?" * length), 0, lambda n: ([], [5]), lambda n: b"?????"),
    "reads of a disk": (disk, 0, read, lambda n: bytes([n]) * SECTOR + b"\0"),
    "lines on a console": (lambda folder: VirtioConsole(), 1, lambda n: ([b"%02d\n" % n], []), lambda n: b""),
}


@pytest.mark.parametrize("batch", [1, 3, 4])
@pytest.mark.parametrize("without", [[], [Feature.EVENT_IDX], [Feature.IN_ORDER]], ids=["all", "flags", "any order"])
@pytest.mark.parametrize("kind", DEVICES)
def test_requests_go_on_where_the_indexes_begin_again(
    tmp_path: Path, kind: str, without: list[int], batch: int
) -> None:
    make, number, request, answer = DEVICES[kind]
    device = make(tmp_path)
    driver = FakeDriver(device).start(without=without)
    queue = driver.queues[number]
    state = device.state()
    state["queues"][number].update(next=START, used=START)
    device.restore(state)
    queue.avail_idx = queue.seen = START
    queue.memory.write_u16(queue.available + 2, START)
    queue.memory.write_u16(queue.used_ring + 2, START)
    device.resume()
    for first in range(0, REQUESTS, batch):
        wanted = range(first, min(first + batch, REQUESTS))
        for each in wanted:
            queue.add(*request(each))
        queue.set_used_event(queue.avail_idx - 1 & 0xFFFF)
        queue.kick()
        assert [content for _, _, content in queue.used()] == [answer(each) for each in wanted]
        assert driver.acknowledge() == 1
        assert queue.flags == 0 or Feature.EVENT_IDX not in without
        assert queue.avail_event == queue.avail_idx or Feature.EVENT_IDX in without
    assert queue.used_idx == START + REQUESTS & 0xFFFF
    assert device.queues[number].in_flight == 0
    assert not device.counters
    if isinstance(device, VirtioConsole):
        assert device.text.split() == [f"{each:02}" for each in range(REQUESTS)]
    driver.mmio.close()
