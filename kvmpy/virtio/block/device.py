"""The block device: a raw image of the host as a disk of the guest (virtio 1.2, section 5.2)."""

from __future__ import annotations

import errno
from functools import partial
from typing import Any

from kvmpy.errors import UsageError
from kvmpy.virtio.block.cached_reads import CachedReads
from kvmpy.virtio.block.file import ImageFile, ImageSource
from kvmpy.virtio.block.format import HEADER, RANGE, SECTOR, BlockConfig, BlockFeature, BlockStatus, BlockType
from kvmpy.virtio.block.workers import Request, Workers
from kvmpy.virtio.chain import Chain
from kvmpy.virtio.device import VirtioDevice
from kvmpy.virtio.virtqueue import Virtqueue

__all__ = ["Block"]

QUEUE_SIZE = 256
MOST_RANGES = 64
"""Of one discard or write-zeroes request."""
MOST_SECTORS = 1 << 22
"""Of one such range: 2 GiB."""
ID_BYTES = 20
"""Section 5.2.6: the length of the ID string."""

_STATUS = tuple(bytes([status]) for status in range(3))
_OK, _IOERR, _UNSUPP = (int(status) for status in BlockStatus)
_IN, _OUT, _WRITEBACK_AT = int(BlockType.IN), int(BlockType.OUT), BlockConfig.writeback.offset
_UNMAP = 1


