"""Frames over a socket that keeps messages apart: one message is one frame, such as between two machines."""

from __future__ import annotations

import errno
import socket
from collections import deque

from kvmpy.errors import UsageError
from kvmpy.virtio.net.backend import DescriptorBackend
from kvmpy.virtio.net.format import LONGEST_FRAME

__all__ = ["DatagramSocket", "datagram_pair"]

_MOST_UNSENT = 1 << 20
"""Bytes that wait for room in the socket's buffer. What comes when there are so many is lost, as in a switch."""
_SOCKET_BUFFER = 1 << 20
"""Bytes that are asked for; the host may give less (net.core.wmem_max)."""
_MOST_VIEWS = 1000


class DatagramSocket(DescriptorBackend):
    """The other end of `sock`, which is connected: SOCK_SEQPACKET or SOCK_DGRAM, of AF_UNIX, or UDP.

    A SOCK_SEQPACKET socket knows when the other end is closed. A SOCK_DGRAM socket of AF_UNIX learns it when it sends,
    and UDP never. The socket becomes the device's, which closes it.
    """

    name = "datagram socket"

    def __init__(self, sock: socket.socket) -> None:
        if sock.type not in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
            raise UsageError(f"DatagramSocket() takes a socket that keeps messages apart, not a {sock.type.name}")
        sock.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)
        self._socket = sock
        self._knows_the_end = sock.type == socket.SOCK_SEQPACKET
        self._is_local = sock.family == socket.AF_UNIX
        self._unsent: deque[bytes] = deque()
        self._unsent_bytes = 0
        self._buffer = memoryview(bytearray(LONGEST_FRAME + 1))
        super().__init__(sock.fileno())

    def receive(self) -> memoryview | None:
        if not self.connected:
            return None
        try:
            length = self._socket.recv_into(self._buffer)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            self._error(error)
            return None
        if not length and self._knows_the_end:
            self._lost("peer_closed")
            return None
        if length > LONGEST_FRAME:  # cut off
            self.counters["giant_frame"] += 1
            return self._buffer[:0]
        return self._buffer[:length]

    def send(self, views: list[memoryview]) -> bool:
        if not self.connected:
            self.counters["link_down"] += 1
            return False
        if not self._unsent:
            if len(views) > _MOST_VIEWS:
                views = [memoryview(b"".join(views))]
            try:
                self._socket.sendmsg(views, (), socket.MSG_NOSIGNAL)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EINTR):
                    self._error(error)
                    return False
            else:
                return True
        frame = b"".join(views)
        if self._unsent_bytes + len(frame) > _MOST_UNSENT:
            self.counters["send_queue_full"] += 1
            return False
        self._unsent.append(frame)
        self._unsent_bytes += len(frame)
        self._watch()
        return True

    def _waits_for_room(self) -> bool:
        return bool(self._unsent)

    def flush(self) -> None:
        while self._unsent and self.connected:
            try:
                self._socket.send(self._unsent[0], socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                self._error(error)
                if not self.connected:
                    return
            self._unsent_bytes -= len(self._unsent.popleft())
        self._watch()

    def _error(self, error: OSError) -> None:
        gone = (errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN)
        if self._is_local and error.errno in gone:
            self._lost("peer_closed")
        else:  # UDP: nobody is there now; or one frame that does not fit
            self._failed(error)

    def _lost(self, cause: str) -> None:
        if self._unsent:
            self.counters["unsent_frame"] += len(self._unsent)
            self._unsent.clear()
            self._unsent_bytes = 0
        super()._lost(cause)

    def close(self) -> None:
        super().close()
        self._socket.close()


def datagram_pair() -> tuple[DatagramSocket, DatagramSocket]:
    """A cable between two network devices, of this machine or of two. Closing one takes the other's link down."""
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return DatagramSocket(first), DatagramSocket(second)
