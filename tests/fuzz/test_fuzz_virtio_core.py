"""Whatever a guest does to a device that keeps requests, and answers them late, from another side, in any order."""

from __future__ import annotations

from hypothesis import given, settings

from kvmpy.errors import UsageError
from kvmpy.virtio import Chain, Feature, VirtioDevice, Virtqueue
from virtio_devices import Keeper
from virtio_driver import FakeDriver
from virtio_hostile import EXAMPLES, PROGRAMS, HostileTarget


class Juggler(Keeper):
    """Answers a request at once, or keeps it, as its first byte says; a request without one it puts back once."""

    features = frozenset({0, 3, Feature.IN_ORDER})
    queue_sizes = (16, 8)

    def __init__(self) -> None:
        super().__init__()
        self.on_chain = self.juggle
        self.put_back = False

    def juggle(self, queue: Virtqueue, chain: Chain) -> None:
        first = chain.readable[0][0] if chain.readable else 0
        if first & 1:
            self.kept.append(chain)
        elif not first and not self.put_back and self.has_feature(0):
            self.put_back = True
            queue.put_back(chain)
        else:
            self.put_back = False
            self.echo(queue, chain)

    def cancel(self) -> None:
        while self.kept:
            self.kept.pop().complete(0)

    def happen(self, number: int) -> None:
        match number % 6:
            case 0:
                with self.changing_config():
                    self.config.limit = number
            case 1 if number & 0x80:
                self.needs_reset("the host wills it")
            case 2:
                self.quiesce()
                self.resume()
            case _ if self.kept:
                chain = self.kept.pop(number % len(self.kept))
                with chain.queue.batch():
                    self.echo(chain.queue, chain)
                try:
                    chain.complete()
                except UsageError:
                    return
                raise AssertionError("it was completed twice")


def happen(device: VirtioDevice, number: int) -> None:
    assert isinstance(device, Juggler)
    device.happen(number)


def works(driver: FakeDriver) -> None:
    assert driver.request([b"\2it ", b"works"], [3, 16]) == b"\2it works"
    assert driver.request([b"\2here too"], [16], queue=1) == b"\2here too"


REQUESTS = (b"\1kept", b"\2answered", b"\0put back")
RIGHT = [(queue, [request], [16]) for queue in (0, 1) for request in REQUESTS]
TARGET = HostileTarget(Juggler, works=works, requests=REQUESTS, right=RIGHT, host=happen)


@settings(max_examples=EXAMPLES)
@given(PROGRAMS)
def test_a_device_that_answers_late(program: bytes) -> None:
    TARGET.play(program)
