"""The raw image behind an ATA disk."""

from __future__ import annotations

import errno
import os

from kvmpy.devices.ata_registers import SECTOR
from kvmpy.errors import UsageError

__all__ = ["AtaImage"]


class AtaImage:
    """Sectors of a file or block device. All methods raise OSError for what the host cannot do."""

    def __init__(self, path: str | os.PathLike[str], read_only: bool) -> None:
        self.fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        size = os.lseek(self.fd, 0, os.SEEK_END)
        if not size or size % SECTOR:
            self.close()
            raise UsageError(f"a disk image has a multiple of {SECTOR} bytes; {os.fspath(path)} has {size}")
        self.sectors = size // SECTOR

    def read(self, sector: int, count: int) -> bytes:
        """So many sectors."""
        data = os.pread(self.fd, count * SECTOR, sector * SECTOR)
        if len(data) < count * SECTOR:
            raise OSError(errno.EIO, "the image has become shorter")
        return data

    def write(self, sector: int, data: bytearray, through: bool) -> None:
        """Whole sectors, `through` to the disk."""
        done = 0
        while done < len(data):
            done += os.pwrite(self.fd, memoryview(data)[done:], sector * SECTOR + done)
        if through:
            self.flush()

    def flush(self) -> None:
        """Return when all that was written is on the disk."""
        os.fdatasync(self.fd)

    def close(self) -> None:
        """Close it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
