"""The base of virtio devices: negotiation, status, configuration space, queues. It knows no transport and no KVM."""

from __future__ import annotations

import ctypes
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from kvmpy.errors import UsageError
from kvmpy.virtio.chain import Chain
from kvmpy.virtio.features import DeviceStatus, Feature, bits_of, mask_of
from kvmpy.virtio.virtqueue import Virtqueue

if TYPE_CHECKING:
    from kvmpy.devices.device import Board, Device
    from kvmpy.memory import GuestMemory

__all__ = ["Transport", "VirtioDevice"]

RESET_PATIENCE = 5.0
"""Seconds that a reset waits for chains in flight. Then the vCPU goes on, and the reset ends with the last one."""

_DRIVER_OK = int(DeviceStatus.DRIVER_OK)
_FEATURES_OK = int(DeviceStatus.FEATURES_OK)
_NEEDS_RESET = int(DeviceStatus.DEVICE_NEEDS_RESET)
_FAILED = int(DeviceStatus.FAILED)
_DRIVERS_BITS = _DRIVER_OK | _FEATURES_OK | _FAILED | int(DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER)


class Transport(Protocol):
    """What a device may ask of the transport it is behind. All may be called from any thread."""

    def used_notification(self, queue: Virtqueue) -> None: ...  # section 2.3: the driver shall look at the used ring
    def config_notification(self) -> None: ...  # it shall look at status and configuration space
    def process_later(self, queue: Virtqueue) -> None: ...  # call `device.notify(queue.index)` in the host input thread


class _NoTransport:
    """What a device is behind that was not plugged in."""

    def used_notification(self, queue: Virtqueue) -> None:
        pass

    def config_notification(self) -> None:
        pass

    def process_later(self, queue: Virtqueue) -> None:
        pass


