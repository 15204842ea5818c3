"""Whatever a guest does to a disk, it works again after a reset, and the image has not grown."""

from __future__ import annotations

import os
import tempfile
import time
from struct import pack

from hypothesis import given, settings

from kvmpy.virtio import Block, VirtioDevice
from kvmpy.virtio.block.format import BlockConfig, BlockType
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
    os.truncate(IMAGE.fileno(), SECTORS * 512)
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
    *((0, [request], [1]) for request in RANGES),
)


def make() -> Block:
    os.truncate(IMAGE.fileno(), SECTORS * 512)
    # Its lock would be that of the device which a restore replaces: both have the same open file.
    return Block(IMAGE, serial="hostile", workers=2)


def host(device: VirtioDevice, number: int) -> None:
    """The image becomes shorter, is whole again, or is not in memory any more."""
    if number % 8 == 0:
        os.truncate(IMAGE.fileno(), number // 8 * 1024)
    elif number % 8 < 3:
        os.truncate(IMAGE.fileno(), SECTORS * 512)
    elif number % 8 == 3:
        os.posix_fadvise(IMAGE.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


TARGET = HostileTarget(
    make, works=works, host=host,
    requests=(*REQUESTS, *RANGES), right=RIGHT, config_size=BlockConfig.num_queues.offset + 2,
)  # fmt: skip


@settings(max_examples=EXAMPLES)
@given(PROGRAMS)
def test_block(program: bytes) -> None:
    TARGET.play(program)
