"""Frames over a stream socket, as passt and QEMU (`-netdev stream`) speak: a length of 4 bytes, highest first, and the
frame."""

from __future__ import annotations

import contextlib
import errno
import socket

from kvmpy.errors import UsageError
from kvmpy.virtio.net.backend import DescriptorBackend
from kvmpy.virtio.net.format import LONGEST_FRAME

__all__ = ["StreamSocket"]

_LENGTH = 4
_BUFFER = 4 * (LONGEST_FRAME + _LENGTH)
_MOST_VIEWS = 1000
"""Of one sendmsg(2): the kernel takes 1024 (IOV_MAX)."""


class StreamSocket(DescriptorBackend):
    """The other end of `sock`, a connected stream socket, or of the UNIX socket that listens at the path `sock`.

    Nothing is lost on the way: while the other end does not read, what the guest wants to send stays in its queue, and
    while the guest has no buffers, nothing is read. A length that no frame has ends the connection, because where the
    next one begins is not known any more.

    The socket becomes the device's, which closes it. Raises OSError where no one listens.
    """

    name = "stream socket"

    def __init__(self, sock: socket.socket | str) -> None:
        if isinstance(sock, str):
            path, sock = sock, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(path)
            except OSError as error:
                sock.close()
                raise OSError(error.errno, error.strerror, path) from None
        if sock.type != socket.SOCK_STREAM:
            raise UsageError(f"StreamSocket() takes a stream socket; for {sock.type.name} there is DatagramSocket()")
        sock.setblocking(False)
        self._socket = sock
        self._unsent = memoryview(b"")
        self._buffer = memoryview(bytearray(_BUFFER))
        self._begin = self._end = 0  # of what was read and not given out
        super().__init__(sock.fileno())

    # --- receiving --------------------------------------------------------------------------------------------------

    def receive(self) -> memoryview | None:
        while self.connected:
            begin, have = self._begin, self._end - self._begin
            if have >= _LENGTH:
                length = int.from_bytes(self._buffer[begin : begin + _LENGTH], "big")
                if length > LONGEST_FRAME:
                    self._lost("bad_stream_length")
                    return None
                if have >= _LENGTH + length:
                    self._begin = begin + _LENGTH + length
                    return self._buffer[begin + _LENGTH : self._begin]
            if not self._read():
                return None
        return None

    def _read(self) -> bool:
        """Read what is there. False: nothing."""
        if self._begin:  # the beginning of a frame, or nothing
            have = self._end - self._begin
            self._buffer[:have] = self._buffer[self._begin : self._end]
            self._begin, self._end = 0, have
        try:
            length = self._socket.recv_into(self._buffer[self._end :])
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            self._lost("peer_closed")
            return False
        if not length:
            self._lost("peer_closed")
            return False
        self._end += length
        return True

    # --- sending ----------------------------------------------------------------------------------------------------

    def send(self, views: list[memoryview]) -> bool:
        if not self.connected or self._unsent:
            self.counters["send_queue_full" if self.connected else "link_down"] += 1
            return False
        if len(views) > _MOST_VIEWS:
            views = [memoryview(b"".join(views))]
        length = sum(map(len, views))
        parts: list[bytes | memoryview] = [length.to_bytes(_LENGTH, "big"), *views]
        try:
            sent = self._socket.sendmsg(parts, (), socket.MSG_NOSIGNAL)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EINTR, errno.ENOBUFS):
                self._lost("peer_closed")
                return False
            sent = 0
        if sent < _LENGTH + length:
            # A copy: the guest has its buffers back before the rest is sent.
            self._unsent = memoryview(b"".join(parts))[sent:]
            self._watch()
        return True

    @property
    def full(self) -> bool:
        return bool(self._unsent)

    def _waits_for_room(self) -> bool:
        return bool(self._unsent)

    def flush(self) -> None:
        if not self._unsent or not self.connected:
            return
        try:
            sent = self._socket.send(self._unsent, socket.MSG_NOSIGNAL)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._lost("peer_closed")
            return
        self._unsent = self._unsent[sent:]
        self._watch()

    def _lost(self, cause: str) -> None:
        if self._unsent:
            self.counters["unsent_frame"] += 1
            self._unsent = memoryview(b"")
        super()._lost(cause)
        with contextlib.suppress(OSError):  # the other end may wait for us
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        super().close()
        self._socket.close()
