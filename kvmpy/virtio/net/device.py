"""The network device: an Ethernet card for the guest (virtio 1.2, section 5.1)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvmpy.errors import UsageError
from kvmpy.virtio.chain import Chain
from kvmpy.virtio.device import VirtioDevice
from kvmpy.virtio.features import Feature
from kvmpy.virtio.net.backend import NetBackend
from kvmpy.virtio.net.format import (
    HEADER_SIZE,
    LEGACY_HEADER_SIZE,
    LINK_UP,
    LONGEST_FRAME,
    LONGEST_MTU,
    MAC_BYTES,
    SHORTEST_FRAME,
    SHORTEST_MTU,
    NetConfig,
    NetFeature,
    received_header,
)
from kvmpy.virtio.net.pcap import PcapFile
from kvmpy.virtio.virtqueue import Virtqueue

if TYPE_CHECKING:
    from kvmpy.devices.device import Board
    from kvmpy.memory import GuestMemory

__all__ = ["VirtioNet"]

_RECEIVE, _TRANSMIT = 0, 1  # section 5.1.2
_ENTRIES = 256
_BATCH = 64
"""Frames that are received, and as many that are sent, before others may have the thread."""
_ETHERNET_HEADERS = 18
"""Bytes that a frame may have beyond the MTU: the header, with a VLAN tag."""
_ONE_BUFFER = received_header(1)
_NEEDS_CHECKSUM = 1  # VIRTIO_NET_HDR_F_NEEDS_CSUM


class VirtioNet(VirtioDevice):
    """A network card whose cable leads to `backend`: `Passt()`, `Tap()`, one of `datagram_pair()`, or None: unplugged.

    `mac` is its address, such as "52:54:00:12:34:56"; by default a random one of the range that is for local use. `mtu`
    tells the driver the longest packet; by default what the backend says, if it does. `capture` names a file to which
    all frames are written (pcap), or is a `PcapFile`.

    What the other end sends while no driver runs is lost, as with a card that is not set up. When the driver has no
    buffers, nothing is taken from the backend until it has. The cable can be pulled and plugged: `connect`. When the
    other end goes, the guest sees the link down. `sent` and `received` count the guest's frames, `counters` what was
    lost and why.
    """

    name = "virtio-net"
    device_id = 1
    queue_sizes = (_ENTRIES, _ENTRIES)

    def __init__(
        self, backend: NetBackend | None = None, *, mac: str | bytes | None = None, mtu: int | None = None,
        capture: str | os.PathLike[str] | PcapFile | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.sent = self.received = 0
        self._backend: NetBackend | None = None
        self._events: _BackendEvents | None = None
        self._held: bytes | memoryview | None = None
        """A frame that has arrived, and that the driver has no buffers for."""
        self._waits_for_room = False
        self._capture: PcapFile | None = None
        self.config: NetConfig = NetConfig(max_virtqueue_pairs=1)
        self.connect(backend)
        try:
            self._describe(mac, mtu)
            if capture is not None:
                self._capture = capture if isinstance(capture, PcapFile) else PcapFile(capture)
        except BaseException:
            self.connect(None)  # nobody else has the backend
            raise

    def _describe(self, mac: str | bytes | None, mtu: int | None) -> None:
        """Features (section 5.1.3) and configuration space (5.1.4)."""
        self.config.mac[:] = [*(b"\x52\x54\x00" + os.urandom(3) if mac is None else _mac_bytes(mac))]
        features = {NetFeature.MAC, NetFeature.STATUS, NetFeature.MRG_RXBUF, Feature.IN_ORDER}
        if mtu is None and self._backend is not None:
            mtu = self._backend.mtu
        if mtu is not None:
            if not SHORTEST_MTU <= mtu <= LONGEST_MTU:
                raise UsageError(f"an MTU is {SHORTEST_MTU} to {LONGEST_MTU} bytes, not {mtu!r}")
            features.add(NetFeature.MTU)
            self.config.mtu = mtu
        self.features = frozenset(features)

    # --- for programs -----------------------------------------------------------------------------------------------

    @property
    def mac(self) -> str:
        """The address, as "52:54:00:12:34:56"."""
        return bytes(self.config.mac).hex(":")

    @property
    def backend(self) -> NetBackend | None:
        """Where the cable leads to."""
        return self._backend

    @property
    def link_up(self) -> bool:
        """Whether there is somebody at the other end."""
        return self._backend is not None and self._backend.connected

    def connect(self, backend: NetBackend | None) -> None:
        """Plug the cable in elsewhere, or pull it (None). What it was plugged into is closed. From any thread.

        Raises UsageError for a backend that has a device already.
        """
        if backend is not None and (backend.in_use or not backend.connected):
            raise UsageError(f"{backend!r} has a device already, or is closed")
        with self.lock:
            before = self._unplug()
            if backend is not None:
                backend.in_use = True
                self.counters.update(backend.counters)
                backend.counters = self.counters
                self._backend = backend
                self._listen()
            self._update_link()
        if before is not None:
            before.close()  # without the lock: a program may take a while to end

    # --- the backend ------------------------------------------------------------------------------------------------

    def attach(self, board: Board, memory: GuestMemory) -> None:
        super().attach(board, memory)
        self._listen()

    def _listen(self) -> None:
        if self.board is not None and self._backend is not None:
            self._events = _BackendEvents(self, self._backend)
            self.board.listen(self._events)

    def _unplug(self) -> NetBackend | None:
        """Use the backend no longer; answers it."""
        backend, events = self._backend, self._events
        self._backend = self._events = self._held = None
        self._waits_for_room = False
        if events is not None and self.board is not None:
            self.board.forget(events)
        return backend

    def _update_link(self) -> None:
        """Tell the driver when the link has come or gone (section 5.1.4.1)."""
        status = LINK_UP if self.link_up else 0
        if status != self.config.status:
            with self.changing_config():
                self.config.status = status

    def backend_is_ready(self, backend: NetBackend) -> bool:
        """`backend.fileno()` can be read. False: it is not to be listened to any longer."""
        with self.lock:
            if backend is not self._backend:
                return False
            backend.flush()
            if self._waits_for_room and not backend.full:
                self._transmit()
            self._receive()
            if not backend.connected:
                self._events = None  # forgotten with the answer
            return backend.connected

    # --- queues -----------------------------------------------------------------------------------------------------

    def notified(self, queue: Virtqueue) -> None:
        if queue.index == _RECEIVE:
            self._receive()
        else:
            self._transmit()

    def _transmit(self) -> None:
        queue = self.queues[_TRANSMIT]
        with queue.batch():
            for _ in range(_BATCH):
                backend = self._backend
                self._waits_for_room = backend is not None and backend.full
                if self._waits_for_room:  # the frames wait in the driver's queue
                    return
                chain = queue.take()
                if chain is None:
                    return
                self.handle(queue, chain)
        self.transport.process_later(queue)

    def handle(self, queue: Virtqueue, chain: Chain) -> None:
        """Send a frame (section 5.1.6.2)."""
        header = chain.read(self._header_size)
        length = chain.readable_left
        backend = self._backend
        if not SHORTEST_FRAME <= length <= LONGEST_FRAME:
            self.counters["bad_frame_sent"] += 1
        elif header[0] & _NEEDS_CHECKSUM or header[1]:
            # 5.1.6.2.1: without CSUM and HOST_TSO the driver must set `flags` and `gso_type` to 0.
            self.counters["offload_not_negotiated"] += 1
        elif backend is None:
            self.counters["link_down"] += 1
        else:
            views = chain.take_readable(length)
            if backend.send(views):
                self.sent += 1
                self._record(views)
            elif not backend.connected:
                self._update_link()
        chain.complete(0)

    def _receive(self) -> None:
        """Give the driver the frames that are there, as far as it has buffers."""
        backend, queue = self._backend, self.queues[_RECEIVE]
        if backend is None:
            return
        with queue.batch():
            for _ in range(_BATCH):
                frame = self._held
                if frame is None:
                    frame = backend.receive()
                    if frame is None:
                        break
                    if frame:
                        self._record((frame,))
                self._held = None
                if not self._deliver(queue, frame):
                    self._held = frame  # it stays valid: the backend is not asked for another
                    break
            else:
                if queue.open:
                    self.transport.process_later(queue)
            backend.watch_arrivals(self._held is None)
        if not backend.connected:
            self._update_link()
            if self._waits_for_room:
                self._transmit()

    def _deliver(self, queue: Virtqueue, frame: bytes | memoryview) -> bool:
        """Put a frame into buffers of the driver (section 5.1.6.4), or drop it. False: it must wait for buffers."""
        length = len(frame)
        if not SHORTEST_FRAME <= length <= self._longest:
            self.counters["bad_frame_received"] += 1
            return True
        if not self.notifies:
            self.counters["no_driver"] += 1
            return True
        chain = queue.take()
        if chain is None:
            return False
        header_size = self._header_size
        if chain.writable_left < header_size:
            self.counters["small_buffer"] += 1  # 5.1.6.3.1: a buffer has at least room for the header
            chain.complete(0)
            return True
        if chain.writable_left >= header_size + length:
            chain.write(_ONE_BUFFER[:header_size])
            chain.write(frame)
            chain.complete()
        elif not self.has_feature(NetFeature.MRG_RXBUF):
            queue.put_back(chain)
            self.counters["frame_longer_than_buffer"] += 1
            return True
        else:
            chains = _enough(queue, chain, header_size + length)
            if chains is None:
                return False
            if not chains:
                self.counters["frame_longer_than_queue"] += 1
                return True
            chain.write(received_header(len(chains)))
            rest = memoryview(frame)
            for chain in chains:
                rest = rest[chain.write(rest[: chain.writable_left]) :]
                chain.complete()
        self.received += 1
        return True

    @property
    def _longest(self) -> int:
        # 5.1.4.1: nothing longer than the MTU, once the driver has agreed to that.
        if self.has_feature(NetFeature.MTU):
            return int(self.config.mtu) + _ETHERNET_HEADERS
        return LONGEST_FRAME

    @property
    def _header_size(self) -> int:
        if self.legacy and not self.has_feature(NetFeature.MRG_RXBUF):
            return LEGACY_HEADER_SIZE
        return HEADER_SIZE

    def _record(self, parts: Sequence[bytes | memoryview]) -> None:
        capture = self._capture
        if capture is not None:
            capture.record(parts)
            if capture.error is not None:
                self.counters["capture_failed"] += 1
                self._capture = None

    # --- configuration and life -------------------------------------------------------------------------------------

    def config_written(self, offset: int, data: bytes) -> None:
        # 5.1.4.2: a legacy driver changes its address by writing it, byte by byte.
        if self.legacy and offset + len(data) <= MAC_BYTES:
            self.config.mac[offset : offset + len(data)] = [*data]
        else:
            super().config_written(offset, data)

    def stopped(self) -> None:
        self._held = None
        self._waits_for_room = False
        if self._backend is not None:
            self._backend.watch_arrivals(True)

    def device_state(self) -> dict[str, Any]:
        return {"held": None if self._held is None else bytes(self._held)}

    def restore_device_state(self, state: dict[str, Any]) -> None:
        self._held = state["held"]

    def resume(self) -> None:
        super().resume()
        with self.lock:
            self._update_link()  # after a restore it is that of this device's backend, not of the one that was saved

    def close(self) -> None:
        """Close the backend and the capture."""
        self.connect(None)
        with self.lock:
            capture, self._capture = self._capture, None
            if capture is not None:
                capture.close()


class _BackendEvents:
    """What the machine's input thread waits on for a backend."""

    def __init__(self, device: VirtioNet, backend: NetBackend) -> None:
        self._device, self._backend = device, backend
        self._fd = backend.fileno()

    def fileno(self) -> int:
        return self._fd

    def ready(self) -> bool:
        return self._device.backend_is_ready(self._backend)

    def __repr__(self) -> str:
        return f"<events of {self._backend!r}>"


def _enough(queue: Virtqueue, first: Chain, needed: int) -> list[Chain] | None:
    """Chains with room for `needed` bytes, beginning with `first`. None: the driver has not made enough available yet.
    Empty: it never can. Then all are put back."""
    chains, room = [first], first.writable_left
    while room < needed:
        chain = queue.take() if len(chains) < queue.size else None
        if chain is None:
            never = len(chains) == queue.size
            for chain in reversed(chains):
                queue.put_back(chain)
            return [] if never else None
        chains.append(chain)
        room += chain.writable_left
    return chains


def _mac_bytes(mac: str | bytes) -> bytes:
    try:
        address = bytes.fromhex(mac.replace(":", "").replace("-", "")) if isinstance(mac, str) else bytes(mac)
    except ValueError:
        address = b""
    if len(address) != MAC_BYTES or address[0] & 1 or not any(address):
        raise UsageError(f'a MAC address is one of a single card, such as "52:54:00:12:34:56", not {mac!r}')
    return address
