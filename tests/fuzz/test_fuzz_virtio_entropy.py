"""Whatever a guest does to the entropy device and its queue, the device works again after a reset."""

from __future__ import annotations

from hypothesis import given, settings

from kvmpy.virtio import Entropy
from virtio_driver import FakeDriver
from virtio_hostile import EXAMPLES, PROGRAMS, HostileTarget


def works(driver: FakeDriver) -> None:
    assert driver.request(into=[5, 11]) == bytes(range(16))


TARGET = HostileTarget(lambda: Entropy(lambda length: bytes(range(256)) * (length // 256 + 1)), works=works)


@settings(max_examples=EXAMPLES)
@given(PROGRAMS)
def test_entropy(program: bytes) -> None:
    TARGET.play(program)