class Block(VirtioDevice):
    """A disk whose sectors are those of `image`: a path, or an open file with a descriptor (its own is duplicated).

    `image` may be sparse; a host's block device works as well. `serial`, up to 20 ASCII characters, is what Linux shows
    in /sys/block/vda/serial. `discard` lets the guest give space back (holes in the image, as fstrim makes them). With
    `read_only` the driver is told, and writes fail. `lock=False` shares the image with whoever has it: see `ImageFile`.

    What waits for a disk does so in up to `workers` threads: writes, flushes, and reads of what is not in the page
    cache of the host. What is there is copied at once. So neither a vCPU nor the host input thread waits, and several
    requests are under way at the same time; they end in any order (section 5.2.6).

    What is on the disk. The cache is a writeback cache, and a flush ends with fdatasync(2): what was written before
    it survives the host. A driver that knows no flush, or that switches the cache to writethrough (CONFIG_WCE), has
    each write on the disk when it ends.

    Faults of the host, such as a full disk, an I/O error, or an image that somebody has truncated, are I/O errors
    to the guest; `counters` has them as "host_ENOSPC" and so on, `last_host_error` is the last one.

    Raises UsageError for an image that is in use, empty, no file, or qcow2; OSError where it cannot be opened.
    """

    name = "virtio-block"
    device_id = 2  # section 5.2.1

    def __init__(
        self, image: ImageSource, *, read_only: bool = False, serial: str = "", discard: bool = True,
        block_size: int = SECTOR, lock: bool = True, queues: int = 1, workers: int = 4,
    ) -> None:  # fmt: skip
        if not serial.isascii() or len(serial) > ID_BYTES or "\0" in serial:
            raise UsageError(f"a serial number has up to {ID_BYTES} ASCII characters, not {serial!r}")
        if block_size not in (512, 1024, 2048, 4096):
            raise UsageError(f"block_size is 512, 1024, 2048 or 4096, not {block_size!r}")
        if not 1 <= queues <= 64 or workers < 1:
            raise UsageError("a disk has 1 to 64 queues and at least one worker")
        self.queue_sizes = (QUEUE_SIZE,) * queues  # section 5.2.2
        super().__init__()
        self.file = ImageFile(image, read_only=read_only, lock=lock)
        self.read_only = read_only
        self.serial = serial
        self.last_host_error: Exception | None = None
        self._cached = CachedReads(self.file)
        self._batch: list[Request] = []
        self._closing = False
        self._flush_is_due = False
        self._workers = Workers(f"kvmpy {self.name}", workers, self._perform, self._answer)
        self.file.interrupted = self._given_up
        try:
            self._describe(discard and not read_only, block_size)
        except BaseException:
            self.file.close()
            raise

    def _describe(self, discard: bool, block_size: int) -> None:
        """Features (section 5.2.3) and configuration space (5.2.4)."""
        file = self.file
        if file.sectors * SECTOR % block_size:
            raise UsageError(f"{file.name} is no multiple of block_size={block_size} bytes long")
        features = {
            BlockFeature.SEG_MAX, BlockFeature.BLK_SIZE, BlockFeature.TOPOLOGY,
            BlockFeature.FLUSH, BlockFeature.CONFIG_WCE,  # 5.2.5.2: who offers the second must offer the first
        }  # fmt: skip
        self.config: BlockConfig = BlockConfig(
            capacity=file.sectors,
            seg_max=QUEUE_SIZE - 2,  # header and status take two entries
            blk_size=block_size,
            physical_block_exp=max(4096 // block_size, 1).bit_length() - 1,
            min_io_size=max(4096 // block_size, 1),
            writeback=1,
        )
        if self.read_only:
            features.add(BlockFeature.RO)
        else:
            features.add(BlockFeature.WRITE_ZEROES)
            self.config.max_write_zeroes_sectors = MOST_SECTORS
            self.config.max_write_zeroes_seg = MOST_RANGES
            # 5.2.6.2: clear if and only if it cannot lead to space being given back.
            self.config.write_zeroes_may_unmap = int(discard)
        if discard and file.can_punch():
            features.add(BlockFeature.DISCARD)
            self.config.max_discard_sectors = MOST_SECTORS
            self.config.max_discard_seg = MOST_RANGES
            self.config.discard_sector_alignment = file.block_size // SECTOR
        if len(self.queue_sizes) > 1:
            features.add(BlockFeature.MQ)
            self.config.num_queues = len(self.queue_sizes)
        self.features = frozenset(features)
        self._sectors = file.sectors
        self._may_unmap = discard

    # --- requests ---------------------------------------------------------------------------------------------------

    def notified(self, queue: Virtqueue) -> None:
        self._cached.begin(self._sectors)
        try:
            queue.run(self.handle, self._cached.read_next if self.file.reads_cached else None)
        finally:
            if self._batch:
                batch, self._batch = self._batch, []
                self._workers.submit(batch)

    def handle(self, queue: Virtqueue, chain: Chain) -> None:
        # 2.7.4: a driver may cut its buffers anyhow. Nearly all have one for the header, and one for the status.
        parts = chain.readable
        if parts and len(parts[0]) == HEADER.size and chain.writable_left:
            kind, _, sector = HEADER.unpack(parts[0])
            if kind == _IN and self._read_cached(queue, chain, sector):
                return
            del parts[0]
            chain.readable_left -= HEADER.size
        else:
            header = chain.read(HEADER.size)
            if len(header) < HEADER.size or not chain.writable_left:
                self._malformed(chain)
                return
            kind, _, sector = HEADER.unpack(header)
        self._others(chain, kind, sector)

    def _read_cached(self, queue: Virtqueue, chain: Chain, sector: int) -> bool:
        """Do at once what `CachedReads.read_next` left because of its many buffers, if the page cache has it all."""
        *data, status = chain.writable
        length = chain.writable_left - 1
        if len(status) != 1 or length % SECTOR or sector + length // SECTOR > self._sectors:
            return False
        if not self._cached.read(data, sector * SECTOR, length):
            return False
        status[0] = _OK
        queue.complete(chain, length + 1)
        return True

    def _malformed(self, chain: Chain) -> None:
        """5.2.6: no request is without header and status. What has at least the latter learns of it."""
        self.counters["bad_request"] += 1
        if chain.writable_left:
            self._end(chain, _IOERR)
        else:
            chain.complete(0)

    def _others(self, chain: Chain, kind: int, sector: int) -> None:
        """All that is not done at once; the header is taken off."""
        if kind == _IN:
            length = chain.writable_left - 1
            if not self._within(sector, length):
                self._end(chain, _IOERR)
                return
            read = partial(self.file.read, chain.take_writable(length), sector * SECTOR)
            self._later(chain, read, length, slow=self.file.reads_cached)
        elif kind == _OUT:
            length = chain.readable_left
            # 5.2.6.2: an error for a write to a read-only device.
            if self.read_only or not self._within(sector, length):
                self._end(chain, _IOERR)
                return
            through = self._writes_through
            write = partial(self.file.write, chain.take_readable(length), sector * SECTOR, through)
            self._later(chain, write, length, slow=through)
        elif kind in (BlockType.FLUSH, BlockType.FLUSH_OUT):
            self._later(chain, self.file.flush, 0, slow=True)
        elif kind == BlockType.GET_ID:
            # 5.2.6: padded with NUL, and without one at its end if it is 20 characters long.
            chain.write(self.serial.encode().ljust(ID_BYTES, b"\0")[: chain.writable_left - 1])
            self._end(chain, _OK)
        elif kind in (BlockType.DISCARD, BlockType.WRITE_ZEROES):
            self._ranges(chain, kind == BlockType.DISCARD)
        else:
            self._end(chain, _UNSUPP)

    def _within(self, sector: int, length: int) -> bool:
        """5.2.6.1: whole sectors, and none beyond the capacity."""
        if length % SECTOR or sector + length // SECTOR > self._sectors:
            self.counters["bad_request"] += 1
            return False
        return True

    @property
    def _writes_through(self) -> bool:
        """Whether a write has to be on the disk when it ends. 5.2.6.2: if neither FLUSH nor CONFIG_WCE was negotiated,
        or the latter and `writeback` is 0; `writeback` is always kept that way, whether the driver may see it or not.
        """
        return not self.config.writeback

    def _ranges(self, chain: Chain, discard: bool) -> None:
        """A discard or write-zeroes request (5.2.6.1 and 5.2.6.2): look at all ranges, then do all."""
        if not self.has_feature(BlockFeature.DISCARD if discard else BlockFeature.WRITE_ZEROES):
            self._end(chain, _UNSUPP)
            return
        length = chain.readable_left
        if not length or length % RANGE.size or length > MOST_RANGES * RANGE.size:
            self.counters["bad_request"] += 1
            self._end(chain, _IOERR)
            return
        ranges = list(RANGE.iter_unpack(chain.read(length)))
        for sector, count, flags in ranges:
            # 5.2.6.2: UNSUPP for unknown flags, and for `unmap` of a discard.
            if flags & (0xFFFF_FFFF if discard else ~_UNMAP):
                self._end(chain, _UNSUPP)
                return
            if count > MOST_SECTORS or not self._within(sector, count * SECTOR):
                self._end(chain, _IOERR)
                return
        self._later(chain, partial(self._do_ranges, ranges, discard, self._writes_through), 0, slow=True)

    def _do_ranges(self, ranges: list[tuple[int, int, int]], discard: bool, through: bool) -> None:
        file = self.file
        for sector, count, flags in ranges:
            if not count:
                continue
            if discard:
                file.discard(sector * SECTOR, count * SECTOR)
            else:
                file.write_zeroes(sector * SECTOR, count * SECTOR, bool(flags & _UNMAP) and self._may_unmap)
        if through:
            file.flush()

    def _later(self, chain: Chain, action: Any, length: int, *, slow: bool) -> None:
        self._batch.append(Request(chain, action, length, slow))

    def _end(self, chain: Chain, status: int) -> None:
        """Write the status, which is the last byte (5.2.6), and complete."""
        chain.take_writable(chain.writable_left - 1)
        chain.write(_STATUS[status])
        chain.complete()

    # --- in worker threads ------------------------------------------------------------------------------------------

    def _given_up(self) -> bool:
        """Whether nobody waits for the rest of a transfer."""
        return self._closing or self.resetting

    def _perform(self, request: Request) -> None:
        try:
            if self._closing or self.resetting:
                raise OSError(errno.ECANCELED, "given up")
            request.action()
        except Exception as error:  # whatever it is: the guest must not wait for ever
            number = error.errno if isinstance(error, OSError) else None
            request.status = _IOERR
            if number != errno.ECANCELED:
                with self.lock:
                    self.counters["host_" + errno.errorcode.get(number or 0, type(error).__name__)] += 1
                    self.last_host_error = error

    def _answer(self, done: list[Request]) -> None:
        chains = [(request.chain, request.status) for request in done if request.chain is not None]
        for queue in {chain.queue for chain, _ in chains}:
            with queue.batch():
                for chain, status in chains:
                    if chain.queue is queue:
                        self._end(chain, status)

    # --- configuration and life -------------------------------------------------------------------------------------

    def accepts(self, features: frozenset[int]) -> bool:
        # 5.2.5.2: `writeback` is 0 if CONFIG_WCE is negotiated and FLUSH is not. With neither it is 0 as well: see
        # `_writes_through`.
        self.config.writeback = int(BlockFeature.FLUSH in features)
        return True

    def started(self) -> None:
        # 5.2.5.3: behind a legacy transport the driver may have set the mode before, unless it knows no CONFIG_WCE.
        if not self.has_feature(BlockFeature.CONFIG_WCE):
            self.config.writeback = int(self.has_feature(BlockFeature.FLUSH))

    def stopped(self) -> None:
        self.config.writeback = 1
        self._flush_is_due = False

    def config_written(self, offset: int, data: bytes) -> None:
        # 5.2.5: the driver may set `writeback`, and nothing else.
        allowed = self.legacy or self.has_feature(BlockFeature.CONFIG_WCE)
        if offset != _WRITEBACK_AT or len(data) != 1 or not allowed:
            self.counters["config_write"] += 1
            return
        was, self.config.writeback = self.config.writeback, data[0] & 1
        if was and not self.config.writeback and not self._flush_is_due:
            # 5.2.6.2 does not say so, but a driver that has switched sends no flush for what it wrote before. One flush
            # that has not begun yet will do, also for a driver that switches to and fro.
            self._flush_is_due = True
            self._workers.submit([Request(None, self._flush_once, 0, slow=True)])

    def _flush_once(self) -> None:
        self._flush_is_due = False
        self.file.flush()

    @property
    def capacity(self) -> int:
        """Bytes that the guest sees."""
        return self._sectors * SECTOR

    def resize(self) -> None:
        """The image has grown: tell the driver. (5.2.6.2: a change of the capacity is notified.)

        Raises UsageError when it is smaller: what the guest has there would be lost.
        """
        self.file.measure()
        with self.lock, self.changing_config():
            self._sectors = self.config.capacity = self.file.sectors

    def device_state(self) -> dict[str, Any]:
        return {"flush_error": self.file.flush_error}

    def restore_device_state(self, state: dict[str, Any]) -> None:
        # The configuration space is that of the state: so must the image be.
        if self.config.capacity > self.file.sectors:
            raise UsageError(
                f"{self.file.name} has {self.file.sectors} sectors, and the state is of a disk with "
                f"{self.config.capacity}"
            )
        self._sectors = self.config.capacity
        self.file.flush_error = state["flush_error"]

    def close(self) -> None:
        """End the threads and close the image. What was not answered is given up; it may be written or not."""
        self._closing = True
        self._workers.close()
        self.file.close()
