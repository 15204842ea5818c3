"""The socket device: streams between programs of the guest and of the host, without a network (virtio 1.2, 5.10)."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvmpy.errors import UsageError
from kvmpy.virtio.chain import Chain
from kvmpy.virtio.device import VirtioDevice
from kvmpy.virtio.virtqueue import BATCH, Virtqueue
from kvmpy.virtio.vsock.connection import BUFFER, VsockConnection
from kvmpy.virtio.vsock.format import (
    EVENT,
    HEADER,
    HOST_CID,
    TRANSPORT_RESET,
    VsockConfig,
    VsockFeature,
    VsockOperation,
    VsockType,
)
from kvmpy.virtio.vsock.listener import VsockListener
from kvmpy.virtio.vsock.streams import Key, VsockStreams
from kvmpy.virtio.vsock.unix import UnixDoor
from kvmpy.virtio.vsock.watched_sockets import WatchedSockets

if TYPE_CHECKING:
    from kvmpy.devices.device import Board
    from kvmpy.memory import GuestMemory

__all__ = ["Vsock"]

_RECEIVE, _TRANSMIT, _EVENTS = 0, 1, 2  # section 5.10.2
_ENTRIES = 128
_MOST_REPLIES = 256
"""Packets that wait for buffers of the guest, before nothing more is taken from it."""
_PIECE = 0x1_0000
"""Bytes of one packet to the guest."""
_IN_A_ROW = 8
"""Packets of one connection, before others have their turn."""
_REQUEST, _RESPONSE, _RST, _SHUTDOWN, _RW, _CREDIT_UPDATE, _CREDIT_REQUEST = (
    int(operation) for operation in VsockOperation if operation
)


class Vsock(VirtioDevice):
    """Sockets of the family AF_VSOCK in the guest, whose address is `cid`; that of the host is 2.

    In Python: `connect(port)` answers a socket that is connected to a program in the guest; `listen(port)` takes
    the connections that the guest makes to (2, port).

    For other programs, with `uds_path`: who connects to the UNIX socket there and says "CONNECT 1234\\n" is
    connected to port 1234 of the guest, and hears "OK ..." when that is done. A connection of the guest to (2, 1234)
    goes to the UNIX socket that listens at `uds_path` with "_1234" behind it. So do Firecracker and Cloud Hypervisor.

    Nothing is lost on the way, nothing blocks, and no more than 256 KiB of a connection wait in the device. After a
    restore all connections are gone, and the guest is told.

    Raises UsageError for a CID that no guest can have, or when `uds_path` is there already.
    """

    name = "virtio-vsock"
    device_id = 19
    queue_sizes = (_ENTRIES, _ENTRIES, 16)
    features = frozenset({int(VsockFeature.STREAM)})

    def __init__(self, cid: int = 3, uds_path: str | os.PathLike[str] | None = None) -> None:
        # 5.10.4: 0, 1, 2 and 0xFFFFFFFF are reserved, and so are the upper 32 bits.
        if not HOST_CID < cid < 0xFFFF_FFFF:
            raise UsageError(f"the CID of a guest is from 3 to 0xFFFFFFFE, not {cid!r}")
        super().__init__()
        self.cid = cid
        self.config: VsockConfig = VsockConfig(cid)
        self._sockets = WatchedSockets(self.lock)
        self._streams = VsockStreams(self, self._sockets)
        self._listeners: dict[int, VsockListener] = {}
        self._replies: deque[bytes] = deque()  # packets without data, for the guest
        self._transmit_waits = False  # the guest's packets do, for room in `_replies`
        self._reset_to_tell = False
        self._closed = False
        self._door: UnixDoor | None = None
        try:
            if uds_path is not None:
                self._door = UnixDoor(os.fspath(uds_path), self._sockets, self._unix_connects)
        except BaseException:
            self._sockets.close()
            raise

    # --- for programs in Python -------------------------------------------------------------------------------------

    def connect(self, port: int, timeout: float | None = 5.0) -> socket.socket:
        """Connect to a port of the guest.

        Raises ConnectionRefusedError when no program listens there, or no driver runs; TimeoutError.
        """
        if not 0 <= port <= 0xFFFF_FFFF:
            raise UsageError(f"a vsock port has 32 bits, not {port!r}")
        answers: list[bool] = []
        answered = threading.Event()

        def answer(accepted: bool) -> None:
            answers.append(accepted)
            answered.set()

        ours, theirs = socket.socketpair()
        try:
            with self.lock:
                connection = self._begin(ours, port, answer)
            if connection is not None and not answered.wait(timeout):
                with self.lock:
                    if not answers:  # it may have been answered just now
                        self._streams.reset(connection)
                        self.deliver()
                        raise TimeoutError(f"the guest has not answered at vsock port {port} within {timeout} s")
            if True not in answers:
                why = "nobody listens there" if connection is not None else "no driver runs"
                raise ConnectionRefusedError(f"vsock port {port} of the guest: {why}")
        except BaseException:
            theirs.close()
            raise
        return theirs

    def listen(self, port: int, backlog: int = 16) -> VsockListener:
        """Take the connections that the guest makes to this port of the host, instead of the UNIX socket for it.

        Raises UsageError when somebody does so already.
        """
        if not 0 <= port < 0xFFFF_FFFF:
            raise UsageError(f"a vsock port has 32 bits, not {port!r}")
        with self.lock:
            if port in self._listeners:
                raise UsageError(f"somebody listens at vsock port {port} already")
            listener = self._listeners[port] = VsockListener(self, port, backlog)
            return listener

    def forget_listener(self, listener: VsockListener) -> None:
        """It is closed."""
        with self.lock:
            if self._listeners.get(listener.port) is listener:
                del self._listeners[listener.port]

    @property
    def connections(self) -> int:
        """How many there are."""
        return len(self._streams)

    # --- connections that the host begins ---------------------------------------------------------------------------

    def _unix_connects(self, sock: socket.socket, port: int) -> None:
        """Somebody has said CONNECT."""

        def answer(accepted: bool) -> None:
            if accepted:
                with contextlib.suppress(OSError):  # gone: the next read tells
                    sock.send(b"OK %d\n" % host_port)

        connection = self._begin(sock, port, answer)
        host_port = 0 if connection is None else connection.host_port

    def _begin(self, sock: socket.socket, port: int, answer: Callable[[bool], object]) -> VsockConnection | None:
        """Ask the guest for a connection. None, and the socket is closed: that cannot be."""
        if not self.notifies or self._streams.full or len(self._replies) >= _MOST_REPLIES:
            sock.close()
            return None
        connection = self._streams.begin(sock, port, answer)
        self.tell(connection, _REQUEST)
        self.deliver()
        return connection

    # --- to the guest -----------------------------------------------------------------------------------------------

    def _packet(self, connection: VsockConnection, operation: int, length: int = 0, flags: int = 0) -> bytes:
        connection.credit_told()
        return HEADER.pack(
            HOST_CID, self.cid, connection.host_port, connection.guest_port, length, VsockType.STREAM, operation,
            flags, BUFFER, connection.forwarded,
        )  # fmt: skip

    def tell(self, connection: VsockConnection, operation: int, flags: int = 0) -> None:
        self._replies.append(self._packet(connection, operation, 0, flags))

    def _refuse(self, key: Key, kind: int = VsockType.STREAM) -> None:
        """5.10.6.4: an RST for what belongs to no connection."""
        self._replies.append(HEADER.pack(HOST_CID, self.cid, *key, 0, kind, _RST, 0, 0, 0))

    def deliver(self) -> None:
        """Give the guest what there is for it, as far as it has made buffers available."""
        queue, readable = self.queues[_RECEIVE], self._streams.readable
        with queue.batch():
            for _ in range(BATCH):
                if self._replies:
                    chain = queue.take()
                    if chain is None:
                        return
                    if chain.write(self._replies.popleft()) < HEADER.size:
                        self.counters["no_room"] += 1
                    chain.complete()
                elif readable:
                    connection = next(iter(readable))
                    if not self._send_to_guest(connection, queue):
                        return
                    if readable.pop(connection, 0) is None:  # it has more, but others have their turn
                        readable[connection] = None
                else:
                    return
        self.transport.process_later(queue)

    def _send_to_guest(self, connection: VsockConnection, queue: Virtqueue) -> bool:
        """Read from the host's end into buffers of the guest. False: there are none."""
        sock = connection.socket
        for _ in range(_IN_A_ROW):
            length = min(connection.credit, _PIECE)
            if sock is None or not (length and connection.guest_receives):
                del self._streams.readable[connection]
                if connection.guest_receives and not connection.credit_asked:
                    connection.credit_asked = True
                    self.tell(connection, _CREDIT_REQUEST)
                break
            chain = queue.take()
            if chain is None:
                return False
            header = chain.take_writable(HEADER.size)
            views = chain.take_writable(length)[:1024]
            if not views:
                self.counters["no_room"] += 1
                chain.complete(0)
                continue
            try:
                length = sock.recvmsg_into(views)[0]
            except BlockingIOError:
                queue.put_back(chain)
                del self._streams.readable[connection]
                break
            except OSError:
                queue.put_back(chain)
                self._streams.reset(connection)
                return True
            if not length:
                queue.put_back(chain)
                del self._streams.readable[connection]
                self._streams.host_has_finished(connection)
                return True
            packet = self._packet(connection, _RW, length)
            for view in header:
                view[:], packet = packet[: len(view)], packet[len(view) :]
            chain.complete(HEADER.size + length)
            connection.sent(length)
        self._streams.watch(connection)
        return True

    # --- from the guest ---------------------------------------------------------------------------------------------

    def notified(self, queue: Virtqueue) -> None:
        if queue.index == _EVENTS:
            self._tell_of_reset()
            return
        if queue.index == _TRANSMIT:
            self._transmit()
        self.deliver()
        if self._transmit_waits and len(self._replies) < _MOST_REPLIES:
            self._transmit()
            self.deliver()
            if self._transmit_waits and len(self._replies) < _MOST_REPLIES:
                self.transport.process_later(self.queues[_TRANSMIT])

    def _transmit(self) -> None:
        """Take packets of the guest, but not those whose answers would wait for buffers that it does not make
        available (5.10.6.1.1: that must not lead to a deadlock, and here it costs no memory without end)."""
        queue = self.queues[_TRANSMIT]
        with queue.batch():
            for _ in range(BATCH):
                self._transmit_waits = len(self._replies) >= _MOST_REPLIES
                chain = None if self._transmit_waits else queue.take()
                if chain is None:
                    return
                self.handle(queue, chain)
        self.transport.process_later(queue)

    def handle(self, queue: Virtqueue, chain: Chain) -> None:
        header = chain.read(HEADER.size)
        if len(header) < HEADER.size:
            self.counters["short_packet"] += 1
        else:
            self._take_packet(chain, *HEADER.unpack(header))
        chain.complete(0)

    def _take_packet(
        self, chain: Chain, source: int, target: int, guest_port: int, host_port: int, length: int, kind: int,
        operation: int, flags: int, buffer: int, forwarded: int,
    ) -> None:  # fmt: skip
        if source != self.cid or target != HOST_CID:  # 5.10.6.4.1: from nobody else, and there is nobody else to reach
            self.counters["wrong_cid"] += 1
            return
        key = (host_port, guest_port)
        if kind != VsockType.STREAM:
            self.counters["unknown_type"] += 1
            if operation != _RST:
                self._refuse(key, kind)
            return
        connection = self._streams.get(key)
        if connection is None:
            if operation == _REQUEST:
                self._accept(key, buffer, forwarded)
            elif operation != _RST:
                self._refuse(key)
            return
        connection.peer_says(buffer, forwarded)
        if operation == _RW:
            wrong = self._streams.take_data(connection, chain, length)
            if wrong is not None:
                self.counters[wrong] += 1
        elif operation == _RESPONSE and not connection.established:
            connection.established = True
            answered, connection.answered = connection.answered, None
            if answered is not None:
                answered(True)
        elif operation == _RST:
            self._streams.drop(connection)
        elif operation == _SHUTDOWN and connection.established:
            self._streams.guest_shuts_down(connection, flags)
        elif operation == _CREDIT_REQUEST:
            self.tell(connection, _CREDIT_UPDATE)
        elif operation != _CREDIT_UPDATE:
            self.counters["bad_operation"] += 1
            self._streams.reset(connection)
        self._streams.watch(connection)

    def _accept(self, key: Key, buffer: int, forwarded: int) -> None:
        """The guest connects to a port of the host."""
        sock = None
        if not self._streams.full:
            listener = self._listeners.get(key[0])
            if listener is not None:
                sock = listener.offer((self.cid, key[1]))
            elif self._door is not None:
                sock = self._door.dial(key[0])
        if sock is None:
            self._refuse(key)
            return
        connection = self._streams.add(sock, key)
        connection.peer_says(buffer, forwarded)
        self.tell(connection, _RESPONSE)
        self._streams.watch(connection)

    # --- life -------------------------------------------------------------------------------------------------------

    def attach(self, board: Board, memory: GuestMemory) -> None:
        super().attach(board, memory)
        board.listen(self._sockets)

    def _tell_of_reset(self) -> None:
        """5.10.6.7: after a restore, as soon as there is a buffer for the event."""
        queue = self.queues[_EVENTS]
        if not self._reset_to_tell:
            return
        with queue.batch():
            chain = queue.take()
            if chain is not None:
                chain.write(EVENT.pack(TRANSPORT_RESET))
                chain.complete()
                self._reset_to_tell = False

    def _forget_all(self) -> None:
        self._streams.clear()
        self._replies.clear()
        self._transmit_waits = False

    def stopped(self) -> None:
        self._forget_all()
        self._reset_to_tell = False

    def device_state(self) -> dict[str, Any]:
        return {"next_port": self._streams.next_port}

    def restore_device_state(self, state: dict[str, Any]) -> None:
        self._forget_all()
        self._streams.next_port = state["next_port"]
        self.cid = int(self.config.guest_cid)
        self._reset_to_tell = True

    def close(self) -> None:
        """End all connections, and remove the UNIX socket."""
        with self.lock:
            self._forget_all()
            listeners = list(self._listeners.values())
            door, self._door = self._door, None
            if door is not None:
                door.close()
            if self.board is not None and not self._closed:
                self.board.forget(self._sockets)
            self._closed = True
            self._sockets.close()
        for listener in listeners:
            listener.close()
