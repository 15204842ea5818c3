"""All streams of a vsock device: what happens at their sockets of the host, and what the guest does to them."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Callable
from functools import partial
from typing import Protocol

from kvmpy.virtio.chain import Chain
from kvmpy.virtio.vsock.connection import VsockConnection
from kvmpy.virtio.vsock.format import SHUT_BOTH, VsockOperation, VsockShutdown
from kvmpy.virtio.vsock.watched_sockets import WatchedSockets

__all__ = ["Key", "VsockStreams"]

MOST_CONNECTIONS = 512
_FIRST_PORT = 1 << 30
"""Ports of the host's ends that are nobody's service."""
_RST, _SHUTDOWN, _CREDIT_UPDATE = VsockOperation.RST, VsockOperation.SHUTDOWN, VsockOperation.CREDIT_UPDATE

Key = tuple[int, int]
"""Port of the host, port of the guest."""


class ToGuest(Protocol):
    """The device: what streams have to say to the guest."""

    def tell(self, connection: VsockConnection, operation: int, flags: int = 0) -> None: ...
    def deliver(self) -> None: ...


class VsockStreams:
    """The connections of a device, by their ports. The device's lock is held in all that is done here."""

    def __init__(self, device: ToGuest, sockets: WatchedSockets) -> None:
        self._device = device
        self._sockets = sockets
        self._connections: dict[Key, VsockConnection] = {}
        self.readable: dict[VsockConnection, None] = {}
        """Those with data for the guest, whose turn is to come."""
        self.next_port = _FIRST_PORT

    def __len__(self) -> int:
        return len(self._connections)

    @property
    def full(self) -> bool:
        """Whether there are as many as there may be."""
        return len(self._connections) >= MOST_CONNECTIONS

    def get(self, key: Key) -> VsockConnection | None:
        """The connection of these ports."""
        return self._connections.get(key)

    def add(self, sock: socket.socket, key: Key) -> VsockConnection:
        """A connection that the guest has begun."""
        sock.setblocking(False)
        connection = self._connections[key] = VsockConnection(sock, *key)
        return connection

    def begin(self, sock: socket.socket, port: int, answered: Callable[[bool], object]) -> VsockConnection:
        """A connection of the host to a port of the guest, which is to be asked."""
        sock.setblocking(False)
        while (self.next_port, port) in self._connections:
            self._advance()
        connection = VsockConnection(sock, self.next_port, port, answered)
        self._connections[self.next_port, port] = connection
        self._advance()
        self.watch(connection)
        return connection

    def _advance(self) -> None:
        self.next_port = self.next_port + 1 if self.next_port < 0xFFFF_FFFE else _FIRST_PORT

    # --- what happens to sockets of the host ------------------------------------------------------------------------

    def watch(self, connection: VsockConnection) -> None:
        """Wait for what can be done now: a socket that is ready for what cannot would keep the thread awake."""
        sock = connection.socket
        if sock is None:
            return
        mask = select.EPOLLOUT if connection.unsent else 0
        reads = connection.established and connection.host_sends and connection.guest_receives
        if reads and connection.credit and connection not in self.readable:
            mask |= select.EPOLLIN
        # The end of both directions cannot be masked out. It is waited for where nothing else tells of it.
        if mask or not connection.established or not connection.host_sends:
            self._sockets.watch(sock.fileno(), mask, partial(self._socket_ready, connection))
        else:
            self._sockets.forget(sock.fileno())

    def _socket_ready(self, connection: VsockConnection, events: int) -> None:
        if events & (select.EPOLLHUP | select.EPOLLERR) and not (connection.established and connection.host_sends):
            if connection.established:
                self._host_is_gone(connection)
            else:
                self.reset(connection)
            self._device.deliver()
            return
        if events & (select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR) and connection.unsent:
            self._flush(connection)
        if connection.socket is not None and connection.host_sends and events & (select.EPOLLIN | select.EPOLLHUP):
            self.readable[connection] = None
        self.watch(connection)
        self._device.deliver()

    def _flush(self, connection: VsockConnection) -> None:
        """The host's end has room for more of what the guest has sent."""
        try:
            connection.flush()
        except OSError:
            self.host_receives_no_more(connection)
        self.after_sending(connection)

    def after_sending(self, connection: VsockConnection) -> None:
        """Something went to the host's end: tell the guest, and end what the guest has ended."""
        if connection.has_news:
            self._device.tell(connection, _CREDIT_UPDATE)
        if connection.guest_sends or connection.unsent or connection.socket is None:
            return
        if not connection.guest_receives:
            self.reset(connection)  # 5.10.6.5: how a disconnect ends
        else:
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_WR)

    def host_receives_no_more(self, connection: VsockConnection) -> None:
        """Writing to the host's end fails. What it has sent still goes to the guest."""
        connection.discard()
        self._device.tell(connection, _SHUTDOWN, VsockShutdown.RECEIVE)

    def host_has_finished(self, connection: VsockConnection) -> None:
        """The host's end was read to its end."""
        assert connection.socket is not None
        connection.host_sends = False
        poll = select.poll()
        poll.register(connection.socket, 0)
        if any(events & select.POLLHUP for _, events in poll.poll(0)):
            self._host_is_gone(connection)
        else:
            self._device.tell(connection, _SHUTDOWN, VsockShutdown.SEND)
            self.watch(connection)

    def _host_is_gone(self, connection: VsockConnection) -> None:
        """Nobody reads or writes at the host's end any more. The guest answers with RST when it has read all."""
        self._close_socket(connection)
        self._device.tell(connection, _SHUTDOWN, SHUT_BOTH)

    def _close_socket(self, connection: VsockConnection) -> None:
        sock, connection.socket = connection.socket, None
        self.readable.pop(connection, None)
        if sock is not None:
            self._sockets.forget(sock.fileno())
            sock.close()

    def drop(self, connection: VsockConnection) -> None:
        """It is over, and both sides know."""
        self._connections.pop((connection.host_port, connection.guest_port), None)
        self._close_socket(connection)
        answered, connection.answered = connection.answered, None
        if answered is not None and not connection.established:
            answered(False)

    def reset(self, connection: VsockConnection) -> None:
        """It is over, and the guest is told."""
        if self._connections.get((connection.host_port, connection.guest_port)) is connection:
            self._device.tell(connection, _RST)
            self.drop(connection)

    # --- what the guest does ----------------------------------------------------------------------------------------

    def take_data(self, connection: VsockConnection, chain: Chain, length: int) -> str | None:
        """An RW packet with `length` bytes. Answers what is wrong with it, by a short name."""
        wrong = None
        if not connection.established or not connection.guest_sends or length > chain.readable_left:
            wrong = "bad_packet"
        elif connection.socket is not None:
            try:
                if not connection.receive(chain.take_readable(length), length):
                    wrong = "credit_exceeded"
            except OSError:
                self.host_receives_no_more(connection)
        if wrong is not None or connection.socket is None:  # it is closed, but the guest has not heard of it yet
            self.reset(connection)
        else:
            self.after_sending(connection)
        return wrong

    def guest_shuts_down(self, connection: VsockConnection, flags: int) -> None:
        """5.10.6.5: what the guest will do no more, it never does again."""
        if flags & VsockShutdown.RECEIVE:
            connection.guest_receives = False
            self.readable.pop(connection, None)
        if flags & VsockShutdown.SEND:
            connection.guest_sends = False
        if connection.socket is None:
            if flags & SHUT_BOTH == SHUT_BOTH:
                self.reset(connection)
        elif not connection.guest_sends:
            self.after_sending(connection)
        elif not connection.guest_receives:
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_RD)

    def clear(self) -> None:
        """All are gone, and the guest is not told."""
        for connection in list(self._connections.values()):
            self.drop(connection)
