"""Much output on a virtio console: what waits in the queue is printed in one piece, and nothing is lost or doubled."""

from __future__ import annotations

import pytest

from kvmpy.virtio import DeviceStatus, VirtioConsole
from virtio_driver import FakeDriver, FakeQueue

TRANSMIT = 1


def transmit_queue(passed: list[bytes], *, size: int = 64) -> FakeQueue:
    return FakeDriver(VirtioConsole(sink=passed.append)).start(size=size).queues[TRANSMIT]


def test_what_waits_is_printed_in_one_piece() -> None:
    passed: list[bytes] = []
    queue = transmit_queue(passed)
    heads = [queue.add([b"line %d\n" % number]) for number in range(50)]
    queue.kick()
    assert passed == [b"".join(b"line %d\n" % number for number in range(50))]
    assert queue.used() == [(head, 0, b"") for head in heads]
    assert queue.driver.board.lines[5].edges == 1


def test_buffers_of_other_shapes_keep_their_place() -> None:
    passed: list[bytes] = []
    queue = transmit_queue(passed)
    heads = [queue.add([b"a"]), queue.add([b"b"]), queue.add([b"c", b"d"]), queue.add([b"e"]), queue.add([b""])]
    heads += [queue.add([b"f"], indirect=True), queue.add([b"g" * 0x1_0001]), queue.add([b"h"])]
    queue.kick()
    assert b"".join(passed) == b"abcdef" + b"g" * 0x1_0001 + b"h"
    assert max(map(len, passed)) == 0x1_0000
    assert [head for head, _, _ in queue.used()] == heads


def test_a_sink_that_fails_gets_the_same_again() -> None:
    got: list[bytes] = []

    def sink(data: bytes) -> None:
        got.append(data)
        if len(got) == 1:
            raise OSError("full")

    driver = FakeDriver(VirtioConsole(sink=sink)).start()
    queue = driver.queues[TRANSMIT]
    queue.add([b"one "])
    queue.add([b"two"])
    with pytest.raises(OSError, match="full"):
        queue.kick()
    assert (queue.used(), driver.status & DeviceStatus.DEVICE_NEEDS_RESET) == ([], 0)
    queue.kick()
    assert got == [b"one two", b"one two"]
    assert len(queue.used()) == 2
    assert driver.device.queues[TRANSMIT].in_flight == 0
