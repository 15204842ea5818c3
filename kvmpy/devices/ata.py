"""A disk as PCs had it for twenty years: ATA, driven by ports, one word at a time (PIO).

Source: ATA/ATAPI-6 (T13 1410D). There is no DMA: each byte goes through the data register. That is slow, and everything
knows how to drive it: firmware, boot loaders, kernels, and a page of code of your own. For speed see
`kvmpy.virtio.Block`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from kvmpy.devices import ata_registers as ata
from kvmpy.devices.ata_image import AtaImage
from kvmpy.devices.ata_registers import (
    CONTROL,
    COUNT,
    DATA,
    DEVICE,
    ERROR,
    LBA_HIGH,
    LBA_LOW,
    MULTIPLE_LIMIT,
    SECTOR,
    STATUS,
    Command,
    Control,
    DeviceBits,
    Error,
    Status,
)
from kvmpy.devices.device import Device, Region

__all__ = ["AtaDisk"]

_READY = int(Status.DRDY | Status.DSC)
_DRQ, _ERR, _BSY = int(Status.DRQ), int(Status.ERR), int(Status.BSY)
_ABRT, _IDNF, _UNC = int(Error.ABRT), int(Error.IDNF), int(Error.UNC)
_NIEN, _SRST, _HOB = int(Control.NIEN), int(Control.SRST), int(Control.HOB)
_DEV, _LBA = int(DeviceBits.DEV), int(DeviceBits.LBA)
_PASSED = 1  # the diagnostic code: device 0 passed, device 1 passed or is not there (8.9)
# SET FEATURES (8.46): write cache on and off, transfer mode, look-ahead off and on, reverting to defaults off and on.
_CACHE_ON, _CACHE_OFF, _TRANSFER_MODE, _KNOWN_FEATURES = 0x02, 0x82, 0x03, {0x55, 0xAA, 0x66, 0xCC}
_FIELDS = (
    "registers", "before", "error", "status", "control", "device", "multiple", "write_cache", "buffer", "position",
    "sector", "left", "block", "writing", "interrupt",
)  # fmt: skip


class AtaDisk(Device):
    """The first disk of the first channel: ports 0x1F0 to 0x1F7 and 0x3F6, IRQ 14. There is no second one.

    `image` is the path of a raw image, which is opened for reading and writing (`read_only`: for reading; then writes
    are aborted), and whose size is a multiple of 512 bytes. Do not use one image in two machines at once.

    28- and 48-bit addresses, cylinders and heads, READ and WRITE SECTORS and MULTIPLE, FLUSH CACHE, IDENTIFY and the
    small commands that drivers send. Commands end at once, in the vCPU's thread; a disk that the host has to wait for
    lets the vCPU wait. With the write cache on, as it is at first, FLUSH CACHE ends with fdatasync(2); without, each
    write does. `counters`: "bad_command", "bad_sector", "data_not_asked_for", and "host_error" for what the host could
    not do, of which `last_host_error` is the last one. `sectors_read` and `sectors_written` count what was transferred.

    Raises OSError when the image cannot be opened, UsageError for one that is empty or ends within a sector.
    """

    name = "ATA disk"

    def __init__(
        self, image: str | os.PathLike[str], *, read_only: bool = False, serial: str = "KVMPY0001",
        model: str = "kvmpy ATA disk", port: int = 0x1F0, control: int = 0x3F6, irq: int = 14,
    ) -> None:  # fmt: skip
        super().__init__()
        self.irq = irq
        self.port, self.control_port = port, control
        self.read_only = read_only
        self.serial, self.model = serial, model
        self.sectors_read = self.sectors_written = 0
        self.last_host_error: OSError | None = None
        self.image = AtaImage(image, read_only)
        self.sectors = self.image.sectors
        self._level = False
        self._power_on()

    def _power_on(self) -> None:
        self._multiple = 0  # sectors of a block of READ MULTIPLE; 0: not set
        self._write_cache = True
        self._control = 0
        self._sign()

    def _sign(self) -> None:
        """What a reset leaves (9.12): the signature of a disk in the registers, and the diagnostic code."""
        self._registers = [0, 0, 1, 1, 0, 0, 0, 0]  # as last written, by offset
        self._before = [0] * 8  # and before that: the upper halves of 48-bit addresses
        self._device = 0
        self._error = _PASSED
        self._status = _READY
        self._end_transfer()
        self._interrupt = False

    def _end_transfer(self) -> None:
        self._buffer = bytearray()
        self._position = 0
        self._sector = self._left = 0  # of the sectors after those in the buffer
        self._block = 1
        self._writing = False

    def regions(self) -> tuple[Region, ...]:
        return (
            Region(
                "port", self.port, 8, self.name, self.read, self.write, width=4, read_string=self.read_string
            ),
            Region("port", self.control_port, 1, self.name, self.read, self.write, base=CONTROL, width=1),
        )  # fmt: skip

    # --- the guest's side -------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        if offset == DATA:
            return int.from_bytes(self.read_string(DATA, size, 1), "little")
        value = 0
        for place in range(size):  # the other registers have eight bits
            value |= self._read_register(offset + place) << 8 * place
        return value

    def read_string(self, offset: int, size: int, count: int) -> bytes:
        """What `count` reads of the data register give: a string instruction's, one exit."""
        length = size * count
        if offset != DATA:
            return b"".join(self.read(offset, size).to_bytes(size, "little") for _ in range(count))
        got = bytearray()
        while len(got) < length and self._status & _DRQ and not self._writing and not self._device & _DEV:
            piece = self._buffer[self._position : self._position + length - len(got)]
            self._position += len(piece)
            got += piece
            if self._position >= len(self._buffer):
                self._block_was_read()
        if len(got) < length:
            self.counters["data_not_asked_for"] += 1
        return bytes(got.ljust(length, b"\xff"))

    def _read_register(self, offset: int) -> int:
        absent = self._device & _DEV
        if offset in (STATUS, CONTROL):
            if offset == STATUS:
                self._set_interrupt(False)
            return 0 if absent else _BSY if self._control & _SRST else self._status  # 9.16.1: device 1 has status 0
        if offset == ERROR:
            return self._error
        if offset == DEVICE:
            return self._device | 0xA0
        if COUNT <= offset <= LBA_HIGH:
            return (self._before if self._control & _HOB else self._registers)[offset]
        return 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == DATA:
            self._write_data(value.to_bytes(size, "little"))
            return
        for place in range(size):
            self._write_register(offset + place, value >> 8 * place & 0xFF)

    def _write_register(self, offset: int, value: int) -> None:
        if offset == CONTROL:
            released = self._control & _SRST and not value & _SRST
            self._control = value & (_HOB | _SRST | _NIEN)
            if value & _SRST or released:
                self._sign()
            self._drive()
            return
        self._control &= ~_HOB  # 7.8: by a write to any of the others
        if self._control & _SRST or offset > STATUS:
            return
        if offset == STATUS:
            if not self._device & _DEV or value == Command.EXECUTE_DEVICE_DIAGNOSTIC:
                self._command(value)
        elif self._status & _DRQ and offset != DEVICE:
            return  # 7.1: not while a command is under way
        elif offset == DEVICE:
            self._device = value & ~0xA0
            self._drive()
        else:
            self._before[offset], self._registers[offset] = self._registers[offset], value

    def _write_data(self, data: bytes) -> None:
        while data:
            if not (self._status & _DRQ and self._writing) or self._device & _DEV:
                self.counters["data_not_asked_for"] += 1
                return
            end = min(self._position + len(data), len(self._buffer))
            taken = end - self._position
            self._buffer[self._position : end] = data[:taken]
            data = data[taken:]
            self._position = end
            if end >= len(self._buffer):
                self._block_was_written()

    # --- commands ---------------------------------------------------------------------------------------------------

    def _command(self, code: int) -> None:
        self._end_transfer()
        self._set_interrupt(False)
        self._status, self._error = _READY, 0
        action = _ACTIONS.get(code)
        if action is None or (code in ata.IN_BLOCKS and not self._multiple):
            self.counters["bad_command"] += 1
            self._fail(_ABRT)
        else:
            action(self, code)

    def _done(self) -> None:
        self._set_interrupt(True)

    def _fail(self, error: int) -> None:
        """The command ends with an error (clause 9.5 and others, "ERR set")."""
        self._end_transfer()
        self._status, self._error = _READY | _ERR, error
        self._set_interrupt(True)

    def _no_operation(self, code: int) -> None:
        self._done()

    def _identify(self, code: int) -> None:
        data = ata.identify_data(self.sectors, self.model, self.serial, "1.0", self._multiple, self._write_cache)
        self._offer(bytearray(data))

    def _diagnose(self, code: int) -> None:
        self._sign()
        self._set_interrupt(True)

    def _set_multiple(self, code: int) -> None:
        count = self._registers[COUNT]
        if count > MULTIPLE_LIMIT or count & count - 1:
            self._fail(_ABRT)
        else:
            self._multiple = count
            self._done()

    def _set_features(self, code: int) -> None:
        feature = self._registers[ERROR]
        if feature in (_CACHE_ON, _CACHE_OFF):
            self._write_cache = feature == _CACHE_ON
        elif feature == _TRANSFER_MODE:
            if self._registers[COUNT] > 0x0F:  # multiword DMA and Ultra DMA
                self._fail(_ABRT)
                return
        elif feature not in _KNOWN_FEATURES:
            self._fail(_ABRT)
            return
        self._done()

    def _check_power_mode(self, code: int) -> None:
        self._registers[COUNT] = 0xFF  # active or idle
        self._done()

    def _flush(self, code: int) -> None:
        try:
            self.image.flush()
        except OSError as failure:
            self._host_failed(failure)
        else:
            self._done()

    def _host_failed(self, failure: OSError, error: int = _ABRT) -> None:
        """What the host refuses is the command's error."""
        self.counters["host_error"] += 1
        self.last_host_error = failure
        self._fail(error)

    def _verify(self, code: int) -> None:
        if self._find(code):
            self._name_sector(code, self._sector + self._left - 1)
            self._end_transfer()
            self._done()

    def _begin_read(self, code: int) -> None:
        if self._find(code):
            self._next_block_to_read()

    def _begin_write(self, code: int) -> None:
        if self.read_only:
            self._fail(_ABRT)
        elif self._find(code):
            self._writing = True
            self._ask_for_block()

    def _find(self, code: int) -> bool:
        """Take address and count from the registers. False, and an error: there are no such sectors."""
        if code in ata.EXTENDED:
            sector, count = ata.address_48(self._registers, self._before)
        else:
            sector, count = ata.address_28(self._registers, self._device)
        if sector < 0 or sector + count > self.sectors:
            self.counters["bad_sector"] += 1
            self._fail(_IDNF)
            return False
        self._sector, self._left = sector, count
        self._block = self._multiple if code in ata.IN_BLOCKS else 1
        return True

    def _name_sector(self, code: int, sector: int) -> None:
        """Leave an address in the registers, as a command with 28 bits does."""
        if code not in ata.EXTENDED and self._device & _LBA:
            self._registers[LBA_LOW : LBA_HIGH + 1] = [sector >> shift & 0xFF for shift in (0, 8, 16)]
            self._device = self._device & 0xF0 | sector >> 24 & 0xF

    # --- transfers --------------------------------------------------------------------------------------------------

    def _next_block_to_read(self) -> None:
        count = min(self._block, self._left)
        try:
            data = self.image.read(self._sector, count)
        except OSError as failure:
            self._host_failed(failure, _UNC)
            return
        self._sector += count
        self._left -= count
        self.sectors_read += count
        self._offer(bytearray(data))

    def _offer(self, data: bytearray) -> None:
        self._buffer, self._position = data, 0
        self._status = _READY | _DRQ
        self._set_interrupt(True)

    def _block_was_read(self) -> None:
        if self._left:
            self._next_block_to_read()
        else:  # 9.5: no interrupt after the last one
            self._status = _READY
            self._end_transfer()

    def _ask_for_block(self) -> None:
        self._buffer, self._position = bytearray(min(self._block, self._left) * SECTOR), 0
        self._status = _READY | _DRQ

    def _block_was_written(self) -> None:
        count = len(self._buffer) // SECTOR
        try:
            self.image.write(self._sector, self._buffer, not self._write_cache)
        except OSError as failure:
            self._host_failed(failure)
            return
        self._sector += count
        self._left -= count
        self.sectors_written += count
        if self._left:
            self._ask_for_block()
        else:
            self._status = _READY
            self._end_transfer()
        self._set_interrupt(True)

    # --- interrupts and life ----------------------------------------------------------------------------------------

    def _set_interrupt(self, pending: bool) -> None:
        self._interrupt = pending
        self._drive()

    def _drive(self) -> None:
        """The line is high while an interrupt is pending, wanted, and its device selected (7.8, 9.1)."""
        level = self._interrupt and not self._control & _NIEN and not self._device & _DEV
        if level != self._level:
            self._level = level
            if level:
                self.line.raise_line()
            else:
                self.line.lower_line()

    def reset(self) -> None:
        self._power_on()
        self._drive()

    def state(self) -> dict[str, Any]:
        """Registers and the transfer under way; what is on the disk is in the image."""
        state = {field: getattr(self, f"_{field}") for field in _FIELDS}
        return {**state, "registers": [*self._registers], "before": [*self._before], "buffer": bytes(self._buffer)}

    def restore(self, state: dict[str, Any]) -> None:
        for field in _FIELDS:
            setattr(self, f"_{field}", state[field])
        self._registers, self._before = [*state["registers"]], [*state["before"]]
        self._buffer = bytearray(state["buffer"])
        self._drive()

    def close(self) -> None:
        self.image.close()


_ACTIONS: dict[int, Callable[[AtaDisk, int], None]] = {
    **dict.fromkeys(ata.READS, AtaDisk._begin_read),
    **dict.fromkeys(ata.WRITES, AtaDisk._begin_write),
    **dict.fromkeys(ata.VERIFIES, AtaDisk._verify),
    **dict.fromkeys(ata.FLUSHES, AtaDisk._flush),
    **dict.fromkeys(ata.WITHOUT_EFFECT, AtaDisk._no_operation),
    Command.EXECUTE_DEVICE_DIAGNOSTIC: AtaDisk._diagnose,
    Command.SET_MULTIPLE_MODE: AtaDisk._set_multiple,
    Command.SET_FEATURES: AtaDisk._set_features,
    Command.CHECK_POWER_MODE: AtaDisk._check_power_mode,
    Command.IDENTIFY_DEVICE: AtaDisk._identify,
}