class VirtioDevice:
    """A virtio device, behind any transport. A subclass sets the class attributes and overrides `handle`.

    `handle`, `notified` and the other hooks are called with `lock` held, in the host input thread or in that of a vCPU.
    They must not block: a worker thread may do what takes long, and complete the chain from there. `counters` counts
    what the guest did wrong, by a short name.
    """

    name: ClassVar[str] = "virtio device"
    device_id: ClassVar[int] = 0
    """Section 5 lists them."""
    queue_sizes: tuple[int, ...] = ()
    """The most entries of each queue; the driver may choose fewer."""
    features: frozenset[int] = frozenset()
    """Numbers of the feature bits of this kind of device that are offered; Feature.IN_ORDER may be among them."""
    ring_features: frozenset[int] = frozenset({Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.RING_RESET})
    """What of the queues' own features is offered. VERSION_1 always is, except behind a legacy transport."""
    config: ctypes.LittleEndianStructure | None = None
    """The configuration space (section 2.5), if the device has one."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        """Held while anything of the device changes."""
        self.counters: Counter[str] = Counter()
        self.queues = tuple(Virtqueue(self, index, size) for index, size in enumerate(self.queue_sizes))
        self.transport: Transport = _NoTransport()
        self.memory: GuestMemory | None = None
        self.board: Board | None = None
        self.legacy = False
        """Whether the transport is a legacy one (section 7.4), which has no FEATURES_OK."""
        self.status = 0
        self.accepted = 0
        """The features that the driver has accepted, as a number."""
        self.config_generation = 0
        self.notifies = False
        """Whether the driver may be notified: it has said DRIVER_OK."""
        self.waiting_for_chains = 0
        """How many wait for chains in flight, a reset that ends later among them."""
        self._chains_are_back = threading.Condition(self.lock)
        self._resetting = self._reset_ends_later = False
        self._quiet = False

    # --- what a subclass overrides ----------------------------------------------------------------------------------

    def handle(self, queue: Virtqueue, chain: Chain) -> None:
        """The driver has made `chain` available. Complete it now or later."""
        chain.complete(0)

    def notified(self, queue: Virtqueue) -> None:
        """There may be chains in `queue`. A queue whose chains wait for the host's data is left alone here."""
        queue.run(self.handle)

    def accepts(self, features: frozenset[int]) -> bool:
        """Whether the driver's choice of offered features works; if not, FEATURES_OK stays clear (section 2.2.2)."""
        return True

    def config_written(self, offset: int, data: bytes) -> None:
        """The driver writes to the configuration space."""
        self.counters["config_write"] += 1

    def started(self) -> None:
        """The driver is ready (DRIVER_OK)."""

    def cancel(self) -> None:
        """Chains are waited for, for a reset or to save the state: complete soon what may be held for long."""

    def stopped(self) -> None:
        """The device was reset; no chain is in flight. Its own state is to be that after power-on."""

    def device_state(self) -> dict[str, Any]:
        """What the subclass has to save, as plain data."""
        return {}

    def restore_device_state(self, state: dict[str, Any]) -> None:
        """Take back what `device_state` gave."""

    def close(self) -> None:
        """The machine is closed: end threads, close files."""

    # --- what a subclass uses ---------------------------------------------------------------------------------------

    def has_feature(self, bit: int) -> bool:
        """Whether driver and device agreed on a feature."""
        return bool(self.accepted >> bit & 1)

    @contextmanager
    def changing_config(self) -> Iterator[None]:
        """Change `config` within this context: the driver sees all of it or nothing (section 2.5.1), and is told."""
        with self.lock:
            yield
            self.config_generation = self.config_generation + 1 & 0xFFFF_FFFF
            if self.notifies:
                self.transport.config_notification()

    def needs_reset(self, cause: str) -> None:
        """Stop until the driver resets the device (section 2.1.2); `cause` is counted."""
        with self.lock:
            self.counters[cause] += 1
            if self.status & _NEEDS_RESET:
                return
            self.status |= _NEEDS_RESET
            # 2.1.2: if DRIVER_OK is set, the driver must be told.
            if self.status & _DRIVER_OK:
                self.transport.config_notification()
            self._update()

    def as_device(self) -> Device:
        """What `Machine.add` plugs in for it: itself behind virtio-mmio, at an address and interrupt of the board's."""
        from kvmpy.virtio.mmio import VirtioMmio

        return VirtioMmio(self)

    # --- what a transport calls -------------------------------------------------------------------------------------

    def attach(self, board: Board, memory: GuestMemory) -> None:
        """Plug the device in."""
        self.board = board
        self.memory = memory

    @property
    def offered(self) -> int:
        """The features that are offered, as a number."""
        offered = mask_of(self.features | self.ring_features)
        return offered & 0xFFFF_FFFF if self.legacy else offered | 1 << Feature.VERSION_1

    def accept(self, mask: int, value: int) -> None:
        """The driver writes its choice of the features in `mask`."""
        with self.lock:
            if self.status & (_FEATURES_OK | _DRIVER_OK):  # 3.1.1, step 5: no new features after this
                self.counters["features_too_late"] += 1
                return
            self.accepted = self.accepted & ~mask | value & mask

    def write_status(self, value: int) -> None:
        """The driver writes the status (sections 2.1 and 3.1.1); 0 resets the device."""
        with self.lock:
            value = int(value) & 0xFF
            if value == 0:
                self.reset()
                return
            if self._resetting:
                self.counters["status_during_reset"] += 1
                return
            old = self.status
            if old & ~value & _DRIVERS_BITS:  # 2.1.1: the driver must not clear a bit, but for a reset
                self.counters["status_bit_cleared"] += 1
            new = old | value & _DRIVERS_BITS
            if new & ~old & _FEATURES_OK and not self._features_are_ok():
                new &= ~_FEATURES_OK  # 2.2.2: the driver reads back whether its choice was taken
            if new & ~old & _DRIVER_OK:
                if self.legacy:
                    self.accepted &= self.offered
                elif not new & _FEATURES_OK:  # 3.1.1: it comes before
                    self.counters["driver_ok_without_features_ok"] += 1
                    new &= ~_DRIVER_OK
            self.status = new
            if new & ~old & (_DRIVER_OK | _FAILED):
                self._update()
                if new & ~old & _DRIVER_OK:
                    self.started()

    def _features_are_ok(self) -> bool:
        accepted, offered = self.accepted, self.offered
        # 2.2.1: the driver must not accept what was not offered. 6.1: without VERSION_1 it would be a legacy driver.
        if accepted & ~offered or not accepted >> Feature.VERSION_1 & 1 or not self.accepts(bits_of(accepted)):
            self.counters["features_refused"] += 1
            return False
        return True

    def notify(self, index: int) -> None:
        """The driver notifies of queue `index` (section 2.3, "available buffer notification")."""
        with self.lock:
            if not (index < len(self.queues) and self.queues[index].open):
                self.counters["notify_not_ready"] += 1
                return
            self.notified(self.queues[index])

    def enable_queue(self, index: int, size: int, addresses: tuple[int, int, int]) -> bool:
        """The driver has set queue `index` up. False: it cannot be used so, and stays disabled."""
        with self.lock:
            if self.memory is None or self._resetting or not self.queues[index].set_up(self.memory, size, addresses):
                self.counters["queue_set_up"] += 1
                return False
            self._update()
            return True

    def reset_queue(self, index: int) -> None:
        """Take queue `index` out of use (section 2.6.1); waits for its chains as `reset` does."""
        with self.lock:
            queue = self.queues[index]
            queue.ready = queue.open = False
            if self._drained((queue,)):
                queue.reset()
            else:  # a worker thread still uses guest memory: only a reset of all may help
                self.needs_reset("slow_reset")

    def reset(self) -> None:
        """Back to the state after power-on (section 2.4). Waits until all chains in flight are completed, so that
        nothing is written into buffers that the driver has taken back; if that takes long, it ends then, and the
        status becomes 0 then (2.4.2)."""
        with self.lock:
            self._resetting = True
            self._update()
            if self._drained(self.queues):
                self._finish_reset()
            else:
                self.counters["slow_reset"] += 1
                self.waiting_for_chains += not self._reset_ends_later
                self._reset_ends_later = True

    @property
    def resetting(self) -> bool:
        """Whether a reset still waits for chains."""
        return self._resetting

    def _finish_reset(self) -> None:
        self._reset_is_over()
        self.status = self.accepted = 0
        for queue in self.queues:
            queue.reset()
        self._update()
        self.stopped()

    def _reset_is_over(self) -> None:
        self.waiting_for_chains -= self._reset_ends_later
        self._resetting = self._reset_ends_later = False

    def _drained(self, queues: tuple[Virtqueue, ...]) -> bool:
        """Wait until no chain is in flight. False: it took too long. The lock is open to others meanwhile."""
        if not any(queue.in_flight for queue in queues):
            return True
        self.waiting_for_chains += 1
        self.cancel()
        done = self._chains_are_back.wait_for(lambda: not any(queue.in_flight for queue in queues), RESET_PATIENCE)
        self.waiting_for_chains -= 1
        return done

    def chains_are_back(self) -> None:
        """A queue has no chain in flight any more, while somebody waits for that. With `lock` held."""
        self._chains_are_back.notify_all()
        if self._reset_ends_later and not any(queue.in_flight for queue in self.queues):
            self._finish_reset()

    def _update(self) -> None:
        """Status, features or queues have changed: who may use what now."""
        status = self.status
        live = bool(status & _DRIVER_OK) and not status & (_NEEDS_RESET | _FAILED) and not self._resetting
        self.notifies = live
        has = self.has_feature
        event_idx, indirect, in_order = (
            has(bit) for bit in (Feature.EVENT_IDX, Feature.INDIRECT_DESC, Feature.IN_ORDER)
        )
        for queue in self.queues:
            queue.open = live and queue.ready and not self._quiet
            queue.negotiated(event_idx=event_idx, indirect=indirect, in_order=in_order)

    def read_config(self, offset: int, size: int) -> bytes:
        """The driver reads `size` bytes of the configuration space, which ends in zeros."""
        with self.lock:
            data = b"" if self.config is None else bytes(self.config)[offset : offset + size]
            return data.ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes there. What is behind its end is counted and lost."""
        with self.lock:
            if self.config is None or offset + len(data) > ctypes.sizeof(self.config):
                self.counters["config_write"] += 1
            else:
                self.config_written(offset, data)

    # --- state ------------------------------------------------------------------------------------------------------

    def quiesce(self) -> None:
        """Take no more chains, and wait until none is in flight. Not in a vCPU's thread of a device that needs it.

        Raises UsageError when chains are still in flight after a while.
        """
        with self.lock:
            self._quiet = True
            self._update()
            if not self._drained(self.queues):
                self.resume()  # and look for what the driver has notified of meanwhile
                raise UsageError(f"{self.name}: requests are still in flight after {RESET_PATIENCE:g} seconds")

    def resume(self) -> None:
        """Go on after `quiesce` or `restore`, with what was in flight before all else."""
        with self.lock:
            self._quiet = False
            self._update()
            for queue in self.queues:
                if queue.open:
                    self.transport.process_later(queue)

    def state(self) -> dict[str, Any]:
        """Status, features, configuration, queues with their chains in flight, and what the subclass adds.

        A chain in flight is handled again after a restore. What a worker thread still writes into guest memory is not
        waited for: `quiesce` does.
        """
        with self.lock:
            return {
                "status": self.status, "accepted": self.accepted, "generation": self.config_generation,
                "config": b"" if self.config is None else bytes(self.config),
                "queues": [queue.state() for queue in self.queues],
                "device": self.device_state(),
            }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave. Guest memory must be back already; `resume` lets the queues go on.

        Raises UsageError when the state is of a device with other queues or another configuration, or in other memory.
        """
        with self.lock:
            if len(state["queues"]) != len(self.queues):
                raise UsageError(f"the state is of a device with {len(state['queues'])} queues; this one has others")
            if self.memory is None:
                raise UsageError(f"{self.name} is not plugged in: its queues are in no guest's memory")
            if len(state["config"]) != (0 if self.config is None else ctypes.sizeof(self.config)):
                raise UsageError(f"the state is of a device with {len(state['config'])} bytes of configuration")
            if self.config is not None:
                ctypes.memmove(ctypes.addressof(self.config), state["config"], ctypes.sizeof(self.config))
            self._reset_is_over()
            self.config_generation = state["generation"]
            self.status, self.accepted = state["status"], state["accepted"]
            for queue, saved in zip(self.queues, state["queues"], strict=True):
                queue.restore(self.memory, saved)
            self.restore_device_state(state["device"])
            self._quiet = True  # until `resume`
            self._update()
