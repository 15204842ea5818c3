"""Whatever a guest does to a disk, it works again after a reset, and the image has not grown."""

from __future__ import annotations

import os
import tempfile
import time
from struct import pack

from hypothesis import given, settings

from kvmpy.virtio import Block
from kvmpy.virtio.block_format import BlockConfig, BlockType
from virtio_driver import FakeDriver
from virtio_hostile import EXAMPLES, PROGRAMS, HostileTarget

SECTORS = 64
IMAGE = tempfile.TemporaryFile()  # noqa: SIM115 for all examples of the session
os.truncate(IMAGE.fileno(), SECTORS * 512)


def answer(driver: FakeDriver, out: list[bytes], into: list[int]) -> bytes:
    ring = driver.queues[0]
    ring.add(out, into)
    ring.kick()
    deadline = time.monotonic() + 20
    while not (done := ring.used()):
        assert time.monotonic() < deadline, "the request was not answered"
        time.sleep(0)
    return done[0][2]


def works(driver: FakeDriver) -> None:
    data = os.urandom(512)
    assert answer(driver, [pack("<IIQ", BlockType.OUT, 0, 9), data], [1]) == b"\0"
    assert answer(driver, [pack("<IIQ", BlockType.IN, 0, 9)], [512, 1]) == data + b"\0"
    assert os.fstat(IMAGE.fileno()).st_size == SECTORS * 512


REQUESTS = tuple(pack("<IIQ", kind, 0, sector) for kind in BlockType for sector in (0, 7, SECTORS - 1, SECTORS))
RANGES = tuple(
    pack("<IIQQII", kind, 0, 0, sector, count, flags)
    for kind in (BlockType.DISCARD, BlockType.WRITE_ZEROES)
    for sector, count, flags in ((0, 1, 0), (8, 8, 1), (SECTORS - 1, 1, 0), (0, SECTORS + 1, 0), ((1 << 64) - 1, 1, 0))
)
RIGHT = (
    *((0, [pack("<IIQ", BlockType.IN, 0, sector)], [length, 1]) for sector in (0, 1, 2, 9) for length in (512, 1024)),
    (0, [pack("<IIQ", BlockType.OUT, 0, 20), bytes(512)], [1]),
    (0, [pack("<IIQ", BlockType.FLUSH, 0, 0)], [1]),
)
TARGET = HostileTarget(
    # Its lock would be that of the device which a restore replaces: both have the same open file.
    lambda: Block(IMAGE, serial="hostile", workers=2), works=works,
    requests=(*REQUESTS, *RANGES), right=RIGHT, config_size=BlockConfig.num_queues.offset + 2,
)  # fmt: skip


@settings(max_examples=EXAMPLES)
@given(PROGRAMS)
def test_block(program: bytes) -> None:
    TARGET.play(program)
