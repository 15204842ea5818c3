"""virtio over MMIO: the registers by which a driver reaches a device that is on no bus (virtio 1.2, section 4.2)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kvmpy.devices.device import Board, Device, Region
from kvmpy.errors import UsageError
from kvmpy.virtio import mmio_registers as reg
from kvmpy.virtio.device import VirtioDevice
from kvmpy.virtio.features import Feature
from kvmpy.virtio.interrupt_status import CONFIG_CHANGE, USED_BUFFER, InterruptStatus

if TYPE_CHECKING:
    from kvmpy.devices.device import Timer, WriteEvent
    from kvmpy.virtio.virtqueue import Virtqueue

__all__ = ["VirtioMmio", "linux_parameters"]

VENDOR = 0x5950_564B
"""What VendorID gives: "KVPY", lowest byte first."""

WINDOW = 0x200
"""Bytes of registers, half of them configuration space; more if that is longer."""

_QUEUE_ADDRESSES = {
    reg.QUEUE_DESC_LOW: (0, 0), reg.QUEUE_DESC_HIGH: (0, 32),
    reg.QUEUE_DRIVER_LOW: (1, 0), reg.QUEUE_DRIVER_HIGH: (1, 32),
    reg.QUEUE_DEVICE_LOW: (2, 0), reg.QUEUE_DEVICE_HIGH: (2, 32),
}  # fmt: skip
"""Register -> which of the three addresses of a queue, and how far it is shifted."""


class _Selected:
    """What the driver has written about one queue, and has not enabled yet."""

    __slots__ = ("addresses", "align", "pfn", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.addresses = [0, 0, 0]
        self.align = 0x1000  # legacy
        self.pfn = 0


class VirtioMmio(Device):
    """A virtio device at `WINDOW` bytes from `address` on, with interrupt input `irq`; both are the board's choice when
    they are left out. Linux finds it by `linux_parameter` on its command line, or through ACPI (`address`, `size`,
    `gsi`; the trigger is the edge).

    `legacy` makes it a device of before version 1 (register Version says 1), for drivers that know no other.

    A driver's notification is an exit, or with `ioeventfd` a signal to the host input thread, which then handles the
    queue while the guest goes on. An interrupt is a line that is raised and lowered, or with `irqfd` an edge: see
    `InterruptStatus`; say `irqfd=False` where the guest programs the input for levels. The board decides whether it has
    these things.
    """

    name = "virtio-mmio"

    def __init__(
        self, device: VirtioDevice, address: int | None = None, irq: int | None = None, *,
        legacy: bool = False, ioeventfd: bool = True, irqfd: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        if not isinstance(device, VirtioDevice):
            raise UsageError(f"VirtioMmio() takes a virtio device, such as Entropy(), not {device!r}")
        if device.board is not None or isinstance(device.transport, VirtioMmio):
            raise UsageError(f"{device.name} is plugged in already")
        self.device = device
        self.name = device.name
        self.counters = device.counters
        self.address = address
        self.irq = irq
        config_size = 0 if device.config is None else len(bytes(device.config))
        self.size = max(WINDOW, reg.CONFIG + config_size + 0xFFF & ~0xFFF if config_size > 0x100 else WINDOW)
        """Bytes of registers."""
        self.legacy = device.legacy = legacy
        device.transport = self
        self._wants_ioeventfd, self._wants_irqfd = ioeventfd, irqfd
        self.write_events: list[WriteEvent] = []
        self.interrupt = InterruptStatus()
        self._timer: Timer | None = None
        self._later: deque[Virtqueue] = deque()
        self._guest_page_size = 0
        self._forget()

    def _forget(self) -> None:
        """What the driver wrote before a reset. GuestPageSize stays: legacy drivers write it first, then reset."""
        self._device_features_sel = self._driver_features_sel = self._queue_sel = self._shm_sel = 0
        self._selected = [_Selected(queue.size_max) for queue in self.device.queues]

    # --- being plugged in -------------------------------------------------------------------------------------------

    @property
    def gsi(self) -> int | None:
        """The interrupt input, as ACPI and the MP table call it."""
        return self.irq

    @property
    def linux_parameter(self) -> str:
        """What tells Linux of it (CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES): "virtio_mmio.device=0x200@0xd0000000:5"."""
        if self.address is None or self.irq is None:
            raise UsageError(f"{self.name} has no place yet: it gets one from machine.add()")
        return f"virtio_mmio.device={self.size:#x}@{self.address:#x}:{self.irq}"

    def place(self, board: Board) -> None:
        if self.address is None:
            self.address = board.allocate_mmio(self.size)
        if self.irq is None:
            self.irq = board.allocate_interrupt()

    def regions(self) -> tuple[Region, ...]:
        if self.address is None:
            raise UsageError(f"{self.name} has no address: say address=, or plug it into a machine")
        return (Region("mmio", self.address, self.size, self.name, self.read, self.write),)

    def attach(self, board: Board) -> None:
        try:
            self._attach(board)
        except BaseException:
            self._close_events()
            raise

    def _attach(self, board: Board) -> None:
        super().attach(board)
        self.interrupt.line = self.line
        self._timer = board.timer(self._process_later)
        if self._wants_irqfd and self.irq is not None:
            edges = self.interrupt.event = board.interrupt_event(self.irq)
            if edges is not None:
                edges.raised = lambda: bool(self.interrupt.causes)
        self.device.attach(board, board.memory)
        if self._wants_ioeventfd and self.address is not None:
            for queue in self.device.queues:
                event = board.write_event(
                    "mmio", self.address + reg.QUEUE_NOTIFY, 4, queue.index, self._notification(queue)
                )
                if event is not None:
                    self.write_events.append(event)

    def _notification(self, queue: Virtqueue) -> Any:
        def notified() -> None:
            try:
                self.device.notify(queue.index)
            except Exception:
                self.device.needs_reset("failed")  # the driver learns of it; the host finds the error in host_errors
                raise

        return notified

    def close(self) -> None:
        """Close the device and give the eventfds back."""
        try:
            self.device.close()
        finally:
            self._close_events()

    def _close_events(self) -> None:
        for event in (*self.write_events, self.interrupt.event):
            if event is not None:
                event.close()
        self.write_events = []
        self.interrupt.event = None

    # --- what the device asks for (Transport) -----------------------------------------------------------------------

    def used_notification(self, queue: Virtqueue) -> None:
        """Interrupt: buffers were used."""
        self.interrupt.add(USED_BUFFER)

    def config_notification(self) -> None:
        """Interrupt: status or configuration changed."""
        self.interrupt.add(CONFIG_CHANGE)

    def process_later(self, queue: Virtqueue) -> None:
        """Have the host input thread look at a queue."""
        if queue not in self._later:
            self._later.append(queue)
        if self._timer is not None:
            self._timer.start(time.monotonic())

    def _process_later(self) -> None:
        for _ in range(len(self._later)):
            self._notification(self._later.popleft())()

    # --- registers --------------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        if offset == reg.INTERRUPT_STATUS and size == 4:
            return self.interrupt.causes
        if offset >= reg.CONFIG:
            return int.from_bytes(self.device.read_config(offset - reg.CONFIG, size), "little")
        # 4.2.2.2: a driver uses aligned accesses of 32 bits here. Others get what lies there.
        if size == 4 and not offset & 3:
            return self._read_register(offset)
        data = bytearray()
        for at in range(offset & ~3, offset + size, 4):
            if at < reg.CONFIG:
                data += self._read_register(at).to_bytes(4, "little")
            else:
                data += self.device.read_config(at - reg.CONFIG, 4)
        return int.from_bytes(data[offset & 3 : (offset & 3) + size], "little")

    def _read_register(self, offset: int) -> int:
        device = self.device
        match offset:
            case reg.MAGIC_VALUE:
                return reg.MAGIC
            case reg.VERSION:
                return 1 if self.legacy else 2
            case reg.DEVICE_ID:
                return device.device_id
            case reg.VENDOR_ID:
                return VENDOR
            case reg.DEVICE_FEATURES:
                # 4.2.2.1: bits 32 x DeviceFeaturesSel to that + 31; there are none beyond 63.
                sel = self._device_features_sel
                return device.offered >> 32 * sel & 0xFFFF_FFFF if sel < 4 else 0
            case reg.QUEUE_NUM_MAX:
                return device.queues[self._queue_sel].size_max if self._queue_sel < len(device.queues) else 0
            case reg.QUEUE_READY if not self.legacy:
                return int(self._queue_sel < len(device.queues) and device.queues[self._queue_sel].ready)
            case reg.QUEUE_PFN if self.legacy:
                return self._selected[self._queue_sel].pfn if self._queue_sel < len(device.queues) else 0
            case reg.INTERRUPT_STATUS:
                return self.interrupt.causes
            case reg.STATUS:
                return device.status
            case reg.SHM_LEN_LOW | reg.SHM_LEN_HIGH | reg.SHM_BASE_LOW | reg.SHM_BASE_HIGH if not self.legacy:
                return 0xFFFF_FFFF  # 4.2.2.1: the length of a region that does not exist is 2^64 - 1
            case reg.CONFIG_GENERATION if not self.legacy:
                return device.config_generation
        return 0  # write-only, reserved, or a queue's reset, which is over when the write is

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == reg.QUEUE_NOTIFY and size == 4:
            self.device.notify(value)
        elif offset == reg.INTERRUPT_ACK and size == 4:
            self.interrupt.acknowledge(value)
        elif offset >= reg.CONFIG:
            self.device.write_config(offset - reg.CONFIG, value.to_bytes(size, "little"))
        elif size != 4 or offset & 3:
            self.counters["register_width"] += 1  # 4.2.2.2
        else:
            with self.device.lock:
                self._write_register(offset, value)

    def _write_register(self, offset: int, value: int) -> None:
        device = self.device
        match offset:
            case reg.DEVICE_FEATURES_SEL:
                self._device_features_sel = value
            case reg.DRIVER_FEATURES_SEL:
                self._driver_features_sel = value
            case reg.DRIVER_FEATURES:
                shift = 32 * self._driver_features_sel
                if self._driver_features_sel < (1 if self.legacy else 2):
                    device.accept(0xFFFF_FFFF << shift, value << shift)
                elif value:
                    self.counters["features_beyond_63"] += 1
            case reg.QUEUE_SEL:
                self._queue_sel = value
            case reg.GUEST_PAGE_SIZE if self.legacy:
                self._guest_page_size = value
            case reg.SHM_SEL:
                self._shm_sel = value
            case reg.STATUS:
                device.write_status(value)
                if value == 0:
                    self._reset_registers()
            case _ if self._queue_sel < len(device.queues):
                self._write_queue_register(offset, value)
            case _:
                self.counters["register_write"] += 1

    def _reset_registers(self) -> None:
        # 2.4.1 and 4.2.2.1: after a reset InterruptStatus is clear and no queue is ready.
        self.interrupt.acknowledge(USED_BUFFER | CONFIG_CHANGE)
        self._forget()

    def _write_queue_register(self, offset: int, value: int) -> None:
        index = self._queue_sel
        selected = self._selected[index]
        queue = self.device.queues[index]
        if self.legacy:
            match offset:
                case reg.QUEUE_NUM:
                    selected.size = value
                case reg.QUEUE_ALIGN:
                    selected.align = value
                case reg.QUEUE_PFN:
                    self._write_legacy_pfn(index, value)
                case _:
                    self.counters["register_write"] += 1
            return
        if offset == reg.QUEUE_READY:
            self._write_queue_ready(index, value & 1)
        elif offset == reg.QUEUE_RESET:
            if value & 1 and self.device.has_feature(Feature.RING_RESET):
                self.device.reset_queue(index)
            else:
                self.counters["register_write"] += 1
        elif queue.ready:  # 4.2.2.2: these must not be written while the queue is in use
            self.counters["queue_moved_while_ready"] += 1
        elif offset == reg.QUEUE_NUM:
            selected.size = value
        elif offset in _QUEUE_ADDRESSES:
            which, shift = _QUEUE_ADDRESSES[offset]
            selected.addresses[which] = selected.addresses[which] & ~(0xFFFF_FFFF << shift) | value << shift
        else:
            self.counters["register_write"] += 1

    def _write_queue_ready(self, index: int, ready: int) -> None:
        queue, selected = self.device.queues[index], self._selected[index]
        if ready and not queue.ready:
            first, second, third = selected.addresses
            self.device.enable_queue(index, selected.size, (first, second, third))
        elif not ready and queue.ready:
            self.device.reset_queue(index)

    def _write_legacy_pfn(self, index: int, pfn: int) -> None:
        """Section 4.2.4: the queue starts at page `pfn`, its parts follow one another (section 2.7.2)."""
        selected, queue = self._selected[index], self.device.queues[index]
        if queue.ready:
            self.device.reset_queue(index)
        selected.pfn = 0
        page, align, size = self._guest_page_size, selected.align, selected.size
        if not pfn:
            return
        if not page or page & page - 1 or not align or align & align - 1:  # powers of 2
            self.counters["queue_set_up"] += 1
            return
        table = pfn * page
        available = table + 16 * size
        used = available + 6 + 2 * size + align - 1 & -align
        if self.device.enable_queue(index, size, (table, available, used)):
            selected.pfn = pfn

    # --- life -------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        self.device.reset()
        self._reset_registers()
        self._guest_page_size = 0

    def quiesce(self) -> None:
        """Finish what is under way, and begin nothing until `resume`: guest memory stays as it is."""
        self.device.quiesce()

    def resume(self) -> None:
        """Go on after `quiesce` or `restore`."""
        self.device.resume()

    def state(self) -> dict[str, Any]:
        """Registers and the device. After `restore` the queues stand still until `resume`."""
        with self.device.lock:
            return {
                "sel": [self._device_features_sel, self._driver_features_sel, self._queue_sel, self._shm_sel],
                "queues": [[one.size, list(one.addresses), one.align, one.pfn] for one in self._selected],
                "page_size": self._guest_page_size, "interrupt_status": self.interrupt.causes,
                "device": self.device.state(),
            }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        with self.device.lock:
            self.device.restore(state["device"])
            (
                self._device_features_sel, self._driver_features_sel, self._queue_sel, self._shm_sel,
            ) = state["sel"]  # fmt: skip
            for one, (size, addresses, align, pfn) in zip(self._selected, state["queues"], strict=True):
                one.size, one.addresses, one.align, one.pfn = size, list(addresses), align, pfn
            self._guest_page_size = state["page_size"]
            self.interrupt.acknowledge(USED_BUFFER | CONFIG_CHANGE)
            if state["interrupt_status"]:
                self.interrupt.add(state["interrupt_status"])


def linux_parameters(devices: Iterable[object]) -> str:
    """What tells Linux of all virtio-mmio devices among `devices`, such as those of a machine, for its command line.

    For kernels without ACPI: one that has both sees a device twice, and the second is refused.
    """
    return " ".join(device.linux_parameter for device in devices if isinstance(device, VirtioMmio))
